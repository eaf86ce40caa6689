"""How well a run uses its chips: throughput a chip, model FLOPs utilisation, memory. docs/performance.md explains the numbers."""

import dataclasses
import re
from pathlib import Path

import jax

from clip_jax.models import size
from clip_jax.plan import chips

CPU_INFO = Path("/proc/cpuinfo")


class Meter:
  """Turns the throughput of a run into what it means for its chips."""

  def __init__(self, config, devices):
    """Prepares.

    Args:
      config: a resolved `Config`.
      devices: those of the mesh, of all processes. They are of one kind.
    """
    chip, share = chips.of_kind(devices[0].device_kind), chips.share(devices[0])
    # A chip that is not in the table counts as many as it has devices, and has no peak.
    self._chips = len(devices) * (share or 1)
    self._peak = chip.flops if share else None
    self._flops = size.training_flops(
      config.model, config.train.global_batch_size, config.loss.name, config.optimizer.freeze
    )
    self._device = next((d for d in devices if d.process_index == jax.process_index()), devices[0])

  def __call__(self, samples_per_second):
    """What is known at a moment; nothing waits for the device.

    Args:
      samples_per_second: of all chips together.

    Returns:
      A dict: `samples_per_second_per_chip`; `mfu`, a share of the chips' published bfloat16 peak, where that is known; `memory_gib` and
      `peak_memory_gib` of the first device of this process, where the platform tells.
    """
    rate = samples_per_second / self._chips
    values = {"samples_per_second_per_chip": rate}
    if self._peak:
      values["mfu"] = rate * self._flops / self._peak
    return values | memory(self._device)


def settled(config, device):
  """A config that says what it computes in: where `model.compute_dtype` is "auto", what is fast on a device and trains well.

  Args:
    config: a resolved `Config`.
    device: a `jax.Device`.

  Returns:
    The `Config`, with "bfloat16" on TPUs, on GPUs since Ampere, and on CPUs with instructions for it; else with "float32".
  """
  if config.model.compute_dtype != "auto":
    return config
  fast = device.platform == "tpu"
  if device.platform == "gpu":
    fast = float(getattr(device, "compute_capability", 0)) >= 8
  if device.platform == "cpu":
    fast = CPU_INFO.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", CPU_INFO.read_text()) is not None
  model = dataclasses.replace(config.model, compute_dtype="bfloat16" if fast else "float32")
  return dataclasses.replace(config, model=model)


def memory(device):
  """The memory of a device that is in use, and was at most.

  Args:
    device: a `jax.Device` of this process.

  Returns:
    A dict with `memory_gib` and `peak_memory_gib`, without what the platform does not tell.
  """
  try:
    found = device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:  # what runtimes without such statistics raise, if they do not return None
    return {}
  names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
  return {name: found[key] / 2**30 for name, key in names.items() if key in found}
