"""Parameters to tensors of another layout and back, one at a time.

The tables in `layouts/` say what goes where. A parameter without a row, a tensor that nothing takes, or one of another shape
is an error that names it: nothing is left out in silence.
"""

import re

import flax
import flax.linen as nn
import jax
import numpy as np

from clip_jax.errors import UsageError
from clip_jax.models.clip import initial_params

LISTED = 8  # names in a message


def shapes_of(model):
  """The parameters of a model.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Returns:
    A dict of paths ("image/projection") and `jax.ShapeDtypeStruct`s.
  """
  boxed = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
  return flax.traverse_util.flatten_dict(nn.unbox(boxed), sep="/")


def rows_of(rows, names):
  """The rows of a layout's table for given parameters, with the numbers of blocks filled in.

  Args:
    rows: a table of `layouts/`.
    names: paths of parameters.

  Returns:
    A dict of paths and `Row`s, and the list of paths that the layout has no place for.
  """
  table = {row.ours: row for row in rows}
  found, homeless = {}, []
  for name in names:
    number = re.search(r"block_(\d+)", name)
    row = table.get(re.sub(r"block_\d+", "block_{i}", name))
    if row is None:
      homeless.append(name)
    else:
      theirs = [their.replace("{i}", number.group(1)) if number else their for their in row.theirs]
      found[name] = row._replace(ours=name, theirs=theirs)
  return found, homeless


def described(row, shape, dtype):
  """Names, shapes and types of the tensors that a parameter becomes, without its numbers."""
  empty = np.broadcast_to(np.zeros((), dtype), shape)
  return {name: (part.shape, part.dtype) for name, part in zip(row.theirs, row.how.to(empty), strict=True)}


def check(rows, shapes, given, ignored, where):
  """Checks that a file holds the tensors of a model, all of them and no others.

  Args:
    rows: a table of `layouts/`.
    shapes: of the model's parameters, as `shapes_of` gives.
    given: a dict of the names and shapes of the tensors in the file.
    ignored: regular expressions of names that may be there and are not read.
    where: the file, for messages.

  Returns:
    The dict of paths and `Row`s.

  Raises:
    UsageError: tensors are missing, left over or of another shape; the message names them.
  """
  found, homeless = rows_of(rows, shapes)
  if homeless:
    raise UsageError(f"{where}: this layout has no place for {listed(homeless)}.")
  wanted = {}
  for name, row in found.items():
    wanted |= described(row, shapes[name].shape, np.float32)
  left = [name for name in given if name not in wanted and not any(re.search(p, name) for p in ignored)]
  missing = [name for name in wanted if name not in given]
  # A scalar is [] in one release of a library and [1] in another.
  wrong = [
    f"{name} is {list(given[name])} instead of {list(shape)}"
    for name, (shape, _) in wanted.items()
    if name in given and tuple(given[name]) != tuple(shape) and not np.prod(given[name]) == np.prod(shape) == 1
  ]
  problems = [
    f"{len(names):,} {what}: {listed(names)}"
    for what, names in (("missing", missing), ("not known", left), ("of another shape", wrong))
    if names
  ]
  if problems:
    raise UsageError(f"{where} does not hold the tensors of this model: {'; '.join(problems)}.")
  return found


def listed(names):
  """Some names for a message, and how many more there are."""
  shown = ", ".join(names[:LISTED])
  return shown + (f" and {len(names) - LISTED:,} more" if len(names) > LISTED else "")


def check_finite(name, array, where):
  """Raises a `UsageError` if an array holds anything that is not a number."""
  if not np.isfinite(array).all():
    raise UsageError(f"{where}: {name} holds values that are not finite numbers.")
