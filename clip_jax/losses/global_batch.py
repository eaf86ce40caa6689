"""The configured loss as a function of whole, sharded arrays."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clip_jax.losses import tiles
from clip_jax.losses.sigmoid import sigmoid_contrastive_loss
from clip_jax.losses.softmax import softmax_contrastive_loss
from clip_jax.parallel.mesh import BATCH_AXES, batch_shards

# "auto" takes `gather`, whose few large transfers use all links of a chip, unless it needs more than this.
GATHER_BYTES = 512 * 2**20


def create(loss, mesh):
  """The loss of a config.

  Args:
    loss: a `clip_jax.config.Loss`.
    mesh: the device mesh.

  Returns:
    A function of image and text embeddings [global batch, embed], the logit scale (exponentiated) and the
    logit bias (which only the sigmoid loss reads), and optionally of `weights` [global batch] and `keys`
    [global batch] by name. It returns the scalar loss. Called outside of jit, it also checks the embeddings,
    and raises a `ValueError` where they are not finite or not of unit length.
  """
  rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
  shards = batch_shards(mesh)

  @jax.jit
  def over_mesh(image, text, scale, bias, weights, keys):
    method = method_of(loss, *image.shape, shards)

    def of_shard(image, text, scale, bias, weights, keys):
      image, text = (x.astype(loss.dtype) for x in (image, text))
      settings = dict(
        axes=BATCH_AXES,
        method=method,
        chunk=loss.chunk,
        label_smoothing=loss.label_smoothing,
        weights=weights,
        keys=keys,
      )
      if loss.name == "sigmoid":
        return sigmoid_contrastive_loss(image, text, scale, bias, **settings)
      return softmax_contrastive_loss(image, text, scale, **settings)

    specs = (rows, rows, whole, whole, rows, rows)
    return jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=whole)(
      image, text, scale, bias, weights, keys
    )

  def contrastive_loss(image, text, logit_scale, logit_bias=0.0, *, weights=None, keys=None):
    if len(image) % shards:
      raise ValueError(f"{len(image):,} pairs cannot be split over {shards} shards of the batch.")
    for name, embeddings in (("image", image), ("text", text)):
      _check_values(name, embeddings)
    return over_mesh(image, text, jnp.float32(logit_scale), jnp.float32(logit_bias), weights, keys)

  return contrastive_loss


def method_of(loss, batch, embed, shards):
  """How a loss is computed: what the config names, or for "auto" what fits.

  Args:
    loss: a `clip_jax.config.Loss`.
    batch: global batch.
    embed: width of the embeddings.
    shards: of the batch.

  Returns:
    "gather" or "ring".
  """
  if loss.method != "auto":
    return loss.method
  return "ring" if estimated_bytes(loss, "gather", batch, embed, shards) > GATHER_BYTES else "gather"


def estimated_bytes(loss, method, batch, embed, shards):
  """What a loss needs on a device beside its embeddings and their gradients (docs/losses.md has the formula).

  Args:
    loss: a `clip_jax.config.Loss`.
    method: "gather" or "ring".
    batch: global batch.
    embed: width of the embeddings.
    shards: of the batch.

  Returns:
    Bytes.
  """
  rows = batch // shards
  chunk = min(loss.chunk or tiles.chunk_for(rows), rows if method == "ring" else batch)
  pair = embed * (jnp.dtype(loss.dtype).itemsize + 4)  # a column and its gradient
  tile = 2 * 4 * rows * chunk  # logits, and what they pull with
  return tile + (batch * pair if method == "gather" else rows * pair + 2 * chunk * pair)


def describe(loss, batch, embed, shards):
  """One line for people: which method computes the loss, and what each would need.

  Args:
    loss: a `clip_jax.config.Loss`.
    batch: global batch.
    embed: width of the embeddings.
    shards: of the batch.
  """
  method = method_of(loss, batch, embed, shards)
  need = {m: f"{estimated_bytes(loss, m, batch, embed, shards) / 2**20:,.1f} MiB" for m in tiles.METHODS}
  others = ", ".join(f"{other} {size}" for other, size in need.items() if other != method)
  return f"loss: {loss.name} over {batch:,} pairs, {method} (about {need[method]} a device; {others})"


def caption_keys(tokens):
  """A hash of each caption, equal for equal captions.

  Args:
    tokens: int [batch, context_length].

  Returns:
    uint32 [batch]. Two of 32,768 different captions share one with a probability of one in eight, which hides
    one negative of each.
  """
  key = jnp.full(len(tokens), 2166136261, jnp.uint32)  # FNV-1a, a token at a time instead of a byte
  for column in tokens.T.astype(jnp.uint32):
    key = (key ^ column) * jnp.uint32(16777619)
    key = key ^ (key >> 15)  # the product carries upwards only
  return key


def _check_values(name, embeddings):
  if isinstance(embeddings, jax.core.Tracer):
    return  # inside jit nothing is known yet; the training loop reports a loss that is not finite
  lengths = jnp.linalg.norm(jnp.asarray(embeddings, jnp.float32), axis=-1)
  row = int(jnp.argmax(jnp.where(jnp.isfinite(lengths), jnp.abs(lengths - 1), jnp.inf)))
  length = float(lengths[row])
  if not abs(length - 1) <= 1e-2:  # bfloat16 rounds to within 4e-3
    wrong = f"has length {length:.4g}" if jnp.isfinite(length) else "is not finite"
    raise ValueError(f"Row {row} of the {name} embeddings {wrong}; expected L2-normalised rows.")
