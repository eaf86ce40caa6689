"""What goes with what: values that have the right type and still cannot be run."""

import dataclasses
import math
import re
from fractions import Fraction

from clip_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "dcn_data")


def check_devices(config, devices):
  """Checks that mesh and batch fit a number of devices.

  Raises:
    ConfigError: they do not; the message says which numbers would.
  """
  sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
  given = [size for size in sizes.values() if size != -1]
  fixed = math.prod(given)
  if sizes["dcn_data"] == -1 or len(given) < len(sizes) - 1:
    raise ConfigError(f"config.mesh={sizes}: only one of data, fsdp and tensor can be -1.")
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


def check(config):
  """Checks a config whose sizes are all set.

  Raises:
    ConfigError: a value or a combination of values that cannot be run.
  """
  check_model(config.model)
  _check_optimizer(config.optimizer)
  _check_multipliers("config.train.init_multipliers", config.train.init_multipliers)
  _check_loss(config.loss, config.model)
  one_of("config.train.init_tower", config.train.init_tower, ("both", "image", "text"))
  one_of("config.train.attention", config.train.attention, ("auto", "xla", "pallas", "cudnn"))
  one_of("config.train.quantization", config.train.quantization, ("none", "int8", "fp8"))
  one_of("config.train.remat", config.train.remat, ("none", "minimal", "attention", "full", "offload"))
  one_of("config.train.on_spike", config.train.on_spike, ("record", "rollback"))
  one_of("config.tracking.wandb", config.tracking.wandb, ("off", "online", "offline"))
  _check_mesh(config.mesh)
  _check_data(config.data)
  _check_ranges(
    ("train.seed", config.train.seed, 0, 2**32 - 1),
    ("train.microbatches", config.train.microbatches, 1, 10**6),
    ("train.log_every", config.train.log_every, 1, 10**9),
    ("train.max_bad_steps", config.train.max_bad_steps, 1, 10**9),
    ("train.spike_window", config.train.spike_window, 2, 10**6),
    ("train.spike_factor", config.train.spike_factor, 1, 1e9),
    ("train.step_timeout", config.train.step_timeout, 1, 1e9),
    ("train.host_timeout", config.train.host_timeout, 10, 10**6),
    ("train.join_timeout", config.train.join_timeout, 1, 10**6),
    ("eval.every", config.eval.every, 0, 10**9),
    ("eval.batch_size", config.eval.batch_size, 1, 10**6),
    ("checkpoint.every", config.checkpoint.every, 1, 10**9),
    ("checkpoint.every_minutes", config.checkpoint.every_minutes, 0.001, 1e9),
    ("checkpoint.keep_last", config.checkpoint.keep_last, 1, 10**6),
    *((f"checkpoint.keep_steps[{i}]", step, 1, 10**9) for i, step in enumerate(config.checkpoint.keep_steps)),
  )
  if config.model.vision.kind == "resnet" and config.train.microbatches > 1:
    raise ConfigError(
      f"config.train.microbatches={config.train.microbatches} must be 1 with a ResNet: its batch norms would see one "
      "microbatch at a time, so the gradient would not be that of the whole batch; if memory is short, take more "
      "devices or a Vision Transformer, as fewer images per device at a time are not possible."
    )
  if config.eval.datasets and not config.eval.data_root:
    raise ConfigError("config.eval.data_root is empty; it is the folder or bucket that holds config.eval.datasets.")
  for name, item in config.eval.zero_shot.items():
    path = f"config.eval.zero_shot.{name}"
    if not item.classes or not item.templates:
      raise ConfigError(f"{path} needs at least one class name and one template.")
    bad = [t for t in item.templates if t.count("{}") != 1]
    if bad:
      raise ConfigError(f"{path}.templates: {bad[0]!r} must hold {{}} once, where the class name goes.")


def _check_pattern(path, pattern):
  try:
    re.compile(pattern)
  except re.error as error:
    raise ConfigError(f"{path}={pattern!r} is not a regular expression ({error}).") from error


