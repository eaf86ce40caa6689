"""CLIP's ViT-B/16 towers with the sigmoid loss (Zhai et al. 2023, SigLIP, arXiv 2303.15343).

The loss, its scale and its bias are the paper's; the towers are CLIP's (class token, causal text), not SigLIP's.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-B-16"
  config.model.logit_scale_init = 10.0  # section 3.2
  config.model.logit_bias_init = -10.0  # section 3.2: most pairs are negatives, and should start as such

  config.loss.name = "sigmoid"
  config.loss.max_logit_scale = None  # not clipped in the authors' code

  config.data.path = "shards/*.tar"
  config.train.global_batch_size = 32_768  # "sufficient", abstract
  config.train.samples = 9_000_000_000  # ours
  config.optimizer.learning_rate = 1e-3  # of the authors' siglip_lit_coco.py, here with warm-up as in CLIP
  config.optimizer.weight_decay = 1e-4  # ours
  config.optimizer.beta2 = 0.95  # the paper's, for the stability of large batches
  return config
