"""The sigmoid loss of SigLIP over the exact global batch."""

import functools

import jax
import jax.numpy as jnp

from clip_jax.losses import tiles


def sigmoid_contrastive_loss(
  image,
  text,
  logit_scale,
  logit_bias,
  *,
  axes,
  method="gather",
  chunk=None,
  label_smoothing=0.0,
  weights=None,
  keys=None,
):
  """Each image with each text as a binary question: do they belong together?

  The value is the sum over all pairs of the global batch, divided by the batch, as in the paper. Nothing has to
  be known of other tiles to differentiate one, so the derivative is computed in the same pass as the value.

  Args:
    image: [local_batch, embed] L2-normalised image embeddings of this shard, float32 or bfloat16.
    text: [local_batch, embed] L2-normalised text embeddings, row i the caption of image i.
    logit_scale: scalar, already exponentiated.
    logit_bias: scalar, added to each logit.
    axes: mesh axes the batch is sharded over; call inside `jax.shard_map`, with its check of varying axes on.
    method: "gather" or "ring", see `clip_jax.losses.tiles`.
    chunk: columns scored at a time; memory is local_batch * chunk float32. Chosen if None.
    label_smoothing: targets are this / 2 and 1 - this / 2 instead of 0 and 1.
    weights: [local_batch], how much a pair counts; a question counts as the mean of its image and its text, and
      the sum is divided by that of the weights. Constants: no gradient is computed.
    keys: int [local_batch]; pairs with equal keys are not asked about each other. All are asked if None.

  Returns:
    Scalar float32, identical on every shard.

  Raises:
    ValueError: shapes, dtypes or settings that do not fit.

  Zhai et al. 2023, section 3.2 and algorithm 1. Memory and communication: docs/losses.md.
  """
  settings = tiles.settings(image, text, axes, method, chunk, label_smoothing, weights, keys)
  return _loss(settings, image, text, jnp.float32(logit_scale), jnp.float32(logit_bias), weights, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings, image, text, scale, bias, weights, keys):
  return _pass(settings, image, text, scale, bias, weights, keys, differentiate=False)[0]


def _forward(settings, image, text, scale, bias, weights, keys):
  return _pass(settings, image, text, scale, bias, weights, keys, differentiate=True)


def _backward(_, gradients, cotangent):
  scaled = jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradients)
  return (*scaled, None, None)


_loss.defvjp(_forward, _backward)


def _pass(settings, image, text, scale, bias, weights, keys, differentiate):
  """The value, and the gradient of image, text, scale and bias (or None)."""
  axes, method, chunk, smoothing = settings
  weights = None if weights is None else weights.astype(jnp.float32)

  def tile(known, columns, first):
    text, column_weights, column_keys = columns
    cosines = tiles.dot(image, text, (1, 1))
    logits = scale * cosines + bias
    pairs = tiles.matching(axes, *logits.shape, first)
    sign = jnp.where(pairs, 1.0, -1.0)
    counts = 1.0 if weights is None else (weights[:, None] + column_weights[None, :]) / 2
    hidden = tiles.hidden(keys, column_keys, pairs)
    if hidden is not None:
      counts = jnp.where(hidden, 0.0, counts)
    loss = jax.nn.softplus(-sign * logits)
    if smoothing:
      loss = loss + smoothing / 2 * sign * logits
    known = {**known, "loss": known["loss"] + jnp.sum(counts * loss, axis=1)}
    if not differentiate:
      return known, None
    pull = counts * sign * (smoothing / 2 - jax.nn.sigmoid(-sign * logits))
    known["scale"] = known["scale"] + jnp.sum(pull * cosines, axis=1)
    known["bias"] = known["bias"] + jnp.sum(pull, axis=1)
    pull = pull.astype(image.dtype)
    known["image"] = known["image"] + tiles.dot(pull, text, (1, 0))
    return known, tiles.dot(pull, image, (0, 0))

  zeros = jnp.zeros(image.shape, jnp.float32)
  known = {"loss": zeros[:, 0]}
  if differentiate:
    known |= {"scale": zeros[:, 0], "bias": zeros[:, 0], "image": zeros}
  known, of_text = tiles.sweep(
    tile,
    known,
    (text, weights, keys),
    zeros if differentiate else None,
    lambda a, b: jax.tree.map(jnp.add, a, b),
    tiles.scatter_sum,
    axes=axes,
    method=method,
    chunk=chunk,
  )
  factor = 1 / tiles.weight_sum(weights, len(image), axes)
  total = {name: jax.lax.psum(jnp.sum(known[name]), axes) * factor for name in known.keys() - {"image"}}
  if not differentiate:
    return total["loss"], None
  of_image, of_text = ((scale * factor * x).astype(image.dtype) for x in (known["image"], of_text))
  return total["loss"], (of_image, of_text, total["scale"], total["bias"])
