"""Both encoders as serialized StableHLO, weights included: they run wherever JAX is, without this project."""

import dataclasses
import math
import warnings
from pathlib import Path

import flax
import jax
import numpy as np
from jax import export

from clip_jax import config as configs
from clip_jax.convert import huggingface, weights
from clip_jax.errors import UsageError
from clip_jax.files import write_json
from clip_jax.models.clip import CLIP

PLATFORMS = ("cpu", "cuda", "tpu")
LIMIT = 2 * 2**30  # bytes of one file, which is a flatbuffer
FILES = {"image": "image.stablehlo", "text": "text.stablehlo"}


def write(folder, source, track=iter):
  """Writes `image.stablehlo`, `text.stablehlo`, `model.json` and the tokenizer's files.

  Args:
    folder: an empty folder.
    source: a `Source`.
    track: wraps the list of parameters that is gone through, to show progress.

  Raises:
    UsageError: a tower has more than 2 GiB of weights, which such a file cannot hold, or they are not finite.
  """
  folder, model = Path(folder), dataclasses.replace(source.model, compute_dtype="float32")
  for tower in FILES:
    size = sum(
      4 * math.prod(shape.shape) for name, shape in source.shapes.items() if name.startswith(f"{tower}/")
    )
    if size > 0.98 * LIMIT:
      raise UsageError(
        f"the {tower} tower of {source.where} has {size / 2**30:.1f} GiB of weights, and a serialized program holds 2; "
        "huggingface and open_clip can express it."
      )
  params = {}
  for name in track(list(source.shapes)):
    array = source.read(name)
    weights.check_finite(name, array, source.where)
    params[name] = jax.numpy.asarray(array, jax.numpy.float32)
  params = flax.traverse_util.unflatten_dict(params, sep="/")
  (batch,) = export.symbolic_shape("batch")
  inputs = {
    "image": jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), np.uint8),
    "text": jax.ShapeDtypeStruct((batch, model.text.context_length), np.int32),
  }
  for tower, file in FILES.items():
    encode = jax.jit(lambda x, tower=tower: CLIP(model).apply({"params": params}, x, method=f"encode_{tower}"))
    with warnings.catch_warnings():
      warnings.filterwarnings("ignore", "A large amount of constants")  # that is the point
      program = export.export(encode, platforms=PLATFORMS)(inputs[tower])
    (folder / file).write_bytes(program.serialize())
  about = {
    "model": configs.to_dict(model),
    "image": f"uint8 [batch, {model.image_size}, {model.image_size}, 3] -> float32 [batch, {model.embed_dim}], of unit length",
    "text": f"int32 [batch, {model.text.context_length}] -> float32 [batch, {model.embed_dim}], of unit length",
    "logit_scale": float(np.exp(params["logit_scale"])),
    "logit_bias": float(params.get("logit_bias", 0.0)),
  }
  write_json(folder / "model.json", about)
  huggingface.write_tokenizer(folder, source.tokenizer, model.text.context_length)


def run(folder, images, tokens):
  """Both encoders of a folder.

  Args:
    folder: what `write` wrote to.
    images: uint8 [batch, size, size, 3].
    tokens: int32 [batch, context_length].

  Returns:
    Both embeddings, [batch, embed_dim].
  """
  inputs = {"image": images, "text": tokens}
  programs = {tower: export.deserialize((Path(folder) / file).read_bytes()) for tower, file in FILES.items()}
  return tuple(np.asarray(programs[tower].call(inputs[tower])) for tower in FILES)
