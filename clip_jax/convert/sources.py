"""Anything that weights come from: which model it is, and its parameters one by one."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import flax
import numpy as np

from clip_jax import config as configs
from clip_jax import files
from clip_jax.convert import containers, huggingface, native, open_clip, openai, weights
from clip_jax.data.locations import cache_key
from clip_jax.data.tokenizer_files import FileTokenizer
from clip_jax.errors import DataError, UsageError, did_you_mean
from clip_jax.models import zoo
from clip_jax.parallel import digest

# In the order they are looked for, in a folder of Hugging Face or open_clip.
HUGGINGFACE_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
OPEN_CLIP_FILES = (
  *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
  *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt"),
)


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights and what model they are of.

  Attributes:
    where: the file or folder.
    layout: "clip_jax", "huggingface", "open_clip" or "openai".
    model: a resolved `clip_jax.config.Model`.
    tokenizer: its `FileTokenizer`, or None if it has CLIP's own.
    shapes: a dict of paths of parameters ("image/projection") and `jax.ShapeDtypeStruct`s.
    read: a function from such a path to a NumPy array.
  """

  where: str
  layout: str
  model: configs.Model
  tokenizer: FileTokenizer | None
  shapes: dict
  read: Callable

  def params(self):
    """All parameters, as the nested dict that `CLIP` takes."""
    return flax.traverse_util.unflatten_dict({name: self.read(name) for name in self.shapes}, sep="/")

  def digest(self, params=None):
    """A name for all that embeddings depend on: numbers, sizes, preprocessing, and the words of the tokenizer.

    Args:
      params: what `params` gave, if it is at hand; the weights are read otherwise.
    """
    known = {} if params is None else flax.traverse_util.flatten_dict(params, sep="/")
    sizes = {name: value for name, value in configs.to_dict(self.model).items() if name not in ("name", "tokenizer")}
    tokenizer = self.tokenizer.to_dict() if self.tokenizer else None
    arrays = [f"{name} {digest.of_array(known[name] if name in known else self.read(name))}" for name in sorted(self.shapes)]
    return cache_key(json.dumps([sizes, tokenizer], sort_keys=True), *arrays)


def find(path, name=None, *, ema=None, average=1):
  """Opens weights, whatever wrote them. Shapes are checked; numbers are read one tensor at a time, later.

  Args:
    path: a work directory, a checkpoint of this project, a Hugging Face or open_clip folder, or a file of tensors
      (.safetensors, or anything that torch saved).
    name: the model's name, for a file that does not say what it holds: activation, heads and preprocessing leave no
      trace in the tensors.
    ema: of a run that kept a moving average of its weights, whether to take that; None: yes, if there is one.
    average: of a work directory, how many of its newest checkpoints to take the mean of (Vaswani et al. 2017, section 6.1).

  Returns:
    A `Source`.

  Raises:
    UsageError: it cannot be read, is not the model it says it is, or does not hold the weights that are asked for.
  """
  path = Path(path)
  if not path.exists():
    raise UsageError(f"{path} does not exist.")
  checkpoint = native.find(path)
  if average > 1:
    return _averaged(path, average, ema)
  if checkpoint is not None:
    return _native(checkpoint, ema)
  if ema is not None:
    raise UsageError(f"{path} is no run or checkpoint of clip_jax, which alone may hold a moving average beside the weights.")
  if path.is_file():
    return _file(path, name)
  if (path / open_clip.CONFIG).is_file():
    model, tokenizer = open_clip.read(path)
    tensors = _without_text_prefix(_tensors(_first(path, OPEN_CLIP_FILES + HUGGINGFACE_FILES)), model)
    return _foreign(path, "open_clip", model, tokenizer, tensors)
  # A work directory has a config.json, too, before it has a checkpoint.
  if (path / "config.json").is_file() and "model_type" in files.read_json(path / "config.json"):
    model, tokenizer = huggingface.read(path)
    return _foreign(path, "huggingface", model, tokenizer, _tensors(_first(path, HUGGINGFACE_FILES)))
  raise UsageError(
    f"{path} holds no checkpoint: neither checkpoints/STEP/ nor card/ is in it, nor a config.json of Hugging Face or an "
    f"{open_clip.CONFIG}."
  )


def _averaged(path, count, ema):
  folders = native.steps_of(path)
  if len(folders) < count:
    raise UsageError(f"{path} holds {len(folders):,} checkpoints, and the mean of {count:,} was asked for; checkpoint.keep_last keeps more.")
  parts = [_native(folder, ema) for folder in folders[-count:]]

  def read(name):
    total = np.zeros(parts[0].shapes[name].shape, np.float64)
    for part in parts:
      total += part.read(name)
    return np.asarray(total / count, parts[0].shapes[name].dtype)

  steps = f"{folders[-count].name} to {folders[-1].name}"
  return dataclasses.replace(parts[-1], where=f"{path} (mean of the {count} checkpoints {steps})", read=read)


