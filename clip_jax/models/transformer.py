"""The pre-LN Transformer that both towers of CLIP are built from.

Radford et al. 2021, section 2.4; Vaswani et al. 2017; initialisation as CLIP's text tower: normal
with standard deviations `width**-0.5` into attention, `(2 * width)**-0.5` into the MLP, and
`width**-0.5 * (2 * layers)**-0.5` back into the residual stream.

Every parameter carries logical axis names, which `clip_jax.parallel.rules` maps to mesh axes.
Parameters are float32; `dtype` is what the matrix products run in. LayerNorm statistics and the
softmax are float32 whatever `dtype` is.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clip_jax.models import attention
from clip_jax.models.products import add_bias, matmul

# What a block keeps from the forward for the backward pass; the rest is computed again (Chen et al. 2016, sublinear memory).
# The names are those of the matrix products' results, and of attention's.
KEPT = ("qkv", "mixed", "attention_out", "mlp_in", "mlp_out")
_policies = jax.checkpoint_policies
REMAT = {
  "none": None,  # what XLA keeps by itself
  "minimal": _policies.save_only_these_names(*KEPT),  # norms and activations are cheap
  "attention": _policies.save_only_these_names("qkv", "mixed"),  # and the MLP, which is wide, is computed again
  "full": _policies.nothing_saveable,  # the inputs of blocks alone
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=list(KEPT), offload_src="device", offload_dst="pinned_host"
  ),
}

ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nn.gelu(x, approximate=True),  # Hendrycks & Gimpel 2016, section 2; what SigLIP has
  # Hendrycks & Gimpel 2016, section 2; what OpenAI's weights were trained with.
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True)
class How:
  """How a model computes. Its parameters do not depend on it, nor what it computes, but for rounding.

  Attributes:
    attend: attention of a sequence to itself, as `attention.create` makes it; `attention.dense` if None.
    remat: what blocks keep for the backward pass: a name of `REMAT`.
    scan: whether the blocks of a tower are one program that is run in a loop, which compiles sooner.
    product: the matrix product of activations and a kernel in blocks; `products.matmul` if None.
    spread: a function that lays an array whose first axis is the batch over the devices; left to the compiler if not given.
    whole: a function that gives every device all of an array; likewise.
  """

  attend: Callable | None = None
  remat: str = "none"
  scan: bool = False
  product: Callable | None = None
  spread: Callable = lambda x: x
  whole: Callable = lambda x: x

  def matmul(self, x, kernel):
    """[..., in] @ [in, out] -> [..., out]."""
    return (self.product or matmul)(x, kernel)


def parameter(init, *axes):
  """An initialiser whose result is annotated with logical axis names."""
  return nn.with_logical_partitioning(init, axes)


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
  keep: str | None = None  # what the product is called in `REMAT`
  how: How = How()

  @nn.compact
  def __call__(self, x):
    init = parameter(nn.initializers.normal(self.stddev), *self.axes)
    kernel = self.param("kernel", init, (x.shape[-1], self.features))
    bias = self.param("bias", parameter(nn.initializers.zeros, self.axes[1]), (self.features,))
    product = self.how.matmul(x, kernel.astype(self.dtype))
    product = product if self.keep is None else checkpoint_name(product, self.keep)
    return add_bias(product, bias.astype(self.dtype))


class Attention(nn.Module):
  """Multi-head attention of a sequence to itself, or of a query to it, with one fused projection.

  Attributes:
    heads: of equal size.
    causal: whether a place sees only itself and those before it.
    output_stddev: of the initial output kernel.
    features: width of what is returned; that of the input if None.
  """

  heads: int
  causal: bool
  output_stddev: float
  dtype: jnp.dtype
  features: int | None = None
  how: How = How()

  @nn.compact
  def __call__(self, x, query=None):
    """Mixes values.

    Args:
      x: [batch, length, width].
      query: [batch, queries, width], or None for `x` itself.

    Returns:
      [batch, queries, features].
    """
    width = x.shape[-1]
    size = width // self.heads
    init = parameter(nn.initializers.normal(width**-0.5), "embed", None, "heads", None)
    kernel = self.param("qkv_kernel", init, (width, 3, self.heads, size))
    init = parameter(nn.initializers.zeros, None, "heads", None)
    bias = self.param("qkv_bias", init, (3, self.heads, size))
    # One flat product; heads are split as late as possible, which saves the transposes of a
    # [batch, length, 3, heads, size] array.
    kernel = kernel.reshape(width, 3 * width).astype(self.dtype)
    bias = bias.reshape(-1).astype(self.dtype)
    if query is None:
      flat = checkpoint_name(self.how.matmul(x, kernel), "qkv")
      mixed = self.how.attend and self.how.attend(flat, bias, self.heads, self.causal)
      if mixed is not None:
        return self._out(width, mixed)
      parts = jnp.split(add_bias(flat, bias), 3, axis=-1)
    else:
      first = add_bias(matmul(query, kernel[:, :width]), bias[:width])
      parts = [first, *jnp.split(add_bias(matmul(x, kernel[:, width:]), bias[width:]), 2, axis=-1)]
    query, key, value = (part.reshape(*part.shape[:2], self.heads, size) for part in parts)
    mixed = attention.dense(query, key, value, self.causal, self.dtype)
    return self._out(width, mixed.reshape(*query.shape[:2], width))

  def _out(self, width, mixed):
    mixed = checkpoint_name(mixed, "mixed")
    features = width if self.features is None else self.features
    out = Dense(features, ("heads", "embed"), self.output_stddev, self.dtype, keep="attention_out", how=self.how, name="out")
    return out(mixed)


def mlp(x, hidden_width, activation, output_stddev, dtype, how=How()):
  """Two affine maps with an activation between them: `mlp_in` and `mlp_out` of the module that calls it."""
  width = x.shape[-1]
  into = Dense(hidden_width, ("embed", "mlp"), (2 * width) ** -0.5, dtype, keep="mlp_in", how=how, name="mlp_in")
  out_of = Dense(width, ("mlp", "embed"), output_stddev, dtype, keep="mlp_out", how=how, name="mlp_out")
  return out_of(ACTIVATIONS[activation](into(x)))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  heads: int
  mlp_width: int
  layers: int  # of the whole stack: the initialisation of what returns to the residual depends on it
  causal: bool
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype
  how: How = How()

  @nn.compact
  def __call__(self, x):
    width = x.shape[-1]
    output_stddev = width**-0.5 * (2 * self.layers) ** -0.5
    normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm_1")(x)
    x = x + Attention(self.heads, self.causal, output_stddev, self.dtype, how=self.how, name="attention")(normed)
    normed = LayerNorm(self.norm_epsilon, self.dtype, name="norm_2")(x)
    return x + mlp(normed, self.mlp_width, self.activation, output_stddev, self.dtype, self.how)


class Transformer(nn.Module):
  """A stack of blocks. Takes and returns [batch, length, width].

  In a loop or not, parameters are the same, a block each: the loop stacks them itself, so that checkpoints, rules and exports
  know one layout only.
  """

  layers: int
  heads: int
  mlp_width: int
  causal: bool
  activation: str
  norm_epsilon: float
  dtype: jnp.dtype
  residual_dtype: jnp.dtype  # of what blocks add to
  how: How = How()

  @nn.compact
  def __call__(self, x):
    x = x.astype(self.residual_dtype)
    policy = REMAT[self.how.remat]
    sizes = dict(
      heads=self.heads,
      mlp_width=self.mlp_width,
      layers=self.layers,
      causal=self.causal,
      activation=self.activation,
      norm_epsilon=self.norm_epsilon,
      dtype=self.dtype,
      how=self.how,
    )
    x = self.how.spread(x)  # said once: the compiler might shard the width as parameters are, and gather it in each block
    names = [f"block_{i}" for i in range(self.layers)]
    if self.how.scan and not self.is_initializing():
      blocks = self.variables["params"]
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[name] for name in names))

      def run(x, params):
        return Block(**sizes, parent=None).apply({"params": params}, x), None

      # Inside a loop nothing can be computed twice by mistake, which `prevent_cse` is there to stop.
      run = run if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=False)
      return jax.lax.scan(run, x, stacked)[0]
    block = Block if policy is None else nn.remat(Block, policy=policy)
    for name in names:
      x = block(**sizes, name=name)(x)
    return x
