"""The schema of a run: every key there is, its type, and what goes with what.

Recipes in `configs/` return a `ConfigDict`. `resolve` checks it against these frozen dataclasses before
anything compiles, fills in the sizes a model's name stands for, and returns a `Config` that the rest of
the code reads. A key that is not here does not exist. `None` as a default means "left open": the model's
name, or another key, decides.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

from clip_jax.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's training images, RGB in 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Vision:
  """The image tower: a Vision Transformer. Sizes left open come from the model's name."""

  patch_size: int | None = None  # pixels
  width: int | None = None
  layers: int | None = None
  heads: int | None = None
  mlp_width: int | None = None  # 4 * width if left open
  patch_drop: float = 0.0  # share of the patches left out in training, at random (Li et al. 2022, FLIP)


@dataclass(frozen=True)
class Text:
  """The text tower: a causal Transformer. Sizes left open come from the model's name."""

  context_length: int | None = None  # tokens, start and end included
  vocab_size: int | None = None
  width: int | None = None
  layers: int | None = None
  heads: int | None = None
  mlp_width: int | None = None
  train_length: int | None = None  # tokens kept in training, start and end included; all of them if left open
  reduction: str = "truncate"  # how: "truncate", "random" or "block" (Li et al. 2023, CLIPA)


@dataclass(frozen=True)
class Model:
  """Everything that must be known to use the weights."""

  name: str = ""  # a name of `clip-jax models`; empty if every size is given
  image_size: int | None = None  # pixels
  embed_dim: int | None = None
  activation: str = "quick_gelu"  # or "gelu"
  norm_epsilon: float = 1e-5
  image_mean: tuple[float, ...] = CLIP_MEAN
  image_std: tuple[float, ...] = CLIP_STD
  tokenizer: str = "clip"
  compute_dtype: str = "float32"  # or "bfloat16"; parameters are float32 either way
  logit_scale_init: float = 1 / 0.07  # what cosines are multiplied by, before anything is learned
  logit_bias_init: float | None = None  # what is then added, learned with the sigmoid loss; no bias if left open
  vision: Vision = field(default_factory=Vision)
  text: Text = field(default_factory=Text)


@dataclass(frozen=True)
class Loss:
  """The contrastive loss, over the whole global batch. docs/losses.md has the equations."""

  name: str = "softmax"  # or "sigmoid" (SigLIP)
  method: str = "auto"  # "gather", "ring", or by estimated memory; all give the same
  chunk: int | None = None  # columns scored at a time; chosen if left open
  dtype: str = "float32"  # or "bfloat16": what embeddings are rounded to before they are scored
  label_smoothing: float = 0.0
  mask_duplicates: bool = False  # pairs with the same caption are not each other's negatives
  max_logit_scale: float | None = 100.0  # the logit scale is clipped to it after each update


@dataclass(frozen=True)
class Data:
  """Where pairs come from, in which order, and what is done to an image."""

  source: str = "tar"  # "tar", or "emoji": the quickstart set, written on first use
  path: str = ""  # a glob, {a..b} and {a,b} expanded; with "emoji" inside its folder
  seed: int = 0  # of the order and of the augmentation
  crop_scale: tuple[float, ...] = (0.9, 1.0)  # random resized crop: smallest and largest share of the area
  color_jitter: float = 0.0  # largest change of brightness, contrast and saturation, as a factor
  flip: float = 0.0  # probability of mirroring left to right
  rotation: float = 0.0  # largest angle, degrees
  other_captions: float = 0.0  # probability of taking one of the captions after a record's first
  threads: int = 0  # 0: as many as there are processor cores
  prefetch: int = 4  # batches kept ready
  max_bad_share: float = 0.05  # of records that do not decode, before the run stops
  allow_truncated: bool = False  # read the whole records of a shard that is cut off


@dataclass(frozen=True)
class Train:
  """How long, how large, and how often to say so."""

  global_batch_size: int = 32_768
  samples: int | None = None  # training pairs in all
  steps: int | None = None  # wins over samples
  microbatches: int = 1  # parts that go through the towers one by one; the loss is that of the whole batch
  init: str = ""  # a work directory or checkpoint whose parameters to start from
  seed: int = 0  # of the parameters, and of what is left out of an example in training
  log_every: int = 1  # steps


