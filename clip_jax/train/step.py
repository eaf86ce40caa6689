"""The training step: one pure function of state and batch."""

import math

import jax
import jax.numpy as jnp
import optax

from clip_jax.losses import global_batch, grad_cache
from clip_jax.models import attention, products
from clip_jax.models.clip import (
  CLIP,
  has_batch_norm,
  leaves_out,
  with_statistics,
  without_statistics,
)
from clip_jax.models.transformer import How
from clip_jax.parallel import rules
from clip_jax.train import optimizer as optimizers
from clip_jax.train.state import describe, shardings_of


def create(config, mesh):
  """The jitted training step of a run.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.

  Returns:
    A function `(state, batch) -> (state, metrics)`. The state is donated. The batch holds `images` (uint8
    [global batch, size, size, 3]) and `tokens` (int32 [global batch, context_length]), both sharded over
    the batch axes. The metrics are float32 scalars: `loss`, `learning_rate`, `logit_scale`,
    `gradient_norm` (before clipping), `parameter_norm` (without running statistics), `skipped` and
    `skipped_in_a_row`, and `logit_bias` where the model has one.

    Where the loss or a gradient is not finite, the step is skipped: it is counted, and changes nothing else.
  """
  shardings = shardings_of(describe(config, mesh)[0])
  batch = rules.batch_sharding(mesh)
  return jax.jit(
    train_step(config, mesh),
    in_shardings=(shardings, {"images": batch, "tokens": batch}),
    out_shardings=(shardings, rules.replicated(mesh)),
    donate_argnums=0,
  )


def inputs(config, mesh):
  """Shapes and shardings of a batch, for a program that is compiled before there is one.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.

  Returns:
    A dict of `jax.ShapeDtypeStruct`: what `create` calls a batch.
  """
  batch, size, sharding = config.train.global_batch_size, config.model.image_size, rules.batch_sharding(mesh)
  return {
    "images": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8, sharding=sharding),
    "tokens": jax.ShapeDtypeStruct((batch, config.model.text.context_length), jnp.int32, sharding=sharding),
  }


def train_step(config, mesh):
  """The step before jit: normalise, encode, loss over the global batch, gradients, update."""
  optimizer, schedule = optimizers.create(config)
  module = CLIP(config.model, how(config.train, mesh))
  loss_of, hold = loss_with(config.loss, mesh), optimizers.frozen(config)

  def held(params):
    # Constants to the derivative, so that nothing is kept, or computed, for a backward pass to them.
    return jax.tree.map(lambda frozen, x: jax.lax.stop_gradient(x) if frozen else x, hold(params), params)

  def step(state, batch):
    if leaves_out(config.model):
      batch = {**batch, "keys": example_keys(config, mesh, state.step)}
    # An image tower that is locked as a whole is used as it is, running statistics included.
    locked = all(jax.tree.leaves(hold(state.params)["image"]))
    batch_norm = has_batch_norm(config.model) and not locked
    embed = embed_with(module, batch_norm)
    value_and_grad = grad_cache.value_and_grad(
      lambda params, batch: embed(held(params), batch),
      lambda params, embeddings, batch: loss_of(held(params), embeddings, batch),
      microbatches=config.train.microbatches,
      mesh=mesh,
      has_aux=batch_norm,
    )
    loss, gradients = value_and_grad(state.params, batch)
    if batch_norm:
      loss, statistics = loss
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if batch_norm:
      params = with_statistics(params, statistics)
    largest = config.loss.max_logit_scale
    if largest is not None:
      # Radford et al. 2021, section 2.5: clipped after each update, not inside the loss, so that its
      # gradient never vanishes.
      params = {**params, "logit_scale": jnp.minimum(params["logit_scale"], math.log(largest))}
    ema = state.ema
    if ema is not None:
      ema = optimizers.moving_average(ema, params, state.step + 1, config.optimizer.ema_decay)
      if batch_norm:  # running statistics are averages already
        ema = with_statistics(ema, statistics)
    gradient_norm = optax.global_norm(gradients)
    new = state.replace(params=params, opt_state=opt_state, ema=ema)
    new = keep_if(jnp.isfinite(loss) & jnp.isfinite(gradient_norm), new, state)
    metrics = {
      "loss": loss,
      "learning_rate": schedule(state.step),
      "logit_scale": jnp.exp(state.params["logit_scale"]),
      "gradient_norm": gradient_norm,
      "parameter_norm": optax.global_norm(without_statistics(new.params)),
      "skipped": new.skipped,
      "skipped_in_a_row": new.skipped_in_a_row,
    }
    if "logit_bias" in state.params:
      metrics["logit_bias"] = state.params["logit_bias"]
    return new, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

  return step


def keep_if(good, new, old):
  """The state after a step that was good or was not, decided on the device.

  Args:
    good: bool scalar.
    new: the `TrainState` with its update.
    old: the one before. If the step was not good, its parameters and moments stay; the step is counted either way.
  """
  one_more = old.step + 1
  kept = jax.tree.map(lambda after, before: jnp.where(good, after, before), new, old)
  return kept.replace(
    step=one_more,
    # The learning rate goes by the step, whatever became of those before.
    opt_state=optimizers.at_step(kept.opt_state, one_more),
    skipped=jnp.where(good, old.skipped, old.skipped + 1),
    skipped_in_a_row=jnp.where(good, 0, old.skipped_in_a_row + 1),
  )


def how(config, mesh):
  """How the towers of a run compute.

  Args:
    config: a `clip_jax.config.Train`.
    mesh: the device mesh.
  """

  def lay(sharding):
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)

  spread, whole = lay(rules.batch_sharding(mesh)), lay(rules.replicated(mesh))
  product = None if config.quantization == "none" else products.quantized(config.quantization)
  return How(attention.create(config.attention, mesh), config.remat, config.scan, product, spread, whole)


def embed_with(module, batch_norm=False):
  """The towers in training, as a function of parameters and a batch (`images`, `tokens`, maybe `keys`).

  It returns both embeddings; with `batch_norm`, for models that have it, a pair of them and the new running statistics.
  """

  def embed(params, batch):
    arguments = {"params": params}, batch["images"], batch["tokens"], batch.get("keys")
    if not batch_norm:
      return module.apply(*arguments)[:2]
    outputs, collections = module.apply(*arguments, train=True, mutable=["batch_stats"])
    return outputs[:2], collections["batch_stats"]

  return embed


def loss_with(config, mesh):
  """The loss as a function of parameters, embeddings and the batch.

  Args:
    config: a `clip_jax.config.Loss`.
    mesh: the device mesh.
  """
  contrastive_loss = global_batch.create(config, mesh)

  def loss(params, embeddings, batch):
    scale, bias = jnp.exp(params["logit_scale"]), params.get("logit_bias", 0.0)
    keys = global_batch.caption_keys(batch["tokens"]) if config.mask_duplicates else None
    with jax.named_scope("contrastive_loss"):  # by which plan/memory.py knows what is the loss's
      return contrastive_loss(*embeddings, scale, bias, keys=keys)

  return loss


def example_keys(config, mesh, step):
  """Keys that choose what is left out of each example of a step: the same on any mesh and in any micro-batch.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.
    step: updates done, an int32 scalar.

  Returns:
    [global batch] `jax.random` keys.
  """
  # Folded in once more than the step: the parameters came from the seed itself.
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), 1), step)
  keys = jax.random.split(key, config.train.global_batch_size)
  return jax.lax.with_sharding_constraint(keys, rules.batch_sharding(mesh))
