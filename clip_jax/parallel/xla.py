"""What XLA is told beside its defaults: one table, with the reason for each row.

TPUs have none: what recipes elsewhere set for overlapping communication is libtpu's default by now (docs/performance.md has what was tried).
A flag that is in XLA_FLAGS already stays as it is.
"""

import os
import re
from typing import NamedTuple

from clip_jax.parallel import clusters


class Flag(NamedTuple):
  """A row of the table.

  Attributes:
    platform: whose it is, "cpu" or "gpu".
    name: of the flag.
    value: what it is set to.
    reason: why not the default.
    deterministic: whether it is only for `config.train.deterministic`.
  """

  platform: str
  name: str
  value: str
  reason: str
  deterministic: bool = False


FLAGS = (
  Flag(
    "cpu", "xla_cpu_collective_call_terminate_timeout_seconds", "900",
    "Devices of a processor are threads. Where there are more of them than cores, and something else is computed beside them, the last one may "
    "come to a collective operation later than the 40 s after which XLA ends the process.",
  ),
  Flag(
    "cpu", "xla_cpu_collective_call_warn_stuck_timeout_seconds", "60",
    "As above: the default of 20 s tells of a machine that is slow, not of one that is stuck.",
  ),
  Flag(
    "gpu", "xla_gpu_enable_latency_hiding_scheduler", "true",
    "Starts what is sent between GPUs early, and computes meanwhile; off by default, and what NVIDIA's own images of JAX set "
    "(https://docs.nvidia.com/jax-toolbox/environment-variables).",
  ),
  Flag(
    "gpu", "xla_gpu_deterministic_ops", "true",
    "No kernel whose result depends on the order in which its threads finish, or on which one was faster when measured.",
    deterministic=True,
  ),
)  # fmt: skip


def set_flags(deterministic=False):
  """Sets the flags of the table in XLA_FLAGS, where this process may have such devices.

  Read when the devices are first used, so to be called before.

  Args:
    deterministic: whether results must be the same bits each time.
  """
  given = os.environ.get("XLA_FLAGS", "").split()
  names = {re.match(r"-*([^=]*)", flag)[1] for flag in given}
  platforms = ("cpu", "gpu") if clusters.has_gpu_plugin() else ("cpu",)
  wanted = [flag for flag in FLAGS if flag.platform in platforms and flag.name not in names and (deterministic or not flag.deterministic)]
  given += [f"--{flag.name}={flag.value}" for flag in wanted]
  os.environ["XLA_FLAGS"] = " ".join(given)
