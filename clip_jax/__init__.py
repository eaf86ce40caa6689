"""clip_jax: pretrain CLIP models in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"


def load(path, model=None):
  """A trained model, ready to embed images and texts.

  Args:
    path: a work directory, a checkpoint, a Hugging Face or open_clip folder, or a file of tensors.
    model: the model's name ("ViT-B-32-quickgelu"), for a file of tensors that does not say what it holds.

  Returns:
    A `clip_jax.inference.Model`.

  Raises:
    UsageError: there are no weights at that path, or they are not those of the model they should be.
  """
  from clip_jax.inference import load  # JAX is not imported before it is needed

  return load(path, model)
