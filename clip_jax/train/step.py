"""The training step: one pure function of state and batch."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from clip_jax.losses.softmax import softmax_contrastive_loss
from clip_jax.models.clip import CLIP, LOGIT_SCALE_MAX
from clip_jax.parallel import rules
from clip_jax.parallel.mesh import BATCH_AXES
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
    `gradient_norm` (before clipping) and `parameter_norm`.
  """
  shardings = shardings_of(describe(config, mesh)[0])
  batch = rules.batch_sharding(mesh)
  return jax.jit(
    train_step(config, mesh),
    in_shardings=(shardings, {"images": batch, "tokens": batch}),
    out_shardings=(shardings, rules.replicated(mesh)),
    donate_argnums=0,
  )


def train_step(config, mesh):
  """The step before jit: normalise, encode, loss over the global batch, gradients, update."""
  module = CLIP(config.model)
  optimizer, schedule = optimizers.create(config)
  contrastive_loss = global_loss(mesh)

  def loss_of(params, batch):
    image, text, logit_scale = module.apply({"params": params}, batch["images"], batch["tokens"])
    return contrastive_loss(image, text, logit_scale)

  def step(state, batch):
    loss, gradients = jax.value_and_grad(loss_of)(state.params, batch)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Radford et al. 2021, section 2.5: clipped after each update, not inside the loss, so that its
    # gradient never vanishes.
    params = {**params, "logit_scale": jnp.minimum(params["logit_scale"], LOGIT_SCALE_MAX)}
    metrics = {
      "loss": loss,
      "learning_rate": schedule(state.step),
      "logit_scale": jnp.exp(state.params["logit_scale"]),
      "gradient_norm": optax.global_norm(gradients),
      "parameter_norm": optax.global_norm(params),
    }
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), metrics)

  return step


def global_loss(mesh):
  """The contrastive loss as a function of whole (sharded) arrays.

  Args:
    mesh: the device mesh.

  Returns:
    A function of image and text embeddings [global batch, embed] and the logit scale.
  """
  rows = PartitionSpec(BATCH_AXES)

  def loss(image, text, logit_scale):
    return softmax_contrastive_loss(image, text, logit_scale, axes=BATCH_AXES)

  return jax.shard_map(loss, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=PartitionSpec())
