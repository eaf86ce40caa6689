"""What JAX computes on: which devices it sees, and how fast one of them and the network between them are."""

import dataclasses
import glob
import importlib.util
import os
import re
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.models import products
from clip_jax.plan import chips
from clip_jax.train.doctor.check import Check, first_line

TPU, GPU = "a TPU", "an NVIDIA GPU"
BACKENDS = {TPU: "tpu", GPU: "gpu"}
# Width of the square matrices, and bytes a device adds up with the others: enough that starting the work does not count.
WIDTH, WIDTH_ON_CPU = 8192, 1024
BUFFER, BUFFER_ON_CPU = 256 << 20, 16 << 20
CHAIN, ROUNDS = 10, 5
# Below these shares of what is published something is wrong, rather than not perfect.
SLOW_PRODUCT, SLOW_NETWORK = 0.4, 0.2


@dataclasses.dataclass(frozen=True)
class Facts:
  """What JAX sees, and what is in the machine.

  Attributes:
    platform: of JAX's devices: "cpu", "gpu", "tpu"; "" if JAX does not start.
    kind: as `jax.Device.device_kind` has it.
    count: of all devices.
    local: of those of this process.
    processes: of the run.
    flops: the published peak of a device, FLOPs a second, or None.
    interconnect: bytes a second to other devices, all links and both directions together, as published, or None.
    present: accelerators that the system has, of `TPU` and `GPU`.
    libtpu: whether it is installed.
    asked: what JAX_PLATFORMS says.
    error: why JAX does not start, or not on what is present.
  """

  platform: str = ""
  kind: str = ""
  count: int = 0
  local: int = 0
  processes: int = 1
  flops: float | None = None
  interconnect: float | None = None
  present: tuple[str, ...] = ()
  libtpu: bool = True
  asked: str = ""
  error: str = ""

  @property
  def accelerators(self):
    """How many devices of this process are not processors."""
    return 0 if self.platform in ("", "cpu") else self.local


def gather():
  """The `Facts` of this machine. Starts JAX."""
  libtpu = importlib.util.find_spec("libtpu") is not None
  known = {"present": present(), "libtpu": libtpu, "asked": os.environ.get("JAX_PLATFORMS", "")}
  try:
    all_of_them = jax.devices()
  except RuntimeError as error:
    return Facts(**known, error=first_line(error))
  first = jax.local_devices()[0]
  chip, share = chips.of_kind(first.device_kind), chips.share(first)
  return Facts(
    **known,
    platform=first.platform,
    kind=first.device_kind,
    count=len(all_of_them),
    local=jax.local_device_count(),
    processes=jax.process_count(),
    flops=chip.flops * share if share else None,
    interconnect=chip.interconnect * share if share and chip.interconnect else None,
    error=_why_not(known["present"]) if first.platform == "cpu" else "",
  )


def present(root=Path("/")):
  """The accelerators that the system has, whatever JAX sees.

  Args:
    root: where the system's own files are.
  """
  patterns = {TPU: ("dev/accel*", "dev/vfio/[0-9]*"), GPU: ("dev/nvidia[0-9]*", "proc/driver/nvidia/version")}
  return tuple(name for name, those in patterns.items() if any(glob.glob(str(root / pattern)) for pattern in those))


def _why_not(names):
  # JAX falls back to the processor without a word, and keeps the reason.
  for name in names:
    try:
      jax.devices(BACKENDS[name])
    except RuntimeError as error:
      return first_line(error)
  return ""


def devices(facts):
  """Checks which devices JAX sees.

  Args:
    facts: a `Facts`.
  """
  if not facts.platform or (facts.platform == "cpu" and facts.present):
    return _not_seen(facts)
  found = "1 device" if facts.count == 1 else f"{facts.count:,} devices"
  found += f", {facts.kind}" + (f" ({facts.platform})" if facts.platform != facts.kind else "")
  found += f", {facts.local} of them in this process, of {facts.processes}." if facts.processes > 1 else "."
  if facts.platform == "cpu" or facts.flops:
    return Check("devices", "ok", found)
  return Check(
    "devices", "warning", f"{found} Its peak is not known, so training reports no MFU.",
    "Add it with its published figures to clip_jax/plan/chips.py.",
  )  # fmt: skip


def _not_seen(facts):
  names = " and ".join(facts.present)
  found = f"There is {names}, but JAX sees only the processor" if facts.platform else "JAX does not start"
  user = re.search(r"already in use by process with pid (\d+)", facts.error)
  if user:
    return Check("devices", "wrong", f"The TPU is in use by process {user[1]}.", f"Wait for it, or end it: ps {user[1]} shows what it is.")
  if facts.platform and facts.asked and not re.search("tpu|cuda|gpu", facts.asked):
    return Check("devices", "wrong", f"{found}, for JAX_PLATFORMS={facts.asked}.", "unset JAX_PLATFORMS")
  if facts.platform and TPU in facts.present and not facts.libtpu:
    return Check("devices", "wrong", f"{found}, because libtpu is not installed.", "pip install 'clip_jax[tpu]'")
  found += f": {facts.error}." if facts.error else "."
  extra = "tpu" if TPU in facts.present else "cuda" if GPU in facts.present else ""
  advice = "Mend what the message names, or set JAX_PLATFORMS=cpu to do without."
  if extra:
    advice = f"pip install 'clip_jax[{extra}]', if it is not, or is too old for the driver."
  return Check("devices", "wrong", found, advice)


