"""Which part of an array lies where, and batches on their way to the devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import config as configs
from clip_jax.models.clip import CLIP
from clip_jax.parallel import rules
from tests.conftest import tiny

SHAPES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8), (1, 8, 1)]


def mesh_of(data, fsdp, tensor):
  devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
  return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def spec_of(shape, *names, mesh=(2, 2, 2), table=rules.SHARDING):
  leaf = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)
  mesh = mesh_of(*mesh)
  found = rules.shardings_of({"a": {"b": leaf}}, mesh, table)["a"]["b"]
  assert isinstance(found, NamedSharding) and found.mesh == mesh
  return found.spec


@pytest.mark.parametrize(
  "shape, names, want",
  [
    ((6, 8), ("embed", "mlp"), P("fsdp", "tensor")),
    ((8, 6), ("mlp", "embed"), P("tensor", "fsdp")),
    ((6, 3, 4, 5), ("embed", None, "heads", None), P("fsdp", None, "tensor", None)),
    ((10, 6), ("vocab", "embed"), P(None, "fsdp")),
    ((6,), ("nobody knows",), P(None)),
    ((), (), P()),
  ],
)
def test_the_rules_of_parameters(shape, names, want):
  assert spec_of(shape, *names) == want


def test_a_dimension_that_cannot_be_divided_is_replicated():
  assert spec_of((7, 8), "embed", "mlp") == P(None, "tensor")
  assert spec_of((6, 9), "embed", "mlp") == P("fsdp", None)
  assert spec_of((6, 8), "embed", "mlp", mesh=(1, 4, 2)) == P(None, "tensor")


def test_an_axis_is_used_for_one_dimension_of_an_array():
  assert spec_of((8, 6), "heads", "mlp") == P("tensor", None)
  assert spec_of((8, 6, 4), "embed", "embed", "mlp") == P("fsdp", None, "tensor")
  # A dimension that could not be divided has not used the axis up.
  assert spec_of((7, 8), "embed", "embed") == P(None, "fsdp")


def test_the_first_of_two_rules_for_a_name_counts():
  table = (("embed", "tensor"), ("embed", "fsdp"), ("mlp", None), ("mlp", "data"))
  assert spec_of((8, 8), "embed", "mlp", table=table) == P("tensor", None)


def test_a_rule_can_name_several_mesh_axes():
  table = (("embed", ("data", "fsdp")), ("mlp", ("fsdp", "tensor")), ("heads", "data"))
  assert spec_of((8, 3), "embed", None, table=table) == P(("data", "fsdp"), None)
  assert spec_of((6,), "embed", table=table) == P(None)  # four devices
  assert spec_of((8, 8), "embed", "mlp", table=table) == P(("data", "fsdp"), None)  # fsdp is taken
  assert spec_of((8, 8), "heads", "mlp", table=table) == P("data", ("fsdp", "tensor"))


def test_leaves_without_names_are_replicated():
  tree = [jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((8, 8), jnp.float32)]
  assert [s.spec for s in rules.shardings_of(tree, mesh_of(2, 2, 2))] == [P(), P()]


def test_every_large_parameter_of_a_model_is_split_over_fsdp_and_blocks_over_tensor_too():
  config = configs.resolve(tiny()).model
  images, tokens = jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 12), jnp.int32)
  shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens)["params"]
  mesh = mesh_of(1, 4, 2)
  placed = rules.shardings_of(shapes, mesh)
  leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(shapes))
  for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
    name = jax.tree_util.keystr(path)
    part = np.prod(sharding.shard_shape(leaf.shape), dtype=int)
    if leaf.ndim > 1 and "qkv_bias" not in name:
      assert leaf.size == part * (8 if "block" in name else 4), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_batch_goes_to_the_devices_and_back(shape):
  mesh, rows = mesh_of(*shape), 16
  random = np.random.default_rng(0)
  batch = {
    "images": random.integers(0, 256, (rows, 3, 3, 3), np.uint8),
    "tokens": random.integers(0, 9, (rows, 5), np.int32),
  }
  assert list(rules.local_rows(mesh, rows)) == list(range(rows))  # one process has all
  placed = rules.to_global(batch, mesh, rows)
  assert placed.keys() == batch.keys()
  for name, array in placed.items():
    assert array.dtype == batch[name].dtype and array.shape == batch[name].shape
    np.testing.assert_array_equal(array, batch[name])
    assert array.sharding == rules.batch_sharding(mesh)
    # A device's part are the rows of its place along data and fsdp; tensor devices share theirs.
    part = rows // (shape[0] * shape[1])
    for shard in array.addressable_shards:
      [[d, f, _]] = np.argwhere(mesh.devices == shard.device)
      start = (d * shape[1] + f) * part
      np.testing.assert_array_equal(shard.data, batch[name][start : start + part])
    held = np.zeros(rows, int)
    for shard in array.addressable_shards:
      held[shard.index[0]] += shard.replica_id == 0
    np.testing.assert_array_equal(held, 1)


TURNS = [0, 1, 4, 5, 8, 9, 12, 13]


class OtherProcess:
  """A batch sharding as a process sees it that holds only some of the devices."""

  def __init__(self, mesh, devices):
    self._whole, self._devices = rules.batch_sharding(mesh), devices

  def addressable_devices_indices_map(self, shape):
    return {d: i for d, i in self._whole.devices_indices_map(shape).items() if d in self._devices}


@pytest.mark.parametrize(
  "shape, order, want",
  [
    # Two processes of four devices each, the first four and the last four.
    ((8, 1, 1), range(8), [range(8), range(8, 16)]),
    ((2, 2, 2), range(8), [range(8), range(8, 16)]),
    ((1, 4, 2), range(8), [range(8), range(8, 16)]),
    # Tensor parallel over both processes: both load everything, as both need it.
    ((1, 1, 8), range(8), [range(16), range(16)]),
    # Processes that take turns along the batch: their rows have gaps.
    ((8, 1, 1), [0, 4, 1, 5, 2, 6, 3, 7], [TURNS, [row + 2 for row in TURNS]]),
    # One process's devices the other way round: rows are sorted, or the batch would be too.
    ((8, 1, 1), [3, 2, 1, 0, 4, 5, 6, 7], [range(8), range(8, 16)]),
  ],
  ids=str,
)
def test_processes_hold_the_rows_of_their_own_devices(monkeypatch, shape, order, want):
  devices = np.array(jax.devices())[list(order)].reshape(shape)
  mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
  for process, rows in enumerate(want):
    view = OtherProcess(mesh, jax.devices()[4 * process : 4 * process + 4])
    with monkeypatch.context() as patch:
      patch.setattr(rules, "batch_sharding", lambda _, view=view: view)
      held = rules.local_rows(mesh, 16)
    assert held.dtype == np.int64
    np.testing.assert_array_equal(held, list(rows))


def test_local_rows_with_gaps_reach_the_right_devices(monkeypatch):
  # Four devices of the process, and each must get its own two of sixteen rows.
  batch, held, asked = np.arange(16) * 10, np.array(TURNS), {}

  def make(shape, sharding, callback):
    assert shape == (16,)
    for start in (0, 4, 8, 12):
      asked[start] = callback((slice(start, start + 2),))

  monkeypatch.setattr(rules, "local_rows", lambda mesh, rows: held)
  monkeypatch.setattr(jax, "make_array_from_callback", make)
  rules.to_global({"x": batch[held]}, mesh_of(8, 1, 1), 16)
  for start, part in asked.items():
    np.testing.assert_array_equal(part, batch[start : start + 2])
  assert len(asked) == 4
