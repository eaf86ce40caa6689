"""The jitted step: the same on every mesh, with state where its rules say."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from clip_jax import config as configs
from clip_jax.models import size
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import optimizer as optimizers
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.losses.reference import dense_softmax
from tests.models.test_clip import inputs


def resolved(shape=(1, 1, 1), more_mesh=None, **sections):
  mesh = dict(zip(("data", "fsdp", "tensor"), shape, strict=True)) | (more_mesh or {})
  return configs.resolve(tiny(mesh=mesh, **sections))


@functools.cache
def beginning(model, optimizer):
  """A new state, on the host: it is the same on any mesh, and is made once for all of them."""
  config = dataclasses.replace(resolved(), model=model, optimizer=optimizer)
  return jax.device_get(states.create(config, meshes.create(config, jax.devices()[:1])))


def begin(config, shape=(1, 1, 1)):
  """A mesh, and a new state on it."""
  mesh = meshes.create(config, jax.devices()[: int(np.prod(shape))])
  return mesh, jax.device_put(beginning(config.model, config.optimizer), states.shardings_of(states.describe(config, mesh)[0]))


@functools.cache
def plain_step():
  """The step of the plain config on one device, for all who call it."""
  return steps.create(resolved(), begin(resolved())[0])


def train(shape, count=3, **sections):
  config = resolved(shape, **sections)
  mesh, state = begin(config, shape)
  step = steps.create(config, mesh)
  measured = []
  for seed in range(count):
    images, tokens = inputs(config.model, rows=16, seed=seed)
    state, metrics = step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, 16))
    measured.append(jax.device_get(metrics))
  return config, state, measured


@functools.cache
def trained(shape=(1, 1, 1)):
  """Of the plain config, for all who ask."""
  return train(shape, count=5)


def assert_same_result(got, want):
  """Of two trainings on different meshes, or computed in different ways."""
  (_, state, metrics), (_, want_state, want_metrics) = got, want
  for ours, theirs in zip(metrics, want_metrics, strict=True):
    np.testing.assert_allclose(ours["loss"], theirs["loss"], atol=1e-4, rtol=0)
    for name, value in theirs.items():
      np.testing.assert_allclose(ours[name], value, rtol=2e-4, err_msg=name)
  # The running means of the gradients, and not the parameters: Adam divides by the gradient's size, and
  # makes whole updates of what is rounding alone (the keys' biases, whose true gradient is zero).
  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(state.opt_state[1].mu), jax.tree.leaves(want_state.opt_state[1].mu), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=5e-4 * np.abs(theirs).max(), err_msg=str(path))


@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_every_mesh_gives_the_one_device_result(shape):
  """Those with one axis of eight or four devices are below, among ways to compute a step."""
  assert_same_result(trained(shape), trained())


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_every_optimizer_gives_the_one_device_losses_where_its_state_is_sharded(name):
  optimizer = {**tiny()["optimizer"], "name": name}
  (_, _, want), (_, state, got) = train((1, 1, 1), optimizer=optimizer), train((1, 4, 2), optimizer=optimizer)
  np.testing.assert_allclose([m["loss"] for m in got], [m["loss"] for m in want], atol=1e-4, rtol=0)
  block = "['image']['transformer']['block_0']"
  specs = {jax.tree_util.keystr(path): x.sharding.spec for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)}
  moments = {path: spec for path, spec in specs.items() if path.endswith(f"{block}['mlp_in']['kernel']")}
  assert moments and PartitionSpec("fsdp", "tensor") in moments.values()
  if name == "adafactor":  # [32, 128]: means over columns, which are more, and over rows
    assert [spec for path, spec in moments.items() if "v_row" in path] == [PartitionSpec("fsdp")]
    assert [spec for path, spec in moments.items() if "v_col" in path] == [PartitionSpec("tensor")]


def test_the_moving_average_follows_the_parameters_after_each_update():
  config = resolved(optimizer={**tiny()["optimizer"], "ema_decay": 0.2, "freeze": "^text/"}, loss={"max_logit_scale": 14.0})
  mesh, state = begin(config)
  step = steps.create(config, mesh)
  start = want = jax.tree.map(np.float64, jax.device_get(state.params))
  assert state.weights is state.ema
  for done in (1, 2, 3):
    state, _ = step(state, dict(zip(("images", "tokens"), inputs(config.model, rows=16, seed=done), strict=True)))
    params, kept = jax.device_get(state.params), min(0.2, (1 + done) / (10 + done))
    if done == 1:
      np.testing.assert_allclose(params["logit_scale"], math.log(14), rtol=1e-6)  # so the average is of what was clipped
    want = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * np.float64(new), want, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), state.ema, want)
  jax.tree.map(np.testing.assert_array_equal, state.ema["text"], start["text"])
  projection = state.ema["image"]["projection"]
  assert np.any(projection != params["image"]["projection"]) and np.any(projection != start["image"]["projection"])


def test_the_first_step_is_the_gradient_of_the_dense_loss():
  config, (_, state) = resolved(), begin(resolved())
  params = jax.device_get(state.params)
  images, tokens = inputs(config.model, rows=16, seed=0)
  towers = jax.jit(lambda p: CLIP(config.model).apply({"params": p}, images, tokens))  # not a program for each operation
  want, of_embeddings = dense_softmax(*towers(params))

  # Chain rule by hand: the float64 gradient of the loss, pulled back through the towers.
  pull_back = jax.jit(lambda p, given: jax.vjp(towers, p)[1](given)[0])
  gradients = pull_back(params, tuple(jnp.float32(g) for g in of_embeddings[:3]))
  norm = math.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(jax.device_get(gradients))))

  _, metrics = plain_step()(state, {"images": images, "tokens": tokens})
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics["logit_scale"], 1 / 0.07, rtol=1e-5)
  np.testing.assert_allclose(metrics["learning_rate"], 5e-4, rtol=1e-6)  # half way up: 1e-3 * 1 / 2


def test_logit_scale_is_clamped_after_the_update_and_can_come_back():
  config = resolved(optimizer={"learning_rate": 10.0, "warmup_steps": 0, "weight_decay": 0.0})
  mesh, state = begin(config)
  step = steps.create(config, mesh)
  batch = dict(zip(("images", "tokens"), inputs(config.model, rows=16), strict=True))
  scales = []
  for _ in range(4):
    state, _ = step(state, batch)
    scales.append(float(state.params["logit_scale"]))
  assert max(scales) <= math.log(100) + 1e-6
  assert len(set(scales)) > 1


def test_the_logit_scale_may_have_no_limit():
  """One that has another than 100 is above, with a moving average."""
  config = resolved(loss={"max_logit_scale": None})
  mesh, state = begin(config)
  state = state.replace(params={**state.params, "logit_scale": jnp.float32(math.log(110))})
  state, _ = steps.create(config, mesh)(state, dict(zip(("images", "tokens"), inputs(config.model, rows=16), strict=True)))
  assert 109.9 < float(jnp.exp(state.params["logit_scale"])) < 110.1


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


@pytest.mark.slow
def test_the_attention_kernel_trains_as_xlas():
  """On a mesh and in micro-batches; two heads of 64 fill the lanes of the kernel."""
  model = {"vision": {"patch_size": 8, "width": 128, "layers": 1, "heads": 2}, "text": {"context_length": 12, "width": 128, "layers": 1, "heads": 2}}
  runs = {}
  for name in ("xla", "pallas"):
    more = {"global_batch_size": 16, "steps": 4, "attention": name, "microbatches": 2}
    _, state, runs[name] = train((2, 2, 1), model=model | {"image_size": 16, "embed_dim": 16}, train=more)
  for ours, theirs in zip(runs["pallas"], runs["xla"], strict=True):
    for key, value in theirs.items():
      np.testing.assert_allclose(ours[key], value, rtol=1e-4, err_msg=key)


ZERO1 = {"sharding": "zero1"}
# Every axis alone, every sharding, all that can be computed again, in a loop and not: a policy is one function of the block in both.
WAYS = [
  ((1, 8, 1), {}, {"remat": "attention"}),
  ((4, 1, 2), {}, {"scan": True, "remat": "minimal"}),
  ((8, 1, 1), ZERO1, {}),
  ((2, 2, 2), ZERO1, {"scan": True}),
  ((2, 4, 1), {}, {"scan": True, "remat": "full"}),
  ((4, 1, 1), {}, {"remat": "full"}),
  *[((1, 1, 1), {}, {"remat": remat}) for remat in ("minimal", "offload")],
  *[((1, 1, 1), {}, {"scan": True, "remat": remat}) for remat in ("offload", "attention")],
]


@pytest.mark.slow
@pytest.mark.parametrize("shape, mesh, how", WAYS, ids=str)
def test_how_a_step_is_computed_changes_no_loss(shape, mesh, how):
  sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  more = {"train": {"global_batch_size": 16, "steps": 4, **how}}
  found = train(shape, count=5, more_mesh=mesh, **more)
  assert_same_result(found, trained())
  state = found[1]
  assert jax.tree.structure(state) == jax.tree.structure(trained()[1])
  kernel = state.params["image"]["transformer"]["block_1"]["mlp_in"]["kernel"]
  moment = state.opt_state[1].mu["image"]["transformer"]["block_1"]["mlp_in"]["kernel"]
  parts = [math.prod(x.shape) / math.prod(x.sharding.shard_shape(x.shape)) for x in (kernel, moment)]
  whole = sizes["tensor"] if mesh else sizes["fsdp"] * sizes["tensor"]
  assert parts == [whole, math.prod(shape) if mesh else whole]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("scan", [False, True])
def test_eight_bits_train_nearly_as_all(name, scan):
  train_in = {"global_batch_size": 16, "steps": 4, "quantization": name, "scan": scan, "remat": "minimal"}
  _, _, measured = train((2, 2, 2), count=5, train=train_in)
  for ours, theirs in zip(measured, trained()[2], strict=True):
    assert 0 < abs(ours["loss"] - theirs["loss"]) < 0.03 * theirs["loss"]
  np.testing.assert_allclose(measured[0]["gradient_norm"], trained()[2][0]["gradient_norm"], rtol=0.1)


def test_the_residual_stream_may_keep_more_digits_than_products():
  losses = {}
  for residual in (None, "bfloat16", "float32"):
    model = {**tiny()["model"], "compute_dtype": "bfloat16", "residual_dtype": residual}
    losses[residual] = [m["loss"] for m in train((1, 1, 1), model=model)[2]]
  exact = [m["loss"] for m in trained()[2][:3]]  # in float32
  assert losses[None] == losses["bfloat16"] != losses["float32"]
  for found in losses.values():
    np.testing.assert_allclose(found, exact, rtol=0.02)


def test_a_step_compiles_once_and_moves_nothing_that_it_was_not_told_to():
  config = resolved((2, 2, 2))
  mesh, state = begin(config, (2, 2, 2))
  step = steps.create(config, mesh)
  with jax.transfer_guard("disallow"):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
      jnp.zeros(3) + np.ones(3)  # the guard works here
    for seed in range(3):
      images, tokens = inputs(config.model, rows=16, seed=seed)
      state, metrics = step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, 16))
  assert step._cache_size() == 1 and np.isfinite(jax.device_get(metrics["loss"]))


def test_duplicates_are_hidden_by_their_captions():
  config = resolved(loss={"mask_duplicates": True})
  mesh, state = begin(config)
  images, tokens = inputs(config.model, rows=16)
  tokens[8:] = tokens[:8]
  image, text, scale = jax.jit(CLIP(config.model).apply)({"params": state.params}, images, tokens)
  want, _ = dense_softmax(image, text, scale, keys=np.arange(16) % 8)
  _, metrics = steps.create(config, mesh)(state, {"images": images, "tokens": tokens})
  np.testing.assert_allclose(metrics["loss"], want, rtol=1e-5)
  assert abs(dense_softmax(image, text, scale)[0] - want) > 0.01


@pytest.mark.parametrize(("name", "value"), [("adamw", np.nan), ("muon", np.inf), ("adafactor", -np.inf)])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name, value, monkeypatch):
  """Parameters, moments and averages stay to the bit; the learning rate goes by the step, whatever became of those before."""
  loss_with = steps.loss_with

  def with_poison(config, mesh):
    loss = loss_with(config, mesh)

    def of(params, embeddings, batch):
      bad = jnp.any(batch["tokens"] == POISON)
      return loss(params, embeddings, batch) * jnp.where(bad, value, 1.0)

    return of

  monkeypatch.setattr(steps, "loss_with", with_poison)
  optimizer = {**tiny()["optimizer"], "name": name, "ema_decay": 0.9}
  config = resolved((1, 2, 1), train={"global_batch_size": 16, "steps": 9}, optimizer=optimizer)
  mesh, state = begin(config, (1, 2, 1))
  step = steps.create(config, mesh)

  def batch(seed, poison=False):
    images, tokens = inputs(config.model, rows=16, seed=seed)
    if poison:
      tokens[3, 1] = POISON
    return rules.to_global({"images": images, "tokens": tokens}, mesh, 16)

  schedule = optimizers.create(config)[1]
  row = total = 0
  for seed, bad in enumerate([False, True, True, False, True, False]):
    before = jax.device_get(state)
    state, metrics = step(state, batch(seed, bad))
    after, metrics = jax.device_get((state, metrics))
    row, total = (row + 1 if bad else 0), total + bad
    assert after.step == before.step + 1 and metrics["learning_rate"] == pytest.approx(float(schedule(before.step)), rel=1e-6)
    assert (after.skipped, after.skipped_in_a_row) == (metrics["skipped"], metrics["skipped_in_a_row"]) == (total, row)
    same = [np.array_equal(a, b) for a, b in zip(*map(parts, (before, after)), strict=True)]
    assert all(same) if bad else not all(same)
    assert np.isfinite(metrics["loss"]) != bad and all(np.all(np.isfinite(x)) for x in parts(after))
    counts = {int(node.count) for node in jax.tree.leaves(after.opt_state, is_leaf=is_schedule) if is_schedule(node)}
    assert counts == {int(after.step)}


POISON = 4_321  # a token that no caption of these tests has


def is_schedule(node):
  return isinstance(node, optax.ScaleByScheduleState)


def parts(state):
  """What an update changes, but for the count of the schedule."""
  moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_schedule) if not is_schedule(x)]
  return [*jax.tree.leaves((state.params, state.ema)), *moments]


def test_finite_steps_are_computed_as_without_looking(monkeypatch):
  """Skipping is a choice between two states, and no change of either: to the bit what a step without it computes."""
  _, state, measured = trained()
  monkeypatch.setattr(steps, "keep_if", lambda good, new, old: new.replace(step=old.step + 1))
  _, plain, plainly = train((1, 1, 1), count=5)
  for ours, theirs in zip(jax.tree.leaves((state, measured)), jax.tree.leaves((plain, plainly)), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_parameters_that_are_not_finite_show_in_the_metrics():
  state = begin(resolved())[1]
  state = state.replace(params={**state.params, "logit_scale": jnp.float32(jnp.nan)})
  batch = dict(zip(("images", "tokens"), inputs(resolved().model, rows=16), strict=True))
  metrics = plain_step()(state, batch)[1]
  assert not np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
  assert metrics["skipped"] == metrics["skipped_in_a_row"] == 1


def test_what_is_left_out_depends_on_the_step_and_the_row_alone():
  config = resolved()
  one, eight = meshes.create(config, jax.devices()[:1]), meshes.create(resolved((2, 2, 2)), jax.devices()[:8])
  keys = [jax.random.key_data(steps.example_keys(config, mesh, step)) for mesh, step in ((one, 3), (eight, 3), (one, 4))]
  np.testing.assert_array_equal(keys[0], keys[1])
  assert len(np.unique(np.concatenate([keys[0], keys[2]]), axis=0)) == 32


def test_state_lies_where_the_rules_say():
  _, state, _ = trained((2, 2, 2))
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


def create(shape):
  config = resolved(shape)
  return states.create(config, meshes.create(config, jax.devices()[: int(np.prod(shape))]))


def test_parameters_do_not_depend_on_the_mesh():
  one, eight = (create(shape).params for shape in ((1, 1, 1), (2, 2, 2)))
  for ours, theirs in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_state_is_donated():
  state = begin(resolved())[1]
  batch = dict(zip(("images", "tokens"), inputs(resolved().model, rows=16), strict=True))
  plain_step()(state, batch)
  assert state.params["image"]["projection"].is_deleted()


def test_a_locked_tower_is_not_changed_and_costs_no_backward_pass():
  frozen = resolved(optimizer={"freeze": "^image/"})
  mesh = meshes.create(frozen, jax.devices()[:1])
  images, tokens = inputs(frozen.model, rows=16)
  batch, compiled = {"images": images, "tokens": tokens}, {}
  for name, config in (("frozen", frozen), ("free", resolved())):
    compiled[name] = steps.create(config, mesh).lower(states.describe(config, mesh)[0], batch).compile()
  flops = {name: program.cost_analysis()["flops"] for name, program in compiled.items()}
  forward = 2 * 16 * size.forward_macs(frozen.model)[0]
  assert 1.8 * forward < flops["free"] - flops["frozen"] < 2.6 * forward  # a backward pass is two forward ones
  state = begin(frozen)[1]
  before = jax.device_get(state.params)
  state, metrics = compiled["frozen"](state, batch)
  jax.tree.map(np.testing.assert_array_equal, state.params["image"], before["image"])
  assert np.abs(state.params["text"]["projection"] - before["text"]["projection"]).max() > 0
  assert metrics["gradient_norm"] > 0
