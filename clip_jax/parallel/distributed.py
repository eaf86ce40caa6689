"""Joining the processes of a run, and what JAX is told before it starts."""

import importlib.util
import os
from pathlib import Path

import jax

from clip_jax.parallel import clusters, roll_call, xla


def initialize(timeout=100, join_timeout=300, deterministic=False):
  """Connects this process to the others of its run, if its launcher tells of any (`clip_jax.parallel.clusters`).

  To be called before devices are first used, which is when XLA reads its flags (`clip_jax.parallel.xla`).

  Args:
    timeout: seconds without a sign of life from one of them until the others end, with an exit code that is not 0.
    join_timeout: seconds to wait for the last of them to come.
    deterministic: whether XLA shall compute the same bits each time on GPUs, too.

  Raises:
    UsageError: what the launcher tells cannot be.
    TrainingError: some did not come; it names them.
  """
  xla.set_flags(deterministic)
  leave_tpu_out()
  cluster = clusters.find()
  if cluster is None:
    return
  roll_call.meet(cluster, join_timeout)
  jax.distributed.initialize(
    cluster.address,
    cluster.count,
    cluster.number,
    local_device_ids=cluster.gpu,
    cluster_detection_method="deactivate",
    initialization_timeout=join_timeout,
    heartbeat_timeout_seconds=timeout,
    # For a process that ends by itself and waits for the others to do so, too, which may wait for it elsewhere.
    shutdown_timeout_seconds=timeout,
  )


def leave_tpu_out():
  """Keeps JAX from looking for TPUs where there are none, but libtpu is installed to compile for them.

  It would find out by itself, with a page of errors.
  """
  if importlib.util.find_spec("libtpu") and not (os.environ.get("JAX_PLATFORMS") or clusters.has_tpu() or clusters.has_gpu_plugin()):
    jax.config.update("jax_platforms", "cpu")


def enable_compilation_cache():
  """Keeps compiled programs on disk, so that a second start of a run does not compile again.

  `JAX_COMPILATION_CACHE_DIR` chooses another folder than `$CLIP_JAX_CACHE/xla`.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = Path(os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
