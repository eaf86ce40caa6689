"""Names of slices, against what is published and against the compiler for TPUs, which knows how many devices each has."""

import pytest

from clip_jax.errors import UsageError
from clip_jax.plan import chips, planner, slices
from clip_jax.plan import compile as compiler

# As Google Cloud's pages have them: v5e and v6e count chips, the others TensorCores, two on a chip.
PUBLISHED = {
  "v4-8": "v4:2x2x1",
  "v4-256": "v4:4x4x8",
  "v5litepod-1": "v5e:1x1",
  "v5litepod-8": "v5e:2x4",
  "v5litepod-256": "v5e:16x16",
  "v5p-8": "v5p:2x2x1",
  "v5p-256": "v5p:4x4x8",
  "v6e-256": "v6e:16x16",
  "tpu7x-128": "tpu7x:4x4x4",
}


@pytest.mark.parametrize("accelerator, topology", PUBLISHED.items())
def test_published_names_map_both_ways(accelerator, topology):
  assert slices.topology_of(accelerator) == topology
  assert slices.accelerator_type(topology) == accelerator


def test_a_slice_has_as_many_chips_as_its_sides_multiply_to():
  assert slices.number_of_chips("v5p:4x4x8") == slices.number_of_chips("v4:4x4x8") == 128
  assert slices.number_of_chips("v5e:16x16") == 256 and slices.number_of_chips("h100:24") == 24


def test_every_slice_of_the_table_is_found_by_either_name():
  assert len(set(slices.names())) == len(slices.names()) > 50
  for topology in slices.names():
    assert slices.topology_of(topology) == topology
    assert slices.topology_of(slices.accelerator_type(topology)) == topology


def test_slices_of_a_chip_are_listed_from_small_to_large():
  for chip in chips.CHIPS:
    sizes = [slices.number_of_chips(topology) for topology in slices.names(chip)]
    assert sizes == sorted(set(sizes)) and len(sizes) == len(chip.slices)


@pytest.mark.parametrize("family", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_slice_of_the_table_has_the_devices_that_the_compiler_shows(family):
  for topology in slices.names(chips.of_topology(family)):
    devices, where = compiler.devices(topology), planner.target(topology)
    assert (len(devices), chips.share(devices[0])) == (where.devices, where.share), topology
    assert where.devices * where.share == slices.number_of_chips(topology)


def test_a_target_by_its_accelerator_type_is_that_of_its_topology():
  assert planner.target("v5litepod-256") == planner.target("v5e:16x16")
  assert planner.target("tpu7x-2").devices == 2 and planner.target("tpu7x-2").topology == "tpu7x:1x1x1"


@pytest.mark.parametrize("topology, accelerator", [("v5p:4x4x20", "v5p-640"), ("v4:4x4x16", "v4-512"), ("tpu7x:4x8x20", "tpu7x-1280")])
def test_whole_cubes_that_are_not_listed_are_slices_too(topology, accelerator):
  assert topology not in slices.names()
  assert slices.topology_of(topology) == topology and slices.accelerator_type(topology) == accelerator
  assert len(compiler.devices(topology)) == planner.target(topology).devices


@pytest.mark.parametrize(
  "name",
  [
    "v5p:4x20x4",  # not in ascending order
    "v5p:4x4x2000",
    "v5p:16x16x28",  # larger than the largest
    "v5p:4x4x6",  # not of whole cubes
    "v5p:0x4x4",
    "v5p:4x4",
    "v5p:4x4x4x4",
    "v5p:4x4x20 ",
    "v5p-7",
    "v5e:4x4x4",  # a plane, not a torus of cubes
    "v5e:32x32",
    "v5e:3x3",
    "v5e:",
    "v5litepod-32768",
    "tpu7x:1x1",
  ],
)
def test_what_is_no_slice_of_its_chip_is_one_line_with_those_that_are(name):
  with pytest.raises(UsageError) as error:
    slices.topology_of(name)
  message, chip = str(error.value), chips.of_topology(name) or chips.of_topology({"v5p-7": "v5p", "v5litepod-32768": "v5e"}[name])
  assert "\n" not in message and f"{name!r} is not a slice of {chip.kinds[-1]}" in message
  for topology in slices.names(chip):
    assert f"{topology} ({slices.accelerator_type(topology)})" in message
  assert not any(topology in message for topology in slices.names() if not topology.startswith(chip.topology))


@pytest.mark.parametrize("name", ["", "v9z:2x2", "V5E:16X16", "a tpu", "v2:2x2", "v5e16x16", "cpu:4", "16x16"])
def test_a_name_of_no_chip_is_one_line_with_all_slices(name):
  with pytest.raises(UsageError) as error:
    slices.topology_of(name)
  message = str(error.value)
  assert "\n" not in message and f"{name!r} is not a topology" in message
  assert all(topology in message for topology in slices.names())
  assert "h100:N" in message and "h200:N" in message and "a100:N" in message


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one():
  with pytest.raises(UsageError, match="Did you mean v5e:16x16?"):
    slices.topology_of("v5r:16x16")


@pytest.mark.parametrize("name, number", [("h100:64", 64), ("h200:1", 1), ("a100:100000", 100_000)])
def test_gpus_come_in_any_number(name, number):
  where = planner.target(name)
  assert (where.topology, where.devices, where.share) == (name, number, 1)
  assert where.chip.kinds[0].startswith("NVIDIA") and not planner.is_compiled(where)
  assert slices.accelerator_type(name) is None


@pytest.mark.parametrize("name", ["h100:0", "h100:x", "h100:-1", "h100:1.5", "h100:", "h100", "h100:8x8", "h100:08", "h100:1000000", "b200:8"])
def test_gpus_come_in_whole_numbers(name):
  with pytest.raises(UsageError, match="is not a topology"):
    slices.topology_of(name)