def _check_mesh(mesh):
  one_of("config.mesh.sharding", mesh.sharding, ("fsdp", "zero1"))
  for key, pairs in (("rules", [(axis, (to,)) for axis, to in mesh.rules]), ("overrides", mesh.overrides)):
    for i, (_, spec) in enumerate(pairs):
      for axes in spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
          one_of(f"config.mesh.{key}[{i}][1]", axis, ("data", "fsdp", "tensor"))
  for i, (axis, _) in enumerate(mesh.rules):
    one_of(f"config.mesh.rules[{i}][0]", axis, LOGICAL_AXES)
  for i, (pattern, _) in enumerate(mesh.overrides):
    _check_pattern(f"config.mesh.overrides[{i}][0]", pattern)


# Of parameters, as the modules in models/ name them.
LOGICAL_AXES = ("embed", "heads", "mlp", "vocab")
FORMATS = ("auto", "tar", "array_record", "tfds", "parquet", "folder", "classes", "emoji")
MOST_WEIGHTS = 10**6


def _check_ranges(*rows):
  for path, value, low, high in rows:
    if value is not None and not low <= value <= high:
      raise ConfigError(f"config.{path}={value} must lie between {low:,} and {high:,}.")


def _check_data(data):
  one_of("config.data.source", data.source, FORMATS)
  one_of("config.data.order", data.order, ("global", "blocks"))
  _check_ranges(
    ("data.color_jitter", data.color_jitter, 0, 1),
    ("data.flip", data.flip, 0, 1),
    ("data.other_captions", data.other_captions, 0, 1),
    ("data.max_bad_share", data.max_bad_share, 0, 1),
    ("data.rotation", data.rotation, 0, 180),
    ("data.threads", data.threads, 0, 1024),
    ("data.prefetch", data.prefetch, 1, 1024),
    ("data.seed", data.seed, 0, 2**63 - 1),
    ("data.min_size", data.min_size, 0, 10**6),
    ("data.max_aspect", math.inf if data.max_aspect is None else data.max_aspect, 1, math.inf),
    ("data.min_caption", data.min_caption, 0, 10**6),
    ("data.max_caption", 10**6 if data.max_caption is None else data.max_caption, 1, 10**6),
    ("data.block", data.block, 1, 10**6),
    ("data.window", data.window, 1, 10**6),
    ("data.lanes", data.lanes, 1, 10**6),
    ("data.block_cache", data.block_cache, 0, 10**6),
    ("data.read_deadline", data.read_deadline, 1, 10**6),
    ("data.max_pixels", data.max_pixels, 1, 2**40),
  )
  if len(data.crop_scale) != 2 or not 0 < data.crop_scale[0] <= data.crop_scale[1] <= 1:
    raise ConfigError(f"config.data.crop_scale={data.crop_scale} must be two shares, 0 < low <= high <= 1.")
  for key, pairs in (("mixture", data.mixture), ("captions", data.captions)):
    for i, (name, weight) in enumerate(pairs):
      if not name or not 0 < weight < math.inf:
        raise ConfigError(f"config.data.{key}[{i}]={(name, weight)} must be a name and a positive weight.")
  paths = [path for path, _ in data.mixture]
  if len(set(paths)) < len(paths):
    raise ConfigError("config.data.mixture names a path twice; give it once, with the sum of its weights.")
  if data.mixture and data.path:
    raise ConfigError(f"config.data.path={data.path!r} and config.data.mixture are both set; put the path into the mixture.")
  if data.captions and data.other_captions:
    raise ConfigError("config.data.captions and config.data.other_captions are both set; the weights say it all.")
  exact = [Fraction(str(weight)) for _, weight in data.mixture]
  if exact and math.lcm(*((weight / sum(exact)).denominator for weight in exact)) > MOST_WEIGHTS:
    raise ConfigError(
      f"config.data.mixture: {[weight for _, weight in data.mixture]} are in no simple proportion to each other; round "
      "them, so that all together are at most a million times their common measure."
    )


