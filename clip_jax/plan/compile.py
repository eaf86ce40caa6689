"""Compiles a program for accelerators that are not there, and reads what the compiler says of it."""

import contextlib
import dataclasses
import importlib.util
import os
import platform
import re
import sys

import jax

from clip_jax.errors import MissingExtraError, UsageError
from clip_jax.plan import hlo, memory


@dataclasses.dataclass(frozen=True)
class Report:
  """What one device needs and does, by the compiler's own account.

  Attributes:
    argument_bytes: of the inputs.
    output_bytes: of the outputs that do not take the place of an input.
    temporary_bytes: of everything else that is allocated. The compiler lets results lie in the place of outputs,
      and in the chip's own fast memory, which are not in this number.
    peak_bytes: the most that is in use at one time, inputs and outputs included.
    memory: whose that is: a dict from `memory.PARTS` to bytes, followed through the program by us; None of programs whose text does
      not say in which order they run, such as those for processors.
    flops: arithmetic of one execution. The compiler counts a loop's body once; the products of its further turns
      are added here.
    bytes_accessed: likewise. It counts what is copied to the chip's own memory, and read there, several times.
    hbm_bytes: what crosses between the chip and its main memory, by our account of the program's text, loops multiplied out.
    product_flops: of matrix products and of kernels alone.
    collectives: a dict from kind ("all-reduce", ...) to [how many, bytes].
    unknown_loops: loops whose turns could not be read, and are counted once.
  """

  argument_bytes: int
  output_bytes: int
  temporary_bytes: int
  peak_bytes: int
  memory: dict | None
  flops: float
  bytes_accessed: float
  hbm_bytes: float
  product_flops: float
  collectives: dict
  unknown_loops: int


class OutOfMemoryError(RuntimeError):
  """The program does not fit into the memory of a device; the message is the compiler's.

  Attributes:
    needed_bytes: what it needs, inputs and outputs included, which the message calls temporaries; None if it does not say.
  """

  def __init__(self, message):
    super().__init__(message)
    found = re.search(r"\((\d+(?:\.\d+)?)([KMG])\) exceeds available", message)
    self.needed_bytes = found and int(float(found[1]) * 1024 ** " KMG".index(found[2]))


def devices(topology, slices=1):
  """The devices of a TPU topology, for a mesh to compile for. They cannot compute.

  Args:
    topology: a name such as "v5e:16x16" or "v5p:4x4x4".
    slices: how many of them, joined by the data-centre network.

  Returns:
    A list of devices.

  Raises:
    UsageError: libtpu is not installed, or does not know the topology.
  """
  if importlib.util.find_spec("libtpu") is None and (sys.platform != "linux" or platform.machine() != "x86_64"):
    raise UsageError(
      f"Compiling for a TPU needs libtpu, which exists for Linux on x86-64 alone, and this is {platform.system()} on {platform.machine()}; "
      "use a container or a small virtual machine. GPUs, such as h100:8, are planned without it."
    )
  # libtpu would ask for the metadata of the machine it is on, and let one process at a time have its chips.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  # And it says at length, on stderr, that it cannot find out what these tell it.
  for name, value in (("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("TPU_WORKER_HOSTNAMES", "localhost"), ("TPU_WORKER_ID", "0")):
    os.environ.setdefault(name, value)
  try:
    import libtpu  # noqa: F401  (what JAX loads by itself; asked for here to say clearly that it is missing)
    from jax.experimental import topologies
  except ImportError as error:
    raise MissingExtraError("Compiling for a TPU", "plan", "libtpu") from error
  more = {"num_slices": slices} if slices > 1 else {}
  if re.fullmatch(r"\w+:1x1(x1)?", topology):
    more["chips_per_host_bounds"] = (1, 1, 1)  # machines have four otherwise
  if topology.startswith("v4:"):
    more["chip_config_name"] = "megacore"  # a chip is one device, as on the real machines, and not its two cores
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
  except Exception as error:  # jaxlib raises several types
    reason = str(error).strip().splitlines()[0]
    raise UsageError(f"{topology!r} cannot be compiled for; v5e:16x16 can. libtpu says: {reason}") from error
  return list(found.devices)


def compile(function, *arguments, fresh=False):
  """Compiles a jitted function for the devices that its arguments are sharded over.

  Args:
    function: what `jax.jit` returns.
    *arguments: trees of `jax.ShapeDtypeStruct` with shardings.
    fresh: not to take it from the cache on disk: a processor's program that came from there cannot be saved a second time.

  Returns:
    What `jax.stages.Lowered.compile` does.

  Raises:
    OutOfMemoryError: it does not fit.
  """
  try:
    with _without_cache() if fresh else contextlib.nullcontext():
      return function.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise OutOfMemoryError(str(error)) from error
    raise


@contextlib.contextmanager
def _without_cache():
  from jax.experimental.compilation_cache import compilation_cache

  before = jax.config.jax_enable_compilation_cache
  try:
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def report(compiled):
  """What the compiler says of a program.

  Args:
    compiled: what `compile` returns.

  Returns:
    A `Report`.
  """
  sizes, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  total, once = hlo.account(text), hlo.account(text, repeat=False)
  return Report(
    argument_bytes=sizes.argument_size_in_bytes,
    output_bytes=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
    temporary_bytes=sizes.temp_size_in_bytes,
    peak_bytes=_peak(sizes),
    memory=memory.at_peak(text) if "is_scheduled=true" in text.partition("\n")[0] else None,
    flops=cost["flops"] + total.product_flops - once.product_flops,
    bytes_accessed=cost["bytes accessed"] + total.bytes_accessed - once.bytes_accessed,
    hbm_bytes=total.bytes_accessed,
    product_flops=total.product_flops,
    collectives=total.collectives,
    unknown_loops=total.unknown_loops,
  )


def _peak(sizes):
  peak, inputs, temporaries = sizes.peak_memory_in_bytes, sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
  # The compiler for processors leaves temporaries out of it.
  return peak if peak > inputs + temporaries / 2 else inputs + temporaries + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
