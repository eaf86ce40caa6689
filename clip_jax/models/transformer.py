"""The pre-LN Transformer that both towers of CLIP are built from.

Radford et al. 2021, section 2.4; Vaswani et al. 2017; initialisation as CLIP's text tower: normal
with standard deviations `width**-0.5` into attention, `(2 * width)**-0.5` into the MLP, and
`width**-0.5 * (2 * layers)**-0.5` back into the residual stream.

Every parameter carries logical axis names, which `clip_jax.parallel.rules` maps to mesh axes.
Parameters are float32; `dtype` is what the matrix products run in. LayerNorm statistics and the
softmax are float32 whatever `dtype` is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  # Hendrycks & Gimpel 2016; what OpenAI's weights were trained with.
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def parameter(init, *axes):
  """An initialiser whose result is annotated with logical axis names."""
  return nn.with_logical_partitioning(init, axes)


def matmul(x, kernel):
  """[..., in] @ [in, out] -> [..., out].

  XLA:CPU runs the gradients of a product with two leading axes at about 0.6 of the speed of the same
  product with one; on TPU that reshape would copy, because lengths such as 197 do not fill tiles.
  """

  def flat(x, kernel):
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])

  return jax.lax.platform_dependent(x, kernel, cpu=flat, default=jnp.matmul)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, computed in float32 and returned in `dtype`."""

  epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    scale = self.param("scale", parameter(nn.initializers.ones, "embed"), (width,))
    bias = self.param("bias", parameter(nn.initializers.zeros, "embed"), (width,))
    x = x.astype(jnp.float32)
    # Two passes: E[x^2] - E[x]^2 loses digits where the mean is large, as in late residual streams.
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias).astype(self.dtype)


class Dense(nn.Module):
  """An affine map of the last axis, with named kernel axes."""

  features: int
  axes: tuple[str | None, str | None]
  stddev: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    init = parameter(nn.initializers.normal(self.stddev), *self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    bias = self.param("bias", parameter(nn.initializers.zeros, self.axes[1]), (self.features,))
    return matmul(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention with one fused projection for query, key and value."""

  heads: int
  causal: bool
  output_stddev: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    batch, length, width = x.shape
    size = width // self.heads
    init = parameter(nn.initializers.normal(width**-0.5), "embed", None, "heads", None)
    kernel = self.param("qkv_kernel", init, (width, 3, self.heads, size))
    init = parameter(nn.initializers.zeros, None, "heads", None)
    bias = self.param("qkv_bias", init, (3, self.heads, size))
    # One flat product; heads are split as late as possible, which saves the transposes of a
    # [batch, length, 3, heads, size] array.
    kernel = kernel.reshape(width, 3 * width).astype(self.dtype)
    flat = matmul(x, kernel) + bias.reshape(-1).astype(self.dtype)
    query, key, value = (
      part.reshape(batch, length, self.heads, size) for part in jnp.split(flat, 3, axis=-1)
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores * size**-0.5
    if self.causal:
      visible = jnp.tril(jnp.ones((length, length), bool))
      scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
    return Dense(width, ("heads", "embed"), self.output_stddev, self.dtype, name="out")(mixed)


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  mlp_width: int
  layers: int  # of the whole stack: the initialisation of what returns to the residual depends on it
  causal: bool
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    output_stddev = width**-0.5 * (2 * self.layers) ** -0.5
    normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm_1")(x)
    x = x + Attention(self.heads, self.causal, output_stddev, self.dtype, name="attention")(normed)
    normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm_2")(x)
    hidden = Dense(self.mlp_width, ("embed", "mlp"), (2 * width) ** -0.5, self.dtype, name="mlp_in")
    output = Dense(width, ("mlp", "embed"), output_stddev, self.dtype, name="mlp_out")
    return x + output(ACTIVATIONS[self.activation](hidden(normed)))


class Transformer(nn.Module):
  """A stack of blocks. Takes and returns [batch, length, width]."""

  layers: int
  heads: int
  mlp_width: int
  causal: bool
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    for i in range(self.layers):
      x = Block(
        heads=self.heads,
        mlp_width=self.mlp_width,
        layers=self.layers,
        causal=self.causal,
        activation=self.activation,
        norm_epsilon=self.norm_epsilon,
        dtype=self.dtype,
        name=f"block_{i}",
      )(x)
    return x
