"""The training state, born sharded."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.errors import UsageError
from clip_jax.models.clip import initial_params
from clip_jax.models.vit import resize_positions
from clip_jax.parallel import rules
from clip_jax.train import optimizer as optimizers


@flax.struct.dataclass
class TrainState:
  """All that a step changes.

  Attributes:
    step: int32 scalar, updates done.
    params: float32 parameters of `clip_jax.models.clip.CLIP`.
    opt_state: of the optax chain in `clip_jax.train.optimizer`.
  """

  step: jax.Array
  params: dict
  opt_state: tuple


def describe(config, mesh):
  """Shapes and shardings of the state, without making it.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.

  Returns:
    A `TrainState` of `jax.ShapeDtypeStruct`s that carry their shardings, and the function of no arguments
    that makes the state.
  """
  optimizer, _ = optimizers.create(config)

  def init():
    return initial_params(config.model, jax.random.key(config.train.seed))

  def create():
    params = nn.unbox(init())
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

  shapes = jax.eval_shape(create)
  params = rules.shardings_of(jax.eval_shape(init), mesh)
  # Moments are laid out like the parameters they belong to.
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, sharding: sharding,
    shapes.opt_state,
    params,
    transform_non_params=lambda _: rules.replicated(mesh),
  )
  shardings = TrainState(rules.replicated(mesh), params, opt_state)
  described = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings
  )
  return described, create


def create(config, mesh):
  """A new state; each device makes only the shards it holds."""
  described, make = describe(config, mesh)
  return jax.jit(make, out_shardings=shardings_of(described))()


def start_from(state, params):
  """A new state with the parameters of another run.

  Args:
    state: a `TrainState`.
    params: a nested dict of NumPy arrays, the same on every process. Where an image tower was trained on
      another image size, its position embeddings are interpolated.

  Returns:
    The state, with the step and the optimizer as they are.

  Raises:
    UsageError: the parameters are those of another model; the message names the first that does not fit.
  """
  wanted = flax.traverse_util.flatten_dict(state.params, sep="/")
  given = flax.traverse_util.flatten_dict(params, sep="/")
  for name in [*wanted, *given]:
    if name not in wanted or name not in given:
      raise UsageError(f"{name} is in only one of config.model and config.train.init: they are different models.")
  placed = {}
  for name, old in wanted.items():
    new = np.asarray(given[name])
    if name == "image/pos_embed":
      new = resize_positions(new, len(old))
    if new.shape != old.shape:
      raise UsageError(
        f"{name} is {list(new.shape)} in config.train.init, and config.model needs {list(old.shape)}: they are "
        "different models."
      )
    placed[name] = jax.make_array_from_callback(old.shape, old.sharding, lambda part, new=new: new[part])
  return state.replace(params=flax.traverse_util.unflatten_dict(placed, sep="/"))


def shardings_of(described):
  """The shardings that `describe` put on the shapes."""
  return jax.tree.map(lambda shape: shape.sharding, described)
