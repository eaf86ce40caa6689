"""Meshes of every shape, and shapes that cannot be."""

import re

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import compile as compiler
from clip_jax.train import state as states
from tests.conftest import tiny


def resolved(mesh, batch=16):
  return configs.resolve(tiny(mesh=mesh, train={"global_batch_size": batch, "steps": 1}, eval={"batch_size": batch}))


@pytest.mark.parametrize(
  "sizes, shape",
  [
    ({}, (8, 1, 1)),
    ({"data": 8}, (8, 1, 1)),
    ({"data": -1, "fsdp": 4}, (2, 4, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4, 1)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
    ({"data": 2, "fsdp": 4, "tensor": 1}, (2, 4, 1)),
    ({"data": -1, "fsdp": 8}, (1, 8, 1)),
    ({"data": -1, "fsdp": 2, "tensor": 4}, (1, 2, 4)),
  ],
  ids=str,
)
def test_shape_and_devices(sizes, shape):
  mesh = meshes.create(resolved(sizes))
  assert mesh.axis_names == ("data", "fsdp", "tensor")
  assert mesh.devices.shape == shape
  # Every device once.
  assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_minus_one_fills_up_the_tensor_axis():
  mesh = meshes.create(resolved({"data": 2, "fsdp": 1, "tensor": -1}))
  assert mesh.devices.shape == (2, 1, 4)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_only_the_given_devices_are_used(count):
  devices = jax.devices()[8 - count :]
  config = configs.resolve(tiny(train={"global_batch_size": 12}, eval={"batch_size": 12}))
  mesh = meshes.create(config, devices)
  assert mesh.devices.shape == (count, 1, 1)
  assert set(mesh.devices.flat) == set(devices)


def test_axes_are_for_the_compiler_to_use():
  # shard_map over explicit axes, and Flax's logical axes, both need them so.
  mesh = meshes.create(resolved({}))
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_the_batch_axes_are_axes_and_tensor_is_not_among_them():
  mesh = meshes.create(resolved({"data": 2, "fsdp": 2, "tensor": 2}))
  assert np.prod([mesh.shape[axis] for axis in meshes.BATCH_AXES]) == 4
  assert set(meshes.BATCH_AXES) < set(meshes.AXES)


@pytest.mark.parametrize(
  "sizes, batch, message",
  [
    ({"data": 3}, 12, "cannot be laid over 8 devices"),
    ({"data": 4}, 16, "cannot be laid over 8 devices"),  # half of the devices would idle
    ({"data": -1, "fsdp": 16}, 16, "cannot be laid over 8 devices"),
    ({"data": -1, "fsdp": -1}, 16, "only one of data, fsdp and tensor can be -1"),
    ({"data": -1, "fsdp": 0}, 16, "cannot be laid over 8 devices"),
    ({"data": 8}, 12, "cannot be split over 8 devices"),
    ({"data": 1, "fsdp": 1, "tensor": 8}, 16, "must divide the heads"),
  ],
  ids=str,
)
def test_what_does_not_fit_is_a_config_error(sizes, batch, message):
  with pytest.raises(ConfigError, match=message):
    meshes.create(resolved(sizes, batch))


@pytest.mark.parametrize(
  "sizes, message",
  [
    ({"data": -2, "fsdp": 8}, "cannot be laid over 8 devices"),
    ({"data": 1, "fsdp": 1, "tensor": -1}, "must divide the heads"),
  ],
  ids=str,
)
def test_what_minus_one_stands_for_is_checked_and_less_is_an_error(sizes, message):
  with pytest.raises(ConfigError, match=message):
    meshes.create(resolved(sizes))


def test_tensor_devices_that_minus_one_stands_for_share_their_part_of_the_batch():
  mesh = meshes.create(resolved({"data": 2, "tensor": -1}, batch=6))
  assert mesh.devices.shape == (2, 1, 4)


@pytest.mark.parametrize("topology, sizes", [("v5e:2x4", {"data": 2, "fsdp": 4}), ("v4:2x2x1", {"data": -1, "tensor": 2})])
def test_slices_are_joined_along_data_alone(topology, sizes):
  devices = compiler.devices(topology, slices=2)
  mesh = meshes.create(resolved({**sizes, "dcn_data": 2}), devices)
  assert mesh.devices.shape == ((4, 4, 1) if topology == "v5e:2x4" else (4, 1, 2))
  where = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  assert (where[:2] == where[0, 0, 0]).all() and (where[2:] == 1 - where[0, 0, 0]).all()
  for count in (1, 4):
    message = "devices are in 2 slices; set it to 2" if count == 1 else "must be 1, the number of slices (2), or, without slices, of processes"
    with pytest.raises(ConfigError, match=re.escape(message)):
      meshes.create(resolved({"dcn_data": count}, batch=64), devices)


def test_one_machine_is_not_several():
  with pytest.raises(ConfigError, match=re.escape("config.mesh.dcn_data=2 must be 1, the number of slices (1), or, without slices, of processes (1).")):
    meshes.create(resolved({"dcn_data": 2}))


def test_a_size_that_is_no_product_of_a_torus_sides_is_laid_out_all_the_same():
  devices = compiler.devices("v5p:4x4x4")
  mesh = meshes.create(resolved({"data": 2, "fsdp": 32}, batch=64), devices)
  assert mesh.devices.shape == (2, 32, 1) and len(set(mesh.devices.flat)) == 64


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}, {"data": 2, "fsdp": -1, "tensor": 2}, {"data": -1, "dcn_data": 1, "tensor": 4}])
def test_an_abstract_mesh_has_the_shape_and_the_shardings_of_the_mesh(mesh):
  config = configs.resolve(tiny(mesh=mesh))
  real, abstract = meshes.create(config), meshes.abstract(config, 8)
  assert dict(abstract.shape) == dict(real.shape) and abstract.axis_names == real.axis_names
  shapes = [[leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(states.describe(config, one)[0])] for one in (real, abstract)]
  assert shapes[0] == shapes[1]


def test_an_abstract_mesh_counts_slices_and_refuses_what_a_mesh_does():
  config = configs.resolve(tiny(mesh={"dcn_data": 2, "fsdp": 4}, train={"global_batch_size": 32, "steps": 1}, eval={"batch_size": 32}))
  assert dict(meshes.abstract(config, 32).shape) == {"data": 8, "fsdp": 4, "tensor": 1}
  with pytest.raises(ConfigError, match="cannot be laid over 12 devices"):
    meshes.abstract(config, 12)
