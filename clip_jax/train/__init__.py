"""Training: `run(config, workdir)` does all of it."""

from clip_jax.train.loop import Result, run

__all__ = ["Result", "run"]
