"""Slices of TPUs, and numbers of GPUs, by the names that JAX and Google Cloud give them."""

import math
import re

from clip_jax.errors import UsageError, did_you_mean
from clip_jax.plan import chips


def names(chip=None):
  """Names of the slices in the table.

  Args:
    chip: only those of this one.

  Returns:
    A list such as ["v4:2x2x1", ...], from small to large for each chip.
  """
  return [f"{one.topology}:{shape}" for one in chips.CHIPS if chip in (None, one) for shape in one.slices]


def number_of_chips(topology):
  """How many chips a topology has: 256 of "v5e:16x16", 8 of "h100:8"."""
  return math.prod(int(side) for side in topology.partition(":")[2].split("x"))


def accelerator_type(topology):
  """What Google Cloud calls a slice: "v5litepod-256" for "v5e:16x16", "v5p-256" for "v5p:4x4x8"; None for what it does not rent."""
  chip = chips.of_topology(topology)
  if chip is None or chip.accelerator is None:
    return None
  return f"{chip.accelerator}-{number_of_chips(topology) * (chip.cores if chip.counts_cores else 1)}"


def topology_of(name):
  """The topology that a name stands for.

  Args:
    name: a topology ("v5p:4x4x8"), an accelerator type ("v5p-256"), or GPUs and their number ("h100:64").

  Returns:
    A topology: of a TPU one that JAX can compile for.

  Raises:
    UsageError: there is no such slice; the message lists those of the chip, or the chips.
  """
  known = names()
  by_type = {accelerator_type(topology): topology for topology in known}
  if name in known or name in by_type:
    return by_type.get(name, name)
  chip = chips.of_topology(name)
  if chip and not chips.is_tpu(chip) and re.fullmatch(r"\w+:[1-9]\d{0,5}", name):
    return name
  if chip and chip.slices and _is_cuboid(name, chip):
    return name
  starts = {one: (f"{one.topology}:", f"{one.accelerator}-") for one in chips.CHIPS if one.slices}
  family = next((one for one, start in starts.items() if name.startswith(start)), None)
  if family:
    listed = ", ".join(f"{topology} ({accelerator_type(topology)})" for topology in names(family))
    raise UsageError(f"{name!r} is not a slice of {family.kinds[-1]}. There are {listed}.")
  raise UsageError(
    f"{name!r} is not a topology. {did_you_mean(name, [*known, *by_type], 'Some are v5e:16x16, or v5litepod-256, and h100:64.')} "
    f"TPUs: {', '.join(known)}. GPUs: {', '.join(f'{one.topology}:N' for one in chips.CHIPS if one.topology and not chips.is_tpu(one))}."
  )


def _is_cuboid(name, chip):
  # Larger slices than those listed are rented, too: whole cubes of 4 x 4 x 4 chips, sides in ascending order, up to the largest.
  sides = name.partition(":")[2].split("x")
  if len(sides) != 3 or not all(re.fullmatch(r"[1-9]\d{0,2}", side) for side in sides):
    return False
  sides = [int(side) for side in sides]
  most = number_of_chips(f"{chip.topology}:{chip.slices[-1]}")
  return "x" in chip.slices[-1][3:] and sides == sorted(sides) and not any(side % 4 for side in sides) and math.prod(sides) <= most
