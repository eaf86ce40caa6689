"""Published peaks of accelerators, as data, by the names that JAX and the TPU compiler give them.

Arithmetic is that of bfloat16 matrix products with float32 sums, dense: NVIDIA's datasheets print twice as much, for matrices of
which every other number is zero. Memory is in binary units, as it is built and as drivers report it, whatever a datasheet's GB
mean. Where a publication does not say something, this table does not either. Which slices of a TPU there are, and what they are
called, is of Google Cloud's pages for each version and of XPK's table
(https://github.com/AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py).
"""

import dataclasses

GIB = 2**30

PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8", "8x8x12", "8x8x16", "8x12x16")


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
    topology: what the names of its slices begin with: of a TPU in JAX ("v5e:16x16"), of a GPU with their number behind ("h100:8"); or None.
    cores: parts of it that JAX may show as a device each: TensorCores of a TPU.
    network: bytes a second to other slices, or machines, in one direction, or None.
    accelerator: what Google Cloud's accelerator types of its slices begin with ("v5litepod-256"), or None.
    counts_cores: whether the number behind that counts TensorCores, instead of chips.
    slices: shapes that can be rented, from small to large.
    host: chips of one machine.
    devices: that JAX shows of one on machines; of libtpu's topologies, too, but for v4 (`compile.devices`).
  """

  kinds: tuple[str, ...]
  flops: float
  memory_bytes: int
  memory_bandwidth: float
  interconnect: float | None = None
  usable_bytes: int | None = None
  topology: str | None = None
  cores: int = 1
  network: float | None = None
  accelerator: str | None = None
  counts_cores: bool = False
  slices: tuple[str, ...] = ()
  host: int = 8
  devices: int = 1


def _chip(*kinds, tflops, gib, gb_per_second, interconnect=None, usable=None, gbit_network=None, **more):
  # In the units of datasheets: 1e12 a second, GiB, 1e9 bytes a second, GiB, 1e9 bits a second.
  return Chip(
    kinds=kinds,
    flops=tflops * 1e12,
    memory_bytes=gib * GIB,
    memory_bandwidth=gb_per_second * 1e9,
    interconnect=None if interconnect is None else interconnect * 1e9,
    usable_bytes=None if usable is None else int(usable * GIB),
    network=None if gbit_network is None else gbit_network * 1e9 / 8,
    **more,
  )


CHIPS = (
  # Jouppi et al. 2020, "A domain-specific supercomputer for training deep neural networks" (CACM 63.7), table 3: 4 links of 496 Gbit/s. Each
  # core is a device.
  _chip("TPU v2", tflops=46, gib=16, gb_per_second=700, interconnect=496, usable=2 * 7.48, topology="v2", cores=2, devices=2),
  # https://cloud.google.com/tpu/docs/v3; Jouppi et al. 2023, "TPU v4" (arXiv 2304.01433), table 4: 4 links of 70 GB/s. Each core is a device.
  _chip("TPU v3", tflops=123, gib=32, gb_per_second=900, interconnect=560, usable=2 * 15.48, topology="v3", cores=2, devices=2),
  # https://cloud.google.com/tpu/docs/v4; Jouppi et al. 2023, table 4: 6 links of 50 GB/s; network: https://jax-ml.github.io/scaling-book/tpus.
  # On machines both cores are one device; libtpu's topologies have one for each, with 15.25 GiB.
  _chip(
    "TPU v4", tflops=275, gib=32, gb_per_second=1200, interconnect=600, gbit_network=50, usable=30.75, topology="v4", cores=2,
    accelerator="v4", counts_cores=True, slices=(*CUBES[:-1], "8x16x16", "16x16x16"), host=4,
  ),
  # https://cloud.google.com/tpu/docs/v5e; its network is that of a machine with 8 chips, 2 x 100 Gbit/s.
  _chip(
    "TPU v5 lite", "TPU v5e", tflops=197, gib=16, gb_per_second=819, interconnect=400, gbit_network=25, usable=15.75, topology="v5e",
    accelerator="v5litepod", slices=PLANE,
  ),
  # https://cloud.google.com/tpu/docs/v5p. Both cores are one device.
  _chip(
    "TPU v5", "TPU v5p", tflops=459, gib=95, gb_per_second=2765, interconnect=1200, gbit_network=50, usable=95.74, topology="v5p", cores=2,
    accelerator="v5p", counts_cores=True, slices=(*CUBES, "8x16x16", "12x16x16", "16x16x16", "16x16x24"), host=4,
  ),
  # https://cloud.google.com/tpu/docs/v6e; its memory's bandwidth and network are those of https://cloud.google.com/tpu/docs/tpu7x, which compares the three.
  _chip(
    "TPU v6 lite", "TPU v6e", tflops=918, gib=32, gb_per_second=1638, interconnect=800, gbit_network=100, usable=31.25, topology="v6e",
    accelerator="v6e", slices=PLANE,
  ),
  # https://cloud.google.com/tpu/docs/tpu7x. Each core is a device. Rented as nodes of GKE, by topology; the type is that of XPK and gcloud.
  _chip(
    "TPU7x", tflops=2307, gib=192, gb_per_second=7380, interconnect=1200, gbit_network=100, usable=2 * 94.75, topology="tpu7x", cores=2, devices=2,
    accelerator="tpu7x", counts_cores=True, slices=("1x1x1", *CUBES, "8x16x16", "12x16x16", "16x16x16", "16x16x24"), host=4,
  ),
  # NVIDIA A100 datasheet (80 GB: 2021; 40 GB: 2020): 312, or 624 with sparsity. Network: DGX A100 datasheet, 8 x 200 Gbit/s.
  _chip("NVIDIA A100-SXM4-40GB", tflops=312, gib=40, gb_per_second=1555, interconnect=600),
  _chip("NVIDIA A100-SXM4-80GB", tflops=312, gib=80, gb_per_second=2039, interconnect=600, gbit_network=200, topology="a100"),
  _chip("NVIDIA A100-PCIE-40GB", tflops=312, gib=40, gb_per_second=1555),
  _chip("NVIDIA A100 80GB PCIe", tflops=312, gib=80, gb_per_second=1935),
  # NVIDIA H100 datasheet (SXM, PCIe, NVL): with sparsity 1,979, 1,513 and 1,671. Network: DGX H100 and H200 datasheets, 8 x 400 Gbit/s.
  _chip("NVIDIA H100 80GB HBM3", tflops=1979 / 2, gib=80, gb_per_second=3350, interconnect=900, gbit_network=400, topology="h100"),
  _chip("NVIDIA H100 PCIe", tflops=1513 / 2, gib=80, gb_per_second=2000),
  _chip("NVIDIA H100 NVL", tflops=1671 / 2, gib=94, gb_per_second=3900, interconnect=600),
  # NVIDIA H200 datasheet (SXM, NVL): with sparsity 1,979 and 1,671.
  _chip("NVIDIA H200", tflops=1979 / 2, gib=141, gb_per_second=4800, interconnect=900, gbit_network=400, topology="h200"),
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
  """The chip of a topology.

  Args:
    topology: such as "v5e:16x16".

  Returns:
    A `Chip`, or None for what is not in the table.
  """
  prefix = topology.partition(":")[0]
  return next((chip for chip in CHIPS if chip.topology == prefix), None)


def is_tpu(chip):
  """Whether a chip can be compiled for where it is not."""
  return chip.kinds[0].startswith("TPU")


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
