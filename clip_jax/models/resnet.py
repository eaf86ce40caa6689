"""CLIP's modified ResNet (Radford et al. 2021, section 2.4).

He et al. 2015's bottleneck blocks, with three changes that the paper names: a stem of three convolutions, an average
pooling before every convolution that would have a stride (Zhang 2019), and attention in place of the last average.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.products import matmul
from clip_jax.models.transformer import Attention, parameter

EPSILON = 1e-5  # of batch norms
MOMENTUM = 0.1  # share of the batch in the new running statistics; both are torch's defaults
EXPANSION = 4  # of a bottleneck: how much wider it ends than it is inside
STATISTICS = ("mean", "var")  # leaves of the parameters that batches set, and no gradient


class ModifiedResNet(nn.Module):
  """A stem, four stages of bottleneck blocks and attention pooling.

  The running statistics of batch norms are leaves of "params", so that those alone make a model. Training leaves
  the new ones in the collection "batch_stats", at the same paths.

  Attributes:
    stages: blocks of each.
    width: of the stem; the last stage is 32 times as wide.
    heads: of the pooling.
  """

  stages: tuple[int, ...]
  width: int
  heads: int
  embed_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images, train=False):
    """Embeds normalised images.

    Args:
      images: [batch, size, size, 3], mean and standard deviation already removed.
      train: whether batch norms take the statistics of this batch, and not the running ones.

    Returns:
      [batch, embed_dim], not normalised.
    """
    x = Stem(self.width, self.dtype, name="stem")(images.astype(self.dtype), train)
    for i, blocks in enumerate(self.stages):
      x = Stage(blocks, self.width * 2**i, 1 if i == 0 else 2, self.dtype, name=f"stage_{i}")(x, train)
    return AttentionPool(self.heads, self.embed_dim, self.dtype, name="pool")(x)


class Stem(nn.Module):
  """Three convolutions and a pooling: [batch, size, size, 3] -> [batch, size / 4, size / 4, width]."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    half = self.width // 2
    for i, (features, stride) in enumerate(((half, 2), (half, 1), (self.width, 1)), start=1):
      x = Conv(features, 3, self.dtype, stride=stride, name=f"conv_{i}")(x)
      x = nn.relu(BatchNorm(self.dtype, name=f"norm_{i}")(x, train))
    return pool(x, 2)


class Stage(nn.Module):
  """Bottleneck blocks, of which the first may have a stride."""

  blocks: int
  planes: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    for j in range(self.blocks):
      x = Bottleneck(self.planes, self.stride if j == 0 else 1, self.dtype, name=f"block_{j}")(x, train)
    return x


class Bottleneck(nn.Module):
  """[batch, size, size, width] -> [batch, size / stride, size / stride, 4 * planes]: a narrow way and a shortcut."""

  planes: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    features = EXPANSION * self.planes
    norm = functools.partial(BatchNorm, self.dtype)
    y = Conv(self.planes, 1, self.dtype, name="conv_1")(x)
    y = nn.relu(norm(name="norm_1")(y, train))
    # Over the mesh axis "tensor" these two are split like the two maps of an MLP, with the norm between them.
    y = Conv(self.planes, 3, self.dtype, axes=("embed", "mlp"), name="conv_2")(y)
    y = nn.relu(norm(axis="mlp", name="norm_2")(y, train))
    y = Conv(features, 1, self.dtype, axes=("mlp", "embed"), name="conv_3")(pool(y, self.stride))
    # Scaled by zero at first: a new block is its shortcut alone, as in the released code.
    y = norm(scale_init=nn.initializers.zeros, name="norm_3")(y, train)
    if self.stride > 1 or x.shape[-1] != features:
      x = Shortcut(features, self.stride, self.dtype, name="shortcut")(x, train)
    return nn.relu(x + y)


class Shortcut(nn.Module):
  """Brings a block's input to the shape of its output."""

  features: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    x = Conv(self.features, 1, self.dtype, name="conv")(pool(x, self.stride))
    return BatchNorm(self.dtype, name="norm")(x, train)


