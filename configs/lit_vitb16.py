"""LiT on a ViT-B/16: a locked, pretrained image tower, and a text tower that learns to read it (Zhai et al. 2022, arXiv 2111.07991).

    python main.py --config=configs/lit_vitb16.py --workdir=runs/lit --config.train.init_from=WEIGHTS

WEIGHTS is anything that `clip_jax.load` reads: a work directory, an imported checkpoint, a Hugging Face or open_clip folder.
Activation, image mean and the like must be those the weights were trained with, and are checked; for OpenAI's weights, say, use
--config.model.name=ViT-B-16-quickgelu. The locked tower computes no gradients and has no optimizer state.
Numbers are those of the authors' repository (google-research/big_vision, configs/proj/image_text/lit_coco.py), which
starts from image classifiers and trains a BERT beside them; the text tower is CLIP's here.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-B-16"
  config.model.logit_scale_init = 10.0
  config.data.path = "shards/*.tar"

  config.train.init_tower = "image"
  config.train.global_batch_size = 4_096
  config.train.steps = 5_000
  config.optimizer.freeze = "^image/"  # "Lu": locked image tower, new text tower, no head on the image (section 3)
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 150  # 3 % of the steps
  config.optimizer.weight_decay = 0.01
  config.optimizer.beta2 = 0.999  # optax's Adam as it comes, as are the next line's
  config.optimizer.epsilon = 1e-8
  config.optimizer.gradient_clip_norm = 1.0
  return config