def _check_optimizer(optimizer):
  one_of("config.optimizer.name", optimizer.name, ("adamw", "lion", "adafactor", "muon"))
  one_of("config.optimizer.mu_dtype", optimizer.mu_dtype, ("float32", "bfloat16"))
  _check_ranges(
    ("optimizer.beta1", optimizer.beta1, 0, 0.999999),  # at 1 a mean never moves, and its correction divides by zero
    ("optimizer.beta2", optimizer.beta2, 0, 0.999999),
    ("optimizer.epsilon", optimizer.epsilon, 0, 1),
    ("optimizer.gradient_clip_norm", 1.0 if optimizer.gradient_clip_norm is None else optimizer.gradient_clip_norm, 1e-9, 1e9),
    ("optimizer.learning_rate", optimizer.learning_rate, 0, 1e3),
    ("optimizer.weight_decay", optimizer.weight_decay, 0, 1e3),
  )
  if optimizer.ema_decay is not None and not 0 < optimizer.ema_decay < 1:
    raise ConfigError(f"config.optimizer.ema_decay={optimizer.ema_decay} must be more than 0 and less than 1.")
  _check_schedule(optimizer)
  _check_patterns(optimizer)


def _check_schedule(optimizer):
  one_of("config.optimizer.schedule", optimizer.schedule, ("cosine", "linear", "rsqrt", "constant"))
  _check_ranges(
    ("optimizer.warmup_steps", optimizer.warmup_steps, 0, 10**9),
    ("optimizer.cooldown_steps", optimizer.cooldown_steps, 0, 10**9),
    ("optimizer.timescale", optimizer.timescale, 1, 10**9),
  )
  end = optimizer.end_learning_rate
  if not 0 <= end <= optimizer.learning_rate:
    raise ConfigError(
      f"config.optimizer.end_learning_rate={end} must lie between 0 and config.optimizer.learning_rate={optimizer.learning_rate}."
    )
  ends = optimizer.schedule in ("cosine", "linear")
  if ends and optimizer.cooldown_steps:
    raise ConfigError(
      f"config.optimizer.cooldown_steps={optimizer.cooldown_steps:,} is for the schedules 'rsqrt' and 'constant'; "
      f"{optimizer.schedule!r} goes down to the end by itself."
    )
  if end and not ends and not optimizer.cooldown_steps:
    raise ConfigError(
      f"config.optimizer.end_learning_rate={end} is never reached: {optimizer.schedule!r} needs config.optimizer.cooldown_steps "
      "to get there."
    )


def _check_patterns(optimizer):
  for key in ("no_decay", "freeze"):
    _check_pattern(f"config.optimizer.{key}", getattr(optimizer, key))
  for key in ("lr_multipliers", "decay_multipliers"):
    _check_multipliers(f"config.optimizer.{key}", getattr(optimizer, key))
  if not 0 < optimizer.layer_decay <= 1:
    raise ConfigError(f"config.optimizer.layer_decay={optimizer.layer_decay} must be more than 0 and at most 1.")


def _check_multipliers(path, pairs):
  for i, (pattern, factor) in enumerate(pairs):
    _check_pattern(f"{path}[{i}][0]", pattern)
    if not 0 <= factor < math.inf:
      raise ConfigError(f"{path}[{i}][1]={factor} must be at least 0, and finite.")


def _check_loss(loss, model):
  one_of("config.loss.name", loss.name, ("softmax", "sigmoid"))
  one_of("config.loss.method", loss.method, ("auto", "gather", "ring"))
  one_of("config.loss.dtype", loss.dtype, ("float32", "bfloat16"))
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


