"""CLIPA ViT-L/16: CLIP on small images and eight tokens of text (Li et al. 2023, arXiv 2305.07017).

Two stages. The first sees images of 96 pixels (36 patches) and 8 tokens of each caption; a short second one, from its
weights, sees 224 pixels and 32 tokens, with the positions of the patches interpolated:

    python main.py --config=configs/clipa_vitl16.py --workdir=runs/clipa
    python main.py --config=configs/clipa_vitl16.py:tune --workdir=runs/clipa_tune --config.train.init_from=runs/clipa

Numbers are those of the authors' scripts for this model (UCSC-VLAA/CLIPA, clipa_torch/scripts/exp/gpu/vit_l16, I37 and
T8). Towers, pooling and tokenizer are CLIP's here; CLIPA pools the mean, and cuts captions by their syntax or by length.
"""

from configs import base


def get_config(stage="pretrain"):
  config = base.get_config()
  config.model.name = "ViT-L-16"
  config.data.path = "shards/*.tar"
  config.data.crop_scale = (0.4, 1.0)

  config.optimizer.beta2 = 0.95
  config.optimizer.weight_decay = 0.2
  if stage == "tune":
    config.model.text.train_length = 32
    config.train.global_batch_size = 7_168
    config.train.samples = 131_072_000
    config.optimizer.learning_rate = 2.24e-5  # 8e-7 for every 256 pairs of the batch
    config.optimizer.warmup_steps = 3_571
  elif stage == "pretrain":
    config.model.image_size = 96
    config.model.text.train_length = 8
    config.train.global_batch_size = 32_768
    config.train.samples = 2_400_000_000  # 6 epochs of 400M pairs
    config.optimizer.learning_rate = 1.024e-3  # 8e-6 for every 256 pairs of the batch
    config.optimizer.warmup_steps = 1_563
  else:
    raise ValueError(f"{stage!r} is not a stage; they are pretrain and tune")
  return config
