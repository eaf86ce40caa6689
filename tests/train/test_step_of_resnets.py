"""The jitted step of a ResNet: its batch norms are over the global batch, and their running statistics the batch's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.models.clip import CLIP, normalize_pixels
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import optimizer as optimizers
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.losses.reference import dense_softmax
from tests.models.test_clip import inputs
from tests.train.test_step import resolved

RESNET = {
  "model": {
    **tiny()["model"],
    "image_size": 32,
    "vision": {"kind": "resnet", "stages": (1, 1, 1, 1), "width": 8, "heads": 4},
  },
  # A large epsilon: without it Adam makes whole updates of gradients that are rounding alone.
  "optimizer": {"learning_rate": 0.01, "warmup_steps": 0, "epsilon": 0.01, "ema_decay": 0.9},
}


@functools.cache
def resnet_step(shape):
  config = resolved(shape, **RESNET)
  mesh = meshes.create(config, jax.devices()[: int(np.prod(shape))])
  described, rows = states.describe(config, mesh)[0], rules.batch_sharding(mesh)
  shapes = {"images": ((16, 32, 32, 3), jnp.uint8), "tokens": ((16, 12), jnp.int32)}
  batch = {name: jax.ShapeDtypeStruct(*given, sharding=rows) for name, given in shapes.items()}
  return config, mesh, described, steps.create(config, mesh).lower(described, batch).compile()


def resnet_start():
  """A state on the host, far from a new one, whose gradients reach every parameter."""
  config, _, described, _ = resnet_step((1, 1, 1))
  state, random = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), described), np.random.default_rng(0)
  flat = flatten_dict(state.params)
  for path, x in flat.items():
    flat[path] = x + np.float32(path[-1] in ("scale", "var")) + 0.1 * random.normal(size=x.shape).astype(np.float32)
  flat["logit_scale",] = np.log(config.model.logit_scale_init, dtype=np.float32)
  return state.replace(params=unflatten_dict(flat), ema=unflatten_dict(flat))


def train_resnet(shape=(1, 1, 1), seeds=(0, 1)):
  config, mesh, described, step = resnet_step(shape)
  state, losses = jax.device_put(resnet_start(), states.shardings_of(described)), []
  for seed in seeds:
    images, tokens = inputs(config.model, rows=16, seed=seed)
    state, metrics = step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, 16))
    losses.append(float(metrics["loss"]))
  return jax.device_get(state), losses


def changes(state):
  """What training added to the parameters, by path; without the keys' biases, whose true gradient is zero."""
  flat = flatten_dict(jax.tree.map(np.subtract, state.params, resnet_start().params), sep="/")
  return {path: np.delete(x, 1, axis=0) if path.endswith("qkv_bias") else x for path, x in flat.items()}


def test_a_resnet_is_normalised_by_the_global_batch_on_a_mesh():
  (want_state, want_losses), (state, losses) = train_resnet(), train_resnet((4, 2, 1))
  np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
  got = changes(state)
  for path, want in changes(want_state).items():
    assert np.linalg.norm(got[path] - want) < 2e-4 * np.linalg.norm(want), path


def test_training_a_resnet_lowers_its_loss():
  _, losses = train_resnet(seeds=[0] * 6)
  assert losses[-1] < losses[0] / 2


def test_running_statistics_are_set_by_the_batch_and_not_by_the_optimizer():
  start, (state, _) = resnet_start(), train_resnet(seeds=[0])
  config = resolved(**RESNET)
  before, after = flatten_dict(start.params), flatten_dict(state.params)
  decayed = flatten_dict(optimizers.decay_mask(config.optimizer.no_decay)(start.params))
  moments = [flatten_dict(m) for m in (state.opt_state[1].mu, state.opt_state[1].nu)]
  paths = [path for path in before if path[-1] in ("mean", "var")]
  assert len(paths) == 2 * (3 + 4 * 4)
  for path in paths:
    assert np.any(after[path] != before[path]), path
    assert not decayed[path] and not any(np.any(m[path]) for m in moments), path

  average = flatten_dict(state.ema)  # copies what is an average already
  for path, x in after.items():
    want = x if path in paths else 2 / 11 * before[path] + 9 / 11 * x
    np.testing.assert_allclose(average[path], want, rtol=1e-5, atol=1e-6, err_msg=str(path))

  # Those of the first norm, from its input.
  pixels = normalize_pixels(inputs(config.model, rows=16, seed=0)[0], config.model.image_mean, config.model.image_std)
  kernel = before["image", "stem", "conv_1", "kernel"]
  padded = np.pad(np.float64(pixels), ((0, 0), (1, 1), (1, 1), (0, 0)))
  x = sum(padded[:, i : i + 32 : 2, j : j + 32 : 2] @ kernel[i, j] for i in range(3) for j in range(3))
  for name, of_batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2), ddof=1))):
    path = ("image", "stem", "norm_1", name)
    np.testing.assert_allclose(after[path], 0.9 * before[path] + 0.1 * of_batch, rtol=1e-5, atol=1e-6)


def test_a_locked_resnet_keeps_its_running_statistics():
  config = resolved(**{**RESNET, "optimizer": {"freeze": "^image/"}})
  mesh = meshes.create(config, jax.devices()[:1])
  images, tokens = inputs(config.model, rows=16)
  batch = {"images": images, "tokens": tokens}
  params = resnet_start().params
  optimizer, _ = optimizers.create(config)
  zero = jnp.zeros((), jnp.int32)
  state = states.TrainState(zero, params, optimizer.init(params), None, zero, zero)
  step = jax.jit(steps.train_step(config, mesh)).lower(state, batch).compile()
  after, metrics = step(state, batch)
  jax.tree.map(np.testing.assert_array_equal, after.params["image"], params["image"])
  image, text, scale = jax.jit(CLIP(config.model).apply)({"params": params}, images, tokens)  # as at inference
  np.testing.assert_allclose(metrics["loss"], dense_softmax(image, text, scale)[0], rtol=1e-5)
