"""Configs: checked against the schema, and completed, before anything compiles.

Recipes in `configs/` return a `ConfigDict`. `resolve` checks it against the frozen dataclasses of `schema.py`,
fills in the sizes a model's name stands for, and returns a `Config` that the rest of the code reads.
"""

import dataclasses
import types
import typing

from clip_jax.config import checks
from clip_jax.config.checks import check_devices
from clip_jax.config.schema import (
  CLIP_MEAN,
  CLIP_STD,
  Checkpoint,
  Config,
  Data,
  Eval,
  Loss,
  Mesh,
  Model,
  Optimizer,
  Retrieval,
  Text,
  Tracking,
  Train,
  Vision,
  ZeroShot,
)
from clip_jax.errors import ConfigError, did_you_mean

__all__ = [
  "Checkpoint",
  "Config",
  "Data",
  "Eval",
  "Loss",
  "Mesh",
  "Model",
  "Optimizer",
  "Retrieval",
  "Text",
  "Tracking",
  "Train",
  "Vision",
  "ZeroShot",
  "check_devices",
  "check_key",
  "model_from_dict",
  "resolve",
  "to_dict",
]

# What a model is where neither its keys nor its name say so: Radford et al. 2021.
DEFAULTS = dict(
  activation="quick_gelu",  # of OpenAI's released weights
  norm_epsilon=1e-5,
  image_mean=CLIP_MEAN,
  image_std=CLIP_STD,
  resize_mode="shortest",
  tokenizer="clip",
  logit_scale_init=1 / 0.07,
  vision=dict(kind="vit"),
  text=dict(kind="clip", context_length=77, vocab_size=49_408),
)
# Keys that may stay open, by what the tower is.
OPEN = {
  "model": {"logit_bias_init", "residual_dtype"},
  "vit": {"stages"},
  "siglip": {"stages", "train_length"},
  "resnet": {"patch_size", "layers", "mlp_width"},
  "clip": {"train_length"},
}
KINDS = {"vision": ("vit", "siglip", "resnet"), "text": ("clip", "siglip")}
MLP_RATIO = 4


def resolve(config):
  """Checks a config and fills in what it leaves open.

  Args:
    config: a `ConfigDict` or a nested dict with the keys above.

  Returns:
    A `Config` whose model sizes and numbers of steps are all set.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible combination; the message names the key,
      what is wrong and what would be accepted.
  """
  plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  resolved = _build(Config, plain, "config")
  train = _steps(resolved.train)
  optimizer = _spans(resolved.optimizer, train.global_batch_size)
  resolved = dataclasses.replace(resolved, model=_named_sizes(resolved.model), train=train, optimizer=optimizer)
  checks.check(resolved)
  return resolved


def to_dict(config):
  """A `Config` as nested dicts and lists, ready for JSON."""
  return _plain(dataclasses.asdict(config))


def model_from_dict(values):
  """The `Model` of a checkpoint's card, checked as a config is."""
  model = _named_sizes(_build(Model, values, "model"))
  checks.check_model(model)
  return model


def check_key(path):
  """Checks that a dotted path, such as "train.steps", names a key of the schema.

  Raises:
    ConfigError: it does not; the message names the nearest one that does.
  """
  hint, walked = Config, "config"
  for key in path.split("."):
    if dataclasses.is_dataclass(hint):
      _check_known(hint, key, walked)
      hint = typing.get_type_hints(hint)[key]
    elif typing.get_origin(hint) is dict:
      hint = typing.get_args(hint)[1]
    else:
      raise ConfigError(f"config.{path}: {walked} is a value, not a group of keys.")
    walked = f"{walked}.{key}"


def _build(cls, values, path):
  if not isinstance(values, dict):
    raise ConfigError(f"{path} is {values!r}; expected a group with keys {_listed(cls)}.")
  hints = typing.get_type_hints(cls)
  for key in values:
    _check_known(cls, key, path)
  return cls(**{key: _value(value, hints[key], f"{path}.{key}") for key, value in values.items()})


