"""The device mesh: axes `data`, `fsdp` and `tensor`, over one slice or several."""

import math

import jax
from jax.experimental import mesh_utils

from clip_jax.config import check_devices
from clip_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# Flax linen's logical partitioning leaves placement to the compiler between annotations.
AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)
BATCH_AXES = ("data", "fsdp")  # the batch is sharded over both; parameters over fsdp and tensor


def batch_shards(mesh):
  """How many parts of the batch a mesh has."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def create(config, devices=None):
  """Lays the devices of all processes out as a mesh.

  Args:
    config: a resolved `clip_jax.config.Config`.
    devices: devices to use; all of them if not given.

  Returns:
    A `jax.sharding.Mesh` with the axes of `AXES`. With `mesh.dcn_data` above 1, neighbours along all axes are in one slice, and
    only whole parts of `data` lie in different ones, so that what is summed over it alone crosses the slower network.

  Raises:
    ConfigError: the mesh or the batch does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes(config, len(devices))
  array = _over_slices(config.mesh.dcn_data, sizes, devices)
  return jax.sharding.Mesh(array, AXES, axis_types=AUTO)


def abstract(config, devices):
  """The shape of the mesh that a number of devices would make, for shapes and shardings where there are none.

  Args:
    config: a resolved `clip_jax.config.Config`.
    devices: how many.

  Returns:
    A `jax.sharding.AbstractMesh`.

  Raises:
    ConfigError: as `create`.
  """
  data, *others = _sizes(config, devices)
  return jax.sharding.AbstractMesh((config.mesh.dcn_data * data, *others), AXES, axis_types=AUTO)


def _sizes(config, devices):
  check_devices(config, devices)
  sizes = [getattr(config.mesh, axis) for axis in AXES]
  if -1 in sizes:
    sizes[sizes.index(-1)] = devices // (config.mesh.dcn_data * math.prod(size for size in sizes if size != -1))
  return sizes


def _over_slices(count, sizes, devices):
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  processes = len({device.process_index for device in devices})
  if count not in (slices, 1 if slices > 1 else processes, 1):
    raise ConfigError(
      f"config.mesh.dcn_data={count} must be 1, the number of slices ({slices}), or, without slices, of processes ({processes})."
    )
  if slices > 1 and count == 1:
    raise ConfigError(f"config.mesh.dcn_data=1, and the devices are in {slices} slices; set it to {slices}.")
  # Where no whole axes of a torus make up a size, such as 128 on 8 x 8 x 8, one of them is split.
  split = {"allow_split_physical_axes": True}
  if count == 1:
    return mesh_utils.create_device_mesh(sizes, devices, **split)
  return mesh_utils.create_hybrid_device_mesh(
    sizes, (count, *[1] * (len(sizes) - 1)), devices, process_is_granule=slices == 1, **split
  )
