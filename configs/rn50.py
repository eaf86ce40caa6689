"""CLIP RN50, 12.8B samples at batch 32,768 (Radford et al. 2021, tables 18 and 20)."""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "RN50-quickgelu"  # the activation is the text tower's; the ResNet has ReLU
  config.data.path = "shards/*.tar"
  config.train.samples = 12_800_000_000  # 32 epochs of 400M pairs, table 18
  config.optimizer.learning_rate = 5e-4  # table 20
  config.optimizer.beta2 = 0.999  # table 18, ResNets
  config.optimizer.epsilon = 1e-8  # table 18, ResNets
  return config
