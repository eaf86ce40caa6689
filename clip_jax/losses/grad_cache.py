"""Exact gradients of a contrastive loss over a batch that does not fit through the towers at once.

Averaging the gradients of micro-batches is another loss: each would have its own, fewer negatives. Gao et al. 2021
(GradCache, arXiv 2101.06983, section 3) embed all micro-batches first without keeping activations, take the gradient of the
loss of the whole batch with respect to the embeddings, and pull each micro-batch's part of it back through
the towers in a second pass.
"""

import jax
import jax.numpy as jnp

from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules


def value_and_grad(embed, loss, *, microbatches, mesh, has_aux=False):
  """Value and gradient of `loss(params, embed(params, batch), batch)`.

  Args:
    embed: a pure function of parameters and a batch that returns a tree of arrays [batch, ...]. Each row
      must depend on its own row of the batch alone; anything random comes with the batch (a key a row), so
      that both passes draw the same.
    loss: a function of parameters, embeddings and the batch that returns a scalar. What it reads of the
      parameters itself, such as the logit scale, is counted once.
    microbatches: how many parts each shard's rows are cut into; 1 goes through the towers once.
    mesh: the device mesh.
    has_aux: whether `embed` returns a pair, of which the loss takes the first and the second is handed on: what
      the whole batch has to say of itself, such as the statistics of batch norms. Then rows may depend on each
      other, and `microbatches` must be 1.

  Returns:
    A function of parameters and a batch, a tree of arrays [global batch, ...] sharded over the batch axes,
    that returns the value and the gradient with respect to the parameters. With `has_aux` a pair, of the value
    and what `embed` handed on, stands in place of the value.
  """
  if has_aux:
    if microbatches > 1:
      raise ValueError("what embed returns of a whole batch is not known from microbatches")

    def with_aux(params, batch):
      embedded, aux = embed(params, batch)
      return loss(params, embedded, batch), aux

    return jax.value_and_grad(with_aux, has_aux=True)
  if microbatches == 1:
    return jax.value_and_grad(lambda params, batch: loss(params, embed(params, batch), batch))

  def accumulated(params, batch):
    parts = split(batch, microbatches, mesh)
    embedded = jax.lax.map(lambda part: embed(params, part), parts)
    embedded = join(embedded, mesh)
    value, (gradient, of_embedded) = jax.value_and_grad(loss, argnums=(0, 1))(params, embedded, batch)

    def add(gradient, item):
      part, of_part = item
      _, pull_back = jax.vjp(lambda params: embed(params, part), params)
      return jax.tree.map(jnp.add, gradient, pull_back(of_part)[0]), None

    gradient, _ = jax.lax.scan(add, gradient, (parts, split(of_embedded, microbatches, mesh)))
    return value, gradient

  return accumulated


def split(batch, microbatches, mesh):
  """Cuts a batch into micro-batches, each of them sharded like the batch, without moving a row.

  Args:
    batch: a tree of arrays [batch, ...], sharded over the batch axes.
    microbatches: how many.
    mesh: the device mesh.

  Returns:
    The same tree of arrays [microbatches, batch / microbatches, ...]. A micro-batch has rows of every shard.
  """
  shards = meshes.batch_shards(mesh)

  def cut(x):
    rest = x.shape[1:]
    x = x.reshape(shards, microbatches, -1, *rest).swapaxes(0, 1).reshape(microbatches, -1, *rest)
    return jax.lax.with_sharding_constraint(x, rules.batch_sharding(mesh, axis=1))

  return jax.tree.map(cut, batch)


def join(parts, mesh):
  """The inverse of `split`."""
  shards = meshes.batch_shards(mesh)

  def paste(x):
    microbatches, rest = x.shape[0], x.shape[2:]
    x = x.reshape(microbatches, shards, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)
    return jax.lax.with_sharding_constraint(x, rules.batch_sharding(mesh))

  return jax.tree.map(paste, parts)
