"""Starting from the parameters of another model."""

import dataclasses
import functools
import math

import flax
import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.convert.sources import Source
from clip_jax.errors import UsageError
from clip_jax.models import vit
from clip_jax.parallel import mesh as meshes
from clip_jax.train import state as states
from tests.conftest import tiny
from tests.convert.models import small_tokenizer

SIGLIP = {
  "model": {
    "embed_dim": 32,
    "logit_bias_init": -10.0,
    "vision": {"kind": "siglip", "patch_size": 8, "width": 32, "layers": 1, "heads": 2},
    "text": {"kind": "siglip", "context_length": 12, "width": 16, "layers": 1, "heads": 2},
  },
  "loss": {"name": "sigmoid"},
}
RESNET = {
  "model": {"image_size": 32, "vision": {"kind": "resnet", "stages": (1, 1, 1, 1), "width": 8, "heads": 4}},
}


def resolved(shape=(1, 1, 1), **sections):
  return configs.resolve(tiny(mesh=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), **sections))


def mesh_for(config):
  return meshes.create(config, jax.devices()[: math.prod((config.mesh.data, config.mesh.fsdp, config.mesh.tensor))])


def described(config):
  """A state that has shapes and shardings, and no numbers yet."""
  return states.describe(config, mesh_for(config))[0]


def source(config):
  """The weights of a model: numbers that are all different."""
  shapes, count = jax.tree.flatten(described(config).params)[0], 0
  arrays = []
  for shape in shapes:
    arrays.append(np.arange(count, count + shape.size, dtype=np.float32).reshape(shape.shape))
    count += shape.size
  params = jax.tree.unflatten(jax.tree.structure(described(config).params), arrays)
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return Source("memory", "clip_jax", config.model, None, flat, flat.__getitem__)


@pytest.fixture(scope="module")
def other():
  return source(resolved())


def test_every_parameter_is_taken_and_laid_out_as_the_new_mesh_wants(other):
  config = resolved((2, 2, 2))
  fresh = states.create(config, mesh_for(config))
  state = states.start_from(fresh, config, other)
  for got, want, laid in zip(*map(jax.tree.leaves, (state.params, other.params(), fresh.params)), strict=True):
    np.testing.assert_array_equal(got, want)
    assert got.sharding == laid.sharding
  assert state.step == 0 and not np.any(state.opt_state[1].mu["image"]["projection"])


def test_the_moving_average_starts_from_the_same_parameters(other):
  config = resolved((2, 2, 2), optimizer={**tiny()["optimizer"], "ema_decay": 0.9}, train={**tiny()["train"], "init_tower": "image"})
  state = states.start_from(states.create(config, mesh_for(config)), config, other)
  np.testing.assert_array_equal(state.ema["image"]["projection"], other.read("image/projection"))
  for average, param in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.params), strict=True):
    np.testing.assert_array_equal(average, param)
    assert average.sharding == param.sharding and average.dtype == np.float32
  # Two sets of arrays, though they are equal: the step donates both.
  shifted = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (x + 1, y + 2), a, b), donate_argnums=(0, 1))(state.params, state.ema)
  np.testing.assert_array_equal(shifted["image"]["projection"][0], other.read("image/projection") + 1)
  np.testing.assert_array_equal(shifted["image"]["projection"][1], other.read("image/projection") + 2)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_one_tower_alone_is_taken_and_the_rest_begins_anew(other, tower):
  config = resolved(train={**tiny()["train"], "init_tower": tower})
  fresh = states.create(config, mesh_for(config))
  begun = jax.device_get(fresh.params)
  params = states.start_from(fresh, config, other).params
  for part in ("image", "text", "logit_scale"):
    want = other.params()[part] if part == tower else begun[part]
    jax.tree.map(np.testing.assert_array_equal, params[part], want)


@pytest.mark.parametrize(
  "kind, path, length, classes",
  [({}, ("image", "pos_embed"), 17, 1), (SIGLIP, ("image", "pos_embed"), 16, 0), (RESNET, ("image", "pool", "pos_embed"), 5, 1)],
  ids=["vit", "siglip", "resnet"],
)
def test_positions_are_interpolated_where_the_image_is_larger(kind, path, length, classes):
  small = resolved(**{**kind, "model": {**tiny()["model"], **kind.get("model", {})}})
  other = source(small)
  size = 2 * small.model.image_size
  large = resolved(**{**kind, "model": {**tiny()["model"], **kind.get("model", {}), "image_size": size}})
  params = states.start_from(described(large), large, other).params
  got = functools.reduce(lambda tree, key: tree[key], path, params)
  assert len(got) == length
  np.testing.assert_array_equal(got, vit.resize_positions(other.read("/".join(path)), length, classes))
  np.testing.assert_array_equal(params["text"]["projection"], other.read("text/projection"))


@pytest.mark.parametrize(
  "model, message",
  [
    ({"embed_dim": 32}, "image/projection is [32, 16] in config.train.init_from, and config.model needs [32, 32]"),
    ({"vision": {**tiny()["model"]["vision"], "layers": 3}}, "block_2"),
    ({"text": {**tiny()["model"]["text"], "layers": 2}}, "is in only one of config.model and config.train.init_from"),
    ({"logit_bias_init": -10.0}, "logit_bias is in only one of"),
    ({"activation": "gelu"}, "config.model.activation is gelu, and the weights of config.train.init_from were trained with quick_gelu"),
    ({"norm_epsilon": 1e-6}, "config.model.norm_epsilon is 1e-06"),
    ({"vision": {**tiny()["model"]["vision"], "heads": 8}}, "config.model.vision.heads is 8"),
    ({"image_mean": (0.5, 0.5, 0.5)}, "config.model.image_mean is (0.5, 0.5, 0.5)"),
  ],
  ids=str,
)
def test_another_model_is_refused(other, model, message):
  loss = {"name": "sigmoid"} if "logit_bias_init" in model else {}
  config = resolved(model={**tiny()["model"], **model}, loss=loss)
  with pytest.raises(UsageError) as error:
    states.start_from(described(config), config, other)
  assert message in str(error.value)


def test_another_tokenizer_is_refused(other, tmp_path):
  (tmp_path / "a").mkdir()
  tokenizer = small_tokenizer(tmp_path / "a")
  text = {"kind": "siglip", "vocab_size": 300, "context_length": 9, "width": 16, "layers": 1, "heads": 2}
  model = {**tiny()["model"], "text": text, "tokenizer": str(tmp_path / "a")}
  config = resolved(model=model)
  right = dataclasses.replace(source(config), tokenizer=tokenizer)
  states.start_from(described(config), config, right)
  for wrong in (None, dataclasses.replace(tokenizer, content=tokenizer.content + b" ")):
    with pytest.raises(UsageError, match="is not what the weights of config.train.init_from were trained with"):
      states.start_from(described(config), config, dataclasses.replace(right, tokenizer=wrong))


def test_a_locked_image_tower_may_read_text_another_way(other):
  config = resolved(
    train={**tiny()["train"], "init_tower": "image"}, model={**tiny()["model"], "text": {**tiny()["model"]["text"], "heads": 2}}
  )
  states.start_from(described(config), config, other)
