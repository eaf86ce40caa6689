"""Starting from the parameters of another run."""

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.errors import UsageError
from clip_jax.models import vit
from clip_jax.parallel import mesh as meshes
from clip_jax.train import state as states
from tests.conftest import tiny


def made(shape=(1, 1, 1), **sections):
  config = configs.resolve(tiny(mesh=dict(zip(("data", "fsdp", "tensor"), shape, strict=True)), **sections))
  return states.create(config, meshes.create(config, jax.devices()[: int(np.prod(shape))]))


@pytest.fixture(scope="module")
def other():
  return jax.tree.map(lambda x: np.asarray(x) + 1, jax.device_get(made().params))


def test_every_parameter_is_taken_and_laid_out_as_the_new_mesh_wants(other):
  fresh = made((2, 2, 2))
  state = states.start_from(fresh, other)
  for got, want, laid in zip(*map(jax.tree.leaves, (state.params, other, fresh.params)), strict=True):
    np.testing.assert_array_equal(got, want)
    assert got.sharding == laid.sharding
  assert state.step == 0 and not np.any(state.opt_state[1].mu["image"]["projection"])


def test_positions_are_interpolated_where_the_image_is_larger(other):
  state = states.start_from(made(model={**tiny()["model"], "image_size": 32}), other)
  got = np.asarray(state.params["image"]["pos_embed"])
  assert got.shape == (17, 32)
  np.testing.assert_array_equal(got, vit.resize_positions(other["image"]["pos_embed"], 17))
  np.testing.assert_array_equal(state.params["image"]["projection"], other["image"]["projection"])


@pytest.mark.parametrize(
  "model, message",
  [
    ({"embed_dim": 32}, "image/projection is [32, 16] in config.train.init, and config.model needs [32, 32]"),
    ({"vision": {**tiny()["model"]["vision"], "layers": 3}}, "block_2"),
    ({"text": {**tiny()["model"]["text"], "layers": 0 + 2}}, "is in only one of config.model and config.train.init"),
    ({"logit_bias_init": -10.0}, "logit_bias is in only one of"),
  ],
  ids=str,
)
def test_another_model_is_refused(other, model, message):
  loss = {"name": "sigmoid"} if "logit_bias_init" in model else {}
  with pytest.raises(UsageError) as error:
    states.start_from(made(model={**tiny()["model"], **model}, loss=loss), other)
  assert message in str(error.value)
