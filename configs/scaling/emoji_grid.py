"""A scaling experiment in half an hour on two processor cores: 4 models x 2 amounts of data x 3 durations of the quickstart.

A pair takes the largest model fifty times the compute of the smallest, the data is one artist's drawings or two artists', and each model
is tested on the drawings of a third. `emoji_grid:cosine` trains all 24 runs by themselves; as it is, the shorter ones are
cooldowns of the longest. What it finds: docs/scaling.md.
"""

from clip_jax.scaling import sweep

MODELS = {
  "XS": dict(vision=dict(width=16, layers=1, heads=1), text=dict(width=16, layers=1, heads=1)),
  "S": dict(vision=dict(width=32, layers=2, heads=1), text=dict(width=32, layers=1, heads=1)),
  "M": dict(vision=dict(width=64, layers=2, heads=2), text=dict(width=64, layers=1, heads=2)),
  "L": dict(vision=dict(width=128, layers=3, heads=4), text=dict(width=96, layers=2, heads=2)),
}
DATA = {"one-artist": "noto-seen-*.tar", "two-artists": "{noto,openmoji}-seen-*.tar"}
SAMPLES = {"32k": 32_000, "96k": 96_000, "288k": 288_000}


def get_sweep(schedule="constant"):
  """The 24 runs; `schedule` as `sweep.grid` takes it."""
  models = {
    name: {f"model.{tower}.{key}": value for tower, sizes in towers.items() for key, value in sizes.items()}
    for name, towers in MODELS.items()
  }
  common = {
    "train.global_batch_size": 128,
    "train.log_every": 2,
    "checkpoint.every": 250,
    "checkpoint.keep_last": 1,
    "eval.every": 0,
  }
  # Pictures and yardsticks are for the report of one run.
  for name in ("emoji_seen", "emoji_seen_no_flags", "emoji_unseen"):
    common[f"eval.retrieval.{name}.nearest_training_image"] = False
  common |= {"eval.retrieval.emoji_seen.gallery": 0, "eval.retrieval.emoji_unseen.gallery": 0}
  return sweep.grid(
    "configs/quickstart.py", models, {name: {"data.path": path} for name, path in DATA.items()}, SAMPLES, schedule, common=common
  )