@dataclass(frozen=True)
class Optimizer:
  """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay to zero."""

  learning_rate: float = 5e-4
  warmup_steps: int = 2_000
  weight_decay: float = 0.2
  no_decay: str = r"(^|/)(bias|qkv_bias|scale|logit_scale|logit_bias)$"  # parameters left out of it, by path
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-6
  gradient_clip_norm: float | None = None


@dataclass(frozen=True)
class Mesh:
  """Devices along each mesh axis; -1 takes what the others leave."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1


@dataclass(frozen=True)
class Retrieval:
  """A held-out set of images and captions to retrieve one by the other."""

  path: str = ""
  source: str = "tar"
  first_caption: bool = False  # of each record's captions only the first is a candidate
  nearest_training_image: bool = False  # also report a yardstick that needs no training, at the end
  gallery: int = 0  # pictures of retrievals in the report


@dataclass(frozen=True)
class ZeroShot:
  """A held-out set of labelled images (`.cls` members) to classify by class names in prompts."""

  path: str = ""
  source: str = "tar"
  classes: tuple[str, ...] = ()
  templates: tuple[str, ...] = ("a photo of a {}.",)


@dataclass(frozen=True)
class Eval:
  """Evaluation while training; always once more at the end."""

  every: int = 0  # steps; 0: only at the end
  batch_size: int = 256
  retrieval: dict[str, Retrieval] = field(default_factory=dict)
  zero_shot: dict[str, ZeroShot] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
  """When to save and what to keep; always saved at the end and on SIGTERM or SIGINT."""

  every: int = 1_000  # steps
  keep_last: int = 3
  keep_every: int | None = None  # steps; also keep each multiple of it for good


@dataclass(frozen=True)
class Config:
  """A whole run."""

  model: Model = field(default_factory=Model)
  loss: Loss = field(default_factory=Loss)
  data: Data = field(default_factory=Data)
  train: Train = field(default_factory=Train)
  optimizer: Optimizer = field(default_factory=Optimizer)
  mesh: Mesh = field(default_factory=Mesh)
  eval: Eval = field(default_factory=Eval)
  checkpoint: Checkpoint = field(default_factory=Checkpoint)


def resolve(config):
  """Checks a config and fills in what it leaves open.

  Args:
    config: a `ConfigDict` or a nested dict with the keys above.

  Returns:
    A `Config` whose model sizes and number of steps are all set.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible combination; the message names the key,
      what is wrong and what would be accepted.
  """
  plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
  resolved = _build(Config, plain, "config")
  resolved = dataclasses.replace(
    resolved, model=_named_sizes(resolved.model), train=_steps(resolved.train)
  )
  _check(resolved)
  return resolved


def to_dict(config):
  """A `Config` as nested dicts and lists, ready for JSON."""
  return _plain(dataclasses.asdict(config))


def model_from_dict(values):
  """The `Model` of a checkpoint's card, checked as a config is."""
  model = _named_sizes(_build(Model, values, "model"))
  _check_model(model)
  return model


