"""What a layout is made of: rows of (ours, theirs, how), read in both directions.

Ours is a path in the parameters, theirs the names of the tensors that one parameter becomes in the other layout, and
"{i}" in them is the number of a block. PyTorch's matrices are [out, in], ours [in, out]; a convolution is [out, in, height, width]
there and [height, width, in, out] here; query, key and value are one array [in, 3, heads, size] here.
"""

from collections import namedtuple

import numpy as np

# `to` takes our array and returns their tensors; `back` takes their tensors and our shape and returns our array.
# Both only move numbers: a round trip is exact.
How = namedtuple("How", "to back")
Row = namedtuple("Row", "ours theirs how")

SAME = How(lambda x: [x], lambda parts, shape: parts[0].reshape(shape))
MATRIX = How(lambda x: [x.T], lambda parts, shape: parts[0].T)
CONVOLUTION = How(lambda x: [x.transpose(3, 2, 0, 1)], lambda parts, shape: parts[0].transpose(2, 3, 1, 0))


def leading(axes):
  """Axes of length one in front, as torch has on what is added to a batch."""
  return How(lambda x: [x.reshape((1,) * axes + x.shape)], lambda parts, shape: parts[0].reshape(shape))


def _attention(*cuts):
  # Kernels and biases of query, key and value, each cut one a matrix of its own.
  def matrices(x):
    return [x[:, a:b].reshape(len(x), -1).T for a, b in cuts]

  def from_matrices(parts, shape):
    return np.concatenate([part.T.reshape(shape[0], -1, *shape[2:]) for part in parts], axis=1)

  def vectors(x):
    return [x[a:b].reshape(-1) for a, b in cuts]

  def from_vectors(parts, shape):
    return np.concatenate([part.reshape(-1, *shape[1:]) for part in parts])

  return How(matrices, from_matrices), How(vectors, from_vectors)


QKV, QKV_BIAS = _attention((0, 3))  # torch.nn.MultiheadAttention, timm
SPLIT, SPLIT_BIAS = _attention((0, 1), (1, 2), (2, 3))  # transformers
QUERY_REST, QUERY_REST_BIAS = _attention((0, 1), (1, 3))  # timm's pooling


def norm(ours, theirs):
  """The two rows of a layer normalisation."""
  return [Row(f"{ours}/scale", [f"{theirs}.weight"], SAME), Row(f"{ours}/bias", [f"{theirs}.bias"], SAME)]


def dense(ours, theirs):
  """The two rows of an affine map."""
  return [Row(f"{ours}/kernel", [f"{theirs}.weight"], MATRIX), Row(f"{ours}/bias", [f"{theirs}.bias"], SAME)]


def block(ours, theirs, names):
  """The rows of the blocks of a Transformer.

  Args:
    ours: path of the stack.
    theirs: name of the stack, to which the number of a block is added.
    names: what the other layout calls norm_1, norm_2, the projections of attention (one tensor name without its
      ending, or three), the output of attention, mlp_in and mlp_out.
  """
  norm_1, norm_2, attention, out, mlp_in, mlp_out = names
  ours, theirs = f"{ours}/block_{{i}}", f"{theirs}.{{i}}"
  return [
    *norm(f"{ours}/norm_1", f"{theirs}.{norm_1}"),
    *attend(f"{ours}/attention", [f"{theirs}.{name}" for name in attention]),
    *dense(f"{ours}/attention/out", f"{theirs}.{out}"),
    *norm(f"{ours}/norm_2", f"{theirs}.{norm_2}"),
    *dense(f"{ours}/mlp_in", f"{theirs}.{mlp_in}"),
    *dense(f"{ours}/mlp_out", f"{theirs}.{mlp_out}"),
  ]


def attend(ours, theirs):
  """The two rows of query, key and value. Names that end in an underscore take "weight" and "bias" without a dot."""
  kernel, bias = {1: (QKV, QKV_BIAS), 2: (QUERY_REST, QUERY_REST_BIAS), 3: (SPLIT, SPLIT_BIAS)}[len(theirs)]
  dotted = [name if name.endswith("_") else f"{name}." for name in theirs]
  return [
    Row(f"{ours}/qkv_kernel", [f"{name}weight" for name in dotted], kernel),
    Row(f"{ours}/qkv_bias", [f"{name}bias" for name in dotted], bias),
  ]