def check_model(model):
  """Checks a model whose sizes are all set.

  Raises:
    ConfigError: there is no such model.
  """
  one_of("config.model.activation", model.activation, ("quick_gelu", "gelu", "gelu_tanh"))
  one_of("config.model.compute_dtype", model.compute_dtype, ("float32", "bfloat16", "auto"))
  one_of("config.model.residual_dtype", model.residual_dtype, (None, "float32", "bfloat16"))
  one_of("config.model.resize_mode", model.resize_mode, ("shortest", "squash"))
  for name, tower in (("vision", model.vision), ("text", model.text)):
    for key, value in dataclasses.asdict(tower).items():
      if isinstance(value, int) and value < 1:
        raise ConfigError(f"config.model.{name}.{key}={value} must be at least 1.")
  for key in ("norm_epsilon", "logit_scale_init"):
    if getattr(model, key) <= 0:
      raise ConfigError(f"config.model.{key}={getattr(model, key)} must be positive.")
  if len(model.image_mean) != 3 or len(model.image_std) != 3 or min(model.image_std) <= 0:
    raise ConfigError("config.model.image_mean and image_std must be three numbers, image_std positive.")
  _check_vision(model)
  _check_text(model)


def _check_vision(model):
  vision, size = model.vision, model.image_size
  if not 0 <= vision.patch_drop < 1:
    raise ConfigError(f"config.model.vision.patch_drop={vision.patch_drop} must be at least 0 and less than 1.")
  if vision.kind == "resnet":
    if len(vision.stages) != 4 or min(vision.stages) < 1:
      raise ConfigError(f"config.model.vision.stages={vision.stages} must be four numbers of blocks, each at least 1.")
    given = [key for key in ("patch_size", "layers", "mlp_width") if getattr(vision, key) is not None]
    if given or vision.patch_drop:
      raise ConfigError(f"config.model.vision.{(given or ['patch_drop'])[0]} has no meaning for a ResNet; leave it out.")
    if vision.width % 2:
      raise ConfigError(f"config.model.vision.width={vision.width} must be even: the stem starts with half of it.")
    _divides(vision.heads, "vision.heads", 32 * vision.width, "32 * config.model.vision.width")
    if size < 32 or size % 32:
      raise ConfigError(f"config.model.image_size={size} is not a multiple of 32, which a ResNet divides it by.")
    return
  if vision.stages is not None:
    raise ConfigError("config.model.vision.stages is for a ResNet; set config.model.vision.kind='resnet', or leave it out.")
  _divides(vision.heads, "vision.heads", vision.width, "config.model.vision.width")
  # SigLIP's So400m/14 at 384 pixels leaves the last six out.
  if size < vision.patch_size or (vision.kind == "vit" and size % vision.patch_size):
    raise ConfigError(
      f"config.model.image_size={size} is not a multiple of config.model.vision.patch_size={vision.patch_size}."
    )
  if vision.kind == "siglip" and model.embed_dim != vision.width:
    raise ConfigError(
      f"config.model.embed_dim={model.embed_dim} must be config.model.vision.width={vision.width}: SigLIP's image tower "
      "has no projection."
    )


def _check_text(model):
  text = model.text
  _divides(text.heads, "text.heads", text.width, "config.model.text.width")
  one_of("config.model.text.reduction", text.reduction, ("truncate", "random", "block"))
  if text.train_length is not None:
    if text.kind == "siglip":
      raise ConfigError("config.model.text.train_length is for text towers that are read at the end token; leave it out.")
    if not 3 <= text.train_length <= text.context_length:
      raise ConfigError(
        f"config.model.text.train_length={text.train_length} must lie between 3 and "
        f"config.model.text.context_length={text.context_length}."
      )
  if model.tokenizer != "clip":
    if text.context_length < 2:
      raise ConfigError(f"config.model.text.context_length={text.context_length} must be at least 2.")
    return
  if not 3 <= text.context_length <= 77:
    raise ConfigError(
      f"config.model.text.context_length={text.context_length} must lie between 3 and 77, "
      "the context of CLIP's tokenizer."
    )
  if text.vocab_size < 49_408:
    raise ConfigError(
      f"config.model.text.vocab_size={text.vocab_size:,} is smaller than the tokenizer's 49,408."
    )


def _divides(heads, key, width, of):
  if width % heads:
    raise ConfigError(f"config.model.{key}={heads} does not divide {of}={width}.")


def one_of(path, value, allowed):
  """Raises a `ConfigError` unless a value is one of those allowed."""
  if value not in allowed:
    raise ConfigError(f"{path}={value!r} must be one of {', '.join(map(repr, allowed))}.")
