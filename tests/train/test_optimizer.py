"""Optimizers, and what they do by parameter, against float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.train import optimizer as optimizers
from clip_jax.train.state import describe
from tests.conftest import tiny
from tests.losses.reference import mesh_of


def resolved(**optimizer):
  return configs.resolve(tiny(optimizer=optimizer, train={"global_batch_size": 16, "steps": 20}))


NAMES = ("adamw", "lion", "adafactor", "muon")
# Named and shaped as in a model, small, with axes on either side of what Adafactor factors.
SHAPES = {
  "image/patch_kernel": (4, 4, 3, 32),
  "image/transformer/block_0/attention/qkv_kernel": (64, 3, 2, 32),
  "image/transformer/block_0/attention/qkv_bias": (3, 2, 32),
  "image/transformer/block_0/mlp_in/kernel": (32, 48),
  "image/transformer/block_0/mlp_out/kernel": (48, 32),
  "image/projection": (33, 40),
  "text/transformer/block_0/attention/out/kernel": (16, 24),
  "logit_scale": (),
}


def normal(seed, shapes=SHAPES):
  """Numbers of a tree of parameters: a flat dict in float64."""
  random = np.random.default_rng(seed)
  return {name: random.normal(size=shape) for name, shape in shapes.items()}


def tree_of(flat):
  return unflatten_dict({name: jnp.asarray(x, jnp.float32) for name, x in flat.items()}, sep="/")


def follow(config, start, gradients):
  """Parameters after some updates, as a flat dict, and the optimizer's state."""
  optimizer, _ = optimizers.create(config)
  params, update = tree_of(start), jax.jit(optimizer.update)
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = update(tree_of(gradient), state, params)
    params = optax.apply_updates(params, updates)
  return flatten_dict(params, sep="/"), state


def reference_adamw(o, name, gradients):
  mean = sum((1 - o.beta1) * o.beta1**i * g for i, g in enumerate(reversed(gradients)))
  square = sum((1 - o.beta2) * o.beta2**i * g**2 for i, g in enumerate(reversed(gradients)))
  count = len(gradients)
  return mean / (1 - o.beta1**count) / (np.sqrt(square / (1 - o.beta2**count)) + o.epsilon)


def reference_lion(o, name, gradients):
  momentum = sum((1 - o.beta2) * o.beta2**i * g for i, g in enumerate(reversed(gradients[:-1])))
  return np.sign(o.beta1 * momentum + (1 - o.beta1) * gradients[-1])


def reference_adafactor(o, name, gradients):
  largest = np.argsort(gradients[0].shape, kind="stable")[::-1][:2]
  factored = len(largest) == 2 and gradients[0].shape[largest[1]] >= 32
  rows = columns = square = average = 0.0
  for step, gradient in enumerate(gradients, 1):
    decay = min(1 - step**-0.8, o.beta2)
    if factored:
      rows = decay * rows + (1 - decay) * np.mean(gradient**2, axis=largest[0], keepdims=True)
      columns = decay * columns + (1 - decay) * np.mean(gradient**2, axis=largest[1], keepdims=True)
      square = rows * columns / np.mean(rows, axis=largest[1], keepdims=True)
    else:
      square = decay * square + (1 - decay) * gradient**2
    update = gradient / np.sqrt(square)
    update = update / max(1, np.sqrt(np.mean(update**2)))
    average = o.beta1 * average + (1 - o.beta1) * update
  return average


def newton_schulz(x):
  x = x / np.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
  return x


def reference_muon(o, name, gradients):
  if "transformer" not in name or "kernel" not in name:
    return reference_adamw(o, name, gradients)
  momentum = sum((1 - o.beta1) * o.beta1**i * g for i, g in enumerate(reversed(gradients)))
  count = len(gradients)
  ahead = o.beta1 * momentum / (1 - o.beta1 ** (count + 1)) + (1 - o.beta1) * gradients[-1] / (1 - o.beta1**count)
  matrices = [ahead] if ahead.ndim == 2 else [ahead[:, i].reshape(len(ahead), -1) for i in range(3)]
  update = [0.2 * max(m.shape) ** 0.5 * newton_schulz(m) for m in matrices]
  return update[0] if ahead.ndim == 2 else np.stack(update, axis=1).reshape(ahead.shape)


