"""Sizes written out against the models themselves and against published figures."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from clip_jax import config as configs
from clip_jax.models import size, zoo
from clip_jax.models.clip import CLIP, initial_params, without_statistics
from tests.convert import models

# open_clip's docs/model_profile.csv: millions of parameters, GFLOPs of the image and of the text tower, where one
# multiply-accumulate is two.
PUBLISHED = {
  "ViT-B-32": (151.28, 8.82, 5.96),
  "ViT-B-16": (149.62, 35.13, 5.96),
  "ViT-L-16": (427.74, 123.11, 13.3),
  "ViT-L-14": (427.62, 162.03, 13.3),
  "ViT-L-14-336": (427.94, 381.92, 13.3),
  "ViT-H-14": (986.11, 334.59, 47.09),
  "ViT-g-14": (1366.68, 534.06, 47.09),
  "ViT-bigG-14": (2539.57, 967.5, 97.86),
  "RN50": (102.01, 12.22, 5.96),
  "RN101": (119.69, 19.54, 5.96),
  "RN50x4": (178.3, 42.56, 9.27),
  "RN50x16": (290.98, 149.39, 13.3),
  "RN50x64": (623.26, 529.11, 23.55),
  "ViT-B-16-SigLIP": (203.16, 35.42, 11.02),
  "ViT-B-16-SigLIP-256": (203.2, 46.82, 11.02),
  "ViT-B-16-SigLIP-384": (203.45, 112.13, 11.02),
  "ViT-B-16-SigLIP-512": (203.79, 216.24, 11.02),
  "ViT-L-16-SigLIP-256": (652.15, 162.56, 39.06),
  "ViT-L-16-SigLIP-384": (652.48, 383.85, 39.06),
  "ViT-SO400M-14-SigLIP": (877.36, 220.35, 13.19),
  "ViT-SO400M-14-SigLIP-384": (877.96, 670.35, 53.13),
}  # fmt: skip
# Of OpenAI's released weights, counted.
EXACT = {"ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737, "ViT-L-14": 427_616_513, "RN50": 102_007_137, "RN101": 119_688_033}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_named_models_have_the_published_size(name):
  model = configs.model_from_dict({"name": name})
  plain = name.removesuffix("-quickgelu")
  assert model.activation == {True: "quick_gelu", False: "gelu_tanh" if "SigLIP" in name else "gelu"}[plain != name]
  millions, of_image, of_text = PUBLISHED[plain]
  assert round(size.parameters(model) / 1e6, 2) == millions
  assert size.parameters(model) == EXACT.get(plain, size.parameters(model))
  image, text = size.forward_macs(model)
  if model.vision.kind == "resnet":
    # Pooling has one query; the profile is of a version that computes one for every place, and drops all but the first.
    places, width = (model.image_size // 32) ** 2, 32 * model.vision.width
    image += places * (width * width + width * model.embed_dim + 2 * (places + 1) * width)
  assert 2 * image / 1e9 == pytest.approx(of_image, rel=2e-3)
  assert 2 * text / 1e9 == pytest.approx(of_text, rel=2e-3)


def counted(function, *arguments):
  """Multiply-accumulates of the products and convolutions of a traced function."""
  total = 0

  def visit(jaxpr):
    nonlocal total
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
      elif equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape  # height, width, in, out
        total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:-1])
      elif equation.primitive.name == "cond":
        visit(equation.params["branches"][0].jaxpr)  # a product, as it is written for each platform
        continue
      for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          visit(inner)

  visit(jax.make_jaxpr(function)(*arguments).jaxpr)
  return total


NAMED = ["ViT-g-14", "RN101", "ViT-SO400M-14-SigLIP-384"]


@pytest.mark.parametrize("kind", ["vit", "vit_bias", "resnet", "siglip", *NAMED])
def test_sizes_are_those_of_the_model(kind):
  config = configs.model_from_dict({"name": kind}) if kind in NAMED else models.model(kind)
  params = jax.eval_shape(lambda: initial_params(config, jax.random.key(0)))
  params = nn.unbox(params)
  assert size.parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(without_statistics(params)))
  pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)
  tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)

  def encode(method):
    return lambda params, x: CLIP(config).apply({"params": params}, x, method=method)

  image, text = counted(encode("encode_image"), params, pixels), counted(encode("encode_text"), params, tokens)
  assert size.forward_macs(config) == (image, text)
