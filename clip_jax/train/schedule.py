"""The learning rate as a function of the step: a warm-up, a decay and, where the decay has no end, a cooldown."""

import jax.numpy as jnp


def create(optimizer, steps):
  """The schedule of a run.

  Args:
    optimizer: a resolved `clip_jax.config.Optimizer`.
    steps: updates of the whole run.

  Returns:
    A function from the step (updates done, 0 before the first) to the learning rate, a float32 scalar. Spans that do not fit
    are cut short: a run shorter than its warm-up ends on the way up, and a cooldown starts at the first step at the earliest.
  """
  peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
  end = optimizer.end_learning_rate / peak if peak else 0.0  # as all below, a share of the peak
  begin = max(steps - optimizer.cooldown_steps, 0)

  def before_cooldown(step):
    # The first update uses `peak / warmup`, not 0: an update of nothing would be a step lost.
    warm = (step + 1) / max(warmup, 1)
    return jnp.where(step < warmup, warm, _decay(optimizer, step - warmup, max(steps - warmup, 1), end))

  def with_cooldown(step):
    left = 1 - jnp.clip((step - begin) / (steps - begin), 0, 1)
    return jnp.where(step < begin, before_cooldown(step), end + (before_cooldown(begin) - end) * left)

  share = with_cooldown if optimizer.cooldown_steps else before_cooldown
  return lambda step: peak * share(step)


def _decay(optimizer, step, steps, end):
  # Counted from the end of the warm-up, so that every schedule starts at the peak.
  if optimizer.schedule == "constant":
    return 1.0
  if optimizer.schedule == "rsqrt":  # Zhai et al. 2022 (arXiv 2106.04560), in the form of their code
    return jnp.sqrt(optimizer.timescale / (optimizer.timescale + jnp.maximum(step, 0)))
  done = jnp.clip(step / steps, 0, 1)
  left = 1 - done if optimizer.schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * done))
  return end + (1 - end) * left