def matrix_product(facts):
  """Measures bfloat16 products of square matrices on the first device of this process.

  Args:
    facts: a `Facts`.
  """
  width = WIDTH if facts.accelerators else WIDTH_ON_CPU
  return judge_product(facts, width, measure_product(jax.local_devices()[0], width))


def measure_product(device, width, chain=CHAIN, rounds=ROUNDS):
  """Seconds that the product of two matrices takes, the median of several rounds.

  Args:
    device: a `jax.Device` of this process.
    width: of the square matrices.
    chain: products in a round, one after another.
    rounds: how many.
  """

  def draw():
    x, kernel = (jax.random.normal(jax.random.key(i), (width, width), jnp.bfloat16) for i in range(2))
    return x, kernel * width**-0.5  # so that what goes from product to product stays as large as it is

  placed = jax.sharding.SingleDeviceSharding(device)
  x, kernel = jax.jit(draw, out_shardings=placed)()
  run = jax.jit(lambda x, kernel: jax.lax.fori_loop(0, chain, lambda _, x: products.matmul(x, kernel), x))
  return _median_seconds(lambda: run(x, kernel), rounds) / chain


def judge_product(facts, width, seconds):
  """Compares with the chip's peak.

  Args:
    facts: a `Facts`.
    width: of the square matrices.
    seconds: for a product.
  """
  rate = 2 * width**3 / seconds
  found = f"{rate / 1e12:,.3g} TFLOP/s in bfloat16 on one device, {width:,} wide"
  if not (facts.accelerators and facts.flops):
    return Check("matrix product", "ok", f"{found}.")
  share = rate / facts.flops
  found = f"{found}: {share:.0%} of its peak of {facts.flops / 1e12:,.4g}."
  if share >= SLOW_PRODUCT:
    return Check("matrix product", "ok", found)
  advice = "nvidia-smi shows other programs, its clocks and why they are held back." if facts.platform == "gpu" else "See whether another program uses it."
  return Check("matrix product", "warning", found, advice)


def interconnect(facts):
  """Measures how fast all devices add up what each of them has. All processes of a run must call it at the same time.

  Args:
    facts: a `Facts`.
  """
  if facts.count == 1:
    return Check("interconnect", "skipped", "There is one device.")
  size = BUFFER if facts.platform in ("tpu", "gpu") else BUFFER_ON_CPU
  seconds, agree = measure_all_reduce(jax.devices(), size)
  slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
  return judge_interconnect(facts, slices, size, seconds, agree)


def measure_all_reduce(those, size, rounds=ROUNDS):
  """Adds up an array of each device over all of them.

  Args:
    those: `jax.Device`s, of all processes.
    size: bytes of the array of each.
    rounds: how often it is timed.

  Returns:
    Seconds, the median of the rounds, and whether all devices got the sum that they should.
  """
  mesh = jax.sharding.Mesh(np.array(those), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = PartitionSpec("all")
  values = np.arange(len(those)) % 8 + 1  # small whole numbers: their sum is exact in float32

  def fill():  # with rows that fill a TPU's tiles
    shape = len(those), size // 4096, 1024
    return jnp.broadcast_to(jnp.float32(values)[:, None, None], shape).reshape(-1, 1024)

  arrays = jax.jit(fill, out_shardings=NamedSharding(mesh, spec))()
  # The sums stay one a device, not one for all, so that each is looked at.
  add_up = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
  agree = jax.jit(lambda sums: jnp.all(sums == values.sum()), out_shardings=NamedSharding(mesh, PartitionSpec()))
  right = bool(agree(add_up(arrays)))
  return _median_seconds(lambda: add_up(arrays), rounds), right


def judge_interconnect(facts, slices, size, seconds, agree):
  """Compares with what is published.

  The bus bandwidth of an all-reduce is what each device must at least send, 2 (n - 1) / n of its bytes, a second. It is compared with half
  of the published figure, which counts both directions; where slices or machines are joined by a slower network, with nothing.

  Args:
    facts: a `Facts`.
    slices: of a TPU, over which the devices are.
    size: bytes of each device that were added up.
    seconds: that it took.
    agree: whether the sums were right.
  """
  rate = 2 * (facts.count - 1) / facts.count * size / seconds
  found = f"{rate / 1e9:,.3g} GB/s of bus bandwidth a device, {size >> 20} MiB added up over {facts.count:,} in {seconds * 1e3:,.3g} ms"
  if not agree:
    return Check("interconnect", "wrong", f"{found}; the sums are wrong.", "Do not train on these devices: give them back for others.")
  machines = facts.platform == "gpu" and facts.processes > 1
  if facts.platform == "cpu" or not facts.interconnect or slices > 1 or machines:
    return Check("interconnect", "ok", f"{found}.")
  share = rate / (facts.interconnect / 2)
  found = f"{found}: {share:.0%} of the {facts.interconnect / 2e9:,.4g} published for one direction."
  if share >= SLOW_NETWORK:
    return Check("interconnect", "ok", found)
  advice = "nvidia-smi topo -m and nvidia-smi nvlink -s show the links; NCCL_DEBUG=INFO says which way is taken."
  if facts.platform == "tpu":
    advice = "See whether another program uses the slice; make it anew if not."
  return Check("interconnect", "warning", found, advice)


def _median_seconds(run, rounds):
  # The first time compiles.
  jax.block_until_ready(run())
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return statistics.median(times)
