"""The Vision Transformer of CLIP (Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.transformer import LayerNorm, Transformer, matmul, parameter


class VisionTransformer(nn.Module):
  """Patches, a class token, learned positions, and a norm before as well as after the blocks."""

  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  patch_drop: float
  embed_dim: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

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
    init = nn.initializers.normal(width**-0.5)
    token = self.param("class_embedding", parameter(init, "embed"), (width,))
    positions = self.param("pos_embed", parameter(init, None, "embed"), (patches + 1, width))
    token, positions = token.astype(self.dtype), positions.astype(self.dtype)
    x = x + positions[1:]
    if keys is not None and self.patch_drop:
      kept = max(round(patches * (1 - self.patch_drop)), 1)
      x = jnp.take_along_axis(x, random_patches(keys, patches, kept)[..., None], axis=1)
    token = jnp.broadcast_to(token + positions[0], (batch, 1, width))
    x = jnp.concatenate([token, x], axis=1)
    x = LayerNorm(self.norm_epsilon, self.dtype, name="norm_pre")(x)
    x = Transformer(
      layers=self.layers,
      heads=self.heads,
      mlp_width=self.mlp_width,
      causal=False,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      name="transformer",
    )(x)
    x = LayerNorm(self.norm_epsilon, self.dtype, name="norm_post")(x[:, 0])
    projection = self.param("projection", parameter(init, "embed", None), (width, self.embed_dim))
    return x @ projection.astype(self.dtype)

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
    x = images.reshape(batch, rows, p, columns, p, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, rows * columns, p * p * channels)
    return matmul(x, kernel.reshape(-1, self.width).astype(self.dtype))


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


def resize_positions(positions, length):
  """Position embeddings for another image size: a grid of them, resized like an image, antialiased and bicubic.

  Args:
    positions: [1 + rows * rows, width], that of the class token first.
    length: 1 + the number of patches wanted, a square.

  Returns:
    [length, width].
  """
  if len(positions) == length:
    return positions
  old, new = math.isqrt(len(positions) - 1), math.isqrt(length - 1)
  grid = positions[1:].reshape(old, old, -1)
  grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "bicubic", antialias=True)
  return np.concatenate([positions[:1], np.asarray(grid).reshape(new * new, -1)])
