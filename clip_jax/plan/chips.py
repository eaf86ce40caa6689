"""Published peaks of accelerators, as data, by the names that JAX and the TPU compiler give them.

Arithmetic is that of bfloat16 matrix products with float32 sums, dense: NVIDIA's datasheets print twice as much, for matrices of
which every other number is zero. Memory is in binary units, as it is built and as drivers report it, whatever a datasheet's GB
mean. Where a publication does not say something, this table does not either.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator. Figures are of all of it; of two devices that are one chip each has its `share`.

  Attributes:
    kinds: what `jax.Device.device_kind` calls its devices.
    flops: of bfloat16 matrix products, at most, a second; a multiplication and its addition are two.
    memory_bytes: of its main memory, HBM or GDDR.
    memory_bandwidth: bytes a second between it and the chip.
    interconnect: bytes a second to other chips, all links and both directions together, or None.
    usable_bytes: what a program may use of the memory, by the message of libtpu's compiler (0.0.42) when it does not fit, or None.
    topology: what its TPU topologies begin with ("v5e:16x16"), or None.
    cores: parts of it that JAX may show as a device each: TensorCores of a TPU.
  """

  kinds: tuple[str, ...]
  flops: float
  memory_bytes: int
  memory_bandwidth: float
  interconnect: float | None = None
  usable_bytes: int | None = None
  topology: str | None = None
  cores: int = 1


def _chip(*kinds, tflops, gib, gb_per_second, interconnect=None, usable=None, topology=None, cores=1):
  # In the units of datasheets: 1e12 a second, GiB, 1e9 bytes a second, GiB.
  return Chip(
    kinds=kinds,
    flops=tflops * 1e12,
    memory_bytes=gib * GIB,
    memory_bandwidth=gb_per_second * 1e9,
    interconnect=None if interconnect is None else interconnect * 1e9,
    usable_bytes=None if usable is None else int(usable * GIB),
    topology=topology,
    cores=cores,
  )


CHIPS = (
  # Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks" (CACM 63.7), table 3. Each core is a device.
  _chip("TPU v2", tflops=46, gib=16, gb_per_second=700, usable=2 * 7.48, topology="v2", cores=2),
  # https://cloud.google.com/tpu/docs/v3. Each core is a device.
  _chip("TPU v3", tflops=123, gib=32, gb_per_second=900, usable=2 * 15.48, topology="v3", cores=2),
  # https://cloud.google.com/tpu/docs/v4. On machines both cores are one device; libtpu's topologies have one for each, with 15.25 GiB.
  _chip("TPU v4", tflops=275, gib=32, gb_per_second=1200, usable=30.75, topology="v4", cores=2),
  # https://cloud.google.com/tpu/docs/v5e
  _chip("TPU v5 lite", "TPU v5e", tflops=197, gib=16, gb_per_second=819, interconnect=400, usable=15.75, topology="v5e"),
  # https://cloud.google.com/tpu/docs/v5p. Both cores are one device.
  _chip("TPU v5", "TPU v5p", tflops=459, gib=95, gb_per_second=2765, interconnect=1200, usable=95.74, topology="v5p", cores=2),
  # https://cloud.google.com/tpu/docs/v6e; its bandwidth is that of https://cloud.google.com/tpu/docs/tpu7x, which compares the three.
  _chip("TPU v6 lite", "TPU v6e", tflops=918, gib=32, gb_per_second=1638, interconnect=800, usable=31.25, topology="v6e"),
  # https://cloud.google.com/tpu/docs/tpu7x. Each core is a device.
  _chip(
    "TPU7x", tflops=2307, gib=192, gb_per_second=7380, interconnect=1200, usable=2 * 94.75, topology="tpu7x", cores=2
  ),
  # NVIDIA A100 datasheet (80 GB: 2021; 40 GB: 2020): 312, or 624 with sparsity.
  _chip("NVIDIA A100-SXM4-40GB", tflops=312, gib=40, gb_per_second=1555, interconnect=600),
  _chip("NVIDIA A100-SXM4-80GB", tflops=312, gib=80, gb_per_second=2039, interconnect=600),
  _chip("NVIDIA A100-PCIE-40GB", tflops=312, gib=40, gb_per_second=1555),
  _chip("NVIDIA A100 80GB PCIe", tflops=312, gib=80, gb_per_second=1935),
  # NVIDIA H100 datasheet (SXM, PCIe, NVL): with sparsity 1,979, 1,513 and 1,671.
  _chip("NVIDIA H100 80GB HBM3", tflops=1979 / 2, gib=80, gb_per_second=3350, interconnect=900),
  _chip("NVIDIA H100 PCIe", tflops=1513 / 2, gib=80, gb_per_second=2000),
  _chip("NVIDIA H100 NVL", tflops=1671 / 2, gib=94, gb_per_second=3900, interconnect=600),
  # NVIDIA H200 datasheet (SXM, NVL): with sparsity 1,979 and 1,671.
  _chip("NVIDIA H200", tflops=1979 / 2, gib=141, gb_per_second=4800, interconnect=900),
  _chip("NVIDIA H200 NVL", tflops=1671 / 2, gib=141, gb_per_second=4800, interconnect=900),
  # NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s of eight, 72 PFLOPS in 8 bits with sparsity, of which 16 bits and density leave a quarter.
  _chip("NVIDIA B200", tflops=2250, gib=180, gb_per_second=8000, interconnect=1800),
  # NVIDIA GB200 NVL72 datasheet: 360 PFLOPS with sparsity, 13.4 TB and 576 TB/s of 72.
  _chip("NVIDIA GB200", tflops=2500, gib=186, gb_per_second=8000, interconnect=1800),
  # NVIDIA L4 datasheet: 242 with sparsity; L40S: 733; no NVLink.
  _chip("NVIDIA L4", tflops=121, gib=24, gb_per_second=300),
  _chip("NVIDIA L40S", tflops=362, gib=48, gb_per_second=864),
  # NVIDIA A10G datasheet for AWS: 70, or 140 with sparsity; the A10 of others has 125.
  _chip("NVIDIA A10G", tflops=70, gib=24, gb_per_second=600),
  _chip("NVIDIA A10", tflops=125, gib=24, gb_per_second=600),
)


def of_kind(kind):
  """The chip with devices of a kind.

  Args:
    kind: `jax.Device.device_kind`.

  Returns:
    A `Chip`, or None for what is not in the table, such as a processor.
  """
  return next((chip for chip in CHIPS if kind in chip.kinds), None)


def of_topology(topology):
  """The chip of a TPU topology.

  Args:
    topology: such as "v5e:16x16".

  Returns:
    A `Chip`, or None for what is not in the table.
  """
  prefix = topology.partition(":")[0]
  return next((chip for chip in CHIPS if chip.topology == prefix), None)


def share(device):
  """How much of a chip a device is.

  Args:
    device: a `jax.Device`.

  Returns:
    1.0, or 0.5 for one of two cores; None where the chip is not in the table, or the device does not say how many of its cores it is.
  """
  chip = of_kind(device.device_kind)
  if chip is None:
    return None
  cores = getattr(device, "num_cores", None) if chip.cores > 1 else 1
  return None if cores is None else cores / chip.cores