def _native(folder, ema=None):
  model, tokenizer = native.read_card(folder)
  params = native.Params(folder, ema)
  found = {name: shape.shape for name, shape in params.shapes.items()}
  wanted = {name: shape.shape for name, shape in weights.shapes_of(model).items()}
  if found != wanted:
    odd = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    raise UsageError(f"{folder}: the card and the arrays are of different models: {weights.listed(odd)}.")
  return Source(str(folder), "clip_jax", model, tokenizer, params.shapes, params.read)


def _first(folder, names):
  found = next((folder / name for name in names if (folder / name).is_file()), None)
  if found is None:
    raise DataError(f"{folder} holds no weights; {names[0]} or {names[1]} would be right.")
  return found


def _tensors(path):
  if path.name.endswith(".index.json"):
    return containers.Split(path)
  # By its first bytes: torch saves zip files, or pickles, whatever they are called.
  try:
    with path.open("rb") as file:
      start = file.read(16)
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error.strerror}.") from error
  is_torch = start[:2] == b"PK" or start[:1] == b"\x80"
  if path.suffix == ".safetensors" or not is_torch and start[8:9] == b"{":
    return containers.Safetensors(path)
  return containers.Torch(path)


def _file(path, name):
  tensors = _tensors(path)
  model = _named(name) if name else None
  if model is None and set(openai.SIZES) & set(tensors.shapes):
    model = openai.model_from(tensors.shapes, path)
    return _foreign(path, "openai", model, None, tensors)
  tensors = _without_text_prefix(tensors, model)
  if model is None:
    raise UsageError(_who_is_it(path, tensors.shapes))
  if model.tokenizer != "clip":
    raise UsageError(f"{path} does not hold the tokenizer of {name}; give the folder that has both.")
  return _foreign(path, "open_clip", model, None, tensors)


def _named(name):
  if name not in zoo.MODELS:
    hint = did_you_mean(name, zoo.MODELS, "`clip-jax models` lists them.")
    raise UsageError(f"--model={name} is not a known model. {hint}")
  return configs.model_from_dict({"name": name})


def _who_is_it(path, shapes):
  sizes = openai.sizes_from(shapes)
  if sizes is None:
    transformers = any(name.startswith("vision_model.") for name in shapes)
    hint = "give the Hugging Face folder it is from" if transformers else "the tensors are not those of CLIP's own towers"
    return f"{path} does not say what model it holds; {hint}."
  fitting = [name for name in zoo.MODELS if _fits(configs.model_from_dict({"name": name}), sizes)]
  names = ", ".join(fitting) if fitting else "none that has a name"
  return (
    f"{path} holds tensors alone, which do not tell activation, heads and preprocessing: say which model they are of with "
    f"--model. Of these shapes are: {names}."
  )


def _fits(model, sizes):
  if model.image_size != sizes["image_size"] or model.embed_dim != sizes["embed_dim"]:
    return False
  towers = ((model.vision, sizes["vision"]), (model.text, sizes["text"]))
  return all(getattr(tower, key) == value for tower, given in towers for key, value in given.items())


class _Renamed:
  def __init__(self, tensors, names):
    self._tensors, self._names = tensors, names
    self.shapes = {new: tensors.shapes[old] for new, old in names.items()}

  def read(self, name):
    return self._tensors.read(self._names[name])


def _without_text_prefix(tensors, model):
  # open_clip's CustomTextCLIP puts "text." in front of CLIP's own text tower.
  if "text.positional_embedding" not in tensors.shapes or (model is not None and model.text.kind == "siglip"):
    return tensors
  return _Renamed(tensors, {name.removeprefix("text."): name for name in tensors.shapes})


def _foreign(where, layout, model, tokenizer, tensors):
  formats = {"huggingface": huggingface, "open_clip": open_clip, "openai": openai}
  if "logit_bias" in tensors.shapes and model.logit_bias_init is None:
    model = dataclasses.replace(model, logit_bias_init=-10.0)  # learned, so where it began does not matter
  shapes = weights.shapes_of(model)
  found = weights.check(formats[layout].rows(model), shapes, tensors.shapes, formats[layout].IGNORED, where)

  def read(name):
    row = found[name]
    parts = [tensors.read(their) for their in row.theirs]
    for their, part in zip(row.theirs, parts, strict=True):
      if "float" not in part.dtype.name:
        raise DataError(f"{where}: {their} holds {part.dtype.name}, and weights are floating-point numbers.")
      weights.check_finite(their, part, where)
    array = row.how.back(parts, shapes[name].shape)
    return np.array(array, np.float32, order="C")

  return Source(str(where), layout, _with_name(model), tokenizer, shapes, read)


def _with_name(model):
  """The same model with the name that stands for it, if there is one."""
  if model.name:
    return model
  for name in zoo.MODELS:
    named = configs.model_from_dict({"name": name})
    same = dict(name=name, tokenizer=model.tokenizer, logit_scale_init=named.logit_scale_init)
    if dataclasses.replace(model, **same) == dataclasses.replace(named, tokenizer=model.tokenizer):
      return dataclasses.replace(model, **same)
  return model
