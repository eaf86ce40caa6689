"""The host: memory, cores, limits, disks."""

import errno
import math
import os
import random
import resource
import shutil
import tempfile
import time
from pathlib import Path

from clip_jax.data.locations import cache_folder
from clip_jax.plan.chips import GIB
from clip_jax.train.doctor.check import Check

# What a process holds in the host's memory: records of blocks, up to data.block_cache, 8 GiB; data.prefetch batches; a checkpoint that is being
# written, 12 bytes a parameter (weights and two moments in float32), which is 5 GiB of ViT-L/14 and 30 of bigG, shared by
# the hosts where it is sharded. So 8 GiB, and 4 more for each device. On a processor alone only small models are trained.
BLOCK_CACHE, A_DEVICE, ON_PROCESSOR = 8 * GIB, 4 * GIB, 4 * GIB
# Images a second that a core decodes and resizes (512 to 640 pixels, to 224), as measured in docs/benchmarks.md, "Input"; and
# FLOPs of a pair of ViT-B/16, of which chips at 40 % of their peak are well used (docs/performance.md).
IMAGES_A_CORE, FLOPS_A_PAIR, USED = 1_000, 123.2e9, 0.4
# A process has a file open for each read in flight, for connections, TensorBoard and checkpoints, whose parts are written side by side.
OPEN_FILES = 4096
SHARED_MEMORY = GIB
FREE_SPACE, TRIAL_BYTES = 10 * GIB, 64 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def host_memory(accelerators, root=Path("/")):
  """Checks that the host has memory for what training keeps there.

  Args:
    accelerators: how many devices of this process are not processors.
    root: where the system's own files are.
  """
  try:
    text = (root / "proc/meminfo").read_text()
  except OSError:
    return Check("host memory", "skipped", "This system does not tell, for want of /proc/meminfo.")
  table = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if len(line.split()) > 1}
  total, available = table["MemTotal"], table.get("MemAvailable", table["MemFree"])
  limit, used = memory_limit(root)
  limited = limit is not None and limit < total
  if limited:
    available = min(available, max(limit - used, 0))
  need = BLOCK_CACHE + A_DEVICE * accelerators if accelerators else ON_PROCESSOR
  found = f"{available / GIB:.1f} GiB of {(limit if limited else total) / GIB:.1f} GiB are available"
  found += f" (the limit of this container; the machine has {total / GIB:.1f} GiB)." if limited else "."
  if available >= need:
    return Check("host memory", "ok", found)
  return Check(
    "host memory", "warning", f"{found} Training may need {need / GIB:.0f} GiB.",
    "End what else runs here, raise the container's limit, or keep less: --config.data.block_cache=1 --config.data.prefetch=2.",
  )  # fmt: skip


def memory_limit(root=Path("/")):
  """The memory that control groups leave to this process, and what of it is used and cannot be taken back; in bytes, or None."""
  best = None, 0
  for folder, two in _groups(root, "memory"):
    limit = _number(folder / ("memory.max" if two else "memory.limit_in_bytes"))
    if limit is not None and (best[0] is None or limit < best[0]):
      used = _number(folder / ("memory.current" if two else "memory.usage_in_bytes")) or 0
      best = limit, max(used - _file_cache(folder / "memory.stat"), 0)
  return best


def cores(flops=None, root=Path("/")):
  """Checks that there are cores for what this process's devices take in.

  Args:
    flops: the peak of all accelerators of this process together, FLOPs a second, where it is known.
    root: where the system's own files are.
  """
  there = os.cpu_count() or 1
  allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there
  usable = min(filter(None, (allowed, core_limit(root))))
  images = usable * IMAGES_A_CORE
  found = f"{usable:g} of {there} cores may be used, enough for about {images:,.0f} images a second of 512 to 640 pixels."
  pairs = USED * (flops or 0) / FLOPS_A_PAIR
  if images >= pairs:
    return Check("cores", "ok", found)
  return Check(
    "cores", "warning", f"{found} ViT-B/16 may take {pairs:,.0f} on the devices of this process.",
    "Give the process more cores, or make images smaller once, ahead of training: clip-jax data convert --max-size 256.",
  )  # fmt: skip


def core_limit(root=Path("/")):
  """The cores whose time control groups leave to this process, as a number that may have a fraction, or None."""
  limits = []
  for folder, two in _groups(root, "cpu"):
    if two:
      quota, period = (_text(folder / "cpu.max").split() + ["", ""])[:2]
    else:
      quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period):
      limits.append(int(quota) / int(period))
  return min(limits, default=None)


