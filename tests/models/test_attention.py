"""The attention kernel for TPU, interpreted here and compiled for slices that are not there, and cuDNN's, against float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from clip_jax.models import attention
from clip_jax.plan import compile as compiler


def reference(qkv, bias, heads, causal, gradient):
  """Attention and its gradients, head by head in float64, from the equations."""
  qkv, gradient = np.asarray(qkv, np.float64) + np.asarray(bias, np.float64), np.asarray(gradient, np.float64)
  batch, length, width = gradient.shape
  size = width // heads
  mixed, found = np.zeros_like(gradient), np.zeros_like(qkv)
  for row in range(batch):
    for head in range(heads):
      places = [slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)]
      query, key, value = (qkv[row][:, place] for place in places)
      scores = query @ key.T / np.sqrt(size)
      if causal:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
      weights = np.exp(scores - scores.max(1, keepdims=True))
      weights /= weights.sum(1, keepdims=True)
      mixed[row][:, places[0]] = weights @ value
      given = gradient[row][:, places[0]]
      of_weights = given @ value.T
      of_scores = weights * (of_weights - (weights * of_weights).sum(1, keepdims=True)) / np.sqrt(size)
      for place, x in zip(places, (of_scores @ key, of_scores.T @ query, weights.T @ given), strict=True):
        found[row][:, place] = x
  return mixed, found, found.sum((0, 1))


def arrays(batch, length, width, dtype=jnp.float32, seed=0):
  random = np.random.default_rng(seed)
  shapes = (batch, length, 3 * width), (3 * width,), (batch, length, width)
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)  # one program; operation by operation there would be dozens
def value_and_gradients(attend, qkv, bias, gradient):
  mixed, back = jax.vjp(attend, qkv, bias)
  return mixed, *back(gradient)


# Each shape is another program, of every row and head in turn: few are drawn, and what must not be missed is written down.
# As many rows at a time as there may be, heads of each size, one row of a prime number, a single token, and lengths that fill registers.
@settings(max_examples=4, deadline=None)
@example(batch=8, length=16, size=64, groups=1, causal=True, seed=0)
@example(batch=9, length=50, size=32, groups=2, causal=False, seed=1)
@example(batch=2, length=37, size=80, groups=1, causal=True, seed=2)
@example(batch=1, length=1, size=128, groups=2, causal=False, seed=3)
@given(
  batch=st.integers(1, 4),
  length=st.integers(1, 60),
  size=st.sampled_from([32, 64, 80, 128]),
  groups=st.integers(1, 2),
  causal=st.booleans(),
  seed=st.integers(0, 2**31),
)
def test_value_and_gradients_equal_float64(batch, length, size, groups, causal, seed):
  width = math.lcm(size, 128) * groups
  heads = width // size
  assert attention.fits(length, width, heads)
  qkv, bias, gradient = arrays(batch, length, width, seed=seed)
  got = value_and_gradients(lambda qkv, bias: attention.packed(qkv, bias, heads, causal, True), qkv, bias, gradient)
  for x, want in zip(got, reference(qkv, bias, heads, causal, gradient), strict=True):
    np.testing.assert_allclose(x, want, rtol=0, atol=3e-5 * max(np.abs(want).max(), 1))


@pytest.mark.parametrize("length, causal", [(197, False), (77, True), (257, False)])
def test_in_bfloat16_it_is_as_near_as_xlas(length, causal):
  qkv, bias, gradient = arrays(3, length, 128, jnp.bfloat16)

  def dense(qkv, bias):
    query, key, value = (x.reshape(3, length, 2, 64) for x in jnp.split(qkv + bias, 3, -1))
    return attention.dense(query, key, value, causal, jnp.bfloat16).reshape(3, length, 128)

  want = reference(qkv, bias, 2, causal, gradient)
  ours = value_and_gradients(lambda qkv, bias: attention.packed(qkv, bias, 2, causal, True), qkv, bias, gradient)
  xlas = value_and_gradients(dense, qkv, bias, gradient)
  for x, other, exact in zip(ours, xlas, want, strict=True):
    error, others = (np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact) for y in (x, other))
    assert error < max(1.5 * others, 0.01)


def test_what_the_kernel_takes():
  assert attention.fits(197, 768, 12) and attention.fits(77, 512, 8) and attention.fits(577, 1024, 16)
  assert attention.fits(257, 1280, 16, "TPU v4")  # eight heads of 80 fill five times 128 lanes
  assert attention.fits(257, 1664, 16) and not attention.fits(257, 1664, 16, "TPU v4")  # sixteen of 104 do not fit there
  assert not attention.fits(197, 192, 3)  # three heads of 64 leave lanes empty
  assert not attention.fits(1025, 768, 12)


def mesh_of(*shape):
  auto = (jax.sharding.AxisType.Auto,) * 3
  return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"), axis_types=auto)


def test_which_attention_goes_with_a_mesh():
  cpu = mesh_of(2, 1, 1)
  assert attention.create("auto", cpu) is None and attention.create("xla", cpu) is None
  assert attention.create("pallas", cpu) is not None
  assert attention.create("pallas", mesh_of(1, 1, 2)) is None
  assert attention.create("cudnn", mesh_of(1, 1, 2)) is attention.cudnn
  tpu = Mesh(np.array(compiler.devices("v5e:2x2")).reshape(4, 1, 1), ("data", "fsdp", "tensor"))
  assert attention.create("auto", tpu) is not None and attention.create("xla", tpu) is None


@pytest.mark.parametrize("length, heads, size, causal", [(50, 12, 64, False), (77, 8, 64, True), (33, 2, 80, False)])
def test_what_is_around_cudnn_is_attention(length, heads, size, causal):
  """Its arguments and their gradients, with XLA in its place."""
  qkv, bias, gradient = arrays(3, length, heads * size, jnp.bfloat16)
  attend = functools.partial(attention.cudnn, heads=heads, causal=causal, implementation="xla")
  for got, want in zip(value_and_gradients(attend, qkv, bias, gradient), reference(qkv, bias, heads, causal, gradient), strict=True):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is on NVIDIA's GPUs alone")
@pytest.mark.parametrize("length, heads, size, causal", [(50, 12, 64, False), (77, 8, 64, True), (197, 12, 64, False), (257, 16, 80, False)])
def test_cudnn_is_attention(length, heads, size, causal):
  qkv, bias, gradient = arrays(4, length, heads * size, jnp.bfloat16)
  attend = jax.jit(functools.partial(attention.cudnn, heads=heads, causal=causal))
  for got, want in zip(value_and_gradients(attend, qkv, bias, gradient), reference(qkv, bias, heads, causal, gradient), strict=True):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.02 * np.linalg.norm(want)


def test_what_cudnn_does_not_take_is_left_to_xla():
  assert attention.cudnn(jnp.zeros((1, 5, 3 * 64)), jnp.zeros(3 * 64), 1, False) is None  # float32
  for size in (12, 136):
    qkv, bias, _ = arrays(1, 5, 2 * size, jnp.bfloat16)
    assert attention.cudnn(qkv, bias, 2, False) is None
    assert attention.create("pallas", mesh_of(1, 1, 1))(qkv, bias, 2, False) is None


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)], ids=str)
def test_on_a_mesh_it_is_what_it_is_on_one_device(shape):
  qkv, bias, gradient = arrays(8, 13, 128)
  attend = attention.create("pallas", mesh_of(*shape))
  got = value_and_gradients(lambda qkv, bias: attend(qkv, bias, 2, True), qkv, bias, gradient)
  for x, want in zip(got, reference(qkv, bias, 2, True, gradient), strict=True):
    np.testing.assert_allclose(x, want, atol=3e-5 * np.abs(want).max())


SHAPES = [(50, 12, 64, False), (77, 8, 64, True), (197, 12, 64, False), (257, 16, 80, False), (257, 16, 88, False), (577, 16, 64, False), (257, 16, 104, False)]
# On one TPU all shapes; on the others those that need most of its fast memory, which the first has least of.
COMPILED = [*(("v5e:2x2", *shape) for shape in SHAPES), *(("v4:2x2x1", *shape) for shape in SHAPES[3:6])]
COMPILED += [(topology, *shape) for topology in ("v5p:2x2x1", "v6e:2x2") for shape in SHAPES[5:]]


@pytest.mark.parametrize("topology, length, heads, size, causal", COMPILED)
def test_it_compiles_for_every_tpu_and_keeps_no_scores(topology, length, heads, size, causal):
  device = compiler.devices(topology)[0]
  batch, width, sharding = 16, size * heads, jax.sharding.SingleDeviceSharding(device)
  shapes = (batch, length, 3 * width), (3 * width,), (batch, length, width)
  inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
  step = jax.jit(lambda *x: value_and_gradients(lambda qkv, bias: attention.packed(qkv, bias, heads, causal), *x))
  if not attention.fits(length, width, heads, device.device_kind):
    assert topology.startswith("v4") and size > 80  # its fast memory is the smallest
    with pytest.raises(compiler.OutOfMemoryError):
      compiler.compile(step, *inputs, fresh=True)
    return
  # JAX cannot read back from its cache what was compiled for chips that are not there.
  report = compiler.report(compiler.compile(step, *inputs, fresh=True))
  scores = 4 * batch * heads * length**2
  assert report.temporary_bytes < 4 * 2 * batch * -(-length // 16) * 16 * 3 * width
  assert length < 577 or report.temporary_bytes < scores / 2
