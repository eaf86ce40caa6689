"""The softmax contrastive loss (InfoNCE in both directions) over the exact global batch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.losses import tiles

# The logit of what is not to be scored. Not -inf: where a tile has no candidate for a query, the largest
# logit is this, and it is subtracted from all of them.
NOWHERE = -1e30


class Seen(NamedTuple):
  """What queries know of the candidates they have seen: float32 arrays [queries]."""

  peak: jax.Array  # largest logit
  sum: jax.Array  # of exp(logit - peak)
  total: jax.Array | None = None  # of the logits; kept with label smoothing only
  count: jax.Array | None = None  # of the candidates; kept with label smoothing only


class Norm(NamedTuple):
  """What turns logits into shares, the gradient of a query's loss: float32 arrays [queries].

  The logarithm of the sum of exponentials is `peak + log_sum`. The two stay apart, or the second would lose
  its digits where the first is as large as 100.
  """

  peak: jax.Array
  log_sum: jax.Array
  floor: jax.Array | None  # label smoothing over the number of candidates
  weight: jax.Array | None


def softmax_contrastive_loss(
  image,
  text,
  logit_scale,
  *,
  axes,
  method="gather",
  chunk=None,
  label_smoothing=0.0,
  weights=None,
  keys=None,
):
  """Symmetric InfoNCE over the global batch.

  Every image is scored against every text of all shards, so value and gradients are those of the undivided
  batch, whatever the method. Logits and sums are float32. The derivative is written by hand: it computes the
  logits again, tile by tile, from each query's largest logit and sum of exponentials.

  Args:
    image: [local_batch, embed] L2-normalised image embeddings of this shard, float32 or bfloat16.
    text: [local_batch, embed] L2-normalised text embeddings, row i the caption of image i.
    logit_scale: scalar, already exponentiated (at most 100).
    axes: mesh axes the batch is sharded over; call inside `jax.shard_map`, with its check of varying axes on.
    method: "gather" or "ring", see `clip_jax.losses.tiles`.
    chunk: columns scored at a time; memory is local_batch * chunk float32. Chosen if None.
    label_smoothing: share of each query's target that is spread evenly over all of its candidates.
    weights: [local_batch], how much a pair counts as a query, in both directions; the loss is the weighted
      mean. As a negative a pair counts in full. Constants: no gradient is computed.
    keys: int [local_batch]; pairs with equal keys are not each other's negatives. All are negatives if None.

  Returns:
    Scalar float32, the mean over the global batch, identical on every shard.

  Raises:
    ValueError: shapes, dtypes or settings that do not fit.

  Radford et al. 2021, figure 3. Equations, memory and communication: docs/losses.md.
  """
  settings = tiles.settings(image, text, axes, method, chunk, label_smoothing, weights, keys)
  return _loss(settings, image, text, jnp.float32(logit_scale), weights, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings, image, text, scale, weights, keys):
  return _forward(settings, image, text, scale, weights, keys)[0]


def _forward(settings, image, text, scale, weights, keys):
  axes, method, chunk, smoothing = settings
  rows = len(image)

  def tile(seen, columns, first):
    text, column_keys = columns
    logits = scale * tiles.dot(image, text, (1, 1))
    pairs = tiles.matching(axes, *logits.shape, first)
    hidden = tiles.hidden(keys, column_keys, pairs)
    by_image, by_text = (_see(logits, hidden, axis, smoothing) for axis in (1, 0))
    return _merge(seen, by_image), by_text

  nothing = _nothing_seen(rows, smoothing)
  by_image, by_text = tiles.sweep(
    tile, nothing, (text, keys), nothing, _merge, _reduce, axes=axes, method=method, chunk=chunk
  )
  matched = scale * jnp.sum(image.astype(jnp.float32) * text.astype(jnp.float32), axis=-1)
  losses = _query_losses(by_image, matched, smoothing) + _query_losses(by_text, matched, smoothing)
  if weights is not None:
    weights = weights.astype(jnp.float32)
    losses = weights * losses
  total = tiles.weight_sum(weights, rows, axes)
  value = jax.lax.psum(jnp.sum(losses), axes) / (2 * total)
  return value, (image, text, scale, weights, keys, by_image, by_text)


def _backward(settings, saved, cotangent):
  axes, method, chunk, smoothing = settings
  image, text, scale, weights, keys, by_image, by_text = saved
  by_image, by_text = (_norm(seen, weights, smoothing) for seen in (by_image, by_text))

  def tile(gradients, columns, first):
    of_image, of_scale = gradients
    text, by_text, column_keys = columns
    cosines = tiles.dot(image, text, (1, 1))
    logits = scale * cosines
    pairs = tiles.matching(axes, *logits.shape, first)
    targets = 2.0 if weights is None else by_image.weight[:, None] + by_text.weight[None, :]
    pull = _shares(logits, by_image, 1) + _shares(logits, by_text, 0)
    # The pair's own target is subtracted before anything is rounded to the embeddings' dtype: of a pair that
    # is nearly learned, what remains is small.
    pull = pull - jnp.where(pairs, (1 - smoothing) * targets, 0.0)
    hidden = tiles.hidden(keys, column_keys, pairs)
    if hidden is not None:
      pull = jnp.where(hidden, 0.0, pull)
    of_scale = of_scale + jnp.sum(pull * cosines, axis=1)
    pull = pull.astype(image.dtype)
    of_image = of_image + tiles.dot(pull, text, (1, 0))
    return (of_image, of_scale), tiles.dot(pull, image, (0, 0))

  zeros = jnp.zeros(image.shape, jnp.float32)
  (of_image, of_scale), of_text = tiles.sweep(
    tile,
    (zeros, zeros[:, 0]),
    (text, by_text, keys),
    zeros,
    jnp.add,
    tiles.scatter_sum,
    axes=axes,
    method=method,
    chunk=chunk,
  )
  factor = cotangent / (2 * tiles.weight_sum(weights, len(image), axes))
  of_scale = jax.lax.psum(jnp.sum(of_scale), axes) * factor
  of_image, of_text = ((scale * factor * x).astype(image.dtype) for x in (of_image, of_text))
  return of_image, of_text, of_scale, None, None


_loss.defvjp(_forward, _backward)


def _nothing_seen(queries, smoothing):
  zeros = jnp.zeros(queries, jnp.float32)
  return Seen(zeros + NOWHERE, zeros, *((zeros, zeros) if smoothing else ()))


def _see(logits, hidden, axis, smoothing):
  """What the queries along the other axis see in one tile."""
  scored = logits if hidden is None else jnp.where(hidden, NOWHERE, logits)
  peak = jnp.max(scored, axis)
  seen = Seen(peak, jnp.sum(jnp.exp(scored - jnp.expand_dims(peak, axis)), axis))
  if not smoothing:
    return seen
  visible = jnp.ones_like(logits) if hidden is None else jnp.where(hidden, 0.0, 1.0)
  return seen._replace(total=jnp.sum(visible * logits, axis), count=jnp.sum(visible, axis))


def _merge(a, b):
  peak = jnp.maximum(a.peak, b.peak)
  merged = jax.tree.map(jnp.add, a, b)
  return merged._replace(peak=peak, sum=a.sum * jnp.exp(a.peak - peak) + b.sum * jnp.exp(b.peak - peak))


def _reduce(seen, axes):
  peak = jax.lax.pmax(seen.peak, axes)
  parts = seen._replace(peak=None, sum=seen.sum * jnp.exp(seen.peak - peak))
  own = len(peak) // jax.lax.axis_size(axes)
  peak = jax.lax.dynamic_slice_in_dim(peak, jax.lax.axis_index(axes) * own, own)
  return tiles.scatter_sum(parts, axes)._replace(peak=peak)


def _query_losses(seen, matched, smoothing):
  losses = seen.peak - matched + jnp.log(seen.sum)
  return losses + smoothing * (matched - seen.total / seen.count) if smoothing else losses


def _norm(seen, weights, smoothing):
  floor = smoothing / seen.count if smoothing else None
  return Norm(seen.peak, jnp.log(seen.sum), floor, weights)


def _shares(logits, norm, axis):
  """Gradient of the losses of the queries along the other axis, without their targets."""
  norm = jax.tree.map(lambda x: jnp.expand_dims(x, axis), norm)
  shares = jnp.exp(logits - norm.peak - norm.log_sum)
  if norm.floor is not None:
    shares = shares - norm.floor
  return shares if norm.weight is None else shares * norm.weight
