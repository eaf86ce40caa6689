"""The model family of the quickstart, larger and for longer: half an hour to an hour on two processor cores.

Aims to name the drawings of an artist it has never seen more often than the nearest training drawing by pixels
and gradient histograms does. What it reaches: docs/benchmarks.md.
"""

from configs import quickstart


def get_config(split="test"):
  config = quickstart.get_config(split)
  config.model.image_size = 64
  config.model.vision.layers = 6

  config.data.crop_scale = (0.7, 1.0)

  config.train.global_batch_size = 256
  config.train.samples = 384_000

  config.eval.every = 300
  config.eval.batch_size = 256
  config.checkpoint.every = 100
  return config
