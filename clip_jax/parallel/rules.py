"""Which mesh axis each logical axis of an array is sharded over, and arrays placed by those rules."""

import math
import re

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.errors import ConfigError
from clip_jax.parallel.mesh import BATCH_AXES

# Logical axis -> mesh axis (or axes, or None), in the order they are tried: the first that divides the dimension, and is not taken by
# an earlier dimension of the same array, counts. A logical axis without one is not sharded.
SHARDING = (
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", None),
)
# What the words of `config.mesh.sharding` stand for: rules for parameters, and for the optimizer's state.
RULES = {
  "fsdp": (SHARDING, SHARDING),
  # Rajbhandari et al. 2020 (ZeRO), section 5.1: every device has the parameters, and a part of the optimizer's state.
  "zero1": (
    (("heads", "tensor"), ("mlp", "tensor")),
    (
      *(("heads", "tensor"), ("mlp", "tensor"), ("embed", BATCH_AXES), ("vocab", BATCH_AXES)),
      # Where the batch has more shards than those divide.
      *(("embed", "fsdp"), ("embed", "data"), ("vocab", "fsdp"), ("vocab", "data")),
    ),
  ),
}


def replicated(mesh):
  """The sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh, axis=0):
  """The sharding of an array one of whose axes, the first if not said, is the global batch."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def shardings_of(boxed, mesh, rules=SHARDING, overrides=()):
  """The sharding of every leaf of a tree with logical axis names.

  Args:
    boxed: a tree of `nn.LogicallyPartitioned` leaves (or plain ones, which are replicated) with shapes.
    mesh: the device mesh.
    rules: pairs of logical axis and mesh axis (or axes, or None).
    overrides: pairs of a regular expression and, for each dimension, mesh axis (or axes, or None). Where one is found in a
      parameter's path ("image/transformer/block_0/mlp_in/kernel"), the first counts instead of the rules.

  Returns:
    The same tree, unboxed, with a `NamedSharding` at each leaf.

  Raises:
    ConfigError: an override does not fit the shape of a parameter, or matches none.
  """
  unused = dict.fromkeys(pattern for pattern, _ in overrides)

  def place(path, leaf):
    name = path_name(path)
    for pattern, spec in overrides:
      if re.search(pattern, name):
        unused.pop(pattern, None)
        return NamedSharding(mesh, _checked(name, getattr(leaf, "value", leaf).shape, spec, pattern, mesh))
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return replicated(mesh)
    return NamedSharding(mesh, _by_rules(leaf, mesh, rules))

  placed = jax.tree_util.tree_map_with_path(place, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
  if unused:
    raise ConfigError(f"config.mesh.overrides: {next(iter(unused))!r} matches no parameter.")
  return placed


def _by_rules(leaf, mesh, rules):
  taken, spec = set(), []
  for size, name in zip(leaf.value.shape, leaf.names, strict=True):
    candidates = [as_axes(axes) for logical, axes in rules if logical == name]
    fitting = (axes for axes in candidates if size % _parts(mesh, axes) == 0 and taken.isdisjoint(axes))
    axes = next(fitting, ())
    taken.update(axes)
    spec.append(axes or None)
  return PartitionSpec(*spec)


def _checked(name, shape, spec, pattern, mesh):
  spec = tuple(map(as_axes, spec))
  where = f"config.mesh.overrides: {pattern!r} gives {name}, {list(shape)},"
  if len(spec) != len(shape):
    raise ConfigError(f"{where} {len(spec)} entries; it needs one for each of its {len(shape)} dimensions, None if not sharded.")
  used = [axis for axes in spec for axis in axes]
  if len(set(used)) < len(used):
    raise ConfigError(f"{where} a mesh axis twice; each can shard one dimension.")
  for size, axes in zip(shape, spec, strict=True):
    if size % _parts(mesh, axes):
      raise ConfigError(f"{where} a dimension of {size} over {_parts(mesh, axes)} devices ({', '.join(axes)}), which do not divide it.")
  return PartitionSpec(*(axes or None for axes in spec))


def as_axes(axes):
  """What an array's dimension is split over, one mesh axis, several or none, as a tuple."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _parts(mesh, axes):
  return math.prod(mesh.shape[axis] for axis in axes)


def parameter_shardings(boxed, mesh, config):
  """How the parameters of a run, and its optimizer's state, lie on the devices.

  Args:
    boxed: the parameters, or their shapes, with logical axis names.
    mesh: the device mesh.
    config: a `clip_jax.config.Mesh`; its `rules` come before those that `sharding` stands for.

  Returns:
    Two trees of `NamedSharding`: of parameters, and of what the optimizer keeps for each of them.

  Raises:
    ConfigError: as `shardings_of`.
  """
  return tuple(shardings_of(boxed, mesh, (*config.rules, *table), config.overrides) for table in RULES[config.sharding])


def path_name(path):
  """A key path of `jax.tree_util` as "image/transformer/block_0/norm_1/scale"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def local_bytes(tree):
  """Bytes that a device holds of a tree of arrays, or of `jax.ShapeDtypeStruct`s with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table(described):
  """Which part of each array a device holds, as lines for people to read; blocks that are alike share a line.

  Args:
    described: pairs of a name and a tree of arrays, or `jax.ShapeDtypeStruct`s with shardings.

  Returns:
    A string without a newline at the end.
  """
  lines, total = [], 0
  for title, tree in described:
    rows, here, numbers = {}, 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      part = local_bytes(leaf)
      name = re.sub(r"\bblock_\d+\b", "block_*", path_name(path))
      spec = ", ".join("+".join(as_axes(axes)) or "-" for axes in (*leaf.sharding.spec, *[None] * len(leaf.shape))[: len(leaf.shape)])
      rows.setdefault((name, str(leaf.dtype), str(list(leaf.shape)), spec, part), []).append(path)
      here, numbers = here + part, numbers + math.prod(leaf.shape)
    cells = [(name, dtype, shape, spec or "-", f"{part:,}", f"x {len(same)}") for (name, dtype, shape, spec, part), same in rows.items()]
    cells.insert(0, (title, "dtype", "shape", "sharded over", "bytes a device", "alike"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, dtype, shape, spec, part, same in cells:
      row = (name.ljust(widths[0]), dtype.ljust(widths[1]), shape.ljust(widths[2]), spec.ljust(widths[3]), part.rjust(widths[4]), same.rjust(widths[5]))
      lines.append("  ".join(row).rstrip())
    lines.append(f"{title}: {numbers:,} numbers, {here:,} bytes a device\n")
    total += here
  return "\n".join([*lines, f"In all {total:,} bytes ({total / 2**30:.2f} GiB) a device."])


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

    with jax.transfer_guard_host_to_device("allow"):  # this one is meant
      return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

  return jax.tree.map(place, batch)
