"""The loss against a dense float64 reference, on meshes of one to eight devices."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from clip_jax.train.step import global_loss

MESHES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 2)]


def mesh_of(data, fsdp, tensor):
  devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
  return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def dense_reference(image, text, scale):
  """Value and gradients, in float64, from the equations of the paper's figure 3."""
  image, text, scale = (np.asarray(x, np.float64) for x in (image, text, scale))
  n = len(image)
  dots = image @ text.T
  logits = scale * dots

  def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)

  def cross_entropy(x):
    peak = x.max(axis=1)
    return np.mean(peak + np.log(np.exp(x - peak[:, None]).sum(axis=1)) - np.diag(x))

  value = (cross_entropy(logits) + cross_entropy(logits.T)) / 2
  of_logits = (softmax(logits) - np.eye(n) + softmax(logits.T).T - np.eye(n)) / (2 * n)
  return value, (scale * of_logits @ text, scale * of_logits.T @ image, np.sum(of_logits * dots))


def unit_rows(rows, width, seed):
  x = np.random.default_rng(seed).normal(size=(rows, width))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def assert_equal_to_reference(mesh, image, text, scale, tolerance=1e-5):
  loss = jax.jit(jax.value_and_grad(global_loss(mesh), argnums=(0, 1, 2)))
  value, gradients = loss(image, text, np.float32(scale))
  want, want_gradients = dense_reference(image, text, np.float32(scale))
  # Relative to the largest entry: single entries may cancel to nothing. A loss of zero (batch of one)
  # leaves rounding of the logits themselves, which are as large as the scale.
  np.testing.assert_allclose(value, want, rtol=tolerance, atol=3e-7 * scale)
  for got, expected in zip(gradients, want_gradients, strict=True):
    bound = tolerance * np.abs(expected).max() + 3e-7 * scale
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("shape", MESHES, ids=str)
@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 4), scale=st.floats(1, 100), seed=st.integers(0, 2**31))
def test_value_and_gradients_equal_dense_float64(shape, rows, scale, seed):
  mesh = mesh_of(*shape)
  batch = rows * shape[0] * shape[1]
  assert_equal_to_reference(mesh, unit_rows(batch, 24, seed), unit_rows(batch, 24, seed + 1), scale)


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1)], ids=str)
def test_a_real_batch_is_within_1e_5(shape):
  image, text = unit_rows(256, 64, 0), unit_rows(256, 64, 1)
  mesh = mesh_of(*shape)
  value, gradients = jax.jit(jax.value_and_grad(global_loss(mesh), argnums=(0, 1, 2)))(image, text, 14.3)
  want, want_gradients = dense_reference(image, text, np.float32(14.3))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got, expected in zip(gradients, want_gradients, strict=True):
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 1e-5


def test_negatives_come_from_all_shards():
  # Each shard's two images match only captions of other shards' rows if those are seen at all: with the
  # local batch alone the loss would be that of eight batches of two.
  image, text = unit_rows(16, 8, 2), unit_rows(16, 8, 3)
  got = global_loss(mesh_of(8, 1, 1))(image, text, np.float32(20))
  local = np.mean([dense_reference(image[i : i + 2], text[i : i + 2], 20)[0] for i in range(0, 16, 2)])
  np.testing.assert_allclose(got, dense_reference(image, text, 20)[0], rtol=1e-5)
  assert abs(float(got) - local) > 0.1


def test_identical_rows_and_the_largest_scale():
  same = np.repeat(unit_rows(1, 8, 4), 16, axis=0)
  assert_equal_to_reference(mesh_of(4, 1, 1), same, same, 100)
  np.testing.assert_allclose(global_loss(mesh_of(4, 1, 1))(same, same, np.float32(100)), np.log(16), rtol=1e-5)


def test_bfloat16_embeddings_are_scored_in_float32():
  image, text = (jax.numpy.bfloat16(unit_rows(32, 16, seed)) for seed in (5, 6))
  got = global_loss(mesh_of(2, 1, 1))(image, text, np.float32(50))
  want = dense_reference(np.asarray(image, np.float64), np.asarray(text, np.float64), 50)[0]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, rtol=1e-5)