REFERENCES = {"adamw": reference_adamw, "lion": reference_lion, "adafactor": reference_adafactor, "muon": reference_muon}


@pytest.mark.parametrize("clip", [None, 20.0])
@pytest.mark.parametrize("name", NAMES)
def test_updates_equal_the_equations_in_float64(name, clip):
  config = resolved(name=name, learning_rate=0.01, warmup_steps=3, weight_decay=0.3, beta2=0.6, gradient_clip_norm=clip)
  start, gradients = normal(0), [normal(1 + step) for step in range(6)]
  got, _ = follow(config, start, gradients)
  norms = [np.sqrt(sum(np.sum(g**2) for g in gradient.values())) for gradient in gradients]
  assert min(norms) > 20  # so that all are clipped, or none
  for path, value in start.items():
    want, seen = value, []
    for step, gradient in enumerate(gradients):
      seen.append(gradient[path] * (1 if clip is None else clip / norms[step]))
      rate = 0.01 * (step + 1) / 3 if step < 3 else 0.01 * 0.5 * (1 + np.cos(np.pi * (step - 3) / 17))
      decay = 0.0 if path.endswith(("bias", "logit_scale")) else 0.3
      want = want - rate * (REFERENCES[name](config.optimizer, path, seen) + decay * want)
    error = np.linalg.norm(np.asarray(got[path], np.float64) - want) / np.linalg.norm(want - value)
    assert error < (1e-3 if name == "muon" else 3e-5), path  # five products amplify what is rounding


def test_muon_makes_queries_keys_and_values_orthogonal_and_as_large_as_adamws_updates():
  config = resolved(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
  shapes = {"text/transformer/block_0/attention/qkv_kernel": (64, 3, 2, 16), "text/transformer/block_0/mlp_in/kernel": (64, 256)}
  start, gradient = {name: np.zeros(shape) for name, shape in shapes.items()}, normal(0, shapes)
  got = {name: np.asarray(x) for name, x in follow(config, start, [gradient])[0].items()}
  qkv, mlp = got.values()
  for update in (*(qkv[:, i].reshape(64, 32) for i in range(3)), mlp):
    values = np.linalg.svd(update / (0.2 * max(update.shape) ** 0.5), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    assert 0.15 < np.sqrt(np.mean(update**2)) < 0.25
  # Had they been one matrix, queries would not be.
  together = newton_schulz(gradient["text/transformer/block_0/attention/qkv_kernel"].reshape(64, 96))
  assert np.linalg.svd(together.reshape(64, 3, 32)[:, 0], compute_uv=False).min() < 0.6


def test_muon_takes_the_matrices_of_transformer_blocks_and_no_others():
  def taken(**model):
    config = configs.resolve(tiny(model={**tiny()["model"], **model}, optimizer={"name": "muon"}))
    state = describe(config, mesh_of(1, 1, 1))[0].opt_state[1].inner_states["muon"]
    names = [optimizers.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    return {re.sub(r".*/(?=image|text)|block_\d+/", "", name) for name in names if re.search("image|text", name)}

  matrices = {"attention/qkv_kernel", "attention/out/kernel", "mlp_in/kernel", "mlp_out/kernel"}
  both = {f"{tower}/transformer/{name}" for tower in ("image", "text") for name in matrices}
  assert taken() == both
  assert taken(vision={"kind": "siglip", "patch_size": 8, "width": 16, "layers": 1, "heads": 2}) == both
  resnet = {"kind": "resnet", "stages": (1, 1, 1, 1), "width": 8, "heads": 4}
  assert taken(vision=resnet, image_size=32) == {name for name in both if name.startswith("text")}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_moment_is_kept_in_bfloat16_and_little_changes(name):
  start, gradients = normal(0), [normal(1 + step) for step in range(4)]
  moved, dtypes = {}, {}
  for dtype in ("float32", "bfloat16"):
    config = resolved(name=name, learning_rate=0.01, warmup_steps=0, weight_decay=0.0, mu_dtype=dtype)
    got, state = follow(config, start, gradients)
    moved[dtype] = {path: np.asarray(x) - start[path] for path, x in got.items() if path != "logit_scale"}
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    dtypes[dtype] = {path: leaf.dtype for path, leaf in leaves if "[" in path and leaf.ndim}
    first = {path for path in dtypes[dtype] if re.search(r"\.(mu|ema)\b", path)}
    assert len(first) >= len(SHAPES) - 1
    assert all(dtypes[dtype][path] == (dtype if path in first else "float32") for path in dtypes[dtype])
  errors = [np.linalg.norm(moved["bfloat16"][path] - want) / np.linalg.norm(want) for path, want in moved["float32"].items()]
  assert 0 < max(errors) < (0.15 if name == "lion" else 0.02)  # Lion's are signs, some of which turn


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


@pytest.mark.parametrize("name", NAMES)
def test_decay_has_a_factor_by_path_and_spares_what_no_decay_matches(name):
  rules = (("^image/.*kernel$", 0.5), ("^image/", 3.0), ("bias", 2.0), ("^text/", 0.0))
  config = resolved(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.2, decay_multipliers=rules)
  start = normal(0)
  got, _ = follow(config, start, [{path: np.zeros_like(x) for path, x in start.items()}])  # nothing but decay moves them
  factors = {"image/projection": 3.0, "logit_scale": 0.0, "text/transformer/block_0/attention/out/kernel": 0.0}
  for path, value in start.items():
    factor = 0.0 if path.endswith("bias") else factors.get(path, 0.5)
    np.testing.assert_allclose(got[path], value * (1 - 0.1 * 0.2 * factor), rtol=1e-6, err_msg=path)


def of_the_model(*configs_):
  """Random parameters of a tiny model, and by config their updates and the paths of the optimizer's state."""
  shapes = describe(configs_[0], mesh_of(1, 1, 1))[0].params
  params = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), jnp.float32), shapes)
  for config in configs_:
    optimizer, _ = optimizers.create(config)
    updates, state = jax.jit(lambda p, optimizer=optimizer: optimizer.update(p, optimizer.init(p), p))(params)
    yield updates, [optimizers.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_have_no_moments_and_the_rest_is_trained_as_without_them(name):
  configs_ = resolved(name=name), resolved(name=name, freeze="^image/")
  (plain, all_paths), (held, paths) = of_the_model(*configs_)
  assert sum(path.endswith("text/projection") for path in paths) == sum(path.endswith("text/projection") for path in all_paths) > 0
  assert any("image" in path for path in all_paths) and not any("image" in path for path in paths)
  assert not any(np.any(x) for x in jax.tree.leaves(held["image"]))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), held["text"], plain["text"])