def _value(value, hint, path):
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if isinstance(hint, types.UnionType):
    if value is None and types.NoneType in arguments:
      return None
    # Of "a string or a tuple of strings" the one that the value may be.
    listed = [typing.get_origin(argument) is tuple for argument in arguments]
    return _value(value, arguments[listed.index(True) if any(listed) and isinstance(value, (tuple, list)) else 0], path)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path)
  if origin is dict and isinstance(value, dict):
    return {key: _value(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
  if origin is tuple and isinstance(value, (tuple, list)):
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    if len(hints) == len(value):
      return tuple(_value(item, hint, f"{path}[{i}]") for i, (item, hint) in enumerate(zip(value, hints, strict=True)))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
    return value
  wanted = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "True or False"}
  raise ConfigError(
    f"{path} is {value!r}; expected {wanted.get(getattr(hint, '__name__', ''), str(hint))}."
  )


def _check_known(cls, key, path):
  known = [f.name for f in dataclasses.fields(cls)]
  if key not in known:
    hint = did_you_mean(key, known, f"Its keys are {_listed(cls)}.", cutoff=0.4)
    raise ConfigError(f"{path}.{key} is not a key of {path.removeprefix('config.')}. {hint}")


def _listed(cls):
  return ", ".join(f.name for f in dataclasses.fields(cls))


def _plain(value):
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _named_sizes(model):
  # Imported here: the schema is floor 1, and only this one step needs the table of names.
  from clip_jax.models import zoo

  if model.name and model.name not in zoo.MODELS:
    hint = did_you_mean(model.name, zoo.MODELS, f"Known are {', '.join(zoo.MODELS)}.")
    raise ConfigError(f"config.model.name={model.name!r} is not a known model. {hint}")
  named = zoo.MODELS.get(model.name, {})
  towers = {}
  for tower in ("vision", "text"):
    filled = _fill(getattr(model, tower), DEFAULTS[tower] | named.get(tower, {}))
    checks.one_of(f"config.model.{tower}.kind", filled.kind, KINDS[tower])
    if filled.mlp_width is None and filled.kind != "resnet" and filled.width is not None:
      filled = dataclasses.replace(filled, mlp_width=MLP_RATIO * filled.width)
    towers[tower] = filled
  model = _fill(dataclasses.replace(model, **towers), DEFAULTS | named)
  for path, group, allowed in (
    ("model", model, OPEN["model"]),
    ("model.vision", model.vision, OPEN[model.vision.kind]),
    ("model.text", model.text, OPEN[model.text.kind]),
  ):
    for key, value in dataclasses.asdict(group).items():
      if value is None and key not in allowed:
        raise ConfigError(
          f"config.{path}.{key} is not set; give it, or a config.model.name that stands for it."
        )
  return model


def _fill(group, values):
  open_keys = {k: v for k, v in values.items() if getattr(group, k) is None}
  return dataclasses.replace(group, **open_keys)


def _steps(train):
  if train.steps is None and train.samples is None:
    raise ConfigError("config.train.steps and config.train.samples are both unset; set one of them.")
  if train.global_batch_size < 1:
    raise ConfigError(f"config.train.global_batch_size={train.global_batch_size} must be at least 1.")
  steps = train.steps if train.steps is not None else train.samples // train.global_batch_size
  if steps < 1:
    raise ConfigError(
      f"config.train asks for {steps} steps; samples must be at least one batch "
      f"({train.global_batch_size:,}) and steps at least 1."
    )
  return dataclasses.replace(train, steps=steps, samples=steps * train.global_batch_size)


def _spans(optimizer, batch):
  changes = {}
  for steps, samples in (
    ("warmup_steps", "warmup_samples"),
    ("cooldown_steps", "cooldown_samples"),
    ("timescale", "timescale_samples"),
  ):
    count, given = getattr(optimizer, steps), getattr(optimizer, samples)
    if given is not None:
      if given < 0:
        raise ConfigError(f"config.optimizer.{samples}={given} must be at least 0.")
      count = -(-given // batch)
    changes |= {steps: count, samples: count * batch}
  return dataclasses.replace(optimizer, **changes)
