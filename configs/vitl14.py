"""CLIP ViT-L/14, 12.8B samples at batch 32,768 (Radford et al. 2021, tables 18 and 20)."""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-L-14-quickgelu"
  config.data.path = "shards/*.tar"
  config.train.samples = 12_800_000_000  # 32 epochs of 400M pairs, table 18
  config.optimizer.learning_rate = 4e-4  # table 20
  return config
