"""A recipe for tests: a very small model on plain colours."""

from configs import base


def get_config():
  config = base.get_config()
  config.model.image_size = 16
  config.model.embed_dim = 16
  config.model.compute_dtype = "float32"
  config.model.vision.update(patch_size=8, width=32, layers=2, heads=4)
  config.model.text.update(context_length=12, width=16, layers=2, heads=4)
  config.data.color_jitter = 0.2
  config.train.global_batch_size = 16
  config.train.steps = 40
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 5
  config.eval.batch_size = 16
  config.checkpoint.every = 5
  config.checkpoint.keep_last = 2
  return config
