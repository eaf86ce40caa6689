"""CLIP ViT-bigG/14, sharded over 64 devices and data-parallel beyond; sizes of open_clip's model."""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-bigG-14"
  config.data.path = "shards/*.tar"
  config.train.samples = 12_800_000_000  # as the smaller models
  config.optimizer.learning_rate = 4e-4  # that of L/14, table 20
  config.train.scan = True  # 80 blocks would take the compiler long
  config.train.remat = "full"  # fits on 256 chips of v5e; with more memory "minimal" is faster (docs/performance.md)
  config.eval.batch_size = 512  # an image a device on 512
  config.mesh.fsdp = 64  # divides all widths, and is two sides of 8x8x8
  return config
