"""Optimizers by name, and what differs by parameter: weight decay, learning rate, what is frozen. Sources: docs/optimizers.md."""

import math
import operator
import re

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from clip_jax.errors import ConfigError
from clip_jax.parallel.rules import path_name
from clip_jax.train import schedule as schedules


def create(config):
  """The optimizer of a run.

  Args:
    config: a resolved `Config`.

  Returns:
    An `optax.GradientTransformation` whose updates are to be added to the parameters, and the schedule:
    a function from the step (0 before the first update) to the learning rate.
  """
  optimizer = config.optimizer
  schedule = schedules.create(optimizer, config.train.steps)
  clip = optimizer.gradient_clip_norm
  transforms = [
    optax.clip_by_global_norm(clip) if clip is not None else optax.identity(),
    DIRECTIONS[optimizer.name](optimizer),
    add_weight_decay(optimizer),
    optax.scale_by_learning_rate(schedule),
  ]
  if optimizer.lr_multipliers or optimizer.layer_decay != 1:
    transforms.append(scale_by_path(multiplier(config)))
  chain = optax.chain(*transforms)
  if not optimizer.freeze:
    return chain, schedule
  parts = {"trained": chain, "frozen": optax.set_to_zero()}
  hold = frozen(config)
  return optax.partition(parts, lambda params: jax.tree.map(lambda f: "frozen" if f else "trained", hold(params))), schedule


def at_step(opt_state, step):
  """An optimizer's state whose schedule is at a step, and all else as it is."""

  def of_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)

  return jax.tree.map(lambda node: node._replace(count=step) if of_schedule(node) else node, opt_state, is_leaf=of_schedule)


def adamw(optimizer):
  """Adam's direction (Kingma & Ba 2015); with the weight decay that every optimizer here has, Loshchilov & Hutter's AdamW."""
  return optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon, mu_dtype=jnp.dtype(optimizer.mu_dtype))


def lion(optimizer):
  """The sign of a mean of momentum and gradient (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""
  return optax.scale_by_lion(optimizer.beta1, optimizer.beta2, jnp.dtype(optimizer.mu_dtype))


# What the second longest axis must have for squares to be factored: the authors' number, as a head is shorter than optax's 128.
FACTORED_FROM = 32


def adafactor(optimizer):
  """Adafactor with a first moment, and without learning rates relative to the parameters (Zhai et al. 2022, arXiv 2106.04560).

  Squares of gradients are kept as means over the rows and over the columns of a matrix (Shazeer & Stern 2018, arXiv 1804.04235,
  sections 3, 6 and 7.2), updates are clipped to a root mean square of 1, and then averaged.
  """

  def decay(step, exponent):
    return jnp.minimum(optimizer.beta2, 1 - (jnp.float32(step) + 1) ** -exponent)

  return optax.chain(
    optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=FACTORED_FROM, decay_rate_fn=decay),
    optax.clip_by_block_rms(1.0),
    optax.ema(optimizer.beta1, debias=False, accumulator_dtype=jnp.dtype(optimizer.mu_dtype)),
  )


# The matrices of blocks, of a Transformer alone; queries, keys and values are three of them in one array.
MATRICES = re.compile(r"/transformer/block_\d+/(attention/(qkv_kernel|out/kernel)|mlp_(in|out)/kernel)$")
MATRIX = MuonDimensionNumbers(reduction_axis=0, output_axis=(1,))
QKV = MuonDimensionNumbers(reduction_axis=0, output_axis=(2, 3))  # [width, 3, heads, size]; the axis that is left out counts them
# The root mean square of AdamW's updates, as the authors found it: learning rates and decay carry over (Liu et al. 2025, section 2.2).
MUON_RMS = 0.2


def muon(optimizer):
  """Orthogonalised momentum for the matrices in Transformer blocks, AdamW's direction for everything else.

  Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv 2502.16982).
  """

  def axes_of(name, _):
    return QKV if name.endswith("qkv_kernel") else MATRIX

  def rescale(name, update):
    rows, columns = update.shape[0], math.prod(update.shape[axis] for axis in axes_of(name, update).output_axis)
    return MUON_RMS * max(rows, columns) ** 0.5 * update

  momentum = scale_by_muon(
    beta=optimizer.beta1,
    mu_dtype=jnp.dtype(optimizer.mu_dtype),
    nesterov=True,
    weight_dimension_numbers=lambda params: _by_path(params, axes_of),
  )
  parts = {"muon": optax.chain(momentum, optax.stateless(lambda updates, _: _by_path(updates, rescale))), "adamw": adamw(optimizer)}
  return optax.partition(parts, lambda params: _by_path(params, lambda name, _: "muon" if MATRICES.search(name) else "adamw"))


DIRECTIONS = {"adamw": adamw, "lion": lion, "adafactor": adafactor, "muon": muon}


def add_weight_decay(optimizer):
  """Decoupled weight decay (Loshchilov & Hutter 2019): what `no_decay` matches is left out, factors come from `decay_multipliers`."""
  factor_of = first_match(optimizer.decay_multipliers)

  def add(name, update, param):
    rate = optimizer.weight_decay * factor_of(name)
    return update + rate * param if rate else update

  return optax.masked(optax.stateless(lambda updates, params: _by_path(updates, add, params)), decay_mask(optimizer.no_decay))


def check_patterns(config, params):
  """Checks that the patterns of a config match what they are meant for.

  Args:
    config: a resolved `Config`.
    params: a tree of parameters, or of their shapes.

  Raises:
    ConfigError: one matches no parameter, or nothing is left to train.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  patterns = [("optimizer.freeze", config.optimizer.freeze)] if config.optimizer.freeze else []
  for section, key in (("optimizer", "lr_multipliers"), ("optimizer", "decay_multipliers"), ("train", "init_multipliers")):
    patterns += [(f"{section}.{key}[{i}]", pattern) for i, (pattern, _) in enumerate(getattr(getattr(config, section), key))]
  for key, pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ConfigError(f"config.{key}={pattern!r} matches no parameter; they are named like {names[0]} and {names[-1]}.")
  if config.optimizer.freeze and all(re.search(config.optimizer.freeze, name) for name in names):
    raise ConfigError(f"config.optimizer.freeze={config.optimizer.freeze!r} leaves nothing to train.")


