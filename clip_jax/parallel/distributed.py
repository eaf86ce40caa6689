"""Joining the processes of a run, and what XLA is told before it starts."""

import glob
import importlib.util
import os
from pathlib import Path

import jax

from clip_jax.errors import UsageError

# Set together by whoever starts processes by hand; launchers below are recognised by themselves.
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize(timeout=100):
  """Connects this process to the others of its run, if there are any.

  Cloud TPU pods, Slurm and Open MPI are recognised by `jax.distributed` from their own environment
  variables. Anything else sets the three variables of `BY_HAND`.

  Args:
    timeout: seconds without a sign of life from one of them until the others end, with an exit code that is not 0.

  Raises:
    UsageError: only some of those variables are set, or to what cannot be.
  """
  leave_tpu_out()
  given = [name for name in BY_HAND if name in os.environ]
  if len(given) == len(BY_HAND):
    address, count, number = (os.environ[name] for name in BY_HAND)
    if ":" not in address:
      raise UsageError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT.")
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
      raise UsageError(
        f"JAX_PROCESS_ID={number} and JAX_NUM_PROCESSES={count} must be whole numbers, the first smaller."
      )
    jax.distributed.initialize(address, int(count), int(number), **_seconds(timeout))
  # The address alone is for a launcher's processes, whose number it knows; jax.distributed reads it.
  elif given and not (given == ["JAX_COORDINATOR_ADDRESS"] and _launched_with_others()):
    missing = ", ".join(name for name in BY_HAND if name not in given)
    raise UsageError(f"{', '.join(given)} set without {missing}; set all three, or none.")
  elif _launched_with_others():
    jax.distributed.initialize(**_seconds(timeout))


def _seconds(timeout):
  # The second is for a process that ends by itself and waits for the others to do so, too, which may wait for it elsewhere.
  return {"heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}


def make_deterministic():
  """Tells XLA to use no GPU kernel whose result depends on the order in which its threads finish, or on which was faster when measured.

  Read when the devices are first used, so to be called before.
  """
  flag = "--xla_gpu_deterministic_ops=true"  # implies the exclusion of other operations, and no autotuning
  if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def leave_tpu_out():
  """Keeps JAX from looking for TPUs where there are none, but libtpu is installed to compile for them.

  It would find out by itself, with a page of errors.
  """
  others = any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"))
  if importlib.util.find_spec("libtpu") and not (os.environ.get("JAX_PLATFORMS") or _has_tpu() or others):
    jax.config.update("jax_platforms", "cpu")


def enable_compilation_cache():
  """Keeps compiled programs on disk, so that a second start of a run does not compile again.

  `JAX_COMPILATION_CACHE_DIR` chooses another folder than `$CLIP_JAX_CACHE/xla`.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = Path(os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _launched_with_others():
  variables = os.environ.get
  return (
    _on_cloud_tpu()
    or len(variables("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    or int(variables("MEGASCALE_NUM_SLICES", "1")) > 1
    # Only inside a step: the script of sbatch itself has the number of tasks, but is not one of them.
    or ("SLURM_STEP_NODELIST" in os.environ and int(variables("SLURM_NTASKS", "1")) > 1)
    or int(variables("OMPI_COMM_WORLD_SIZE", "1")) > 1
  )


def _on_cloud_tpu():
  # A TPU VM tells its neighbours' names through its metadata server alone. JAX asks there, and a slice of
  # one host is fine with it, so every machine with chips and libtpu initialises.
  if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu" or importlib.util.find_spec("libtpu") is None:
    return False
  return _has_tpu()


def _has_tpu():
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
