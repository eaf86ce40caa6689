"""A CLIP model that learns emoji in five minutes on two processor cores.

Trains on the drawings of two artists (Noto, OpenMoji) and is tested on a third (Twemoji), and on a tenth of
the concepts that no artist showed it. Chosen with `configs/quickstart.py:validation`, which trains on Noto
alone and tests on OpenMoji: the held-out artist had no part in any choice.
"""

from configs import base


def get_config(split="test"):
  training, held_out = {"test": ("{noto,openmoji}", "twemoji"), "validation": ("noto", "openmoji")}[split]
  config = base.get_config()

  config.model.image_size = 48
  config.model.embed_dim = 128
  config.model.compute_dtype = "float32"  # faster than bfloat16 on most processors
  config.model.vision.patch_size = 16
  config.model.vision.width = 256
  config.model.vision.layers = 4
  config.model.vision.heads = 4
  config.model.text.context_length = 16
  config.model.text.width = 128
  config.model.text.layers = 2
  config.model.text.heads = 2

  config.data.source = "emoji"
  config.data.path = f"{training}-seen-*.tar"
  config.data.other_captions = 0.3
  config.data.color_jitter = 0.4
  config.data.rotation = 15.0

  config.train.global_batch_size = 128
  config.train.samples = 160_000

  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 50
  config.optimizer.gradient_clip_norm = 1.0

  config.eval.every = 250
  config.eval.batch_size = 128
  sets = {
    "emoji_seen": dict(path=f"{held_out}-seen-*.tar", nearest_training_image=True, gallery=24),
    "emoji_seen_no_flags": dict(path=f"{held_out}-seen-other.tar", nearest_training_image=True),
    "emoji_unseen": dict(path=f"{held_out}-unseen-*.tar", nearest_training_image=True, gallery=12),
  }
  for name, values in sets.items():
    config.eval.retrieval[name] = dict(source="emoji", first_caption=True, **values)
  config.eval.zero_shot.emoji_groups = dict(
    source="emoji",
    path=f"{held_out}-seen-*.tar",
    # Unicode's nine groups, in the order of the labels.
    classes=(
      "smiley", "person", "animal or plant", "food or drink", "place or vehicle", "activity", "object", "symbol", "flag",
    ),
    templates=("{}", "a {}"),
  )

  config.checkpoint.every = 250
  return config
