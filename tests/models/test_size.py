"""Sizes written out against the models themselves and against published figures."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from clip_jax import config as configs
from clip_jax.models import size, zoo
from clip_jax.models.clip import CLIP, initial_params, without_statistics
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.plan import hlo
from clip_jax.train import state as states
from clip_jax.train import step as steps
from clip_jax.train.optimizer import path_name
from tests.conftest import tiny
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
  trained = jax.tree_util.tree_leaves_with_path(without_statistics(params))
  assert size.parameters(config) == sum(leaf.size for _, leaf in trained)
  listed = {}
  for part in [*size.image_parts(config), *size.text_parts(config)]:
    if part.path:
      listed[part.path] = listed.get(part.path, 0) + part.size
  assert listed == {path_name(path): leaf.size for path, leaf in trained if "/" in path_name(path)}  # not the logit scale
  pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.uint8)
  tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)

  def encode(method):
    return lambda params, x: CLIP(config).apply({"params": params}, x, method=method)

  image, text = counted(encode("encode_image"), params, pixels), counted(encode("encode_text"), params, tokens)
  assert size.forward_macs(config) == (image, text)


VIT = dict(
  image_size=64, embed_dim=64,
  vision=dict(patch_size=8, width=128, layers=2, heads=4), text=dict(context_length=32, width=96, layers=1, heads=4),
)  # fmt: skip
SIGLIP = dict(
  image_size=64, embed_dim=128, logit_bias_init=-10.0,
  vision=dict(kind="siglip", patch_size=8, width=128, layers=2, heads=4, mlp_width=300),
  text=dict(kind="siglip", context_length=16, width=96, layers=1, heads=2),
)  # fmt: skip
RESNET = {**VIT, "vision": dict(kind="resnet", stages=(1, 2, 1, 1), width=32, heads=8)}
FEWER = {**VIT, "vision": {**VIT["vision"], "patch_drop": 0.5}, "text": {**VIT["text"], "train_length": 16}}
SIGMOID = dict(name="sigmoid", max_logit_scale=None)
LOWER_HALF = "^image/(patch_kernel|class_embedding|pos_embed|norm_pre|transformer/block_0/)"


def compiled_and_written_out(batch=8, **sections):
  """FLOPs of a pair in the products of the whole training step as it is compiled here, and by `size`; and the config."""
  train = {"global_batch_size": batch, "steps": 1, **sections.pop("train", {})}
  config = configs.resolve(tiny(train=train, **sections))
  mesh = meshes.create(config, jax.devices()[:1])
  model, sharding = config.model, rules.batch_sharding(mesh)
  inputs = {
    "images": jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), jnp.uint8, sharding=sharding),
    "tokens": jax.ShapeDtypeStruct((batch, model.text.context_length), jnp.int32, sharding=sharding),
  }
  compiled = steps.create(config, mesh).lower(states.describe(config, mesh)[0], inputs).compile()
  found = hlo.account(compiled.as_text()).product_flops / batch
  return found, size.training_flops(model, batch, config.loss.name, config.optimizer.freeze), config


# What remains is what the compiler finds to be the same: the logits of a batch that is one tile, forward and backward, and the
# projection of a pooling's query, which all images share.
@pytest.mark.parametrize(
  "model, loss, freeze",
  [
    (VIT, {}, ""),
    (FEWER, {}, ""),
    (SIGLIP, SIGMOID, ""),
    (RESNET, {}, ""),
    (VIT, {}, "^image/"),  # a locked tower has no backward pass
    (VIT, {}, LOWER_HALF),  # nor has the locked bottom of one
    (SIGLIP, SIGMOID, "^image/(?!head)"),
    (RESNET, {}, "^image/(stem|stage_0)"),
  ],
  ids=["vit", "fewer", "siglip", "resnet", "locked image", "locked half", "head only", "locked stages"],
)
def test_training_flops_are_those_of_the_compiled_step(model, loss, freeze):
  compiled, written_out, _ = compiled_and_written_out(model=model, loss=loss, optimizer={"freeze": freeze})
  assert written_out == pytest.approx(compiled, rel=1e-3)


@pytest.mark.parametrize("loss, bias", [({}, None), (SIGMOID, -10.0)], ids=["softmax", "sigmoid"])
def test_the_loss_is_a_large_part_of_small_towers_in_a_large_batch(loss, bias):
  model = {"embed_dim": 128, "logit_bias_init": bias}
  compiled, written_out, config = compiled_and_written_out(2048, model=model, loss={"chunk": 512, **loss})
  alone = size.training_flops(config.model, 0, config.loss.name)
  assert written_out - alone == size.LOSS_PRODUCTS[config.loss.name] * 2 * 2048 * 128 > 0.5 * written_out
  assert written_out == pytest.approx(compiled, rel=1e-3)


def test_what_is_computed_twice_counts_once():
  compiled, written_out, config = compiled_and_written_out(model=VIT, train={"microbatches": 2})
  assert compiled == pytest.approx(written_out + 2 * sum(size.forward_macs(config.model)), rel=1e-3)
  compiled, again, _ = compiled_and_written_out(model=VIT, train={"remat": "full"})
  assert again == written_out and compiled > 1.2 * written_out


def test_frozen_parameters_without_products_spare_nothing():
  config = configs.resolve(tiny(model=VIT)).model
  assert size.training_flops(config, 8, freeze="(bias|scale)$") == size.training_flops(config, 8)
  one = size.training_flops(config, 8) - size.training_flops(config, 8, freeze="image/projection")
  assert one == 2 * 128 * 64  # the product for its own gradient; that for what lies below stays
