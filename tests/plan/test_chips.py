"""The table of chips, against the devices and the messages of libtpu, which knows TPUs that are not here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.plan import chips
from clip_jax.plan import compile as compiler

# Of each TPU a topology of four chips, and how many devices these are.
TOPOLOGIES = {"v2:2x2": 8, "v3:2x2": 8, "v4:2x2x1": 4, "v5e:2x2": 4, "v5p:2x2x1": 4, "v6e:2x2": 4, "tpu7x:2x2x1": 8}


def test_every_tpu_of_the_table_is_asked_about():
  assert {name.partition(":")[0] for name in TOPOLOGIES} == {chip.topology for chip in chips.CHIPS if chips.is_tpu(chip)}


@pytest.mark.parametrize("topology, count", TOPOLOGIES.items())
def test_a_tpu_is_found_by_its_devices_and_by_its_topology(topology, count):
  devices = compiler.devices(topology)
  chip = chips.of_kind(devices[0].device_kind)
  assert chip is not None and chip is chips.of_topology(topology)
  assert len(devices) == count and chips.share(devices[0]) == 4 / count


def available(devices):
  """GiB of a device's memory that the compiler leaves to a program."""
  mesh = Mesh(np.array(devices), ("x",))
  x = jax.ShapeDtypeStruct((len(devices) * 4096, 2**23), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
  with pytest.raises(compiler.OutOfMemoryError) as error:
    compiler.compile(jax.jit(lambda x: x * 2 + x[::-1]), x)
  return float(re.search(r"available HBM \(([\d.]+)G\)", str(error.value))[1])


@pytest.mark.parametrize("topology", [name for name in TOPOLOGIES if not name.startswith("v4")])
def test_usable_memory_is_what_the_compiler_leaves(topology):
  devices = compiler.devices(topology)
  chip = chips.of_topology(topology)
  assert available(devices) / chips.share(devices[0]) == pytest.approx(chip.usable_bytes / chips.GIB, abs=0.005)
  assert chip.usable_bytes < 1.01 * chip.memory_bytes  # a v5p has more than the 95 GiB that are published


def test_both_cores_of_a_v4_are_one_device_on_a_machine():
  devices = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1", chip_config_name="megacore").devices
  assert len(devices) == 4 and chips.share(devices[0]) == 1
  assert available(devices) == pytest.approx(chips.of_topology("v4:2x2x1").usable_bytes / chips.GIB, abs=0.005)


def test_no_name_stands_for_two_chips():
  kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))
  topologies = [chip.topology for chip in chips.CHIPS if chip.topology]
  assert len(topologies) == len(set(topologies))


def test_what_can_be_compiled_for_are_tpus_alone():
  assert {chip.topology for chip in chips.CHIPS if chips.is_tpu(chip)} == {"v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x"}
  assert not any(chips.is_tpu(chip) for chip in chips.CHIPS if chip.kinds[0].startswith("NVIDIA"))
  assert chips.of_topology("h100:8").kinds == ("NVIDIA H100 80GB HBM3",)


def test_figures_have_the_size_that_such_chips_have():
  """A wrong power of ten falls out of these bounds: operations a byte, and seconds to read all of the memory."""
  for chip in chips.CHIPS:
    assert 50 < chip.flops / chip.memory_bandwidth < 600, chip.kinds
    assert chip.memory_bytes / chip.memory_bandwidth < 0.1, chip.kinds
    assert chip.interconnect is None or 0.1 < chip.interconnect / chip.memory_bandwidth < 0.8, chip.kinds
    assert chip.network is None or 0.005 < chip.network / chip.interconnect < 0.1, chip.kinds


def test_what_is_not_in_the_table_has_no_peak():
  assert chips.of_kind("NVIDIA H100") is None  # a part of a name is not a name
  assert chips.of_topology("v9z:2x2") is None and chips.of_topology("") is None
  assert chips.share(jax.devices()[0]) is None
