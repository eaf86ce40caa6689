"""Both losses by both methods against dense float64 references, on meshes of one to eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.losses.softmax import softmax_contrastive_loss
from tests.losses.reference import (
  DENSE,
  MESHES,
  assert_equal_to_reference,
  loss_of,
  mesh_of,
  unit_rows,
)

METHODS = ["gather", "ring"]
both = pytest.mark.parametrize("name", DENSE)
all_methods = pytest.mark.parametrize("method", METHODS)


@both
def test_the_references_gradients_are_those_of_its_values(name):
  image, text = unit_rows(6, 5, 0).astype(np.float64), unit_rows(6, 5, 1).astype(np.float64)
  options = dict(smoothing=0.2, weights=[1, 2, 0.5, 0, 1, 3], keys=[1, 1, 2, 3, 1, 4])
  _, gradients = DENSE[name](image, text, 7.0, -2.0, **options)
  steps = [np.random.default_rng(2).normal(size=np.shape(g)) for g in gradients]
  for i, step in enumerate(steps):
    def moved(by, i=i, step=step):
      arguments = [image, text, 7.0, -2.0]
      arguments[i] = arguments[i] + by * step
      return DENSE[name](*arguments, **options)[0]

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(gradients[i] * step), slope, rtol=1e-6, atol=1e-9)


@both
@all_methods
@pytest.mark.parametrize("shape", MESHES, ids=str)
@settings(max_examples=5, deadline=None)
@given(
  rows=st.integers(1, 4),
  chunk=st.integers(1, 5),
  scale=st.floats(1, 100),
  bias=st.floats(-12, 2),
  smoothing=st.sampled_from([0.0, 0.1]),
  weighted=st.booleans(),
  keyed=st.booleans(),
  seed=st.integers(0, 2**31),
)
def test_value_and_gradients_equal_dense_float64(
  name, method, shape, rows, chunk, scale, bias, smoothing, weighted, keyed, seed
):
  batch, random = rows * shape[0] * shape[1], np.random.default_rng(seed)
  assert_equal_to_reference(
    name,
    mesh_of(*shape),
    unit_rows(batch, 24, seed),
    unit_rows(batch, 24, seed + 1),
    scale,
    bias,
    method=method,
    chunk=chunk,
    smoothing=smoothing,
    weights=random.uniform(0.1, 3, batch).astype(np.float32) if weighted else None,
    keys=random.integers(0, 3, batch) if keyed else None,
  )


@both
@all_methods
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("chunk", [None, 7, 32])
def test_a_real_batch_is_within_1e_5(name, method, shape, chunk):
  image, text = unit_rows(256, 64, 0), unit_rows(256, 64, 1)
  text = text + image  # partly learned: the pair stands out
  text /= np.linalg.norm(text, axis=1, keepdims=True)
  mesh = mesh_of(*shape)
  loss = loss_of(name, mesh, method=method, chunk=chunk)
  value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(image, text, 14.3, -10.0)
  want, want_gradients = DENSE[name](image, text, np.float32(14.3), -10.0)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  for got, expected in zip(gradients, want_gradients, strict=True):
    assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


@both
@all_methods
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1)], ids=str)
@settings(max_examples=8, deadline=None)
@given(scale=st.floats(1, 100), smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 2**31))
def test_bfloat16_embeddings_stay_within_2e_2(name, method, shape, scale, smoothing, seed):
  image, text = (jnp.bfloat16(unit_rows(32, 64, seed + i)) for i in range(2))
  assert_equal_to_reference(
    name, mesh_of(*shape), image, text, scale, -10.0, 2e-2, dtype="bfloat16", method=method, chunk=3,
    smoothing=smoothing,
  )  # fmt: skip


@both
@all_methods
def test_a_nearly_learned_pair_keeps_its_gradient_in_bfloat16(name, method):
  # Its share of the softmax is 0.99 and more: rounded before the target is subtracted, 1 - share would be lost.
  image = jnp.bfloat16(np.eye(16, 32, dtype=np.float32))
  text = jnp.bfloat16(0.75 * np.eye(16, 32) + 0.25)
  assert_equal_to_reference(
    name, mesh_of(2, 1, 1), image, text, 12.0, -5.0, 2e-2, dtype="bfloat16", method=method
  )


@both
@all_methods
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("case", ["identical", "duplicated", "batch of one a shard", "opposite"])
def test_extreme_batches_at_the_largest_scale(name, method, shape, case):
  shards = shape[0] * shape[1]
  rows = shards if case == "batch of one a shard" else 2 * shards
  image, text = unit_rows(rows, 8, 4), unit_rows(rows, 8, 5)
  if case == "identical":
    image = text = np.repeat(image[:1], rows, axis=0)
  elif case == "duplicated":
    image[1::2], text[1::2] = image[::2], text[::2]
  elif case == "opposite":
    text = -image
  assert_equal_to_reference(name, mesh_of(*shape), image, text, 100, -10.0, method=method, chunk=3)


@all_methods
def test_a_batch_of_one_costs_nothing(method):
  image, text = unit_rows(1, 8, 0), unit_rows(1, 8, 1)
  value, gradients = jax.value_and_grad(loss_of("softmax", mesh_of(1, 1, 1), method=method), (0, 1))(image, text, 100.0)
  np.testing.assert_allclose(value, 0, atol=1e-4)
  np.testing.assert_allclose(gradients, 0, atol=1e-4)


@all_methods
def test_negatives_come_from_all_shards(method):
  # With a shard's own rows alone the loss would be that of eight batches of two.
  image, text = unit_rows(16, 8, 2), unit_rows(16, 8, 3)
  got = loss_of("softmax", mesh_of(8, 1, 1), method=method)(image, text, 20)
  local = np.mean([DENSE["softmax"](image[i : i + 2], text[i : i + 2], 20)[0] for i in range(0, 16, 2)])
  np.testing.assert_allclose(got, DENSE["softmax"](image, text, 20)[0], rtol=1e-5)
  assert abs(float(got) - local) > 0.1


@both
@all_methods
def test_equal_keys_hide_only_other_pairs(name, method):
  # All captions are the same text and key: each image has but its own caption as a candidate.
  image, text = unit_rows(8, 8, 6), np.repeat(unit_rows(1, 8, 7), 8, axis=0)
  loss = loss_of(name, mesh_of(4, 1, 1), method=method, chunk=1)
  value = loss(image, text, 10, -3, keys=np.zeros(8, np.uint32))
  pairs = 10 * np.sum(image * text, axis=1) - 3
  want = 0 if name == "softmax" else np.mean(np.logaddexp(0, -pairs))
  np.testing.assert_allclose(value, want, atol=1e-5)


@both
@all_methods
def test_weights_of_zero_and_one_choose_the_queries(name, method):
  image, text = unit_rows(8, 8, 8), unit_rows(8, 8, 9)
  weights = np.float32([1, 0, 0, 1, 1, 0, 1, 0])
  loss = loss_of(name, mesh_of(2, 1, 1), method=method)
  assert float(loss(image, text, 10, -3, weights=weights)) != pytest.approx(float(loss(image, text, 10, -3)), rel=1e-3)
  twice = loss(image, text, 10, -3, weights=2 * weights)
  np.testing.assert_allclose(twice, loss(image, text, 10, -3, weights=weights), rtol=1e-6)


@both
@all_methods
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_inside_jit_shows_in_the_loss(name, method, bad):
  image, text = unit_rows(16, 8, 0), unit_rows(16, 8, 1)
  image[5, 2] = bad
  assert not np.isfinite(jax.jit(loss_of(name, mesh_of(4, 1, 1), method=method, chunk=2))(image, text, 10.0, -3.0))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(text=np.zeros((4, 3), np.float32)), "image is float32 [4, 8] and text is float32 [4, 3]"),
    (dict(text=np.zeros((4, 8), np.float16)), "of one dtype"),
    (dict(image=np.zeros((4, 8), np.int32), text=np.zeros((4, 8), np.int32)), "embeddings are int32; expected float32"),
    (dict(method="rign"), "method='rign' must be one of 'gather', 'ring'"),
    (dict(chunk=0), "chunk=0 must be at least 1"),
    (dict(label_smoothing=1.0), "label_smoothing=1.0 must be at least 0 and less than 1"),
    (dict(weights=np.ones(3)), "weights are [3]; expected [4], one a pair"),
    (dict(keys=np.ones((4, 2), int)), "keys are [4, 2]; expected [4]"),
  ],
)
def test_wrong_arguments_are_one_sentence(arguments, message):
  given = dict(image=unit_rows(4, 8, 0), text=unit_rows(4, 8, 1)) | arguments
  with pytest.raises(ValueError) as error:
    softmax_contrastive_loss(logit_scale=1.0, axes=("data",), **given)
  assert message in str(error.value) and "\n" not in str(error.value)
