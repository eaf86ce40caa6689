"""Where the best learning rate lies at three widths: `emoji_lr` as the model is, `emoji_lr:mup` with rates scaled by width.

Twenty-one runs of a quarter of a minute to a minute on two processor cores. What it finds: docs/scaling.md.
"""

from clip_jax.scaling import transfer

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MODELS = {
  f"w{width}": {
    "model.vision.width": width,
    "model.vision.heads": width // 32,
    "model.vision.layers": 3,
    "model.text.width": width // 2,
    "model.text.heads": width // 64,
  }
  for width in (64, 128, 256)
}


def get_sweep(which="plain"):
  """The runs; `which` is "plain" or "mup"."""
  if which not in ("plain", "mup"):
    raise ValueError(f"{which!r} is no part of this sweep; plain and mup are")
  common = {"train.log_every": 5, "eval.every": 0, "checkpoint.every": 1_000, "checkpoint.keep_last": 1}
  for name in ("emoji_seen", "emoji_seen_no_flags", "emoji_unseen"):
    common[f"eval.retrieval.{name}.nearest_training_image"] = False
  common |= {"eval.retrieval.emoji_seen.gallery": 0, "eval.retrieval.emoji_unseen.gallery": 0}
  return transfer.lr_sweep("configs/quickstart.py", RATES, MODELS, 25_600, base="w64" if which == "mup" else None, common=common)
