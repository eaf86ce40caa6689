"""Dense float64 NumPy references of the losses, written from the equations, and what the tests of losses share."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import config as configs
from clip_jax.losses import global_batch

MESHES = [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]


def mesh_of(data, fsdp, tensor):
  devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
  return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def unit_rows(rows, width, seed):
  x = np.random.default_rng(seed).normal(size=(rows, width))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def candidates(n, keys):
  """Which texts are scored for which images."""
  if keys is None:
    return np.ones((n, n), bool)
  keys = np.asarray(keys)
  return (keys[:, None] != keys[None, :]) | np.eye(n, dtype=bool)


def dense_softmax(image, text, scale, bias=0.0, *, smoothing=0.0, weights=None, keys=None):
  """Value and gradients of the softmax loss: image, text, scale, bias."""
  image, text, scale = (np.asarray(x, np.float64) for x in (image, text, scale))
  n = len(image)
  weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
  cosines, allowed = image @ text.T, candidates(n, keys)

  def direction(logits):  # each row a query; allowed is symmetric
    logits = np.where(allowed, logits, -np.inf)
    peak = logits.max(axis=1, keepdims=True)
    log_share = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    target = (1 - smoothing) * np.eye(n) + smoothing * allowed / allowed.sum(axis=1, keepdims=True)
    losses = -np.sum(target * np.where(allowed, log_share, 0), axis=1)
    return weights @ losses, weights[:, None] * (np.exp(log_share) - target)

  by_image, pull_image = direction(scale * cosines)
  by_text, pull_text = direction(scale * cosines.T)
  pull = (pull_image + pull_text.T) / (2 * weights.sum())
  value = (by_image + by_text) / (2 * weights.sum())
  return value, (scale * pull @ text, scale * pull.T @ image, np.sum(pull * cosines), 0.0)


def dense_sigmoid(image, text, scale, bias, *, smoothing=0.0, weights=None, keys=None):
  """Value and gradients of the sigmoid loss: image, text, scale, bias."""
  image, text, scale, bias = (np.asarray(x, np.float64) for x in (image, text, scale, bias))
  n = len(image)
  weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
  cosines = image @ text.T
  logits = scale * cosines + bias
  target = np.eye(n) * (1 - smoothing) + smoothing / 2
  counts = candidates(n, keys) * (weights[:, None] + weights[None, :]) / 2 / weights.sum()
  losses = target * np.logaddexp(0, -logits) + (1 - target) * np.logaddexp(0, logits)
  pull = counts * (1 / (1 + np.exp(-logits)) - target)
  gradients = scale * pull @ text, scale * pull.T @ image, np.sum(pull * cosines), np.sum(pull)
  return np.sum(counts * losses), gradients


DENSE = {"softmax": dense_softmax, "sigmoid": dense_sigmoid}


def loss_of(name, mesh, **settings):
  """The project's loss on whole arrays."""
  return global_batch.create(configs.Loss(name=name, **settings), mesh)


@functools.cache
def program(name, mesh, **settings):
  """A loss and its gradients, jitted once for all who ask for the same settings."""
  loss = loss_of(name, mesh, **settings)

  def call(image, text, scale, bias, weights, keys):
    return loss(image, text, scale, bias, weights=weights, keys=keys)

  return jax.jit(jax.value_and_grad(call, (0, 1, 2, 3)))


def assert_equal_to_reference(
  name, mesh, image, text, scale, bias=0.0, tolerance=1e-5, smoothing=0.0, weights=None, keys=None, **settings
):
  """Value within a relative tolerance, each gradient within it relative to its largest entry.

  Single entries may cancel to nothing, so both have a floor: a few units in the last place of the largest
  logit, which is what any float32 computation of these logits is wrong by. A share is wrong by as much where its logit is
  computed a second time, as the backward pass does, and the gradient of an embedding is a share times the scale and the
  pair's part of all weights.
  """
  call = program(name, mesh, label_smoothing=smoothing, **settings)
  value, gradients = call(image, text, np.float32(scale), np.float32(bias), weights, keys)
  image, text = (np.asarray(x, np.float64) for x in (image, text))
  want, want_gradients = DENSE[name](
    image, text, np.float32(scale), np.float32(bias), smoothing=smoothing, weights=weights, keys=keys
  )
  floor = 3e-7 * (scale + abs(bias))
  np.testing.assert_allclose(value, want, rtol=tolerance, atol=floor)
  for part, got, expected in zip(("image", "text", "scale", "bias"), gradients, want_gradients, strict=True):
    part_of_weights = 1 / len(image) if weights is None else np.max(weights) / np.sum(weights)
    passed_on = max(scale * part_of_weights, 1) if part in ("image", "text") else 1
    bound = tolerance * np.abs(expected).max() + floor * passed_on
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound, err_msg=part)
