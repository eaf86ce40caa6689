"""Which part of an array lies where, and batches on their way to the devices."""

import copy
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import state as states
from configs import vitb16
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


def described(recipe, mesh=None, **optimizer):
  """The state of a recipe on a mesh of 8 devices; nothing is allocated."""
  recipe = copy.deepcopy(recipe)
  recipe["mesh"] = dict(recipe.get("mesh", {})) | (mesh or {})
  recipe["optimizer"] = dict(recipe["optimizer"]) | optimizer
  config = configs.resolve(recipe)
  return states.describe(config, meshes.create(config))[0]


GOLDEN = Path(__file__).parent / "sharding"
LAYOUTS = {
  "vitb16_data8": (vitb16, {}, {}),
  "vitb16_fsdp8": (vitb16, {"data": 1, "fsdp": 8}, {}),
  "vitb16_data4_tensor2": (vitb16, {"data": 4, "tensor": 2}, {}),
  "vitb16_zero1": (vitb16, {"sharding": "zero1"}, {}),
  "vitb16_fsdp8_adafactor": (vitb16, {"data": 1, "fsdp": 8}, {"name": "adafactor"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_lies_where_is_as_written_down(name):
  """A change of any sharding shows as a difference of these files; `UPDATE_GOLDEN=1 make test` writes them anew."""
  recipe, mesh, optimizer = LAYOUTS[name]
  state = described(recipe.get_config().to_dict(), mesh, **optimizer)
  text = rules.table([("parameters", state.params), ("optimizer", state.opt_state)]) + "\n"
  path = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
  assert text.splitlines() == path.read_text().splitlines()


def test_the_table_counts_what_a_device_holds():
  state = described(tiny(), {"data": 1, "fsdp": 4, "tensor": 2})
  table = rules.table([("parameters", state.params), ("optimizer", state.opt_state)])
  numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  held = [sum(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * 4 for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state)]
  assert f"parameters: {numbers:,} numbers, {held[0]:,} bytes a device" in table
  assert f"In all {sum(held):,} bytes" in table
  [line] = [line for line in table.splitlines() if line.startswith("image/transformer/block_*/mlp_in/kernel ")]
  assert line.split() == ["image/transformer/block_*/mlp_in/kernel", "float32", "[32,", "128]", "fsdp,", "tensor", "2,048", "x", "2"]


def test_rules_of_the_config_come_first_and_overrides_before_them():
  mesh = {
    "data": 2,
    "fsdp": 2,
    "tensor": 2,
    "rules": (("embed", ("data", "fsdp")), ("heads", None)),
    "overrides": ((r"image/.*/mlp_in/kernel$", (None, ["tensor", "fsdp"])), ("mlp_in", ("data",)), ("logit_scale", ())),
  }
  with pytest.raises(ConfigError, match=r"'mlp_in' gives text/.*mlp_in/kernel, \[.*\], 1 entries; it needs one for each of its 2 dimensions"):
    described(tiny(), mesh)
  mesh["overrides"] = (mesh["overrides"][0], ("mlp_in/bias$", ("data",)))
  state = described(tiny(), mesh)
  for tree in (state.params, state.opt_state[1].mu):
    block = tree["image"]["transformer"]["block_0"]
    assert block["mlp_in"]["kernel"].sharding.spec == P(None, ("tensor", "fsdp"))
    assert block["mlp_in"]["bias"].sharding.spec == P(("data",))
    assert block["attention"]["qkv_kernel"].sharding.spec == P(("data", "fsdp"), None, None, None)
    assert tree["text"]["transformer"]["block_0"]["mlp_in"]["kernel"].sharding.spec == P(("data", "fsdp"), ("tensor",))


@pytest.mark.parametrize(
  "overrides, message",
  [
    ((("nothing", ("data",)),), "config.mesh.overrides: 'nothing' matches no parameter."),
    ((("mlp_in/kernel", ("data", "data")),), "a mesh axis twice; each can shard one dimension."),
    ((("pos_embed", ("data", None)),), "a dimension of 5 over 8 devices (data), which do not divide it."),
  ],
)
def test_overrides_that_cannot_be(overrides, message):
  with pytest.raises(ConfigError) as error:
    described(tiny(), {"overrides": overrides})
  assert message in str(error.value)


def test_zero1_splits_what_it_can_of_the_state_and_no_parameter():
  state = described(vitb16.get_config().to_dict(), {"data": 2, "fsdp": 4, "sharding": "zero1"})
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
  sizes = [(leaf.size, np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)) for leaf in jax.tree.leaves(state.opt_state)]
  assert sum(part for _, part in sizes) < 1.02 * sum(size for size, _ in sizes) / 8


def test_zero1_takes_another_dimension_where_the_first_cannot_be_divided():
  first, second = rules.RULES["zero1"]
  assert spec_of((16, 12), "vocab", "embed", mesh=(4, 2, 1), table=second) == P(("data", "fsdp"), None)
  assert spec_of((12, 16), "vocab", "embed", mesh=(4, 2, 1), table=second) == P("fsdp", "data")  # 12 / 8 is not whole
  assert spec_of((6, 16), "embed", "mlp", mesh=(4, 1, 2), table=second) == P("fsdp", "tensor")
  assert spec_of((16, 12), "embed", "heads", mesh=(4, 1, 2), table=first) == P(None, "tensor")
