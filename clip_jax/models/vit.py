"""The Vision Transformer of CLIP (Dosovitskiy et al. 2020; Radford et al. 2021, section 2.4)."""

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.transformer import LayerNorm, Transformer, matmul, parameter


class VisionTransformer(nn.Module):
  """Patches, a class token, learned positions, and a norm before as well as after the blocks."""

  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  embed_dim: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images):
    """Embeds normalised images.

    Args:
      images: [batch, size, size, 3], mean and standard deviation already removed.

    Returns:
      [batch, embed_dim], not normalised.
    """
    x = self._patches(images.astype(self.dtype))
    batch, patches, width = x.shape
    init = nn.initializers.normal(width**-0.5)
    token = self.param("class_embedding", parameter(init, "embed"), (width,))
    positions = self.param("pos_embed", parameter(init, None, "embed"), (patches + 1, width))
    token = jnp.broadcast_to(token.astype(self.dtype), (batch, 1, width))
    x = jnp.concatenate([token, x], axis=1) + positions.astype(self.dtype)
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