def frozen(config):
  """Which parameters stay as they are, as a function from a tree of parameters to a tree of bools."""
  return matching(config.optimizer.freeze or "(?!)")  # the latter matches nothing


def matching(pattern):
  """Whose path a regular expression finds a match in, as a function from a tree of parameters to a tree of bools."""
  pattern = re.compile(pattern)
  return lambda params: _by_path(params, lambda name, _: bool(pattern.search(name)))


def first_match(multipliers):
  """The factor of the first pattern that a parameter's path matches, or 1, as a function from paths.

  Args:
    multipliers: pairs of a regular expression and a factor.
  """
  patterns = [(re.compile(pattern), factor) for pattern, factor in multipliers]
  return lambda name: next((factor for pattern, factor in patterns if pattern.search(name)), 1.0)


def scaled(params, multipliers):
  """A tree of parameters, each multiplied by its factor.

  Args:
    params: the tree.
    multipliers: as `first_match`.
  """
  factor_of = first_match(multipliers)
  return _by_path(params, lambda name, param: param if (factor := factor_of(name)) == 1 else param * factor)


def multiplier(config):
  """Factors of the learning rate, as a function from a parameter's path ("image/projection") to a number.

  The first pattern of `lr_multipliers` that matches, times `layer_decay` to the power of how many layers are above: embeddings
  lie below the first block (of a ResNet: the stem below the first stage), norms, pooling and projection above the last. The logit
  scale and bias are no part of a tower. Clark et al. 2020 (ELECTRA, arXiv 2003.10555, section A); Bao et al. 2021 (BEiT, arXiv
  2106.08254).
  """
  optimizer, model = config.optimizer, config.model
  matched = first_match(optimizer.lr_multipliers)
  resnet = model.vision.kind == "resnet"
  top = {"image": 5 if resnet else model.vision.layers + 1, "text": model.text.layers + 1}

  def factor_of(name):
    tower = name.split("/")[0]
    return matched(name) * optimizer.layer_decay ** (top[tower] - _layer(name, top[tower]) if tower in top else 0)

  return factor_of


def _layer(name, top):
  block = re.match(r"image/stage_(\d+)/|(?:image|text)/transformer/block_(\d+)/", name)
  if block:
    return 1 + int(block[1] or block[2])
  first = r"image/(patch_kernel|patch_bias|class_embedding|pos_embed|norm_pre/|stem/)|text/(token_embedding|pos_embed)"
  return 0 if re.match(first, name) else top


def scale_by_path(factor_of):
  """An `optax.GradientTransformation` that multiplies each update by a factor that its path alone decides."""
  return optax.stateless(lambda updates, _: _by_path(updates, lambda name, update: update * factor_of(name)))


def moving_average(average, params, updates, decay):
  """A moving average of parameters, one update on.

  Args:
    average: float32 arrays like the parameters.
    params: parameters after the update.
    updates: updates done, this one included; a scalar.
    decay: what is kept of the average from one update to the next; at most (1 + updates) / (10 + updates), so that what was
      there before training is soon forgotten (as in TensorFlow's ExponentialMovingAverage).

  Returns:
    Arrays like `average`; equal to it, to the last bit, where the parameter is.
  """
  share = jnp.maximum(1 - decay, 9 / (10 + updates))
  return jax.tree.map(lambda old, new: old + share * (new - old), average, params)


def decay_mask(no_decay):
  """Which parameters weight decay applies to.

  Args:
    no_decay: a regular expression; parameters whose path ("image/transformer/block_0/norm_1/scale") it
      finds a match in are left out.

  Returns:
    A function from a tree of parameters to a tree of bools.
  """
  spared = matching(no_decay)
  return lambda params: jax.tree.map(operator.not_, spared(params))


def _by_path(tree, function, *others):
  return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *others)
