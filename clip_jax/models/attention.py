"""Softmax attention: written for XLA, cuDNN's, and a kernel for the short sequences of CLIP on TPU.

A block of a ViT-B/16 spends most of its memory traffic on attention, and most of that on scores: 12 heads of 197 x 197
float32 numbers an image, written and read several times. They fit into a core's own memory (VMEM), though, so the kernel
computes them there, uses them, and forgets them; the backward pass computes them again (Dao et al. 2022, FlashAttention,
section 3.1, with one tile for the whole sequence). It reads the flat product of the fused projection in place, as many whole
heads at a time as fill registers of 128 lanes, and writes its gradient in the same layout: nothing is transposed, padded or joined.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from clip_jax.parallel.mesh import BATCH_AXES

LANES = 128
# Rows of a batch that a step of the kernel's grid takes: enough to hide its cost, few enough for the scores of a head, in
# float32 and several times over, to fit beside them.
TOKENS_AT_ONCE, MOST_ROWS = 1024, 8
LONGEST = 1024  # tokens; beyond it scores do not fit in one piece
# Bytes of VMEM that the kernel may take, and on kinds of devices that have no more than that in all.
MOST_VMEM, SMALL_VMEM = 60 * 2**20, 16 * 2**20
WITH_SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")


def create(name, mesh):
  """The attention of a sequence to itself that goes with a mesh.

  Args:
    name: "xla"; "cudnn"; "pallas", the kernel, which is interpreted where there is no TPU; or "auto", the kernel on TPU and cuDNN's on
      NVIDIA's GPUs since Ampere.
    mesh: the device mesh. With heads sharded over "tensor" the kernel is not used.

  Returns:
    A function from a projection [batch, length, 3 * width], its bias [3 * width], heads and whether it is causal to
    [batch, length, width], as `packed` has them, or to None where `dense` is to be used; or None for `dense` always.
  """
  device = mesh.devices.flat[0]
  if name == "auto":
    nvidia = device.platform == "gpu" and device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8
    name = "pallas" if device.platform == "tpu" else "cudnn" if nvidia else "xla"
  if name == "cudnn":
    return cudnn
  if name == "xla" or mesh.shape["tensor"] > 1:
    return None

  def attend(qkv, bias, heads, causal):
    if not fits(qkv.shape[1], qkv.shape[2] // 3, heads, device.device_kind):
      return None

    # The compiler cannot split a kernel; each device calls it on its rows.
    def on_device(qkv, bias):
      return packed(qkv, bias, heads, causal, device.platform != "tpu")

    # "tensor", of size 1 here, is named because gradients are summed over the axes that are not.
    rows = PartitionSpec((*BATCH_AXES, "tensor"))
    return jax.shard_map(on_device, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, check_vma=False)(qkv, bias)

  return attend


def cudnn(qkv, bias, heads, causal, implementation="cudnn"):
  """Attention of a sequence to itself by cuDNN's fused kernels (`jax.nn.dot_product_attention`).

  Args:
    qkv: as `packed` has it.
    bias: likewise.
    heads: of equal size.
    causal: whether a place sees only itself and those before it.
    implementation: "cudnn", or "xla" to check without a GPU what is around it.

  Returns:
    [batch, length, width], or None for what cuDNN does not take: float32, and heads of other sizes than multiples of 8 up to 128.
  """
  batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  size = width // heads
  if qkv.dtype == jnp.float32 or size % 8 or size > LANES:
    return None
  parts = ((part.reshape(batch, length, heads, size)) for part in jnp.split(qkv + bias, 3, axis=-1))
  return jax.nn.dot_product_attention(*parts, is_causal=causal, implementation=implementation).reshape(batch, length, width)


def dense(query, key, value, causal, dtype):
  """Attention with its scores in memory, for any platform.

  Args:
    query: [batch, queries, heads, size].
    key: [batch, length, heads, size].
    value: as key.
    causal: whether a place sees only itself and those before it.
    dtype: what weights are rounded to before they meet values; scores and softmax are float32.

  Returns:
    [batch, queries, heads, size].
  """
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
  scores = scores * query.shape[-1] ** -0.5
  if causal:
    visible = jnp.tril(jnp.ones(scores.shape[2:], bool))
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def fits(length, width, heads, kind=""):
  """Whether the kernel takes sequences of a length, with heads of equal size in a width, on a kind of device."""
  lanes = _lanes(width, heads)
  most = SMALL_VMEM if kind in WITH_SMALL_VMEM else MOST_VMEM
  return length <= LONGEST and width % lanes == 0 and _vmem(length, lanes, width // heads) <= most


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def packed(qkv, bias, heads, causal, interpret=False):
  """Attention of a sequence to itself by the kernel for TPU.

  Args:
    qkv: [batch, length, 3 * width], queries, keys and values without their bias, the heads of each one after the other;
      see `fits`.
    bias: [3 * width]. It is added here because its gradient is a sum that the kernel can take while it has the terms.
    heads: of equal size.
    causal: whether a place sees only itself and those before it.
    interpret: run the kernel's program without a TPU, to check it.

  Returns:
    [batch, length, width].
  """
  return _forward(qkv, bias, heads, causal, interpret)[0]


def _forward(qkv, bias, heads, causal, interpret):
  batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  lanes = _lanes(width, heads)
  rows, groups = _rows(batch, length, lanes), width // lanes

  def part(number):
    return pl.BlockSpec((rows, length, lanes), lambda i, group: (i, 0, group + number * groups))

  def part_of_bias(number):
    return pl.BlockSpec((1, lanes), lambda i, group: (0, group + number * groups))

  mixed = pl.pallas_call(
    functools.partial(_forward_kernel, size=width // heads, causal=causal),
    grid=(batch // rows, groups),
    in_specs=[*map(part, range(3)), *map(part_of_bias, range(3))],
    out_specs=part(0),
    out_shape=jax.ShapeDtypeStruct((batch, length, width), qkv.dtype),
    cost_estimate=_cost(qkv, heads, products=2, arrays=4),
    compiler_params=_limits(length, lanes, width // heads),
    interpret=interpret,
  )(qkv, qkv, qkv, *[bias[None]] * 3)
  return mixed, (qkv, bias, mixed)


def _backward(heads, causal, interpret, kept, gradient):
  qkv, bias, mixed = kept
  batch, length, width = mixed.shape
  lanes = _lanes(width, heads)
  rows, groups = _rows(batch, length, lanes), width // lanes

  def part(number):
    return pl.BlockSpec((rows, length, lanes), lambda i, group, _: (i, 0, group + number * groups))

  def part_of_bias(number):
    return pl.BlockSpec((1, lanes), lambda i, group, _: (0, group + number * groups))

  # The last axis of the grid writes the gradients of queries, keys and values, which the first of its three steps
  # computes, to their places in one array.
  of_qkv, of_bias = pl.pallas_call(
    functools.partial(_backward_kernel, size=width // heads, causal=causal),
    grid=(batch // rows, groups, 3),
    in_specs=[*map(part, range(3)), *map(part_of_bias, range(3)), part(0), part(0)],
    out_specs=[
      pl.BlockSpec((rows, length, lanes), lambda i, group, number: (i, 0, group + number * groups)),
      pl.BlockSpec((1, 1, lanes), lambda i, group, number: (i, 0, group + number * groups)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
      jax.ShapeDtypeStruct((batch // rows, 1, 3 * width), jnp.float32),
    ],
    scratch_shapes=[pltpu.VMEM((3, rows, length, lanes), qkv.dtype), pltpu.VMEM((3, 1, lanes), jnp.float32)],
    cost_estimate=_cost(qkv, heads, products=5, arrays=8),
    compiler_params=_limits(length, lanes, width // heads),
    interpret=interpret,
  )(qkv, qkv, qkv, *[bias[None]] * 3, mixed, gradient)
  return of_qkv, of_bias.sum((0, 1)).astype(bias.dtype)


packed.defvjp(_forward, _backward)


def _lanes(width, heads):
  # The least number of whole heads that fill whole registers: two of 64, eight of 80.
  return math.lcm(width // heads, LANES)


def _vmem(length, lanes, size):
  # Bytes for a row of the backward pass: five inputs and an output, twice because the next ones come meanwhile, and the three
  # gradients, in 16 bits; five arrays of scores, and what the compiler puts aside of each head's, two more by its own account.
  places = -(-length // 16) * 16
  return 15 * places * lanes * 2 + (5 + 2 * lanes // size) * places * -(-places // LANES) * LANES * 4


def _limits(length, lanes, size):
  return pltpu.CompilerParams(vmem_limit_bytes=max(_vmem(length, lanes, size), SMALL_VMEM))


def _rows(batch, length, lanes):
  most = max(min(MOST_ROWS, TOKENS_AT_ONCE * LANES // (length * lanes)), 1)
  return next(rows for rows in range(most, 0, -1) if batch % rows == 0)


def _cost(qkv, heads, products, arrays):
  batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
  return pl.CostEstimate(
    flops=2 * products * batch * length * length * width,
    bytes_accessed=arrays * batch * length * width * qkv.dtype.itemsize,
    transcendentals=batch * heads * length * length,
  )


def _forward_kernel(query, key, value, of_query, of_key, of_value, mixed, *, size, causal):
  for row in range(query.shape[0]):
    q, k, v = query[row] + of_query[...], key[row] + of_key[...], value[row] + of_value[...]
    heads = []
    for first in range(0, query.shape[-1], size):
      here = slice(first, first + size)
      exponentials, sums = _exponentials(q[:, here], k[:, here], causal)
      heads.append(_dot(exponentials.astype(v.dtype), v[:, here], 1, 0) / sums)
    mixed[row] = jnp.concatenate(heads, -1).astype(mixed.dtype)


def _backward_kernel(
  query, key, value, of_query, of_key, of_value, mixed, gradient, out, bias_out, scratch, bias_scratch, *, size, causal
):
  @pl.when(pl.program_id(2) == 0)
  def _():
    sums_of_bias = [jnp.zeros((1, query.shape[-1]), jnp.float32) for _ in range(3)]
    for row in range(query.shape[0]):
      biased = query[row] + of_query[...], key[row] + of_key[...], value[row] + of_value[...]
      parts = ([], [], [])
      for first in range(0, query.shape[-1], size):
        here = slice(first, first + size)
        found = _head_gradients(*(x[:, here] for x in (*biased, mixed[row], gradient[row])), causal)
        for part, x in zip(parts, found, strict=True):
          part.append(x)
      for number, part in enumerate(parts):
        whole = jnp.concatenate(part, -1)
        sums_of_bias[number] += whole.sum(0, keepdims=True)
        scratch[number, row] = whole.astype(scratch.dtype)
    for number, total in enumerate(sums_of_bias):
      bias_scratch[number] = total

  out[...] = scratch[pl.program_id(2)]
  bias_out[0] = bias_scratch[pl.program_id(2)]


def _head_gradients(query, key, value, mixed, gradient, causal):
  # Of the queries, keys and values of one head, [length, size] float32. Dao et al. 2022, appendix B.2: the derivative of
  # the softmax needs the sums of weights times their gradients, which are the products of the result with its own gradient.
  exponentials, sums = _exponentials(query, key, causal)
  weights = exponentials / sums
  inner = (mixed.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1, keepdims=True)
  scores = (weights * (_dot(gradient, value, 1, 1) - inner) * query.shape[-1] ** -0.5).astype(query.dtype)
  return _dot(scores, key, 1, 0), _dot(scores, query, 0, 0), _dot(weights.astype(gradient.dtype), gradient, 0, 0)


def _exponentials(query, key, causal):
  # Of the scores less the largest of their row, [queries, length] float32, and the sums of its rows.
  scores = _dot(query, key, 1, 1) * query.shape[-1] ** -0.5
  if causal:
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
    scores = jnp.where(columns <= rows, scores, jnp.finfo(jnp.float32).min)
  exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
  return exponentials, exponentials.sum(-1, keepdims=True)


def _dot(a, b, axis_a, axis_b):
  # A product over one axis of each, summed in float32.
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
