"""CLIP ViT-L/14 at 336 pixels: one more epoch at a higher resolution (Radford et al. 2021, section 2.5).

The paper starts this from its ViT-L/14 weights, with position embeddings interpolated: --config.train.init_from=runs/vitl14.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-L-14-336-quickgelu"
  config.data.path = "shards/*.tar"
  config.train.samples = 400_000_000  # one epoch, section 2.5
  config.optimizer.learning_rate = 2e-5  # table 20
  return config
