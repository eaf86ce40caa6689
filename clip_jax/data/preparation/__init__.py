"""Preparing training data on many machines: verified, filtered, without copies, shuffled, in shards that are quick to read."""

from clip_jax.data.preparation.launcher import convert
from clip_jax.data.preparation.settings import Settings

__all__ = ["Settings", "convert"]
