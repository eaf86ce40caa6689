"""`main.py`, with a line written down for each example that is loaded: its position and what it was."""

import hashlib
import json
import os
import sys

from clip_jax.data import pipeline

load = pipeline.Loader.__call__


def observed(self, positions, out):
  """Loads, and says what was loaded."""
  load(self, positions, out)
  with open(os.environ["EXAMPLES_LOG"], "a", encoding="utf-8") as file:
    for position, pixels, tokens in zip(positions, out["images"], out["tokens"], strict=True):
      digest = hashlib.sha256(pixels.tobytes() + tokens.tobytes()).hexdigest()[:16]
      file.write(json.dumps([int(position), pixels[8, 8].tolist(), digest]) + "\n")


pipeline.Loader.__call__ = observed

if __name__ == "__main__":
  import main

  sys.exit(main.main(sys.argv))