def shared_memory(platform, folder=Path("/dev/shm"), least=SHARED_MEMORY):
  """Checks the memory that processes on one machine share, through which NCCL moves data between GPUs.

  Args:
    platform: of the devices: "gpu", "tpu", "cpu".
    folder: where it is mounted.
    least: bytes that should be free.
  """
  try:
    usage = shutil.disk_usage(folder)
  except OSError:
    return Check("shared memory", "skipped", f"There is no {folder}.")
  found = f"{usage.free / GIB:.2f} GiB of {usage.total / GIB:.2f} GiB are free in {folder}."
  if platform != "gpu" or usage.free >= least:
    return Check("shared memory", "ok", found)
  return Check("shared memory", "warning", found, "Containers start with 64 MiB: docker run --ipc=host, or --shm-size=8g.")


def open_files(least=OPEN_FILES):
  """Checks how many files this process may have open."""
  soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
  found = f"{soft:,} may be open at the same time."
  if soft >= least:
    return Check("open files", "ok", found)
  if hard >= least:
    return Check("open files", "warning", found, f"ulimit -n {min(hard, 65536)} in the shell that starts training.")
  return Check(
    "open files", "warning", f"{found} The hard limit is {hard:,}.",
    "Raise the hard limit: LimitNOFILE of a systemd unit, docker run --ulimit nofile=65536, or /etc/security/limits.conf.",
  )  # fmt: skip


def disk(folder, least=FREE_SPACE, size=TRIAL_BYTES):
  """Checks the disk of a work directory by writing to it.

  Args:
    folder: the work directory. It need not exist, and is not made; the folder in which it would be is written to instead.
    least: bytes that should be free.
    size: bytes to write, and to remove again.
  """
  folder = Path(folder)
  there = existing(folder)
  if not there.is_dir():
    return Check("disk", "wrong", f"{there} is a file, not a folder.", "Choose another --workdir.")
  free = shutil.disk_usage(there).free
  try:
    seconds = _write(there, size)
  except OSError as error:
    full = error.errno in NO_ROOM
    advice = "Make room on that disk, or choose another --workdir." if full else "Make it writable for this user, or choose another --workdir."
    return Check("disk", "wrong", f"{folder} cannot be written ({error.strerror}); {free / GIB:,.1f} GiB are free.", advice)
  found = f"{folder}: {free / GIB:,.1f} GiB are free; {size / 2**20:.0f} MiB were written, and on the disk, at {size / seconds / 1e6:,.0f} MB/s."
  if free >= least:
    return Check("disk", "ok", found)
  return Check(
    "disk", "warning", found,
    "Checkpoints take 12 bytes a parameter each, 5 GiB of ViT-L/14: make room, keep fewer (--config.checkpoint.keep_last=1), or choose another --workdir.",
  )  # fmt: skip


def compilation_cache():
  """Checks that compiled programs can be kept, in the folder that training keeps them in."""
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  name = "compilation cache"
  if given == "":
    return Check(name, "skipped", "JAX_COMPILATION_CACHE_DIR is empty, which turns it off.")
  if given and "://" in given:
    return Check(name, "skipped", f"{given} is not a folder of this machine.")
  folder = Path(given) if given else cache_folder("xla")
  there = existing(folder)
  try:
    _write(there, 1)
  except OSError as error:
    return Check(
      name, "warning", f"{folder} cannot be written ({error.strerror}); each start of a run compiles anew.",
      "Set CLIP_JAX_CACHE, or JAX_COMPILATION_CACHE_DIR, to a folder that can be written.",
    )  # fmt: skip
  return Check(name, "ok", f"{folder} can be written.")


def existing(folder):
  """A folder, or the nearest above it that there is."""
  folder = folder.absolute()
  return next(path for path in (folder, *folder.parents) if path.exists())


def _write(folder, size):
  # Seconds for bytes to be written and on the disk. They are random, for some file systems compress.
  chunk = random.randbytes(min(size, 1 << 20))
  with tempfile.NamedTemporaryFile(dir=folder, prefix=".clip-jax-doctor-") as file:
    start = time.perf_counter()
    for _ in range(size // len(chunk)):
      file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return time.perf_counter() - start


def _groups(root, controller):
  # The control groups of this process from its own to the outermost, each with whether it is of version 2.
  for line in _text(root / "proc/self/cgroup").splitlines():
    number, controllers, path = line.split(":", 2)
    two = number == "0" and not controllers
    if not two and controller not in controllers.split(","):
      continue
    mounted = root / "sys/fs/cgroup" / ("" if two else controller)
    own = mounted / path.strip("/")  # in a container it may not be seen, and the outermost there is its own
    yield from ((folder, two) for folder in (own, *own.parents) if folder.is_relative_to(mounted))


def _file_cache(path):
  # Bytes of files that are kept as long as there is room.
  table = dict(line.split(maxsplit=1) for line in _text(path).splitlines() if " " in line)
  return int(table.get("total_inactive_file") or table.get("inactive_file") or 0)


def _number(path):
  text = _text(path)
  return int(text) if text.isdecimal() else None  # "max" of version 2 is no limit


def _text(path):
  try:
    return path.read_text().strip()
  except OSError:
    return ""