class AttentionPool(nn.Module):
  """One layer of attention in which the mean over all places is the query."""

  heads: int
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    """[batch, height, width, channels] -> [batch, features]."""
    channels = x.shape[-1]
    x = x.reshape(x.shape[0], -1, channels)
    mean = x.mean(1, keepdims=True, dtype=jnp.float32).astype(self.dtype)
    x = jnp.concatenate([mean, x], axis=1)
    stddev = channels**-0.5
    init = parameter(nn.initializers.normal(stddev), None, "embed")
    x = x + self.param("pos_embed", init, x.shape[1:]).astype(self.dtype)
    attention = Attention(
      self.heads, causal=False, output_stddev=stddev, dtype=self.dtype, features=self.features, name="attention"
    )
    return attention(x, x[:, :1])[:, 0]


class Conv(nn.Module):
  """A square convolution without bias that, with a stride of 1, keeps the size of the image.

  Attributes:
    features: channels out.
    size: of the kernel, odd.
    axes: logical names of channels in and out.
  """

  features: int
  size: int
  dtype: jnp.dtype
  stride: int = 1
  axes: tuple[str | None, str | None] = (None, "embed")

  @nn.compact
  def __call__(self, x):
    # torch's default initialisation: uniform, variance 1 / (3 fan_in).
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1, 2))
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", parameter(init, None, None, *self.axes), shape).astype(self.dtype)
    if self.size == 1 and self.stride == 1:
      return matmul(x, kernel[0, 0])  # XLA:CPU runs the gradients of the convolution at a third of the speed
    # As many zeros on both sides, with a stride too, where "SAME" would put them all at the right and the bottom.
    padding = [(self.size // 2, self.size // 2)] * 2
    strides = (self.stride, self.stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class BatchNorm(nn.Module):
  """Batch normalisation as torch has it (Ioffe & Szegedy 2015), computed in float32 and returned in `dtype`.

  Under `jit` the batch is the global one, so its statistics are the same on any mesh.

  Attributes:
    axis: logical name of the channels.
  """

  dtype: jnp.dtype
  axis: str = "embed"
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x, train):
    """Normalises channels.

    Args:
      x: [batch, height, width, channels].
      train: whether to take the statistics of this batch. The new running statistics are then left in the
        collection "batch_stats", if that is mutable; the parameters stay what they are.

    Returns:
      An array like `x`.
    """
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    inits = {"scale": self.scale_init, "bias": zeros, "mean": zeros, "var": ones}
    scale, bias, mean, variance = (
      self.param(name, parameter(init, self.axis), x.shape[-1:]) for name, init in inits.items()
    )
    x = x.astype(jnp.float32)
    if train:
      running, places = {"mean": mean, "var": variance}, (0, 1, 2)
      # One pass over the batch, and one reduction over devices: a ResNet waits for memory, not for arithmetic.
      # E[x^2] - E[x]^2 loses digits where the mean is large; taken from the running mean, it is not.
      from_running = x - jax.lax.stop_gradient(mean)
      offset = from_running.mean(places)
      mean = jax.lax.stop_gradient(mean) + offset
      variance = jnp.maximum(jnp.square(from_running).mean(places) - jnp.square(offset), 0)
      count = x.size // x.shape[-1]
      # The batch is normalised by its own, biased variance; what is kept is the unbiased estimate.
      new = {"mean": mean, "var": variance * (count / max(count - 1, 1))}
      for name, old in running.items():
        value = (1 - MOMENTUM) * old + MOMENTUM * new[name]
        self.sow("batch_stats", name, value, init_fn=lambda: None, reduce_fn=lambda _, value: value)
    return ((x - mean) * (jax.lax.rsqrt(variance + EPSILON) * scale) + bias).astype(self.dtype)


def pool(x, stride):
  """The averages of squares of `stride` by `stride` places; `x` itself where that is 1."""
  return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x
