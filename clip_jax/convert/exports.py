"""Weights written for others, and others' weights written as a checkpoint of this project."""

import shutil
from pathlib import Path

import numpy as np

from clip_jax import files
from clip_jax.convert import (
  containers,
  huggingface,
  native,
  onnx,
  open_clip,
  openai,
  stablehlo,
  verify,
  weights,
)
from clip_jax.errors import UsageError


def write(source, target, out, *, split_bytes=containers.SPLIT_BYTES, track=iter, verified=False):
  """Writes weights in another project's layout. Nothing stays at `out` unless all of it is there.

  Args:
    source: a `Source`.
    target: "openai" (a .pt file), "open_clip" (a hub folder), "huggingface" (a folder for `from_pretrained`),
      "stablehlo" or "onnx" (folders with both encoders as programs).
    out: where; there must be nothing yet.
    split_bytes: bytes a file of a Hugging Face folder may have before the weights are split.
    track: wraps the list of parameters that is gone through, to show progress.
    verified: whether to run what was written in PyTorch, before it gets its name.

  Returns:
    What `verify.compare` found, or None.

  Raises:
    UsageError: the target cannot express the model, or it cannot be written.
  """
  with files.new(out) as temporary:
    WRITERS[target](source, temporary, Path(out).name, split_bytes, track)
    return verify.compare(source, target, temporary) if verified else None


def import_weights(source, out, *, track=iter):
  """Writes weights as a checkpoint that `clip_jax.load` and `config.train.init_from` read.

  Args:
    source: a `Source`.
    out: the folder; there must be nothing yet.
    track: wraps the list of parameters that is gone through, to show progress.

  Raises:
    UsageError: a tensor cannot be read or is not finite, or `out` cannot be written.
  """
  if source.layout == "clip_jax":
    raise UsageError(f"{source.where} is a checkpoint of clip_jax already.")
  with files.new(out) as temporary:
    params = ((name, source.read(name)) for name in track(list(source.shapes)))
    native.write(temporary, source.model, source.tokenizer, params, imported_from=source.layout)


def _openai(source, path, _, split_bytes, track):
  openai.check_expressible(source.model)
  torch = containers.import_torch("Writing a .pt file")
  tensors, read = _plan(source, openai.rows(source.model), track)
  state = {name: torch.from_numpy(np.array(read(name), np.float32)) for name in tensors}
  model = source.model
  for key, value in zip(openai.SIZES, (model.image_size, model.text.context_length, model.text.vocab_size), strict=True):
    state[key] = torch.tensor(value)
  torch.save(state, path)


def _open_clip(source, folder, _, split_bytes, track):
  table = open_clip.rows(source.model)
  folder.mkdir()
  open_clip.write(folder, source.model, source.tokenizer)
  tensors, read = _plan(source, table, track)
  containers.write_safetensors(folder / f"{open_clip.WEIGHTS}.safetensors", tensors, read)  # open_clip reads one file


def _huggingface(source, folder, name, split_bytes, track):
  table = huggingface.rows(source.model)
  folder.mkdir()
  dtype = str(next(iter(source.shapes.values())).dtype)
  huggingface.write(folder, source.model, source.tokenizer, dtype)
  (folder / "README.md").write_text(huggingface.model_card(source.model, name))
  tensors, read = _plan(source, table, track)
  containers.write_split(folder, "model", tensors, read, split_bytes)


def _stablehlo(source, folder, _, split_bytes, track):
  folder.mkdir()
  stablehlo.write(folder, source, track)


def _onnx(source, folder, name, split_bytes, track):
  folder.mkdir()
  twin = folder / "twin"  # in transformers, which torch's exporter runs
  _huggingface(source, twin, name, split_bytes, track)
  onnx.write(folder, twin)
  for path in twin.iterdir():
    if path.suffix != ".safetensors" and path.name not in ("README.md", "model.safetensors.index.json"):
      path.rename(folder / path.name)
  shutil.rmtree(twin)


# Each takes the source, a path where nothing is, the name it will have, and what `write` was given.
WRITERS = {
  "openai": _openai,
  "open_clip": _open_clip,
  "huggingface": _huggingface,
  "stablehlo": _stablehlo,
  "onnx": _onnx,
}


def _plan(source, table, track):
  """What will be written, and a function that gives it: one parameter at a time is read, and cut up if need be."""
  found, homeless = weights.rows_of(table, source.shapes)
  if homeless:
    raise UsageError(f"this layout has no place for {weights.listed(homeless)} of {source.where}.")
  described, owners = {}, {}
  for name, row in found.items():
    parts = weights.described(row, source.shapes[name].shape, source.shapes[name].dtype)
    described |= parts
    owners |= dict.fromkeys(parts, name)
  progress, waiting = iter(track(list(found))), {}

  def read(their):
    if their not in waiting:
      name = owners[their]
      next(progress, None)
      array = source.read(name)
      weights.check_finite(name, array, source.where)
      waiting.update(zip(found[name].theirs, found[name].how.to(array), strict=True))
    return waiting.pop(their)

  return described, read
