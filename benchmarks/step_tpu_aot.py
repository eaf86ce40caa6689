"""What does a training step need on a TPU slice that is not there? Compiles the step of recipes, and asks the compiler.

    python benchmarks/step_tpu_aot.py
    python benchmarks/step_tpu_aot.py --config vitl14 --topology v5e:16x16 --set train.remat=minimal
    python benchmarks/step_tpu_aot.py --config vitl14 --topology v5p:4x4x4 --batch 4194304 --set train.microbatches=256

Each row compiles the function that main.py runs, for every config on every topology. `train.remat=least` tries what is kept of
blocks, from most to least, until it fits. Without arguments it compiles `CASES`. `--save` puts each row, as soon as it is there, in
benchmarks/results/step_tpu_aot.json, in the place of an earlier one of the same name, so that a regression shows as a difference.
Needs the extra `plan`; takes one to four minutes a row. What users want to know of a recipe, `clip-jax plan` says (docs/planning.md).
"""

import argparse
import ast
import functools
import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where configs/ is

from clip_jax import config as configs
from clip_jax.losses import global_batch
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import chips
from clip_jax.plan import compile as compiler
from clip_jax.train import performance
from clip_jax.train import state as states
from clip_jax.train import step as steps

GIB = 2**30
RESULTS = Path(__file__).parent / "results" / "step_tpu_aot.json"
CASES = [
  ("vitb16", "v5e:16x16", 32_768, {}),
  ("vitb16", "v5e:16x16", 32_768, {"train.attention": "xla"}),
  ("vitb16", "v5e:16x16", 32_768, {"train.remat": "minimal"}),
  ("vitb16", "v5e:16x16", 32_768, {"train.remat": "full"}),
  ("vitb16", "v5e:16x16", 32_768, {"train.scan": True, "train.remat": "minimal"}),
  ("vitb16", "v5e:16x16", 32_768, {"mesh.sharding": "zero1"}),
  ("vitl14", "v5e:16x16", 32_768, {"train.remat": "least"}),
  ("vitl14", "v5e:16x16", 32_768, {"train.remat": "full"}),
  ("vitl14_336", "v4:4x4x8", 32_768, {"train.remat": "least"}),
  ("vitl14_336", "v5p:4x4x8", 32_768, {"train.remat": "least"}),
  ("vith14", "v4:4x4x8", 32_768, {"train.remat": "least"}),
  ("vith14", "v5p:4x4x8", 32_768, {"train.remat": "least"}),
  ("vitbigg14", "v5p:8x8x8", 32_768, {"train.remat": "least"}),
]
LEAST = ("none", "minimal", "attention", "full")  # from what keeps most to what computes most again


def main():
  """Compiles each row and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", nargs="+")
  parser.add_argument("--topology", nargs="+", default=["v5e:16x16"])
  parser.add_argument("--batch", type=int, default=32_768)
  parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config, as train.remat=full")
  parser.add_argument("--save", action="store_true")
  parser.add_argument("--json", action="store_true", help="print a list of objects")
  arguments = parser.parse_args()
  changes = dict(setting.split("=", 1) for setting in arguments.set)
  cases = [(name, topology, arguments.batch, changes) for name in arguments.config or () for topology in arguments.topology]
  rows = []
  for case in cases or CASES:
    for found in least(*case) if case[-1].get("train.remat") == "least" else [row(*case)]:
      rows.append(found)
      if not arguments.json:
        show(found)
      if arguments.save:
        save(found)
  if arguments.json:
    print(json.dumps(rows))


def least(name, topology, batch, changes):
  """Yields rows until one fits."""
  for remat in LEAST:
    found = row(name, topology, batch, {**changes, "train.remat": remat})
    yield found
    if not found["error"]:
      return


def save(found):
  """Puts a row in the file of results."""
  names = ("config", "topology", "batch", "changes")
  rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
  rows = [row for row in rows if any(row[name] != found[name] for name in names)]
  RESULTS.parent.mkdir(exist_ok=True)
  RESULTS.write_text(json.dumps([*rows, found], indent=1) + "\n")


def row(name, topology, batch, changes):
  """Compiles one step and returns what the compiler says, or its error."""
  recipe = importlib.import_module(f"configs.{name}").get_config()
  recipe.train.global_batch_size = batch
  for key, value in changes.items():
    *groups, last = key.split(".")
    functools.reduce(getattr, groups, recipe)[last] = value_of(value)
  devices = compiler.devices(topology)
  config = performance.settled(configs.resolve(recipe), devices[0])
  mesh, chip = meshes.create(config, devices), chips.of_topology(topology)
  found = {
    "config": name,
    "topology": topology,
    "chips": round(len(devices) * (chips.share(devices[0]) or 1)),
    "batch": batch,
    "remat": config.train.remat,
    "changes": changes,
    "pairs_at_a_time": batch // config.train.microbatches // len(devices),
    "loss_method": global_batch.method_of(config.loss, batch, config.model.embed_dim, meshes.batch_shards(mesh)),
    "usable_gib": chip and chip.usable_bytes and chip.usable_bytes / GIB,
    "error": None,
  }
  start = time.monotonic()
  try:
    compiled = compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], steps.inputs(config, mesh))
  except compiler.OutOfMemoryError as error:
    return found | {"error": str(error).splitlines()[0][:300]}
  report = compiler.report(compiled)
  return found | {
    "peak_hbm_gib": report.peak_bytes / GIB,
    "memory_gib": {part: size / GIB for part, size in report.memory.items()},
    "arguments_gib": report.argument_bytes / GIB,
    "flops": report.flops,
    "bytes_accessed": report.bytes_accessed,
    "collectives": report.collectives,
    "compile_s": time.monotonic() - start,
  }


def value_of(text):
  """What a setting on the command line means: a number, a tuple, or a word."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def show(row):
  """Prints a row."""
  changes = " ".join(f"{key}={value}" for key, value in row["changes"].items())
  about = f"{row['config']} {row['topology']} batch {row['batch']:,} {changes} ({row['pairs_at_a_time']} pairs a chip, {row['loss_method']})"
  if row["error"]:
    print(f"{about}: does not fit ({row['error']})", flush=True)
    return
  of = f" of {row['usable_gib']:.2f}" if row["usable_gib"] else ""
  print(
    f"{about}: peak {row['peak_hbm_gib']:.2f}{of} GiB, inputs {row['arguments_gib']:.2f} GiB; {row['flops'] / 1e12:,.2f} TFLOP, "
    f"{row['bytes_accessed'] / 1e9:,.1f} GB; compiled in {row['compile_s']:.0f} s",
    flush=True,
  )
  for kind, (count, size) in row["collectives"].items():
    print(f"  {kind:<20}{count:>10,} times {size / 1e9:>10,.2f} GB", flush=True)


if __name__ == "__main__":
  main()
