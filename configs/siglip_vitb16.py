"""SigLIP ViT-B/16: the sigmoid loss and its own towers (Zhai et al. 2023, arXiv 2303.15343).

The image tower pools by attention, the text tower is not causal, and captions are read by a SentencePiece vocabulary of 32,000,
whose file must be given: `spiece.model` of the Hugging Face folder google/siglip-base-patch16-224, say.

    python main.py --config=configs/siglip_vitb16.py --workdir=runs/siglip --config.model.tokenizer=spiece.model

The sigmoid loss with CLIP's towers and tokenizer: --config.model.name=ViT-B-16.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.model.name = "ViT-B-16-SigLIP"
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
