"""Using a trained model from Python: images and texts to embeddings."""

import functools

import jax
import numpy as np

from clip_jax.convert import sources
from clip_jax.data import images
from clip_jax.data.pipeline import tokenizer_for
from clip_jax.models.clip import CLIP


class Model:
  """A model and what belongs to it.

  Attributes:
    config: the `clip_jax.config.Model` it was trained as.
    module: the linen module; `module.apply({"params": params}, images, tokens)`.
    params: its parameters.
  """

  def __init__(self, config, params, tokenizer=None):
    """Puts the parameters on the default device.

    Args:
      config: a resolved `clip_jax.config.Model`.
      params: the nested dict of arrays that `CLIP` takes.
      tokenizer: its tokenizer, if it is not the one that the config names.
    """
    self.config, self.module = config, CLIP(config)
    self.params = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.float32), params)
    self._tokenizer = tokenizer or tokenizer_for(config)

  @property
  def logit_scale(self):
    """What cosine similarities are multiplied by."""
    return float(np.exp(self.params["logit_scale"]))

  @property
  def logit_bias(self):
    """What is added to logits: nothing, in a model trained with the softmax loss."""
    return float(self.params.get("logit_bias", 0.0))

  def preprocess(self, image):
    """A PIL image as the model wants it: uint8 [size, size, 3]."""
    return images.resize_and_crop(image, self.config.image_size, self.config.resize_mode)

  def tokenize(self, texts):
    """A string or a list of strings as int32 [n, context_length]."""
    return self._tokenizer(texts)

  def encode_image(self, pixels, *, normalize=True):
    """Embeds images.

    Args:
      pixels: uint8 [n, size, size, 3], or one [size, size, 3].
      normalize: whether rows get unit length.

    Returns:
      float32 [n, embed_dim].
    """
    pixels = np.asarray(pixels)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    size = self.config.image_size
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
      raise ValueError(
        f"pixels are {pixels.dtype} {list(pixels.shape)}; expected uint8 [n, {size}, {size}, 3], "
        "as model.preprocess gives."
      )
    return np.asarray(self._encode("encode_image", normalize)(self.params, pixels))

  def encode_text(self, tokens, *, normalize=True):
    """Embeds texts.

    Args:
      tokens: int32 [n, context_length], as `tokenize` gives.
      normalize: whether rows get unit length.

    Returns:
      float32 [n, embed_dim].
    """
    tokens = np.asarray(tokens)
    context = self.config.text.context_length
    if tokens.ndim != 2 or tokens.shape[1] != context or tokens.dtype.kind not in "iu":
      raise ValueError(
        f"tokens are {tokens.dtype} {list(tokens.shape)}; expected int32 [n, {context}], as model.tokenize gives."
      )
    return np.asarray(self._encode("encode_text", normalize)(self.params, tokens))

  @functools.cache  # noqa: B019  (a model is kept for as long as its compiled towers are of use)
  def _encode(self, method, normalize):
    def encode(params, batch):
      return self.module.apply({"params": params}, batch, normalize=normalize, method=method)

    return jax.jit(encode)


def load(path, model=None):
  """A trained model.

  Args:
    path: a work directory (its newest checkpoint is taken), one `checkpoints/STEP` folder, what `clip-jax import`
      wrote, a Hugging Face or open_clip folder, or a file of tensors. Of a run that kept a moving average of its weights
      it is the average.
    model: the model's name, for a file of tensors that does not say what it holds.

  Returns:
    A `Model`.

  Raises:
    UsageError: there are no weights at that path, or they are not those of the model they should be.
  """
  source = sources.find(path, model)
  return Model(source.model, source.params(), source.tokenizer)
