"""AdamW with decoupled weight decay, linear warm-up and cosine decay (Radford et al. 2021, section 2.5)."""

import operator
import re

import jax
import jax.numpy as jnp
import optax

from clip_jax.errors import ConfigError


def create(config):
  """The optimizer of a run.

  Args:
    config: a resolved `Config`.

  Returns:
    An `optax.GradientTransformation` whose updates are to be added to the parameters, and the schedule:
    a function from the step (0 before the first update) to the learning rate.
  """
  optimizer = config.optimizer
  schedule = warmup_cosine(optimizer.learning_rate, optimizer.warmup_steps, config.train.steps)
  clip = optimizer.gradient_clip_norm
  transforms = [
    optax.clip_by_global_norm(clip) if clip is not None else optax.identity(),
    optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.epsilon),
    optax.add_decayed_weights(optimizer.weight_decay, decay_mask(optimizer.no_decay)),
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


def check_patterns(config, params):
  """Checks that the patterns of a config match what they are meant for.

  Args:
    config: a resolved `Config`.
    params: a tree of parameters, or of their shapes.

  Raises:
    ConfigError: one matches no parameter, or nothing is left to train.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  patterns = [("freeze", config.optimizer.freeze)] if config.optimizer.freeze else []
  patterns += [(f"lr_multipliers[{i}]", pattern) for i, (pattern, _) in enumerate(config.optimizer.lr_multipliers)]
  for key, pattern in patterns:
    if not any(re.search(pattern, name) for name in names):
      raise ConfigError(f"config.optimizer.{key}={pattern!r} matches no parameter; they are named like {names[0]} and {names[-1]}.")
  if config.optimizer.freeze and all(re.search(config.optimizer.freeze, name) for name in names):
    raise ConfigError(f"config.optimizer.freeze={config.optimizer.freeze!r} leaves nothing to train.")


def frozen(config):
  """Which parameters stay as they are, as a function from a tree of parameters to a tree of bools."""
  return matching(config.optimizer.freeze or "(?!)")  # the latter matches nothing


def matching(pattern):
  """Whose path a regular expression finds a match in, as a function from a tree of parameters to a tree of bools."""
  pattern = re.compile(pattern)
  return lambda params: jax.tree_util.tree_map_with_path(lambda path, _: bool(pattern.search(path_name(path))), params)


def multiplier(config):
  """Factors of the learning rate, as a function from a parameter's path ("image/projection") to a number.

  The first pattern of `lr_multipliers` that matches, times `layer_decay` to the power of how many layers are above: embeddings
  lie below the first block (of a ResNet: the stem below the first stage), norms, pooling and projection above the last. The logit
  scale and bias are no part of a tower. Clark et al. 2020 (ELECTRA, arXiv 2003.10555, section A); Bao et al. 2021 (BEiT, arXiv
  2106.08254).
  """
  optimizer, model = config.optimizer, config.model
  patterns = [(re.compile(pattern), factor) for pattern, factor in optimizer.lr_multipliers]
  resnet = model.vision.kind == "resnet"
  top = {"image": 5 if resnet else model.vision.layers + 1, "text": model.text.layers + 1}

  def factor_of(name):
    factor = next((factor for pattern, factor in patterns if pattern.search(name)), 1.0)
    tower = name.split("/")[0]
    return factor * optimizer.layer_decay ** (top[tower] - _layer(name, top[tower]) if tower in top else 0)

  return factor_of


def _layer(name, top):
  block = re.match(r"image/stage_(\d+)/|(?:image|text)/transformer/block_(\d+)/", name)
  if block:
    return 1 + int(block[1] or block[2])
  first = r"image/(patch_kernel|patch_bias|class_embedding|pos_embed|norm_pre/|stem/)|text/(token_embedding|pos_embed)"
  return 0 if re.match(first, name) else top


def scale_by_path(factor_of):
  """An `optax.GradientTransformation` that multiplies each update by a factor that its path alone decides."""
  return optax.stateless(
    lambda updates, _: jax.tree_util.tree_map_with_path(lambda path, u: u * factor_of(path_name(path)), updates)
  )


def warmup_cosine(peak, warmup_steps, total_steps):
  """Linear from 0 over the warm-up, then half a cosine down to 0 at the end.

  The first update uses `peak / warmup_steps`, not 0: an update of nothing would be a step lost. A run
  shorter than its warm-up ends on the way up.
  """

  def schedule(step):
    warm = (step + 1) / max(warmup_steps, 1)
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
    return peak * jnp.where(step < warmup_steps, warm, cosine)

  return schedule


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


def path_name(path):
  """A key path of `jax.tree_util` as "image/transformer/block_0/norm_1/scale"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
