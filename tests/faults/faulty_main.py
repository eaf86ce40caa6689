"""`main.py` where something goes wrong inside of the process, as environment variables say.

SLOW=SECONDS        each part of a batch takes that much longer to load: there is time to do something to the run
POISON=WORD         the loss of a batch that has the word in a caption is not a number
SPIKE=WORD          the loss of a batch that has it is a hundred times what it should be
LAST=SECONDS        waits that long before each new attempt to save at the end of the run
CLOCK=STEP:SECONDS  from that batch on, the clock on the wall is that much off; several are separated by commas
"""

import os
import sys
import time

import jax.numpy as jnp

from clip_jax.data import pipeline
from clip_jax.data.tokenizer import ClipTokenizer
from clip_jax.train import hooks
from clip_jax.train import step as steps

load, loss_with, wall_clock = pipeline.Loader.__call__, steps.loss_with, time.time
off = [0.0]


def slow(self, positions, out):
  """Loads late, and turns the clock."""
  time.sleep(float(os.environ.get("SLOW", 0)))
  for change in filter(None, os.environ.get("CLOCK", "").split(",")):
    step, seconds = change.split(":")
    if positions[0] // 16 == int(step):
      off[0] = float(seconds)
  load(self, positions, out)


def has(word, tokens):
  """Whether a batch has a word in a caption."""
  return jnp.any(tokens == int(ClipTokenizer(12)([word])[0, 1]))


def bad_loss_with(config, mesh):
  """The loss, or what the environment makes of it."""
  loss_of = loss_with(config, mesh)

  def loss(params, embeddings, batch):
    value = loss_of(params, embeddings, batch)
    if "POISON" in os.environ:
      value *= jnp.where(has(os.environ["POISON"], batch["tokens"]), jnp.nan, 1.0)
    if "SPIKE" in os.environ:
      value *= jnp.where(has(os.environ["SPIKE"], batch["tokens"]), 100.0, 1.0)
    return value

  return loss


if "LAST" in os.environ:
  hooks.Save.LAST = len(hooks.Save.LAST) * (float(os.environ["LAST"]),)
pipeline.Loader.__call__ = slow
steps.loss_with = bad_loss_with
time.time = lambda: wall_clock() + off[0]

if __name__ == "__main__":
  import main

  sys.exit(main.main(sys.argv))
