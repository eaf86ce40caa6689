"""The causal text Transformer of CLIP (Radford et al. 2021, section 2.4)."""

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.transformer import LayerNorm, Transformer, parameter


class TextTransformer(nn.Module):
  """Reads the embedding off at the end-of-text token, which has seen the whole caption."""

  vocab_size: int
  context_length: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  embed_dim: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens):
    """Embeds token ids.

    Args:
      tokens: int32 [batch, context_length]; the end token has the largest id of its row.

    Returns:
      [batch, embed_dim], not normalised.
    """
    init = parameter(nn.initializers.normal(0.02), "vocab", "embed")
    embedding = self.param("token_embedding", init, (self.vocab_size, self.width))
    init = parameter(nn.initializers.normal(0.01), None, "embed")
    positions = self.param("pos_embed", init, (self.context_length, self.width))
    x = embedding[tokens].astype(self.dtype) + positions.astype(self.dtype)
    x = Transformer(
      layers=self.layers,
      heads=self.heads,
      mlp_width=self.mlp_width,
      causal=True,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      name="transformer",
    )(x)
    end = jnp.argmax(tokens, axis=-1)
    x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    x = LayerNorm(self.norm_epsilon, self.dtype, name="norm_final")(x)
    init = parameter(nn.initializers.normal(self.width**-0.5), "embed", None)
    return x @ self.param("projection", init, (self.width, self.embed_dim)).astype(self.dtype)