@pytest.mark.parametrize("name", NAMES)
def test_learning_rates_by_pattern_and_by_layer(name):
  config = resolved(name=name, lr_multipliers=(("^image/", 0.1), ("projection$", 3.0), ("logit", 0.0)), layer_decay=0.5)
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
  assert {path: factor(path) for path in want} == pytest.approx(want)
  (before, _), (after, _) = of_the_model(resolved(name=name), config)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_allclose(y, factor(optimizers.path_name(path)) * x, rtol=1e-5)


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
    ({"decay_multipliers": (("tokens", 0.1),)}, "decay_multipliers[0]='tokens' matches no parameter"),
  ],
)
def test_patterns_that_match_nothing_are_refused(values, message):
  with pytest.raises(ConfigError) as error:
    describe(resolved(**values), mesh_of(1, 1, 1))
  assert message in str(error.value)


@pytest.mark.parametrize("decay", [0.1, 0.6, 0.9999])
def test_the_moving_average_forgets_the_start_and_then_keeps_its_pace(decay):
  random = np.random.default_rng(0)
  average = want = random.normal(size=5)
  average = {"x": jnp.float32(average), "still": jnp.float32(1 / 3)}
  for done in range(1, 30):
    params = random.normal(size=5)
    average = optimizers.moving_average(average, {"x": jnp.float32(params), "still": jnp.float32(1 / 3)}, jnp.int32(done), decay)
    kept = min(decay, (1 + done) / (10 + done))
    want = kept * want + (1 - kept) * params
    np.testing.assert_allclose(average["x"], want, rtol=1e-5, atol=1e-6)
  assert average["still"] == np.float32(1 / 3)  # exactly: a frozen parameter is its own average
