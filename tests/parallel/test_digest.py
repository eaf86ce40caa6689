"""Digests: the same wherever the parts of an array lie, another for any other bits, and blind to no copy that differs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.errors import TrainingError
from clip_jax.parallel import digest
from tests.parallel.test_rules import mesh_of

SHAPE = (8, 3, 4)
LAYOUTS = [
  ((1, 1, 1), PartitionSpec()),
  ((2, 2, 2), PartitionSpec()),
  ((8, 1, 1), PartitionSpec("data")),
  ((2, 2, 2), PartitionSpec(("data", "fsdp"), None, "tensor")),
  ((2, 2, 2), PartitionSpec(("fsdp", "data"), None, "tensor")),
  ((1, 4, 2), PartitionSpec("tensor", None, "fsdp")),
  ((2, 4, 1), PartitionSpec(None, None, "fsdp")),
]


def mixed(x):
  """MurmurHash3's 32-bit finaliser in whole numbers of Python."""
  x ^= x >> 16
  x = x * 0x85EBCA6B % 2**32
  x ^= x >> 13
  x = x * 0xC2B2AE35 % 2**32
  return x ^ x >> 16


def reference(array):
  """The digest from its definition, element by element."""
  low = high = 0
  size = array.dtype.itemsize
  content = array.tobytes()
  for place in range(array.size):
    bits = int.from_bytes(content[place * size : (place + 1) * size], "little")
    first = mixed(bits ^ mixed(place))
    low, high = low + first, high + mixed((first + 0x9E3779B9) % 2**32)
  return f"{high % 2**32:08x}{low % 2**32:08x}"


def placed(arrays, shape, spec):
  sharding = NamedSharding(mesh_of(*shape), spec)
  return jax.tree.map(lambda array: jax.device_put(array, sharding if array.ndim else NamedSharding(sharding.mesh, PartitionSpec())), arrays)


def values(dtype, seed=0):
  return np.random.default_rng(seed).normal(size=SHAPE).astype(dtype)


@pytest.mark.parametrize(("shape", "spec"), LAYOUTS, ids=str)
def test_on_any_mesh_they_are_those_of_the_definition(shape, spec):
  arrays = {"a": {"f": values(np.float32), "h": values(jnp.bfloat16)}, "i": np.int32(7), "n": np.full(SHAPE, np.nan, np.float32)}
  tree = placed(arrays, shape, spec)
  want = {name: reference(array) for name, array in (("a/f", arrays["a"]["f"]), ("a/h", arrays["a"]["h"]), ("i", arrays["i"]), ("n", arrays["n"]))}
  assert digest.Digests(tree)(tree) == want


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([np.float32, jnp.bfloat16, np.int32, np.uint8]), st.lists(st.integers(1, 5), max_size=4), st.integers(0, 2**32 - 1))
def test_of_a_numpy_array(dtype, shape, seed):
  array = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)[..., 0]
  assert digest.of_array(array) == reference(array)


def test_of_a_numpy_array_that_is_longer_than_a_cache():
  array = values(np.float32).ravel()
  long = np.tile(array, digest.IN_CACHE // array.size + 2)
  assert digest.of_array(long) == reference(long)
  assert digest.of_array(long[::-1]) == reference(long[::-1].copy())  # not contiguous


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(0, 95), st.integers(0, 31), st.integers(1, 95))
def test_any_bit_that_is_another_and_any_two_elements_that_change_places_show(seed, place, bit, distance):
  array = np.random.default_rng(seed).normal(size=96).astype(np.float32)
  flipped, swapped = array.copy(), array.copy()
  flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
  other = (place + distance) % 96
  swapped[[place, other]] = swapped[[other, place]]
  assert len({digest.of_array(each) for each in (array, flipped, swapped)}) == 3


@pytest.mark.parametrize(("shape", "spec", "device"), [((8, 1, 1), PartitionSpec(), 5), ((2, 2, 2), PartitionSpec("tensor"), 3)], ids=str)
def test_a_copy_that_differs_in_one_bit_is_found_on_its_device(shape, spec, device):
  """One device of eight, and one of four that have the same half."""
  good = placed({"w": values(np.float32), "x": values(np.float32, 1)}, shape, spec)
  check = digest.Digests(good)
  check(good)
  shards = [np.array(shard.data) for shard in good["x"].addressable_shards]
  shards[device].view(np.uint32)[0, 0, 0] ^= 1
  places = [shard.device for shard in good["x"].addressable_shards]
  bad = jax.make_array_from_single_device_arrays(SHAPE, good["x"].sharding, list(map(jax.device_put, shards, places)))
  with pytest.raises(TrainingError) as error:
    check({**good, "x": bad})
  assert str(error.value).startswith(f"copies of x differ between devices, as on {places[device]} (process 0)")


def test_of_two_copies_that_differ_one_is_named():
  good = placed({"x": values(np.float32)}, (2, 1, 1), PartitionSpec())
  shards = [np.array(shard.data) for shard in good["x"].addressable_shards]
  shards[1][0, 0, 0] += 1
  bad = jax.make_array_from_single_device_arrays(
    SHAPE, good["x"].sharding, [jax.device_put(part, shard.device) for part, shard in zip(shards, good["x"].addressable_shards, strict=True)]
  )
  with pytest.raises(TrainingError, match="copies of x differ"):
    digest.Digests(good)({"x": bad})
