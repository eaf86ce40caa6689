"""clip_jax: pretrain CLIP models in JAX, from a laptop to a TPU pod."""

__version__ = "0.1.0"
