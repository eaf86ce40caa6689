"""AdamW with decoupled weight decay, linear warm-up and cosine decay (Radford et al. 2021, section 2.5)."""

import re

import jax
import jax.numpy as jnp
import optax


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
  return optax.chain(*transforms), schedule


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
  pattern = re.compile(no_decay)

  def mask(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: not pattern.search(path_name(path)), params)

  return mask


def path_name(path):
  """A key path of `jax.tree_util` as "image/transformer/block_0/norm_1/scale"."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
