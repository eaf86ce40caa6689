"""The grid of "Reproducible scaling laws for contrastive language-image learning" (Cherti et al. 2022, arXiv 2212.07143).

Five models x LAION-80M, -400M and -2B x 3B, 13B and 34B samples seen: 45 runs, of which the authors trained 29
(`openclip_grid:published` are these alone; of H/14 and g/14 they trained one each, on 2B). Learning rates, warm-ups and batch sizes
are those of their table trained_models_info.csv; runs that are not in it have those of one of the same model that is. A batch "of 88k" is
86 x 1,024 here and was 88,064 to 90,112 there, so that TPU slices can share it; durations are 32, 160 and 428 epochs of LAION-80M, and
theirs vary by up to 7 % about that. `openclip_grid:constant` shares work between durations instead, as cooldowns of the longest runs.
"""

from clip_jax.scaling import sweep

SHARDS = "shards"  # a folder or bucket with laion80m, laion400m and laion2b
BENCHMARKS = "benchmarks"  # a folder or bucket, as --data-root of `clip-jax eval`
RECIPES = {
  "ViT-B-32": "configs/vitb32.py",
  "ViT-B-16": "configs/vitb16.py",
  "ViT-L-14": "configs/vitl14.py",
  "ViT-H-14": "configs/vith14.py",
  "ViT-g-14": "configs/vith14.py",
}
DATA = {"LAION-80M": "laion80m", "LAION-400M": "laion400m", "LAION-2B": "laion2b"}
SAMPLES = {"3B": 2_560_000_000, "13B": 12_800_000_000, "34B": 34_240_000_000}
K = 1_024
# (data, duration) of a model: learning rate, batch, steps of warm-up.
USUAL = (1e-3, 86 * K, 10_000)
PUBLISHED = {
  "ViT-B-32": {
    ("LAION-80M", "3B"): (5e-4, 32 * K, 2_000),
    ("LAION-80M", "13B"): (5e-4, 32 * K, 2_000),
    ("LAION-80M", "34B"): USUAL,
    ("LAION-400M", "3B"): USUAL,
    ("LAION-400M", "13B"): (1e-3, 84 * K, 2_000),
    ("LAION-400M", "34B"): (5e-4, 32 * K, 2_000),
    ("LAION-2B", "3B"): USUAL,
    ("LAION-2B", "13B"): (5e-4, 32 * K, 2_000),
    ("LAION-2B", "34B"): (1e-3, 79_104, 2_000),
  },
  "ViT-B-16": {(data, duration): USUAL for data in DATA for duration in SAMPLES} | {("LAION-400M", "13B"): (5e-4, 33 * K, 10_000)},
  "ViT-L-14": {(data, duration): USUAL for data in DATA for duration in SAMPLES}
  | {
    ("LAION-400M", "13B"): (1e-3, 84 * K, 2_000),
    ("LAION-400M", "34B"): (1e-3, 84 * K, 10_000),
    ("LAION-2B", "13B"): (1e-3, 84 * K, 10_000),
    ("LAION-2B", "34B"): (1e-3, 84 * K, 10_000),
  },
  "ViT-H-14": {("LAION-2B", "34B"): (5e-4, 79_104, 2_000)},
  "ViT-g-14": {("LAION-2B", "13B"): (5e-4, 64_000, 2_000)},
}
# What lets these batches fit 256 chips of v5e, by estimate; runs may change it between starts, and smaller batches need less.
FITS = {
  "ViT-B-16": {"train.remat": "attention"},
  "ViT-L-14": {"train.remat": "full"},
  "ViT-g-14": {"mesh.data": -1, "mesh.fsdp": 64},  # 1,408 is no multiple of 256
}


def get_sweep(which="all"):
  """The runs; `which` is "all", "published", or "constant" for all with shared work."""
  if which not in ("all", "published", "constant"):
    raise ValueError(f"{which!r} is no part of this grid; all, published and constant are")

  def each(model, data, duration):
    rate, batch, warmup = PUBLISHED[model].get((data, duration)) or next(iter(PUBLISHED[model].values()))
    return {"optimizer.learning_rate": rate, "train.global_batch_size": batch, "optimizer.warmup_steps": warmup}

  common = {
    "eval.data_root": BENCHMARKS,
    "eval.datasets": ("imagenet1k", "imagenet_robustness", "mscoco_captions", "flickr30k"),
    "checkpoint.keep_last": 2,
  }
  runs = sweep.grid(
    RECIPES,
    {name: {"model.name": name, **FITS.get(name, {})} for name in RECIPES},
    {name: {"data.path": f"{SHARDS}/{folder}/*.tar"} for name, folder in DATA.items()},
    SAMPLES,
    "constant" if which == "constant" else "cosine",
    common=common,
    each=each,
  )
  if which == "published":
    return [run for run in runs if (run.data, run.name.rpartition("_")[2]) in PUBLISHED[run.arch]]
  return runs
