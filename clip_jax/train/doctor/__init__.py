"""What a machine is like, and what is wrong with it: `clip-jax doctor`.

Each check is a function that gives a `Check`. What it concludes from is handed to it where the real thing is seldom at hand.
"""

import dataclasses
import json
import sys
import threading

from clip_jax.errors import UsageError
from clip_jax.train import environment
from clip_jax.train.doctor import buckets, machine, versions
from clip_jax.train.doctor.check import Check, first_line, guarded

__all__ = ["Check", "Examined", "run"]

PATIENCE = 10.0  # seconds until it is said what is waited for


@dataclasses.dataclass(frozen=True)
class Examined:
  """A machine, or all machines of a run.

  Attributes:
    machine: versions and devices, as `environment.describe` gives them.
    checks: of this process, and what other processes found that is not in order.
    process: the number of this process.
  """

  machine: dict
  checks: tuple[Check, ...]
  process: int

  def count(self, status):
    """How many checks came to a status."""
    return sum(check.status == status for check in self.checks)


def run(workdir=".", urls=()):
  """Makes all checks. All processes of a run must do it together.

  Args:
    workdir: the folder that training will write to.
    urls: of buckets that training will read from.

  Returns:
    An `Examined`, with the same checks in the same order on the same machine.

  Raises:
    UsageError: one of the URLs is not of a bucket, the work directory is not a folder of this machine, or the variables that join processes are wrong.
  """
  for url in urls:
    buckets.check_url(url)
  if "://" in workdir:
    raise UsageError(f"--workdir {workdir}: work directories are folders of this machine; --bucket is for buckets.")
  checks = [guarded("versions", versions.versions)]
  facts, described, found = _devices()
  checks += found
  checks += _host(workdir, facts)
  zone = buckets.machine_zone() if urls else ""
  for url in urls:
    pair = guarded("bucket", buckets.bucket, url, zone)
    checks += [pair] if isinstance(pair, Check) else pair
  if not facts or not facts.platform:
    return Examined(described, tuple(checks), 0)
  import jax

  return Examined(described, tuple(checks + _of_others(checks)), jax.process_index())


def _devices():
  # What there is, as facts (none without JAX) and as a dict, and the checks that need JAX.
  message = "Waiting for devices and other processes; on several machines the same command must run on all at the same time."
  patience = threading.Timer(PATIENCE, print, [message], {"file": sys.stderr})
  patience.daemon = True
  patience.start()
  try:
    from clip_jax.parallel import distributed
    from clip_jax.train.doctor import devices

    distributed.initialize()
    facts = devices.gather()
  except UsageError:
    raise
  except Exception as error:  # packages that do not go together, a driver that fails
    advice = "Mend what is said of versions, if anything, or what the message names."
    return None, environment.describe(()), [Check("devices", "wrong", f"JAX does not start: {first_line(error)}.", advice)]
  finally:
    patience.cancel()
  checks = [devices.devices(facts)]
  if not facts.platform:
    return facts, environment.describe(()), checks
  # Next to each other, while processes are at the same place: what follows takes each machine its own time.
  checks.append(guarded("matrix product", devices.matrix_product, facts))
  checks.append(guarded("interconnect", devices.interconnect, facts))
  return facts, environment.describe(), checks


def _host(workdir, facts):
  accelerators = facts.accelerators if facts else 0
  flops = accelerators * facts.flops if facts and facts.flops else None
  return [
    guarded("host memory", machine.host_memory, accelerators),
    guarded("cores", machine.cores, flops),
    guarded("shared memory", machine.shared_memory, facts.platform if facts else ""),
    guarded("open files", machine.open_files),
    guarded("disk", machine.disk, workdir),
    guarded("compilation cache", machine.compilation_cache),
  ]


def _of_others(checks):
  # What the other processes found that is not in order, with whose it is.
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  if jax.process_count() == 1:
    return []
  amiss = [dataclasses.astuple(check) for check in checks if check.status in ("warning", "wrong")]
  text = np.frombuffer(json.dumps(amiss).encode(), np.uint8)
  length = int(multihost_utils.process_allgather(np.int32(len(text))).max())
  texts = multihost_utils.process_allgather(np.pad(text, (0, length - len(text)), constant_values=ord(" ")))
  return [
    Check(f"{name} (process {process})", *rest)
    for process, text in enumerate(texts)
    if process != jax.process_index()
    for name, *rest in json.loads(text.tobytes())
  ]
