"""Where lines of progress go."""

import sys


def tell(line):
  """Prints a line for people, who may wait: to standard error, as standard output is for results."""
  print(line, file=sys.stderr, flush=True)
