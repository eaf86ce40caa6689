"""The softmax contrastive loss (InfoNCE in both directions) over the exact global batch."""

import jax
import jax.numpy as jnp


def softmax_contrastive_loss(image, text, logit_scale, *, axes):
  """Symmetric InfoNCE over the global batch.

  Every shard scores its own rows against the columns of all shards, so the value and the gradients
  are those of the undivided batch. Logits and their log-sum-exps are float32.

  Args:
    image: [local_batch, embed] L2-normalised image embeddings of this shard.
    text: [local_batch, embed] L2-normalised text embeddings, row i the caption of image i.
    logit_scale: scalar, already exponentiated (at most 100).
    axes: mesh axes the batch is sharded over; call inside `jax.shard_map`.

  Returns:
    Scalar mean over the global batch, identical on every shard.

  Radford et al. 2021, figure 3.
  """
  image, text = image.astype(jnp.float32), text.astype(jnp.float32)
  all_image = jax.lax.all_gather(image, axes, tiled=True)
  all_text = jax.lax.all_gather(text, axes, tiled=True)
  # Float32 products on every device: TPUs would otherwise round the factors to bfloat16.
  def dot(rows, columns):
    return jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
  matching = logit_scale * jnp.sum(image * text, axis=-1)
  per_image = jax.nn.logsumexp(logit_scale * dot(image, all_text), axis=-1) - matching
  per_text = jax.nn.logsumexp(logit_scale * dot(text, all_image), axis=-1) - matching
  return jax.lax.pmean(jnp.mean(per_image + per_text) / 2, axes)
