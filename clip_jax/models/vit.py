"""The Vision Transformers of CLIP and SigLIP (Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.products import matmul
from clip_jax.models.transformer import Attention, How, LayerNorm, Transformer, mlp, parameter


class VisionTransformer(nn.Module):
  """Patches and learned positions through a Transformer.

  CLIP's reads the embedding off at a class token, has a norm before as well as after the blocks, and ends in a
  projection. SigLIP's (`map_head`) has a bias on its patches and reads with a query that attends to all of them.
  """

  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  patch_drop: float
  map_head: bool
  embed_dim: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype
  residual_dtype: jnp.dtype
  how: How = How()

  @nn.compact
  def __call__(self, images, keys=None):
    """Embeds normalised images.

    Args:
      images: [batch, size, size, 3], mean and standard deviation already removed.
      keys: [batch] `jax.random` keys that choose the patches to leave out, in training; all are seen if None.

    Returns:
      [batch, embed_dim], not normalised.
    """
    x = self._patches(images.astype(self.dtype))
    batch, patches, width = x.shape
    classes = 0 if self.map_head else 1
    init = nn.initializers.normal(width**-0.5)
    if classes:
      token = self.param("class_embedding", parameter(init, "embed"), (width,)).astype(self.dtype)
    positions = self.param("pos_embed", parameter(init, None, "embed"), (classes + patches, width)).astype(self.dtype)
    x = x + positions[classes:]
    if keys is not None and self.patch_drop:
      kept = max(round(patches * (1 - self.patch_drop)), 1)
      x = jnp.take_along_axis(x, random_patches(keys, patches, kept)[..., None], axis=1)
    if classes:
      x = jnp.concatenate([jnp.broadcast_to(token + positions[0], (batch, 1, width)), x], axis=1)
      x = LayerNorm(self.norm_epsilon, self.dtype, name="norm_pre")(x)
    x = Transformer(
      layers=self.layers,
      heads=self.heads,
      mlp_width=self.mlp_width,
      causal=False,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      residual_dtype=self.residual_dtype,
      how=self.how,
      name="transformer",
    )(x)
    norm = LayerNorm(self.norm_epsilon, self.dtype, name="norm_post")
    if self.map_head:
      return MapHead(
        self.heads, self.mlp_width, self.activation, self.norm_epsilon, self.dtype, name="head"
      )(norm(x))
    projection = self.param("projection", parameter(init, "embed", None), (width, self.embed_dim))
    return norm(x[:, 0]) @ projection.astype(self.dtype)

  def _patches(self, images):
    batch, height, width, channels = images.shape
    p = self.patch_size
    rows, columns = height // p, width // p
    # A convolution whose stride is its size, as one matrix product. torch's default initialisation
    # of a convolution (uniform, variance 1 / (3 fan_in)) is what CLIP's patch embedding started from.
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2))
    kernel = self.param(
      "patch_kernel", parameter(init, None, None, None, "embed"), (p, p, channels, self.width)
    )
    x = images[:, : rows * p, : columns * p]  # what is left over at the right and the bottom is not seen
    x = x.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, rows * columns, p * p * channels)
    x = matmul(x, kernel.reshape(-1, self.width).astype(self.dtype))
    if self.map_head:
      x = x + self.param("patch_bias", parameter(nn.initializers.zeros, "embed"), (self.width,)).astype(self.dtype)
    return x


class MapHead(nn.Module):
  """Multi-head attention pooling: a learned query attends to all places (Zhai et al. 2022, arXiv 2106.04560)."""

  heads: int
  mlp_width: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    """[batch, length, width] -> [batch, width]."""
    batch, _, width = x.shape
    probe = self.param("probe", parameter(nn.initializers.normal(width**-0.5), "embed"), (width,))
    probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
    attention = Attention(self.heads, causal=False, output_stddev=width**-0.5, dtype=self.dtype, name="attention")
    x = attention(x, probe)[:, 0]
    normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm")(x)
    return x + mlp(normed, self.mlp_width, self.activation, width**-0.5, self.dtype)


def random_patches(keys, patches, kept):
  """Which patches of each image are seen (Li et al. 2022, FLIP, section 3).

  Args:
    keys: [batch] `jax.random` keys. An image's choice depends on its own key alone, so it is the same on any mesh
      and in any micro-batch.
    patches: how many there are.
    kept: how many are seen.

  Returns:
    int32 [batch, kept], without repetition, in no order.
  """
  noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (patches,)))(keys)
  return jax.lax.top_k(noise, kept)[1]


def resize_positions(positions, length, classes=1):
  """Position embeddings for another image size: a grid of them, resized like an image, antialiased and bicubic.

  Args:
    positions: [classes + rows * rows, width], those of class tokens first.
    length: classes + the number of patches wanted, a square.
    classes: 1, or 0 in towers without a class token.

  Returns:
    [length, width].
  """
  if len(positions) == length:
    return positions
  old, new = math.isqrt(len(positions) - classes), math.isqrt(length - classes)
  grid = positions[classes:].reshape(old, old, -1)
  grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic", antialias=True)
  return np.concatenate([positions[:classes], np.asarray(grid).reshape(new * new, -1)])
