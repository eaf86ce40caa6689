"""`python -m clip_jax.cli`."""

import sys

from clip_jax.cli import main

if __name__ == "__main__":  # processes that are started for the work import this module, too
  sys.exit(main())
