"""clip_jax: pretrain CLIP models in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"


def load(path):
  """A trained model, ready to embed images and texts.

  Args:
    path: a work directory, or one `checkpoints/STEP` folder of it.

  Returns:
    A `clip_jax.inference.Model`.

  Raises:
    UsageError: there is no checkpoint at that path.
  """
  from clip_jax.inference import load  # JAX is not imported before it is needed

  return load(path)
