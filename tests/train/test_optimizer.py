"""AdamW, its schedule and its mask, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax import config as configs
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