def check_devices(config, devices):
  """Checks that mesh and batch fit a number of devices.

  Raises:
    ConfigError: they do not; the message says which numbers would.
  """
  sizes = dataclasses.asdict(config.mesh)
  given = [size for size in sizes.values() if size != -1]
  fixed = math.prod(given)
  if len(given) < 2:
    raise ConfigError(f"config.mesh={sizes}: only one axis can be -1.")
  if min(given) < 1 or (devices % fixed if -1 in sizes.values() else devices != fixed):
    raise ConfigError(f"config.mesh={sizes} cannot be laid over {devices} devices.")
  tensor = devices // fixed if sizes["tensor"] == -1 else sizes["tensor"]
  shards = devices // tensor
  for key, size, parts in (
    ("train.global_batch_size", config.train.global_batch_size, config.train.microbatches),
    ("eval.batch_size", config.eval.batch_size, 1),
  ):
    multiple = shards * parts
    if size % multiple:
      below, above = size // multiple * multiple, -(-size // multiple) * multiple
      can = f"{below:,} and {above:,} can" if below else f"{above:,} can"
      times = f" times {parts} microbatches" if parts > 1 else ""
      raise ConfigError(f"config.{key}={size:,} cannot be split over {shards} devices{times}; {can}.")
  if config.model.vision.heads % tensor or config.model.text.heads % tensor:
    raise ConfigError(
      f"config.mesh.tensor={tensor} must divide the heads of both towers "
      f"({config.model.vision.heads} and {config.model.text.heads})."
    )


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
    return None if value is None else _value(value, arguments[0], path)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path)
  if origin is dict and isinstance(value, dict):
    return {key: _value(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
  if origin is tuple and isinstance(value, (tuple, list)):
    return tuple(_value(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
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
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}?" if near else f"Its keys are {_listed(cls)}."
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
    near = difflib.get_close_matches(model.name, zoo.MODELS, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(zoo.MODELS)}."
    raise ConfigError(f"config.model.name={model.name!r} is not a known model. {hint}")
  named = zoo.MODELS.get(model.name, {})
  defaults = dict(context_length=zoo.CONTEXT_LENGTH, vocab_size=zoo.VOCAB_SIZE)
  vision = _fill(model.vision, named.get("vision", {}))
  text = _fill(model.text, defaults | named.get("text", {}))
  model = _fill(dataclasses.replace(model, vision=vision, text=text), named)
  for path, group in (("model", model), ("model.vision", vision), ("model.text", text)):
    for key, value in dataclasses.asdict(group).items():
      if value is None and key not in ("mlp_width", "train_length", "logit_bias_init"):
        raise ConfigError(
          f"config.{path}.{key} is not set; give it, or a config.model.name that stands for it."
        )
  widths = {
    "vision": _fill(vision, dict(mlp_width=zoo.MLP_RATIO * vision.width)),
    "text": _fill(text, dict(mlp_width=zoo.MLP_RATIO * text.width)),
  }
  return dataclasses.replace(model, **widths)


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


def _check(config):
  _check_model(config.model)
  data, optimizer = config.data, config.optimizer
  _check_loss(config.loss, config.model)
  _one_of("config.data.source", data.source, ("tar", "emoji"))
  if len(data.crop_scale) != 2 or not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
    raise ConfigError(f"config.data.crop_scale={data.crop_scale} must be two shares, 0 < low <= high <= 1.")
  for path, value, low, high in (
    ("data.color_jitter", data.color_jitter, 0, 1),
    ("data.flip", data.flip, 0, 1),
    ("data.other_captions", data.other_captions, 0, 1),
    ("data.max_bad_share", data.max_bad_share, 0, 1),
    ("data.rotation", data.rotation, 0, 180),
    ("data.threads", data.threads, 0, 1024),
    ("data.prefetch", data.prefetch, 1, 1024),
    ("data.seed", data.seed, 0, 2**63 - 1),
    ("train.seed", config.train.seed, 0, 2**32 - 1),
    ("train.microbatches", config.train.microbatches, 1, 10**6),
    ("train.log_every", config.train.log_every, 1, 10**9),
    ("optimizer.warmup_steps", optimizer.warmup_steps, 0, 10**9),
    ("optimizer.beta1", optimizer.beta1, 0, 1),
    ("optimizer.beta2", optimizer.beta2, 0, 1),
    ("optimizer.learning_rate", optimizer.learning_rate, 0, 1e3),
    ("optimizer.weight_decay", optimizer.weight_decay, 0, 1e3),
    ("eval.every", config.eval.every, 0, 10**9),
    ("eval.batch_size", config.eval.batch_size, 1, 10**6),
    ("checkpoint.every", config.checkpoint.every, 1, 10**9),
    ("checkpoint.keep_last", config.checkpoint.keep_last, 1, 10**6),
  ):
    if not low <= value <= high:
      raise ConfigError(f"config.{path}={value} must lie between {low:,} and {high:,}.")
  for name, item in config.eval.zero_shot.items():
    path = f"config.eval.zero_shot.{name}"
    if not item.classes or not item.templates:
      raise ConfigError(f"{path} needs at least one class name and one template.")
    bad = [t for t in item.templates if t.count("{}") != 1]
    if bad:
      raise ConfigError(f"{path}.templates: {bad[0]!r} must hold {{}} once, where the class name goes.")


def _check_loss(loss, model):
  _one_of("config.loss.name", loss.name, ("softmax", "sigmoid"))
  _one_of("config.loss.method", loss.method, ("auto", "gather", "ring"))
  _one_of("config.loss.dtype", loss.dtype, ("float32", "bfloat16"))
  if loss.chunk is not None and loss.chunk < 1:
    raise ConfigError(f"config.loss.chunk={loss.chunk} must be at least 1 column.")
  if not 0 <= loss.label_smoothing < 1:
    raise ConfigError(f"config.loss.label_smoothing={loss.label_smoothing} must be at least 0 and less than 1.")
  if loss.max_logit_scale is not None and loss.max_logit_scale <= 0:
    raise ConfigError(f"config.loss.max_logit_scale={loss.max_logit_scale} must be positive.")
  if (loss.name == "sigmoid") != (model.logit_bias_init is not None):
    raise ConfigError(
      f"config.loss.name={loss.name!r} and config.model.logit_bias_init={model.logit_bias_init} do not go "
      "together: the sigmoid loss learns a bias (SigLIP starts it at -10), and the softmax loss has no use for one."
    )


def _check_model(model):
  _one_of("config.model.activation", model.activation, ("quick_gelu", "gelu"))
  _one_of("config.model.compute_dtype", model.compute_dtype, ("float32", "bfloat16"))
  _one_of("config.model.tokenizer", model.tokenizer, ("clip",))
  for name, tower in (("vision", model.vision), ("text", model.text)):
    for key, value in dataclasses.asdict(tower).items():
      if isinstance(value, int) and value < 1:
        raise ConfigError(f"config.model.{name}.{key}={value} must be at least 1.")
    if tower.width % tower.heads:
      raise ConfigError(
        f"config.model.{name}.heads={tower.heads} does not divide config.model.{name}.width={tower.width}."
      )
  if model.image_size < 1 or model.image_size % model.vision.patch_size:
    raise ConfigError(
      f"config.model.image_size={model.image_size} is not a multiple of "
      f"config.model.vision.patch_size={model.vision.patch_size}."
    )
  if not 0 <= model.vision.patch_drop < 1:
    raise ConfigError(
      f"config.model.vision.patch_drop={model.vision.patch_drop} must be at least 0 and less than 1."
    )
  if model.logit_scale_init <= 0:
    raise ConfigError(f"config.model.logit_scale_init={model.logit_scale_init} must be positive.")
  if len(model.image_mean) != 3 or len(model.image_std) != 3 or min(model.image_std) <= 0:
    raise ConfigError("config.model.image_mean and image_std must be three numbers, image_std positive.")
  if not 3 <= model.text.context_length <= 77:
    raise ConfigError(
      f"config.model.text.context_length={model.text.context_length} must lie between 3 and 77, "
      "the context of CLIP's tokenizer."
    )
  _one_of("config.model.text.reduction", model.text.reduction, ("truncate", "random", "block"))
  length = model.text.train_length
  if length is not None and not 3 <= length <= model.text.context_length:
    raise ConfigError(
      f"config.model.text.train_length={length} must lie between 3 and "
      f"config.model.text.context_length={model.text.context_length}."
    )
  if model.text.vocab_size < 49_408:
    raise ConfigError(
      f"config.model.text.vocab_size={model.text.vocab_size:,} is smaller than the tokenizer's 49,408."
    )


def _one_of(path, value, allowed):
  if value not in allowed:
    raise ConfigError(f"{path}={value!r} must be one of {', '.join(map(repr, allowed))}.")
