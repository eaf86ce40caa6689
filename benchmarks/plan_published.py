"""How close to published training runs are the planner's predictions?

    python benchmarks/plan_published.py

Each row is a run whose model, batch, chips and time were published; its step is compiled by us for the same slice, or, of GPUs, estimated.
Ratios of published speed to the lower bound are what `EFFICIENCY` in clip_jax/plan/estimate.py was chosen by. On TPUs attention is XLA's, as it
was in those runs; what is predicted, of v4, is with our kernel. Needs the extra `plan`; takes two to five minutes a row.
"""

import argparse
import functools
import importlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where configs/ is

import jax

from clip_jax.plan import estimate, planner, slices, targets

RESULTS = Path(__file__).parent / "results" / "plan_published.json"
SIGLIP = {  # Zhai et al. 2023 (arXiv 2303.15343), section 4.2: texts of 16 tokens
  "model.text.context_length": 16, "optimizer.name": "adafactor",
}
FLIP = {  # Li et al. 2022 (arXiv 2212.00794), table 9 and A.1: a text tower of 768, 32 tokens, float32
  "model.text.context_length": 32, "model.compute_dtype": "float32",
}  # fmt: skip
LIT = {"model.text.context_length": 16, "model.text.width": 768, "model.text.heads": 12}  # Zhai et al. 2022 (arXiv 2111.07991), appendix E
L_16 = {"model.name": "ViT-L-16", "model.vision.patch_size": 16}
# What, where (chips), recipe, changes, batch, pairs a second and chip, whose words. Days are whole ones in the papers: +-20 %.
RUNS = [
  ("SigLIP B/16", "v4:2x2x4", "siglip_vitb16", SIGLIP, 16_384, 2.4e9 / (3 * 86_400 * 16), "arXiv 2303.15343, table 1: 16 chips, 3 days, 2.4 B pairs"),
  ("SigLIP B/16", "v4:2x4x4", "siglip_vitb16", SIGLIP, 32_768, 9e9 / (5 * 86_400 * 32), "ibid.: 32 chips, 5 days; 9 B pairs by figure 2"),
  ("CLIP L/16 of FLIP", "v3:8x16", "flip_vitl16", {**FLIP, "model.vision.patch_drop": 0.0}, 16_384, 12.8e9 / (10 * 86_400 * 128), "arXiv 2212.00794, 4.1: 256 cores, 10 days, 32 epochs of 400 M"),
  ("FLIP L/16, half of the patches", "v3:8x16", "flip_vitl16", {**FLIP, "model.vision.patch_drop": 0.5}, 32_768, 2 * 12.8e9 / (10 * 86_400 * 128), "ibid., table 1a: half the time"),
  ("FLIP L/16, a quarter of the patches", "v3:8x16", "flip_vitl16", {**FLIP, "model.vision.patch_drop": 0.75}, 65_536, 12.8e9 / (3.3 * 86_400 * 128), "ibid., table 1a: a third of the time"),
  ("LiT B/32, text B", "v3:2x2", "lit_vitb16", {**LIT, "model.name": "ViT-B-32"}, 2_240, 2 * 893, "arXiv 2111.07991, table 7: 893 a core"),
  ("LiT L/16, text B", "v3:2x2", "lit_vitb16", {**LIT, **L_16}, 1_600, 2 * 215, "ibid.: 215 a core"),
  ("LiT L/16, text L", "v3:2x2", "lit_vitb16", {**LIT, **L_16, "model.text.width": 1024, "model.text.heads": 16, "model.text.layers": 24}, 736, 2 * 204, "ibid.: 204 a core"),
  ("CLIP L/14, open_clip", "a100:32", "vitl14", {"train.remat": "full"}, 16_384, 78.9, "MMoCLIP on JUWELS: 8 x 4 A100 (40 GB), checkpointing"),
  ("CLIP B/32, open_clip", "a100:128", "vitb32", {}, 32_768, 772, "open_clip, PRETRAINED.md: 128 A100, 36 hours"),
  ("CLIP H/14, open_clip", "a100:824", "vith14", {"train.remat": "full"}, 79_104, 42, "LAION, scaling-laws-openclip: 824 A100"),
]  # fmt: skip


def main():
  """Compiles each run and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true", help="print a list of objects")
  parser.add_argument("--quick", action="store_true", help="as `clip-jax plan --quick`")
  parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name} and use what stands there already")
  arguments = parser.parse_args()
  if arguments.quick:
    jax.config.update("jax_optimization_level", "O0")
  known = {tuple(row["run"]): row for row in json.loads(RESULTS.read_text())} if arguments.save and RESULTS.exists() else {}
  rows = []
  if not arguments.json:
    print("| run | chips | published, pairs/s and chip | lower bound's speed | published / bound | predicted | with our kernel | source |\n|---|---|---|---|---|---|---|---|")
  for run in RUNS:
    rows.append(known.get((run[0], run[1])) or measured(*run))
    if not arguments.json:
      show(rows[-1])
    if arguments.save:
      RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
  if arguments.json:
    print(json.dumps(rows))


def measured(name, topology, recipe_name, changes, batch, published, source):
  """Plans one run, with XLA's attention and with what is taken by default."""
  where = targets.of_topology(topology)  # v3 is not rented as slices any more
  number = slices.number_of_chips(topology)
  speeds = {}
  # Of v3 only the first: our kernel was never meant for it.
  for attention in {"v3": ("xla",), "v4": ("xla", "auto")}.get(where.chip.topology, ("auto",)):
    recipe = importlib.import_module(f"configs.{recipe_name}").get_config()
    for key, value in {**changes, "train.global_batch_size": batch, "eval.batch_size": where.devices, "train.attention": attention}.items():
      *groups, last = key.split(".")
      functools.reduce(getattr, groups, recipe)[last] = value
    for remat in (recipe.train.remat, "minimal", "attention", "full"):
      recipe.train.remat = remat
      found, _ = planner.plan(planner.resolved(recipe, where), where)
      if found["fits"]:
        break
    speeds[attention] = batch / found["step_time_lower_bound_s"] / number if found["fits"] else None
  bound = speeds.get("xla") or speeds["auto"]
  return {
    "run": [name, topology], "batch": batch, "published": published, "bound": bound, "ratio": bound and published / bound,
    "predicted": bound and bound * estimate.EFFICIENCY, "with_kernel": len(speeds) > 1 and speeds["auto"] * estimate.EFFICIENCY or None, "remat": recipe.train.remat, "method": found["method"], "source": source,
  }  # fmt: skip


def show(row):
  """Prints a row."""
  name, topology = row["run"]
  number = lambda value: "-" if value is None else f"{value:,.0f}"  # noqa: E731
  ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
  print(f"| {name} | {topology} | {number(row['published'])} | {number(row['bound'])} | {ratio} | {number(row['predicted'])} | {number(row['with_kernel'])} | {row['source']} |", flush=True)


if __name__ == "__main__":
  main()
