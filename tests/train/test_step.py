"""The jitted step: the same on every mesh, with state where its rules say."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from clip_jax import config as configs
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.losses.reference import dense_softmax
from tests.models.test_clip import inputs

MESHES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


def resolved(shape=(1, 1, 1), **sections):
  mesh = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  return configs.resolve(tiny(mesh=mesh, **sections))


def train(shape, count=3, **sections):
  config = resolved(shape, **sections)
  mesh = meshes.create(config, jax.devices()[: int(np.prod(shape))])
  state, step = states.create(config, mesh), steps.create(config, mesh)
  measured = []
  for seed in range(count):
    images, tokens = inputs(config.model, rows=16, seed=seed)
    state, metrics = step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, 16))
    measured.append(jax.device_get(metrics))
  return config, state, measured


@pytest.fixture(scope="module")
def alone():
  return train((1, 1, 1))


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_every_mesh_gives_the_one_device_result(alone, shape):
  _, want, want_metrics = alone
  _, got, metrics = train(shape)
  for ours, theirs in zip(metrics, want_metrics, strict=True):
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)
  # The running means of the gradients, and not the parameters: Adam divides by the gradient's size, and
  # makes whole updates of what is rounding alone (the keys' biases, whose true gradient is zero).
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(got.opt_state[1].mu), jax.tree.leaves(want.opt_state[1].mu), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=5e-4 * np.abs(theirs).max(), err_msg=str(path))


def test_the_first_step_is_the_gradient_of_the_dense_loss():
  config = resolved()
  mesh = meshes.create(config, jax.devices()[:1])
  state = states.create(config, mesh)
  module, params = CLIP(config.model), jax.device_get(state.params)
  images, tokens = inputs(config.model, rows=16, seed=0)
  image, text, scale = module.apply({"params": params}, images, tokens)
  want, of_embeddings = dense_softmax(image, text, scale)

  # Chain rule by hand: the float64 gradient of the loss, pulled back through the towers.
  _, pull_back = jax.vjp(lambda p: module.apply({"params": p}, images, tokens), params)
  gradients = pull_back(tuple(jnp.float32(g) for g in of_embeddings[:3]))[0]
  norm = float(optax.global_norm(gradients))

  _, metrics = steps.create(config, mesh)(state, {"images": images, "tokens": tokens})
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics["logit_scale"], 1 / 0.07, rtol=1e-5)
  np.testing.assert_allclose(metrics["learning_rate"], 5e-4, rtol=1e-6)  # half way up: 1e-3 * 1 / 2


def test_logit_scale_is_clamped_after_the_update_and_can_come_back():
  config = resolved(optimizer={"learning_rate": 10.0, "warmup_steps": 0, "weight_decay": 0.0})
  mesh = meshes.create(config, jax.devices()[:1])
  state, step = states.create(config, mesh), steps.create(config, mesh)
  batch = dict(zip(("images", "tokens"), inputs(config.model, rows=16), strict=True))
  scales = []
  for _ in range(4):
    state, _ = step(state, batch)
    scales.append(float(state.params["logit_scale"]))
  assert max(scales) <= math.log(100) + 1e-6
  assert len(set(scales)) > 1


@pytest.mark.parametrize("limit, low, high", [(20.0, 19.99, 20.01), (None, 24.9, 25.1)])
def test_the_logit_scale_has_the_limit_of_the_config_or_none(limit, low, high):
  model = {**tiny()["model"], "logit_scale_init": 25.0}
  _, state, _ = train((1, 1, 1), count=1, loss={"max_logit_scale": limit}, model=model)
  assert low < float(jnp.exp(state.params["logit_scale"])) < high


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_both_methods_on_a_mesh_train_alike(name):
  bias = -10.0 if name == "sigmoid" else None
  runs = {}
  for method, shape in (("gather", (1, 1, 1)), ("gather", (2, 2, 2)), ("ring", (2, 2, 2))):
    loss = {"name": name, "method": method, "chunk": 3, "label_smoothing": 0.1, "mask_duplicates": True}
    runs[method, shape] = train(shape, loss=loss, model={**tiny()["model"], "logit_bias_init": bias})[2]
  want = runs.pop(("gather", (1, 1, 1)))
  for key, metrics in runs.items():
    for ours, theirs in zip(metrics, want, strict=True):
      assert ours.keys() == theirs.keys() and ("logit_bias" in ours) == (name == "sigmoid")
      for metric, value in theirs.items():
        np.testing.assert_allclose(ours[metric], value, rtol=2e-4, err_msg=f"{key} {metric}")


def test_duplicates_are_hidden_by_their_captions():
  config = resolved(loss={"mask_duplicates": True})
  mesh = meshes.create(config, jax.devices()[:1])
  state = states.create(config, mesh)
  images, tokens = inputs(config.model, rows=16)
  tokens[8:] = tokens[:8]
  image, text, scale = CLIP(config.model).apply({"params": state.params}, images, tokens)
  want, _ = dense_softmax(image, text, scale, keys=np.arange(16) % 8)
  _, metrics = steps.create(config, mesh)(state, {"images": images, "tokens": tokens})
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  assert abs(dense_softmax(image, text, scale)[0] - want) > 0.01


def test_parameters_that_are_not_finite_show_in_the_metrics():
  config = resolved()
  mesh = meshes.create(config, jax.devices()[:1])
  state = states.create(config, mesh)
  state = state.replace(params={**state.params, "logit_scale": jnp.float32(jnp.nan)})
  batch = dict(zip(("images", "tokens"), inputs(config.model, rows=16), strict=True))
  metrics = steps.create(config, mesh)(state, batch)[1]
  assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])


def test_what_is_left_out_depends_on_the_step_and_the_row_alone():
  config = resolved()
  one, eight = meshes.create(config, jax.devices()[:1]), meshes.create(resolved((2, 2, 2)), jax.devices()[:8])
  keys = [jax.random.key_data(steps.example_keys(config, mesh, step)) for mesh, step in ((one, 3), (eight, 3), (one, 4))]
  np.testing.assert_array_equal(keys[0], keys[1])
  assert len(np.unique(np.concatenate([keys[0], keys[2]]), axis=0)) == 32


def test_state_lies_where_the_rules_say():
  _, state, _ = train((2, 2, 2), count=1)
  block = state.params["image"]["transformer"]["block_0"]
  expected = {
    "mlp_in": (block["mlp_in"]["kernel"], PartitionSpec("fsdp", "tensor")),
    "mlp_out": (block["mlp_out"]["kernel"], PartitionSpec("tensor", "fsdp")),
    "qkv": (block["attention"]["qkv_kernel"], PartitionSpec("fsdp", None, "tensor", None)),
    "norm": (block["norm_1"]["scale"], PartitionSpec("fsdp")),
    "words": (state.params["text"]["token_embedding"], PartitionSpec(None, "fsdp")),
  }
  for name, (array, spec) in expected.items():
    assert array.sharding.spec == spec, name
  kernel = block["mlp_in"]["kernel"]
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 64)}  # of [32, 128]
  moments = state.opt_state[1].mu["image"]["transformer"]["block_0"]["mlp_in"]["kernel"]
  assert moments.sharding == kernel.sharding


def test_parameters_do_not_depend_on_the_mesh():
  one, eight = (train(shape, count=0)[1].params for shape in ((1, 1, 1), (2, 2, 2)))
  for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_state_is_donated():
  config = resolved()
  mesh = meshes.create(config, jax.devices()[:1])
  state = states.create(config, mesh)
  batch = dict(zip(("images", "tokens"), inputs(config.model, rows=16), strict=True))
  steps.create(config, mesh)(state, batch)
  assert state.params["image"]["projection"].is_deleted()
