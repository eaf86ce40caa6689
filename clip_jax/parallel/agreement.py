"""What the processes of a run must agree on, asked over their devices: of one process alone nothing is asked."""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.errors import UsageError


def everyone(mine):
  """Whether something holds on every process; all must ask at the same time.

  Args:
    mine: whether it holds here.
  """
  if jax.process_count() == 1:
    return bool(mine)
  return bool(np.all(multihost_utils.process_allgather(np.array(bool(mine)))))


def of_first(make):
  """What the first process finds, on all of them; all must ask at the same time.

  Files that one process has just written, others may not see yet: what they do together must not depend on it.

  Args:
    make: a function without arguments, called on the first process alone, that returns something ready for JSON.
  """
  if jax.process_count() == 1:
    return make()
  return json.loads(_gathered(json.dumps(make() if jax.process_index() == 0 else None))[0])


def require_same(find):
  """Checks that all processes hold the same to be true; all must ask at the same time.

  Args:
    find: a function without arguments that returns a dict of what something is called to its value, ready for JSON. One process
      alone need not find out.

  Raises:
    UsageError: they do not; the message names the first difference, and who has which value. It is raised on every process.
  """
  if jax.process_count() == 1:
    return
  everybody = [json.loads(text) for text in _gathered(json.dumps(find(), sort_keys=True))]
  names = dict.fromkeys(name for theirs in everybody for name in theirs)
  for name in names:
    values = [theirs.get(name) for theirs in everybody]
    if any(value != values[0] for value in values):
      other = next(i for i, value in enumerate(values) if value != values[0])
      raise UsageError(
        f"The processes of this run do not agree: {name} is {values[0]!r} on process 0, and {values[other]!r} on process {other} "
        f"of {len(values)}. All must run the same code and config on the same data."
      )


def _gathered(text):
  mine = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(mine), np.int32))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(mine)] = mine
  rows = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
