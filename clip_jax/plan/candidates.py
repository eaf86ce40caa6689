"""How else a config could be run: meshes, recomputation, microbatches and loops, with what our estimate says of each."""

import dataclasses
import itertools
import math

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import estimate
from clip_jax.plan.targets import slices_of

ROOM = 0.97  # of the usable memory: what is above that by our estimate is not advised


def estimated(config, where):
  """What `clip_jax.plan.estimate` says of a config, for a chip.

  Args:
    config: a resolved `Config`.
    where: a `Target`.

  Returns:
    A dict with the keys of a plan that depend on the program.

  Raises:
    ConfigError: it cannot be laid over the devices.
  """
  mesh, per_chip = meshes.abstract(config, where.devices * slices_of(config, where)), 1 / where.share
  parts, traffic = estimate.memory(config, mesh), estimate.hbm_bytes(config, mesh) * per_chip
  peak = sum(parts.values()) * per_chip
  return {
    "method": "analytic",
    "fits": peak <= where.capacity,
    "peak_hbm_bytes": peak,
    "memory": {part: size * per_chip for part, size in parts.items()},
    "flops": estimate.step_flops(config) / mesh.size * per_chip,
    "bytes_accessed": traffic,
    "hbm_traffic_bytes": traffic,
    "collectives": {kind: [count, size * per_chip] for kind, (count, size) in estimate.collectives(config, mesh).items()},
  }


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A change of a config, and what our estimate says of it.

  Attributes:
    config: with the changes.
    changes: a dict from key, such as "train.remat", to value.
    peak: bytes of a chip.
    seconds: lower bound of a step; of chips without a published peak its FLOPs.
  """

  config: configs.Config
  changes: dict
  peak: float
  seconds: float

  @property
  def flags(self):
    """The changes, as flags of main.py."""
    return [f"--config.{key}={value}" for key, value in self.changes.items()]


def candidates(config, where):
  """Meshes, recomputation, microbatches and loops that a config could be run with, the fastest first, and of equally fast ones the simplest.

  Args:
    config: a resolved `Config`.
    where: a `Target`.

  Returns:
    A list of `Candidate`, those that do not fit by our estimate included.
  """
  found = []
  for changes in _changes(config, where):
    changed = _with(config, changes)
    try:
      said = estimated(changed, where)
    except ConfigError:  # it cannot be laid over these devices
      continue
    # A processor has no published peak; its arithmetic is what is compared then.
    limits = estimate.seconds(where.chip, said["flops"], said["hbm_traffic_bytes"], said["collectives"]) if where.chip else {"compute": said["flops"]}
    found.append(Candidate(changed, changes, said["peak_hbm_bytes"], max(limits.values())))
  # Differences under 5 % are none to an estimate.
  return sorted(found, key=lambda one: (round(math.log(one.seconds, 1.05)), len(one.changes), one.peak > ROOM * where.capacity, one.seconds))


def _changes(config, where):
  """Yields dicts of changed keys, each once."""
  train, mesh = config.train, config.mesh
  shapes = [(mesh.data, mesh.fsdp, mesh.tensor, mesh.sharding), *_shapes(config, where)]
  remats = ("none", "minimal", "attention", "full") if train.remat != "offload" else ("offload",)
  # Deep towers are not unrolled: the compiler would take longer than all candidates together.
  layers = (config.model.vision.layers or 0) + (config.model.text.layers or 0)
  loops = (False, True) if layers <= 48 else (True,)
  parts = (1, 2, 4, 8, 16, 32) if config.model.vision.kind != "resnet" else (1,)
  keys = ("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sharding", "train.remat", "train.scan", "train.microbatches")
  seen = set()
  for shape, *rest in itertools.product(shapes, remats, loops, parts):
    changes = {key: value for key, value in zip(keys, (*shape, *rest), strict=True) if value != _value(config, key)}
    if tuple(changes.items()) not in seen:
      seen.add(tuple(changes.items()))
      yield changes


def _shapes(config, where):
  heads = math.gcd(config.model.vision.heads, config.model.text.heads)
  for tensor in (t for t in (1, 2, 4) if heads % t == 0):
    for fsdp in (1, 8, 64, -1):
      if fsdp == -1 or fsdp * tensor < where.devices:
        shape = (-1, fsdp, tensor) if fsdp != -1 else (1, -1, tensor)
        yield (*shape, "fsdp")
        if fsdp == 1:
          yield (*shape, "zero1")


def _value(config, key):
  for part in key.split("."):
    config = getattr(config, part)
  return config


def _with(config, changes):
  for key, value in changes.items():
    group, name = key.split(".")
    config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
  return config


def what_would_fit(config, where, most=3):
  """Changes that make a config fit, by our estimate: `--config...` flags, the fastest first.

  Args:
    config: a resolved `Config`.
    where: a `Target`.
    most: how many to return.

  Returns:
    A list of lists of flags; empty where nothing tried would do.
  """
  found = []
  for candidate in sorted(candidates(config, where), key=lambda one: len(one.changes)):
    fits = candidate.peak <= ROOM * where.capacity
    if fits and candidate.changes and not any(candidate.changes.keys() >= other.changes.keys() for other in found):
      found.append(candidate)
  return [candidate.flags for candidate in sorted(found, key=lambda one: one.seconds)[:most]]
