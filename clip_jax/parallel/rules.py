"""Which mesh axis each logical axis of an array is sharded over, and arrays placed by those rules."""

import math

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.parallel.mesh import BATCH_AXES

# Logical axis -> mesh axis, first match wins. A dimension that the mesh axis does not divide, or whose
# mesh axis is taken by an earlier dimension of the same array, is not sharded.
SHARDING = (
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", None),
)


def replicated(mesh):
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh, axis=0):
  """The sharding of an array one of whose axes, the first if not said, is the global batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def shardings_of(boxed, mesh, rules=SHARDING):
  """The sharding of every leaf of a tree with logical axis names.

  Args:
    boxed: a tree of `nn.LogicallyPartitioned` leaves (or plain ones, which are replicated) with shapes.
    mesh: the device mesh.
    rules: pairs of logical axis and mesh axis (or axes, or None).

  Returns:
    The same tree, unboxed, with a `NamedSharding` at each leaf.
  """
  table = dict(reversed(rules))

  def place(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return replicated(mesh)
    taken, spec = set(), []
    for size, name in zip(leaf.value.shape, leaf.names, strict=True):
      axes = table.get(name) or ()
      axes = (axes,) if isinstance(axes, str) else tuple(axes)
      if size % math.prod(mesh.shape[axis] for axis in axes) or not taken.isdisjoint(axes):
        axes = ()
      taken.update(axes)
      spec.append(axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree.map(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def local_rows(mesh, rows):
  """Which rows of a global batch this process's devices hold.

  Args:
    mesh: the device mesh.
    rows: length of the batch axis.

  Returns:
    Sorted int64 array of row numbers.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
  held = {range(*index[0].indices(rows)) for index in indices}
  return np.unique(np.concatenate([np.asarray(r, np.int64) for r in held]))


def to_global(batch, mesh, rows):
  """Puts the local rows of a batch on this process's devices, as parts of global arrays.

  Args:
    batch: a tree of NumPy arrays whose first axis are `local_rows(mesh, rows)`.
    mesh: the device mesh.
    rows: length of the batch axis over all processes.

  Returns:
    The same tree of `jax.Array`s with first axis `rows`, sharded over the batch axes.
  """
  sharding = batch_sharding(mesh)
  held = local_rows(mesh, rows)

  def place(array):
    def part(index):
      wanted = range(*index[0].indices(rows))
      start = np.searchsorted(held, wanted.start)
      return array[start : start + len(wanted)]

    return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

  return jax.tree.map(place, batch)
