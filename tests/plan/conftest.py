"""Steps that are compiled for TPU slices that are not there."""

import dataclasses

import jax
import pytest
from ml_collections import ConfigDict

from clip_jax.parallel import mesh as meshes
from clip_jax.plan import compile as compiler
from clip_jax.plan import planner
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny

# Wide enough for activations to be more than what small arrays and whole tiles leave over, and compiled in seconds.
SMALL = {
  "image_size": 64,
  "embed_dim": 128,
  "compute_dtype": "bfloat16",
  "vision": {"patch_size": 8, "width": 256, "layers": 2, "heads": 4},
  "text": {"context_length": 32, "width": 256, "layers": 1, "heads": 4},
}


@pytest.fixture
def quickly():
  """The compiler tries less hard to make a fast program, and is done in a third of the time; its products are the same."""
  before = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", "O0")
  yield
  jax.config.update("jax_optimization_level", before)


def resolved(topology, model=None, **sections):
  """A config for a topology, with a model in the place of the very small one, and the topology as a `Target`."""
  where = planner.target(topology)
  values = tiny(**sections)
  values["model"] = model or values["model"]
  return planner.resolved(ConfigDict(values), where), where


@dataclasses.dataclass(frozen=True)
class Step:
  """A compiled training step, and what it was made of."""

  config: object
  mesh: object
  state: object
  compiled: object


def step(topology, model=None, **sections):
  """The training step of a config, compiled for a topology."""
  config, where = resolved(topology, model, **sections)
  mesh = meshes.create(config, compiler.devices(where.topology))
  state = states.describe(config, mesh)[0]
  return Step(config, mesh, state, compiler.compile(steps.create(config, mesh), state, steps.inputs(config, mesh), fresh=True))
