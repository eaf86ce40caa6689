"""Accumulated gradients are those of the whole batch: the same losses, the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.losses import grad_cache
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.losses.reference import mesh_of
from tests.models.test_clip import inputs

ROWS = 16
TINY = tiny()["model"]
# Sixteen patches, of which half are dropped; captions cut at random: both passes must draw the same.
PARTIAL = {
  "vision": {**TINY["vision"], "patch_size": 4, "patch_drop": 0.5},
  "text": {**TINY["text"], "train_length": 6, "reduction": "random"},
}


def train(microbatches, shape=(1, 1, 1), model=PARTIAL, count=3, **sections):
  sections = {"train": {"microbatches": microbatches}, "model": model, **sections}
  config = configs.resolve(tiny(mesh=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), **sections))
  mesh = meshes.create(config, jax.devices()[: int(np.prod(shape))])
  state, step = states.create(config, mesh), steps.create(config, mesh)
  measured = []
  for seed in range(count):
    images, tokens = inputs(config.model, rows=ROWS, seed=seed)
    state, metrics = step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, ROWS))
    measured.append(jax.device_get(metrics))
  return jax.device_get(state), measured


def without_key_biases(params):
  """The biases of the keys change no softmax, so their gradient is rounding, of which Adam makes whole updates."""

  def cut(path, x):
    return np.delete(x, 1, axis=0) if path[-1].key == "qkv_bias" else x

  return jax.tree_util.tree_map_with_path(cut, params)


def relative(got, want):
  return np.linalg.norm(np.float64(got) - want) / np.linalg.norm(np.float64(want))


@pytest.fixture(scope="module")
def whole():
  return train(1)


@pytest.mark.parametrize(
  "microbatches, shape",
  [(2, (1, 1, 1)), (4, (1, 1, 1)), (8, (1, 1, 1)), (2, (2, 4, 1)), (4, (2, 1, 2))],
  ids=str,
)
def test_three_steps_end_with_the_parameters_of_the_whole_batch(whole, microbatches, shape):
  want, want_metrics = whole
  got, metrics = train(microbatches, shape)
  for ours, theirs in zip(metrics, want_metrics, strict=True):
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
  ours, theirs = without_key_biases(got.params), without_key_biases(want.params)
  together = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (ours, theirs)]
  assert relative(*together) < 1e-5
  # And the first moments, the running means of the gradients, leaf by leaf.
  ours, theirs = without_key_biases(got.opt_state[1].mu), without_key_biases(want.opt_state[1].mu)
  assert abs(theirs["logit_scale"]) > 1e-4
  np.testing.assert_allclose(ours["logit_scale"], theirs["logit_scale"], rtol=1e-5)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    assert relative(x, y) < 2e-5, jax.tree_util.keystr(path)


def test_averaging_the_micro_batches_would_not_do(whole):
  # Each micro-batch by itself: fewer negatives, another loss.
  _, metrics = whole
  config = configs.resolve(tiny(model=PARTIAL))
  state = states.create(config, mesh_of(1, 1, 1))
  images, tokens = inputs(config.model, rows=ROWS, seed=0)
  embed, loss = steps.embed_with(steps.CLIP(config.model)), steps.loss_with(config.loss, mesh_of(1, 1, 1))
  keys = steps.example_keys(config, mesh_of(1, 1, 1), 0)
  parts = []
  for part in np.split(np.arange(ROWS), 4):
    batch = {"images": images[part], "tokens": tokens[part], "keys": keys[part]}
    parts.append(float(jax.jit(lambda p, b: loss(p, embed(p, b), b))(state.params, batch)))
  assert abs(np.mean(parts) - metrics[0]["loss"]) > 0.5


def test_scale_and_bias_are_counted_once():
  """With softmax, which has no bias, the scale is one of the leaves above."""
  sections = dict(model={"logit_bias_init": -10.0}, count=1, loss={"name": "sigmoid", "mask_duplicates": True})
  (want, _), (got, _) = train(1, **sections), train(4, **sections)
  for parameter in ("logit_scale", "logit_bias"):
    ours, theirs = (s.opt_state[1].mu[parameter] for s in (got, want))
    assert abs(theirs) > 1e-4
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=parameter)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 2, 2)], ids=str)
def test_micro_batches_have_rows_of_every_shard_and_come_back_in_order(shape):
  mesh = mesh_of(*shape)
  x = jax.device_put(np.arange(16), rules.batch_sharding(mesh))
  parts = jax.jit(lambda x: grad_cache.split(x, 2, mesh))(x)
  shards = shape[0] * shape[1]
  own = np.arange(16).reshape(shards, -1)
  np.testing.assert_array_equal(parts[1], own[:, own.shape[1] // 2 :].ravel())
  np.testing.assert_array_equal(jax.jit(lambda x: grad_cache.join(x, mesh))(parts), np.arange(16))
  text = jax.jit(lambda x: grad_cache.split(x, 2, mesh)).lower(x).compile().as_text()
  assert not any(kind in text for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))


def test_towers_see_one_micro_batch_at_a_time():
  seen = []

  def embed(params, batch):
    seen.append(batch.shape)
    return batch * params, -batch * params

  def loss(params, embedded, batch):
    return jnp.sum(embedded[0] * embedded[1]) * params

  run = grad_cache.value_and_grad(embed, loss, microbatches=4, mesh=mesh_of(1, 1, 1))
  value, gradient = jax.jit(run)(jnp.float32(2), jnp.arange(8.0))
  assert set(seen) == {(2,)}
  squares = np.sum(np.arange(8.0) ** 2)
  np.testing.assert_allclose(value, -8 * squares)
  np.testing.assert_allclose(gradient, -12 * squares)  # d(-p^3 s)/dp, of which the loss itself gives a third
