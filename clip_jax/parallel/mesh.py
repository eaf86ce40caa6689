"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import math

import jax
from jax.experimental import mesh_utils

from clip_jax.config import check_devices

AXES = ("data", "fsdp", "tensor")
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
    A `jax.sharding.Mesh` with the axes of `AXES`.

  Raises:
    ConfigError: the mesh or the batch does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  check_devices(config, len(devices))
  sizes = [getattr(config.mesh, axis) for axis in AXES]
  if -1 in sizes:
    known = 1
    for size in sizes:
      known *= max(size, 1)
    sizes[sizes.index(-1)] = len(devices) // known
  array = mesh_utils.create_device_mesh(sizes, devices)
  # Flax linen's logical partitioning leaves placement to the compiler between annotations.
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(array, AXES, axis_types=auto)
