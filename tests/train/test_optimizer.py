"""AdamW, its schedule and its mask, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.train import optimizer as optimizers
from clip_jax.train.state import describe
from tests.conftest import tiny
from tests.losses.reference import mesh_of


def resolved(**optimizer):
  return configs.resolve(tiny(optimizer=optimizer, train={"global_batch_size": 16, "steps": 20}))


@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_equal_adamw_in_float64(clip):
  config = resolved(learning_rate=0.01, warmup_steps=3, weight_decay=0.3, gradient_clip_norm=clip)
  optimizer, _ = optimizers.create(config)
  random = np.random.default_rng(0)
  params = {"kernel": random.normal(size=(4, 3)), "bias": random.normal(size=3)}
  want = {name: value.copy() for name, value in params.items()}
  got = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  state = optimizer.init(got)
  mean = dict.fromkeys(params, 0.0)
  square = dict.fromkeys(params, 0.0)
  for step in range(6):
    gradients = {name: random.normal(size=value.shape) for name, value in params.items()}
    updates, state = optimizer.update(jax.tree.map(jnp.float32, gradients), state, got)
    got = optax.apply_updates(got, updates)

    norm = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    shrink = 1.0 if clip is None else min(1.0, clip / norm)
    if step < 3:
      rate = 0.01 * (step + 1) / 3
    else:
      rate = 0.01 * 0.5 * (1 + np.cos(np.pi * (step - 3) / 17))
    for name, gradient in gradients.items():
      gradient = shrink * gradient
      mean[name] = 0.9 * mean[name] + 0.1 * gradient
      square[name] = 0.98 * square[name] + 0.02 * gradient**2
      unbiased = mean[name] / (1 - 0.9 ** (step + 1))
      scale = np.sqrt(square[name] / (1 - 0.98 ** (step + 1))) + 1e-6
      decay = 0.3 * want[name] if name == "kernel" else 0.0
      want[name] = want[name] - rate * (unbiased / scale + decay)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6)


def test_the_schedule_warms_up_and_ends_at_zero():
  schedule = optimizers.warmup_cosine(2.0, 4, 12)
  rates = [float(schedule(step)) for step in range(13)]
  np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(rates[8], 1.0, rtol=1e-6)  # half way down
  assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False)) and abs(rates[12]) < 1e-6


@pytest.mark.parametrize("warmup, total", [(0, 5), (10, 5), (5, 5)])
def test_the_schedule_of_odd_lengths_is_finite_and_positive(warmup, total):
  rates = [float(optimizers.warmup_cosine(1.0, warmup, total)(step)) for step in range(total)]
  assert np.isfinite(rates).all() and min(rates) > 0


def test_decay_reaches_weights_but_not_gains_and_biases():
  config = resolved()
  params = describe(config, mesh_of(1, 1, 1))[0].params
  mask = optimizers.decay_mask(config.optimizer.no_decay)(params)
  decayed = {
    optimizers.path_name(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if on
  }
  spared = {
    optimizers.path_name(path) for path, on in jax.tree_util.tree_leaves_with_path(mask) if not on
  }
  assert {name.rsplit("/", 1)[-1] for name in spared} == {"bias", "qkv_bias", "scale", "logit_scale"}
  assert {name.rsplit("/", 1)[-1] for name in decayed} == {
    "kernel", "qkv_kernel", "patch_kernel", "projection", "token_embedding", "pos_embed", "class_embedding",
  }  # fmt: skip


def test_frozen_parameters_have_no_moments_and_the_rest_is_trained_as_without_them():
  plain, held = resolved(), resolved(freeze="^image/")
  shapes = describe(held, mesh_of(1, 1, 1))[0]
  moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(shapes.opt_state) if "image" in jax.tree_util.keystr(path)]
  assert not moments
  names = [optimizers.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes.opt_state)]
  assert sum(name.endswith("text/projection") for name in names) == 2
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes.params)
  gradients = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), params)
  updates = {}
  for name, config in (("plain", plain), ("held", held)):
    optimizer, _ = optimizers.create(config)
    updates[name], _ = optimizer.update(gradients, optimizer.init(params), params)
  assert not any(np.any(x) for x in jax.tree.leaves(updates["held"]["image"]))
  jax.tree.map(np.testing.assert_array_equal, updates["held"]["text"], updates["plain"]["text"])


def test_learning_rates_by_pattern_and_by_layer():
  config = resolved(lr_multipliers=(("^image/", 0.1), ("projection$", 3.0), ("logit", 0.0)), layer_decay=0.5)
  factor = optimizers.multiplier(config)  # two blocks in the image tower, one in the text tower
  want = {
    "image/patch_kernel": 0.1 / 8,
    "image/norm_pre/scale": 0.1 / 8,
    "image/transformer/block_0/mlp_in/kernel": 0.1 / 4,
    "image/transformer/block_1/mlp_in/kernel": 0.1 / 2,
    "image/norm_post/scale": 0.1,
    "image/projection": 0.1,  # the first pattern that matches
    "text/token_embedding": 1 / 4,
    "text/transformer/block_0/norm_1/bias": 1 / 2,
    "text/projection": 3.0,
    "logit_scale": 0.0,
  }
  assert {name: factor(name) for name in want} == pytest.approx(want)
  plain, _ = optimizers.create(resolved())
  scaled, _ = optimizers.create(config)
  shapes = describe(config, mesh_of(1, 1, 1))[0].params
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32), shapes)
  before, after = (o.update(params, o.init(params), params)[0] for o in (plain, scaled))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_allclose(y, factor(optimizers.path_name(path)) * x, rtol=1e-6)


def test_layers_of_a_resnet():
  vision = {"kind": "resnet", "stages": (1, 1, 1, 1), "width": 8, "heads": 4}
  model = {**tiny()["model"], "image_size": 32, "vision": vision}
  factor = optimizers.multiplier(configs.resolve(tiny(model=model, optimizer={"layer_decay": 0.5})))
  want = {"image/stem/conv_1/kernel": 1 / 32, "image/stage_0/block_0/conv_1/kernel": 1 / 16, "image/stage_3/block_0/conv_1/kernel": 1 / 2}
  assert {name: factor(name) for name in want} == want and factor("image/pool/pos_embed") == 1


@pytest.mark.parametrize(
  "values, message",
  [
    ({"freeze": "^img/"}, "freeze='^img/' matches no parameter; they are named like image/"),
    ({"lr_multipliers": (("^image/", 0.1), ("heads", 2.0))}, "lr_multipliers[1]='heads' matches no parameter"),
    ({"freeze": "."}, "leaves nothing to train"),
  ],
)
def test_patterns_that_match_nothing_are_refused(values, message):
  with pytest.raises(ConfigError) as error:
    describe(resolved(**values), mesh_of(1, 1, 1))
  assert message in str(error.value)
