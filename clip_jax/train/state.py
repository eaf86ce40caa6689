"""The training state, born sharded."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.data.pipeline import file_tokenizer_for
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
    ema: a moving average of the parameters; None if `optimizer.ema_decay` is.
    skipped: int32 scalar, steps that changed nothing because the loss or a gradient was not finite.
    skipped_in_a_row: int32 scalar, how many of them were the last ones.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  ema: dict | None
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  @property
  def weights(self):
    """What the model is used with: the moving average of its parameters if there is one."""
    return self.params if self.ema is None else self.ema


def describe(config, mesh):
  """Shapes and shardings of the state, without making it.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.

  Returns:
    A `TrainState` of `jax.ShapeDtypeStruct`s that carry their shardings, and the function of no arguments
    that makes the state.

  Raises:
    ConfigError: a pattern of the optimizer matches no parameter.
  """
  optimizer, _ = optimizers.create(config)

  def around(annotated):
    params = optimizers.scaled(nn.unbox(annotated), config.train.init_multipliers)
    ema = None if config.optimizer.ema_decay is None else params
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), ema, zero, zero)

  def create():
    return around(initial_params(config.model, jax.random.key(config.train.seed)))

  annotated = _shapes_of(config.model)
  shapes = jax.eval_shape(around, annotated)
  optimizers.check_patterns(config, shapes.params)
  params, moments = rules.parameter_shardings(annotated, mesh, config.mesh)
  opt_state = _shardings_of_moments(shapes.opt_state, _with_shardings(shapes.params, moments), mesh)
  whole = rules.replicated(mesh)
  shardings = TrainState(whole, params, opt_state, None if shapes.ema is None else moments, whole, whole)
  return _with_shardings(shapes, shardings), create


@functools.lru_cache(maxsize=1)
def _shapes_of(model):
  # A run asks several times, and each time the whole model would be traced.
  return jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))


def _with_shardings(shapes, shardings):
  return jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), shapes, shardings)


# Adafactor's means of squares are over one axis of the parameter; optax takes the largest for the first, the next for the second.
MEANS = {"v_row": -1, "v_col": -2}


def _shardings_of_moments(opt_state, params, mesh):
  # Moments are laid out like the parameters they belong to, whose path theirs ends with.
  by_path = {rules.path_name(path): param for path, param in jax.tree_util.tree_leaves_with_path(params)}

  def place(path, moment):
    keys = [key for key in path if isinstance(key, jax.tree_util.DictKey)]
    names = (rules.path_name(keys[i:]) for i in range(len(keys)))
    param = next((by_path[name] for name in names if name in by_path), None)
    if param is None:
      return rules.replicated(mesh)
    if moment.shape == param.shape:
      return param.sharding
    rank = next((MEANS[name] for key in path if (name := getattr(key, "name", "")) in MEANS), None)
    if rank is not None and len(param.shape) > 1:
      axis, spec = np.argsort(param.shape)[rank], tuple(param.sharding.spec)
      if moment.shape == (*param.shape[:axis], *param.shape[axis + 1 :]):
        return NamedSharding(mesh, PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return rules.replicated(mesh)  # a number that stands where nothing is kept

  return jax.tree_util.tree_map_with_path(place, opt_state)


def create(config, mesh):
  """A new state; each device makes only the shards it holds."""
  described, make = describe(config, mesh)
  return jax.jit(make, out_shardings=shardings_of(described))()


def start_from(state, config, source):
  """A new state with the parameters of another model, one at a time.

  Args:
    state: a `TrainState`.
    config: the resolved `Config` it was made for; `train.init_tower` says which of its parameters are replaced.
    source: a `clip_jax.convert.sources.Source`. Where an image tower was trained on another image size, its position
      embeddings are interpolated.

  Returns:
    The state, with the step and the optimizer as they are. A moving average starts from the same parameters.

  Raises:
    UsageError: the parameters are those of another model; the message names the first that does not fit.
  """
  names = check_start(state.params, config, source)
  wanted = flax.traverse_util.flatten_dict(state.params, sep="/")
  placed = dict(wanted)
  averages = None if state.ema is None else flax.traverse_util.flatten_dict(state.ema, sep="/")
  for name in names:
    old, new = wanted[name], source.read(name)
    if name in RESIZED:
      new = resize_positions(new, len(old), classes=0 if config.model.vision.kind == "siglip" else 1)
    new = np.asarray(new, old.dtype)
    for arrays in (placed, averages):
      if arrays is not None:
        arrays[name] = jax.make_array_from_callback(old.shape, old.sharding, lambda part, new=new: new[part])
  params, ema = (arrays and flax.traverse_util.unflatten_dict(arrays, sep="/") for arrays in (placed, averages))
  return state.replace(params=params, ema=ema)


def check_start(params, config, source):
  """Checks that a model's parameters can take the place of a run's, without reading them.

  Args:
    params: the parameters of a state, or their shapes.
    config: as `start_from`.
    source: as `start_from`.

  Returns:
    The paths of the parameters that it replaces.

  Raises:
    UsageError: as `start_from`.
  """
  tower = config.train.init_tower
  _check_same_model(config.model, source.model, tower)
  if tower != "image":
    _check_same_tokenizer(config.model, source.tokenizer)
  wanted = flax.traverse_util.flatten_dict(params, sep="/")
  names = [name for name in {**wanted, **source.shapes} if tower == "both" or name.startswith(f"{tower}/")]
  for name in names:
    if name not in wanted or name not in source.shapes:
      raise UsageError(f"{name} is in only one of config.model and config.train.init_from: they are different models.")
    new, old = list(source.shapes[name].shape), list(wanted[name].shape)
    if new != old and not (name in RESIZED and new[1:] == old[1:]):
      raise UsageError(f"{name} is {new} in config.train.init_from, and config.model needs {old}: they are different models.")
  return names


RESIZED = ("image/pos_embed", "image/pool/pos_embed")  # interpolated for another image size


def _check_same_model(wanted, given, tower):
  # What leaves no trace in the shapes, and makes the weights another function.
  keys = ["activation", "norm_epsilon"]
  if tower != "text":
    keys += ["vision.kind", "vision.heads", "image_mean", "image_std", "resize_mode"]
  if tower != "image":
    keys += ["text.kind", "text.heads"]
  for key in keys:
    new, old = (functools.reduce(getattr, key.split("."), model) for model in (wanted, given))
    if new != old:
      raise UsageError(f"config.model.{key} is {new}, and the weights of config.train.init_from were trained with {old}.")


def _check_same_tokenizer(model, given):
  if _identity(file_tokenizer_for(model)) != _identity(given):
    raise UsageError(
      f"config.model.tokenizer={model.tokenizer!r} is not what the weights of config.train.init_from were trained with, "
      f"{'CLIP' if given is None else f'another {given.kind}'}."
    )


def _identity(tokenizer):
  # How captions are cleaned is no part of it: open_clip does that itself.
  return tokenizer and (tokenizer.kind, tokenizer.content, tokenizer.pad_id, tokenizer.end_id)


def shardings_of(described):
  """The shardings that `describe` put on the shapes."""
  return jax.tree.map(lambda shape: shape.sharding, described)
