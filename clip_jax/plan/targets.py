"""Where a run is planned for: slices of TPUs, numbers of GPUs, this machine; and a config as it would run there."""

import dataclasses
import os

import jax

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import chips, slices
from clip_jax.train import performance
from clip_jax.train.doctor import machine

HERE = "here"  # instead of a topology: the devices of this machine


@dataclasses.dataclass(frozen=True)
class Target:
  """What is planned for.

  Attributes:
    topology: such as "v5e:16x16", "h100:64", or `HERE`.
    chip: a `chips.Chip`; None of what is not in the table.
    devices: of one slice: what JAX shows.
    share: how much of a chip each of them is.
    capacity: bytes of a chip that a program may use.
  """

  topology: str
  chip: chips.Chip | None
  devices: int
  share: float
  capacity: int


def target(name):
  """What a name stands for.

  Args:
    name: a topology or an accelerator type (`slices.topology_of`), or `HERE`.

  Returns:
    A `Target`.

  Raises:
    UsageError: there is no such slice.
  """
  if name == HERE:
    devices = jax.devices()
    share = chips.share(devices[0]) or 1
    return Target(name, chips.of_kind(devices[0].device_kind), len(devices), share, round(_memory_here() / share))
  return of_topology(slices.topology_of(name))


def of_topology(topology):
  """The `Target` of a topology of any chip in the table, whether such slices are rented or not."""
  chip = chips.of_topology(topology)
  devices = slices.number_of_chips(topology) * chip.devices
  return Target(topology, chip, devices, 1 / chip.devices, chip.usable_bytes or chip.memory_bytes)


def _memory_here():
  """Bytes of a device of this machine that a program may use; of a processor its part of the machine's memory."""
  device = jax.local_devices()[0]
  if device.platform != "cpu":
    return device.memory_stats()["bytes_limit"]
  whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  limit, _ = machine.memory_limit()
  return min(whole, limit or whole) // jax.local_device_count()


def resolved(recipe, where):
  """A config as it would run there.

  Args:
    recipe: a `ConfigDict`.
    where: a `Target`.

  Returns:
    A `Config` that says what it computes in.

  Raises:
    ConfigError: the config is wrong, or cannot be laid over those devices; the message names the topology.
  """
  config = configs.resolve(recipe)
  try:
    meshes.abstract(config, where.devices * slices_of(config, where))
  except ConfigError as error:
    raise ConfigError(f"{where.topology}: {error}") from error
  if config.model.compute_dtype != "auto":
    return config
  if where.topology == HERE:
    return performance.settled(config, jax.devices()[0])
  model = dataclasses.replace(config.model, compute_dtype="bfloat16")  # of all chips that have a topology
  return dataclasses.replace(config, model=model)


def is_compiled(where):
  """Whether the compiler can be asked about a `Target`: a TPU, or this machine."""
  return where.topology == HERE or chips.is_tpu(where.chip)


def slices_of(config, where):
  """How many slices of a `Target` a config is laid over."""
  return config.mesh.dcn_data if where.topology != HERE and chips.is_tpu(where.chip) else 1
