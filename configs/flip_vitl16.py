"""FLIP ViT-L/16: CLIP with half of the patches left out (Li et al. 2022, arXiv 2212.00794).

Two stages. The first sees half of each image; a short second one, from its weights, sees whole images:

    python main.py --config=configs/flip_vitl16.py --workdir=runs/flip
    python main.py --config=configs/flip_vitl16.py:tune --workdir=runs/flip_tune --config.train.init_from=runs/flip

Numbers are those of the authors' repository (facebookresearch/flip, configs/default.py and cfg_flip_large.py). Towers,
pooling and tokenizer are CLIP's here; FLIP has fixed positions, mean pooling and a text tower without a causal mask.
"""

from configs import base


def get_config(stage="pretrain"):
  config = base.get_config()
  config.model.name = "ViT-L-16"
  config.data.path = "shards/*.tar"
  config.data.crop_scale = (0.5, 1.0)
  config.data.flip = 0.5

  config.train.global_batch_size = 65_536
  config.optimizer.beta2 = 0.95
  config.optimizer.weight_decay = 0.2
  if stage == "tune":
    config.train.samples = 128_116_700  # 100 times ImageNet's length: a third of an epoch of LAION-400M
    config.optimizer.learning_rate = 1.024e-5  # 4e-8 for every 256 pairs of the batch
  elif stage == "pretrain":
    config.model.vision.patch_drop = 0.5
    config.train.samples = 12_811_670_000  # 10,000 times ImageNet's length: 32 epochs of LAION-400M
    config.optimizer.learning_rate = 1.024e-3  # 4e-6 for every 256 pairs of the batch
  else:
    raise ValueError(f"{stage!r} is not a stage; they are pretrain and tune")
  config.optimizer.warmup_steps = 391  # 20 times ImageNet's length, in both stages
  return config
