"""Compiles a program for accelerators that are not there, and reads what the compiler says of it."""

import dataclasses
import os

import jax

from clip_jax.errors import MissingExtraError, UsageError
from clip_jax.plan import hlo


@dataclasses.dataclass(frozen=True)
class Report:
  """What one device needs and does, by the compiler's own account.

  Attributes:
    argument_bytes: of the inputs.
    output_bytes: of the outputs that do not take the place of an input.
    temporary_bytes: of everything else that is allocated. The compiler lets results lie in the place of outputs,
      and in the chip's own fast memory, which are not in this number.
    peak_bytes: the most that is in use at one time, inputs and outputs included.
    flops: arithmetic of one execution. The compiler counts a loop's body once; the products of its further turns
      are added here.
    bytes_accessed: likewise.
    product_flops: of matrix products alone.
    collectives: a dict from kind ("all-reduce", ...) to [how many, bytes].
    unknown_loops: loops whose turns could not be read, and are counted once.
  """

  argument_bytes: int
  output_bytes: int
  temporary_bytes: int
  peak_bytes: int
  flops: float
  bytes_accessed: float
  product_flops: float
  collectives: dict
  unknown_loops: int


class OutOfMemoryError(RuntimeError):
  """The program does not fit into the memory of a device; the message is the compiler's."""


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
  # libtpu would ask for the metadata of the machine it is on, and let one process at a time have its chips.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    import libtpu  # noqa: F401  (what JAX loads by itself; asked for here to say clearly that it is missing)
    from jax.experimental import topologies
  except ImportError as error:
    raise MissingExtraError("Compiling for a TPU", "plan", "libtpu") from error
  more = {"num_slices": slices} if slices > 1 else {}
  if topology.startswith("v4:"):
    more["chip_config_name"] = "megacore"  # a chip is one device, as on the real machines, and not its two cores
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more)
  except Exception as error:  # jaxlib raises several types
    reason = str(error).strip().splitlines()[0]
    raise UsageError(f"{topology!r} cannot be compiled for; v5e:16x16 can. libtpu says: {reason}") from error
  return list(found.devices)


def compile(function, *arguments):
  """Compiles a jitted function for the devices that its arguments are sharded over.

  Args:
    function: what `jax.jit` returns.
    *arguments: trees of `jax.ShapeDtypeStruct` with shardings.

  Returns:
    A `Report`.

  Raises:
    OutOfMemoryError: it does not fit.
  """
  try:
    compiled = function.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      raise OutOfMemoryError(str(error)) from error
    raise
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  total, once = hlo.account(text), hlo.account(text, repeat=False)
  return Report(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporary_bytes=memory.temp_size_in_bytes,
    peak_bytes=memory.peak_memory_in_bytes,
    flops=cost["flops"] + total.product_flops - once.product_flops,
    bytes_accessed=cost["bytes accessed"] + total.bytes_accessed - once.bytes_accessed,
    product_flops=total.product_flops,
    collectives=total.collectives,
    unknown_loops=total.unknown_loops,
  )
