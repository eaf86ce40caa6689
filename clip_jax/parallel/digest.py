"""Digests of arrays: what their bits are, in a number that is the same on any mesh, on any platform and in NumPy.

Each element's bits are hashed together with its place in the array (both with the 32-bit finaliser of MurmurHash3, Appleby 2011),
and the hashes are added as whole numbers, in any order. A device does this with its own part; the parts' sums make up the array's.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from clip_jax.errors import TrainingError
from clip_jax.parallel.rules import as_axes, replicated

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
IN_CACHE = 2**16  # elements that NumPy hashes at a time: its temporary arrays stay in a core's cache
GOLDEN = np.uint32(0x9E3779B9)  # makes a second hash of the first: a digest has 64 bits


class Digests:
  """The digest of each array of a tree, and whether all copies of it are alike."""

  def __init__(self, described):
    """Compiles nothing yet.

    Args:
      described: a tree of `jax.ShapeDtypeStruct`s with a `NamedSharding` each, all on one mesh.
    """
    leaves = jax.tree_util.tree_leaves_with_path(described)
    self._names = [name_of(path) for path, _ in leaves]
    specs = [leaf.sharding.spec for _, leaf in leaves]
    self._mesh = leaves[0][1].sharding.mesh
    # A program for each kind of array, and one that puts their sums together: one for all arrays would take minutes to compile.
    self._sums_of = [_on_devices(self._mesh, spec) for spec in specs]
    self._together = _together(self._mesh)
    self._alike = collections.defaultdict(list)  # mesh axes that an array is split over -> which arrays those are
    for i, spec in enumerate(specs):
      self._alike[_axes(spec)].append(i)

  def __call__(self, tree):
    """Waits for the arrays.

    Args:
      tree: arrays as described.

    Returns:
      A dict from an array's name ("params/image/projection") to 16 hexadecimal digits.

    Raises:
      TrainingError: two devices have different copies of the same numbers.
    """
    parts = (sums_of(leaf) for sums_of, leaf in zip(self._sums_of, jax.tree.leaves(tree), strict=True))
    sums = np.asarray(self._together(*parts))
    sums = sums.reshape(*self._mesh.devices.shape, len(self._names), 2)
    found = np.zeros((len(self._names), 2), np.uint32)
    for axes, arrays in self._alike.items():
      split = tuple(i for i, axis in enumerate(self._mesh.axis_names) if axis in axes)
      copies = tuple(i for i in range(self._mesh.devices.ndim) if i not in split)
      here = sums[..., arrays, :]
      first = here[tuple(slice(0, 1) if i in copies else slice(None) for i in range(self._mesh.devices.ndim))]
      if np.any(here != first):
        raise TrainingError(self._differing(here, copies, arrays))
      found[arrays] = first.sum(axis=tuple(range(self._mesh.devices.ndim)), dtype=np.uint32)
    return {name: written(*pair) for name, pair in zip(self._names, found, strict=True)}

  def _differing(self, sums, copies, arrays):
    # Among three copies or more the one that differs from the median of them is the odd one out; of two nobody knows.
    usual = np.median(sums, axis=copies, keepdims=True).astype(np.uint32)
    wrong = np.any(sums != usual, axis=-1)
    count = wrong.sum(axis=-1)
    device = self._mesh.devices[np.unravel_index(np.argmax(count), count.shape)]
    name = self._names[arrays[int(np.argmax(wrong.reshape(-1, len(arrays)).any(axis=0)))]]
    return (
      f"copies of {name} differ between devices, as on {device} (process {device.process_index}): memory or a computation is corrupt. "
      "Nothing of it was saved; take that machine out, and start the same command again."
    )


def of_array(array):
  """The digest of a NumPy array.

  Args:
    array: of a type of at most four bytes.

  Returns:
    16 hexadecimal digits.
  """
  array = np.ascontiguousarray(array).reshape(-1)
  bits, sums = array.view(UNSIGNED[array.dtype.itemsize]), np.zeros(2, np.uint32)
  for start in range(0, len(bits), IN_CACHE):
    part = bits[start : start + IN_CACHE].astype(np.uint32)
    hashes = _hashes(part, np.arange(len(part), dtype=np.uint32) + np.uint32(start % 2**32))
    sums += np.array([each.sum(dtype=np.uint32) for each in hashes])
  return written(*sums)


def name_of(path):
  """The name of an array by its key path: "opt_state/1/mu/image/projection"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def written(low, high):
  """Two 32-bit sums as 16 hexadecimal digits."""
  return f"{int(high) << 32 | int(low):016x}"


@functools.lru_cache
def _on_devices(mesh, spec):
  # Without check_vma: sums of what the mesh says is the same everywhere may differ, which is the point.
  return jax.jit(
    jax.shard_map(
      lambda part: _of_part(part, spec)[None],
      mesh=mesh, in_specs=spec, out_specs=PartitionSpec(mesh.axis_names), check_vma=False,
    )
  )  # fmt: skip


@functools.lru_cache
def _together(mesh):
  # Every process gets the sums of all devices, to compare them itself: no compiler may take copies for equal, and not look.
  return jax.jit(lambda *sums: jnp.stack(sums, axis=1), out_shardings=replicated(mesh))


def _of_part(part, spec):
  # The place of an element in the whole array, of which this device has a part.
  index, stride = jnp.zeros(part.shape, jnp.uint32), 1
  for dim in reversed(range(part.ndim)):
    axes = as_axes(spec[dim]) if dim < len(spec) else ()
    parts = jax.lax.axis_size(axes) if axes else 1
    offset = jax.lax.axis_index(axes).astype(jnp.uint32) * np.uint32(part.shape[dim]) if axes else np.uint32(0)
    here = jax.lax.broadcasted_iota(jnp.uint32, part.shape, dim) + offset
    index += here * np.uint32(stride % 2**32)
    stride *= part.shape[dim] * parts
  bits = jax.lax.bitcast_convert_type(part, UNSIGNED[part.dtype.itemsize]).astype(jnp.uint32)
  # Both sums in one pass: on a CPU two of them take six times as long.
  zeros, dims = (np.uint32(0), np.uint32(0)), tuple(range(part.ndim))
  return jnp.stack(jax.lax.reduce(_hashes(bits, index), zeros, lambda sums, more: (sums[0] + more[0], sums[1] + more[1]), dims))


def _hashes(bits, index):
  first = _mixed(bits ^ _mixed(index))
  return first, _mixed(first + GOLDEN)


def _mixed(x):
  x = x ^ (x >> np.uint32(16))
  x = x * np.uint32(0x85EBCA6B)
  x = x ^ (x >> np.uint32(13))
  x = x * np.uint32(0xC2B2AE35)
  return x ^ (x >> np.uint32(16))


def _axes(spec):
  return frozenset(axis for axes in spec for axis in as_axes(axes))
