"""Checkpoints of this project: the card that says what model the weights are of, and the weights, one by one.

A checkpoint is an Orbax folder with the items `card` (JSON), `state` (with `params` in it and, in runs that keep a moving
average of them, `ema`, which is what is read) and, where the tokenizer is not CLIP's own, `tokenizer` (JSON that holds the file).
"""

import itertools
import json
import logging
import math
from pathlib import Path

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp

import clip_jax
from clip_jax import config as configs
from clip_jax import files
from clip_jax.data.tokenizer_files import FileTokenizer
from clip_jax.errors import DataError, UsageError
from clip_jax.parallel import digest

# Number of the layout of a checkpoint; a reader refuses one that it does not know. 2 added digests to the card, and to the state of a
# run how many steps were skipped.
FORMAT = 2
READABLE = (1, 2)
# What is read or written at a time, unless one parameter is larger: fewer calls, in memory that does not matter.
CHUNK_BYTES = 64 * 2**20

# Orbax logs each internal step, and of a failure every task that it takes along; what matters to a person is said by the caller.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def card(model, **values):
  """What is written beside the weights.

  Args:
    model: a resolved `clip_jax.config.Model`.
    **values: what else belongs to the checkpoint, ready for JSON.
  """
  return {"format": FORMAT, "clip_jax": clip_jax.__version__, **values, "model": configs.to_dict(model)}


def find(path):
  """The checkpoint that a path stands for.

  Args:
    path: a work directory, of which the newest checkpoint is taken, one `checkpoints/STEP` folder, or what
      `clip-jax import` wrote.

  Returns:
    A `Path` of one of the latter kinds, or None if there is no checkpoint.
  """
  steps = steps_of(path)
  folder = steps[-1] if steps else Path(path)
  return folder if (folder / "card").is_dir() else None


def steps_of(path):
  """The checkpoints of a work directory, in the order of their steps; none of another folder."""
  steps = [p for p in (Path(path) / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
  return sorted(steps, key=lambda p: int(p.name))


def read_card(folder):
  """What model a checkpoint holds.

  Args:
    folder: what `find` gave.

  Returns:
    A resolved `clip_jax.config.Model`, and its `FileTokenizer`, or None if it has CLIP's own.

  Raises:
    UsageError: there is no card, or a newer version wrote it.
  """
  written = read_json(folder, "card")
  model = configs.model_from_dict(written.get("model"))
  if model.tokenizer == "clip":
    return model, None
  return model, FileTokenizer.from_dict(read_json(folder, "tokenizer"))


def read_json(folder, item):
  """What an item of a checkpoint says.

  Args:
    folder: what `find` gave.
    item: "card" or "tokenizer".

  Raises:
    UsageError: it is not there, or a newer version wrote it.
  """
  path = Path(folder) / item / "metadata"
  try:
    written = files.read_json(path)
  except DataError as error:
    raise UsageError(f"{folder} is not a checkpoint of clip_jax: {path} cannot be read.") from error
  if item == "card" and written.get("format") not in READABLE:
    raise UsageError(f"{folder} has checkpoint format {written.get('format')}; this version reads formats 1 to {FORMAT}.")
  return written


class Params:
  """The weights of a checkpoint, read one by one, each whole whatever devices it was sharded over."""

  def __init__(self, folder, ema=None):
    """Reads what there is.

    Args:
      folder: what `find` gave.
      ema: whether they are the moving average of the parameters; None: if the run kept one.

    Raises:
      UsageError: the arrays cannot be read, or there is no moving average.
    """
    self._folder = Path(folder).absolute() / "state"
    self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    try:
      tree = self._checkpointer.metadata(self._folder).item_metadata.tree
      kept = "ema" in tree
      self._item = "ema" if kept and ema is not False else "params"
      tree = tree[self._item]
    except Exception as error:  # Orbax and TensorStore raise what they like
      raise UsageError(f"{folder} is not a whole checkpoint: its arrays cannot be read.") from error
    if ema and not kept:
      raise UsageError(f"{folder} holds no moving average of the weights; the run had no optimizer.ema_decay.")
    self._digests = read_json(folder, "card").get("digests", {})
    self._waiting = {}
    self._metadata = flax.traverse_util.flatten_dict(tree, sep="/")
    self.shapes = {
      name: jax.ShapeDtypeStruct(entry.shape, entry.dtype) for name, entry in self._metadata.items()
    }

  def read(self, name):
    """One parameter.

    Args:
      name: its path, such as "image/projection".

    Returns:
      A NumPy array.

    Raises:
      UsageError: it cannot be read.
    """
    if name not in self._waiting:
      self._waiting = self._restore(self._from(name))
    return self._waiting.pop(name)

  def _from(self, name):
    # A parameter and those after it, of which the next is mostly asked for next: Orbax parses all its metadata at each call.
    names, size = [], 0
    for following in itertools.dropwhile(lambda other: other != name, self.shapes):
      shape = self.shapes[following]
      size += math.prod(shape.shape) * shape.dtype.itemsize
      if names and size > CHUNK_BYTES:
        break
      names.append(following)
    return names

  def _restore(self, names):
    item = flax.traverse_util.unflatten_dict({f"{self._item}/{name}": self._metadata[name] for name in names}, sep="/")
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
    try:
      restored = self._checkpointer.restore(self._folder, args=args)[self._item]
    except Exception as error:
      raise UsageError(f"{self._folder}: {names[0]} cannot be read ({str(error).splitlines()[0]}).") from error
    arrays = {name: np.asarray(array) for name, array in flax.traverse_util.flatten_dict(restored, sep="/").items()}
    for name, array in arrays.items():
      written = self._digests.get(f"{self._item}/{name}")
      if written is not None and digest.of_array(array) != written:  # the first format has none
        raise UsageError(f"{self._folder}: {name} is not what was written: the checkpoint is damaged.")
    return arrays


def write(folder, model, tokenizer, params, **values):
  """Writes a checkpoint that holds parameters alone, a few at a time.

  Args:
    folder: where nothing is yet.
    model: a resolved `clip_jax.config.Model`.
    tokenizer: its `FileTokenizer`, or None if it has CLIP's own.
    params: an iterable of pairs of a path ("image/projection") and a NumPy array.
    **values: what else the card shall say.
  """
  from orbax.checkpoint import v1  # partial saves are there alone

  folder = Path(folder).absolute()
  waiting, size, digests = {}, 0, {}

  def save():
    v1.partial.save(folder, {"params": flax.traverse_util.unflatten_dict(waiting, sep="/")})
    waiting.clear()

  for name, array in params:
    waiting[name], digests[f"params/{name}"] = array, digest.of_array(array)
    size += array.nbytes
    if size >= CHUNK_BYTES:
      save()
      size = 0
  if waiting:
    save()
  v1.partial.finalize(folder)
  items = {"card": card(model, **values, digests=digests)}
  if tokenizer is not None:
    items["tokenizer"] = tokenizer.to_dict()
  for item, content in items.items():
    (folder / item).mkdir()
    (folder / item / "metadata").write_text(json.dumps(content))
