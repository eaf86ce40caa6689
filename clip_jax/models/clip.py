"""CLIP: two towers and one temperature (Radford et al. 2021, figure 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.models.resnet import STATISTICS, ModifiedResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.transformer import How, parameter
from clip_jax.models.vit import VisionTransformer


class CLIP(nn.Module):
  """An image tower, a text tower, the logarithm of the logit scale, and a logit bias if the config has one.

  Attributes:
    config: a resolved `clip_jax.config.Model` (no size left open).
    how: how the Transformers of it compute.
  """

  config: object
  how: How = How()

  def setup(self):
    config = self.config
    dtype = jnp.dtype(config.compute_dtype)
    shared = dict(
      embed_dim=config.embed_dim,
      activation=config.activation,
      norm_epsilon=config.norm_epsilon,
      dtype=dtype,
      residual_dtype=jnp.dtype(config.residual_dtype or dtype),
      how=self.how,
    )
    vision, text = config.vision, config.text
    if vision.kind == "resnet":
      self.image = ModifiedResNet(
        stages=vision.stages,
        width=vision.width,
        heads=vision.heads,
        embed_dim=config.embed_dim,
        dtype=dtype,
      )
    else:
      self.image = VisionTransformer(
        patch_size=vision.patch_size,
        width=vision.width,
        layers=vision.layers,
        heads=vision.heads,
        mlp_width=vision.mlp_width,
        patch_drop=vision.patch_drop,
        map_head=vision.kind == "siglip",
        **shared,
      )
    self.text = TextTransformer(
      vocab_size=text.vocab_size,
      context_length=text.context_length,
      width=text.width,
      layers=text.layers,
      heads=text.heads,
      mlp_width=text.mlp_width,
      causal=text.kind == "clip",
      train_length=text.train_length,
      reduction=text.reduction,
      **shared,
    )
    init = parameter(nn.initializers.constant(jnp.log(config.logit_scale_init)))
    self.logit_scale = self.param("logit_scale", init, ())
    if config.logit_bias_init is not None:
      init = parameter(nn.initializers.constant(config.logit_bias_init))
      self.logit_bias = self.param("logit_bias", init, ())

  def encode_image(self, images, normalize=True, keys=None, train=False):
    """uint8 [batch, size, size, 3] -> float32 [batch, embed_dim], of unit length if `normalize`.

    In training `keys`, [batch] `jax.random` keys, choose what is left out of each example. `train` has batch norms
    take the statistics of this batch, and leave new running ones in the collection "batch_stats" if it is mutable.
    """
    pixels = normalize_pixels(images, self.config.image_mean, self.config.image_std)
    if has_batch_norm(self.config):
      return _embedding(self.image(pixels, train), normalize)  # a ResNet sees whole images
    return _embedding(self.image(pixels, keys), normalize)

  def encode_text(self, tokens, normalize=True, keys=None, train=False):
    """int32 [batch, context_length] -> float32 [batch, embed_dim], of unit length if `normalize`.

    `keys` as in `encode_image`; `train` changes nothing, as no text tower has a batch norm.
    """
    return _embedding(self.text(tokens, keys), normalize)

  def __call__(self, images, tokens, keys=None, train=False):
    """Both embeddings and the logit scale, exponentiated; `keys` and `train` as in `encode_image`."""
    image = self.encode_image(images, keys=keys, train=train)
    text = self.encode_text(tokens, keys=keys, train=train)
    return image, text, jnp.exp(self.logit_scale)


def initial_params(config, key):
  """New parameters, annotated with logical axis names.

  Args:
    config: a resolved `clip_jax.config.Model`.
    key: a `jax.random.key`; the parameters depend on nothing else, so any mesh gives the same ones.

  Returns:
    A nested dict of `nn.LogicallyPartitioned` arrays.
  """
  size, context = config.image_size, config.text.context_length
  images, tokens = jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, context), jnp.int32)
  return CLIP(config).init(key, images, tokens)["params"]


def has_batch_norm(config):
  """Whether a model has running statistics, which training sets from its batches and not by gradients."""
  return config.vision.kind == "resnet"


def with_statistics(params, statistics):
  """Parameters with new running statistics.

  Args:
    params: a nested dict.
    statistics: the collection "batch_stats" that a pass with `train` left, with the same paths.

  Returns:
    A nested dict like `params`.
  """
  return unflatten_dict({**flatten_dict(params), **flatten_dict(statistics)})


def without_statistics(params):
  """Of a nested dict of parameters those that gradients change: all but running statistics."""
  return unflatten_dict({path: x for path, x in flatten_dict(params).items() if path[-1] not in STATISTICS})


def leaves_out(config):
  """Whether a model is trained on a part of each example, and so needs keys to choose it."""
  return config.vision.patch_drop > 0 or config.text.train_length is not None


def normalize_pixels(images, mean, std):
  """uint8 pixels to float32 with the model's mean and standard deviation (of values in 0..1)."""
  mean, std = 255 * jnp.asarray(mean), 255 * jnp.asarray(std)
  return (images.astype(jnp.float32) - mean) / std


def l2_normalize(x):
  """Rows of unit length, in float32; a row of zeros stays zero and has a finite gradient."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def _embedding(x, normalize):
  return l2_normalize(x) if normalize else x.astype(jnp.float32)
