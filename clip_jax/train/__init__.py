"""Training: `run(config, workdir)` does all of it."""

__all__ = ["Result", "run"]


def __getattr__(name):
  # The loop imports all there is: what `train.doctor` says of a machine, it must say where that fails.
  if name not in __all__:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from clip_jax.train import loop

  return getattr(loop, name)
