"""CLIP ViT-H/14 with both towers sharded over all devices; sizes of Cherti et al. 2022 (arXiv 2212.07143)."""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-H-14"
  config.data.path = "shards/*.tar"
  config.train.samples = 12_800_000_000  # as the smaller models; the authors' saw 34B
  config.optimizer.learning_rate = 4e-4  # that of L/14, table 20
  config.train.scan = True  # 56 blocks would take the compiler long
  config.train.remat = "full"  # fits on 128 chips of v4 and 256 of v5e; with more memory "minimal" is faster (docs/performance.md)
  config.mesh.data = 1
  config.mesh.fsdp = -1
  return config
