"""The text Transformers of CLIP (Radford et al. 2021, section 2.4) and SigLIP (Zhai et al. 2023)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.transformer import How, LayerNorm, Transformer, parameter


class TextTransformer(nn.Module):
  """CLIP's is causal, and read at the end-of-text token, which has seen the whole caption.

  SigLIP's (`causal` false) sees all of a padded caption at every place, is read at the last one, and its projection
  has a bias.
  """

  vocab_size: int
  context_length: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  causal: bool
  train_length: int | None
  reduction: str
  embed_dim: int
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype
  residual_dtype: jnp.dtype
  how: How = How()

  @nn.compact
  def __call__(self, tokens, keys=None):
    """Embeds token ids.

    Args:
      tokens: int32 [batch, context_length]; in a causal tower the end token has the largest id of its row.
      keys: [batch] `jax.random` keys, in training; without them captions are seen whole.

    Returns:
      [batch, embed_dim], not normalised.
    """
    init = parameter(nn.initializers.normal(0.02), "vocab", "embed")
    embedding = self.param("token_embedding", init, (self.vocab_size, self.width))
    init = parameter(nn.initializers.normal(0.01), None, "embed")
    positions = self.param("pos_embed", init, (self.context_length, self.width))
    if keys is not None and self.train_length is not None:
      tokens = shorten(tokens, keys, self.train_length, self.reduction)
    # All of the table, where it is sharded: what is looked up in a part would have to change devices, which is more.
    x = self.how.whole(embedding)[tokens].astype(self.dtype) + positions[: tokens.shape[1]].astype(self.dtype)
    x = Transformer(
      layers=self.layers,
      heads=self.heads,
      mlp_width=self.mlp_width,
      causal=self.causal,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      residual_dtype=self.residual_dtype,
      how=self.how,
      name="transformer",
    )(x)
    if self.causal:
      end = jnp.argmax(tokens, axis=-1)
      x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
    else:
      x = x[:, -1]
    x = LayerNorm(self.norm_epsilon, self.dtype, name="norm_final")(x)
    init = parameter(nn.initializers.normal(self.width**-0.5), "embed", None)
    x = x @ self.param("projection", init, (self.width, self.embed_dim)).astype(self.dtype)
    if self.causal:
      return x
    return x + self.param("projection_bias", parameter(nn.initializers.zeros, None), (self.embed_dim,)).astype(self.dtype)


def shorten(tokens, keys, length, reduction):
  """Captions cut down to fewer tokens, in their order, between the start and the end token.

  Args:
    tokens: int32 [batch, context_length]: start, the caption, the end token (the largest id), zeros.
    keys: [batch] `jax.random` keys.
    length: tokens to keep, start and end included; shorter captions are kept whole.
    reduction: "truncate" keeps the first ones, "block" a run that begins anywhere, "random" any.

  Returns:
    int32 [batch, length], laid out as `tokens`.

  Li et al. 2023 (CLIPA, arXiv 2305.07017).
  """
  end = jnp.argmax(tokens, axis=-1)[:, None]
  words, kept = end - 1, jnp.minimum(end - 1, length - 2)
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
  places = jnp.arange(length - 1)  # of what comes after the start token
  if reduction == "random":
    noise = jax.vmap(lambda key: jax.random.uniform(key, tokens.shape[1:]))(keys)
    position = jnp.arange(tokens.shape[1])
    is_word = (position > 0) & (position < end)
    chosen = jnp.argsort(jnp.where(is_word, noise, 2.0), axis=-1)[:, : length - 1]
    chosen = jnp.sort(jnp.where(places < kept, chosen, tokens.shape[1]), axis=-1)
  else:
    first = jnp.zeros_like(end)
    if reduction == "block":
      share = jax.vmap(jax.random.uniform)(keys)[:, None]
      first = jnp.minimum((share * (words - kept + 1)).astype(end.dtype), words - kept)
    chosen = 1 + first + places
  taken = jnp.take_along_axis(tokens, jnp.minimum(chosen, tokens.shape[1] - 1), axis=-1)
  end_token = jnp.take_along_axis(tokens, end, axis=-1)
  rest = jnp.where(places < kept, taken, jnp.where(places == kept, end_token, 0))
  return jnp.concatenate([tokens[:, :1], rest], axis=-1)
