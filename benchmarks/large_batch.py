"""Does a training step with four million pairs fit? Compiles the step of a recipe for a TPU slice that is not there.

    python benchmarks/large_batch.py --microbatches 256 512 1024
    python benchmarks/large_batch.py --config vitb16 --topology v5e:16x16 --batch 32768 --microbatches 1

Each row compiles the function that main.py runs. Needs the extra `plan`; takes a few minutes a row.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # where configs/ is

import jax
import jax.numpy as jnp

from clip_jax import config as configs
from clip_jax.losses import global_batch
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.plan import compile as compiler
from clip_jax.train import state as states
from clip_jax.train import step as steps

GIB = 2**30
# What a program may use of a chip's memory, by the compiler's own message when it does not fit.
USABLE = {"v5e": 15.75 * GIB, "v5p": 95.74 * GIB}


def main():
  """Compiles each row and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="vitl14")
  parser.add_argument("--topology", default="v5p:4x4x4")
  parser.add_argument("--batch", type=int, default=4_194_304)
  parser.add_argument("--microbatches", type=int, nargs="+", default=[256, 512])
  parser.add_argument("--json", action="store_true", help="print a list of objects")
  arguments = parser.parse_args()
  rows = []
  for microbatches in arguments.microbatches:
    rows.append(row(arguments.config, arguments.topology, arguments.batch, microbatches))
    if not arguments.json:
      show(rows[-1])
  if arguments.json:
    print(json.dumps(rows))


def row(name, topology, batch, microbatches):
  """Compiles one step and returns what the compiler says, or its error."""
  recipe = importlib.import_module(f"configs.{name}").get_config()
  recipe.train.global_batch_size, recipe.train.microbatches = batch, microbatches
  config = configs.resolve(recipe)
  devices = compiler.devices(topology)
  mesh = meshes.create(config, devices)
  chip = USABLE[topology.partition(":")[0]]
  found = {
    "config": name,
    "topology": topology,
    "batch": batch,
    "microbatches": microbatches,
    "pairs_at_a_time": batch // microbatches // len(devices),
    "loss_method": global_batch.method_of(config.loss, batch, config.model.embed_dim, meshes.batch_shards(mesh)),
    "usable_gib": chip / GIB,
    "error": None,
  }
  start = time.monotonic()
  try:
    report = compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], inputs(config, mesh))
  except compiler.OutOfMemoryError as error:
    return found | {"error": str(error).splitlines()[0][:300]}
  return found | {
    "peak_gib": report.peak_bytes / GIB,
    "left_gib": (chip - report.peak_bytes) / GIB,
    "arguments_gib": report.argument_bytes / GIB,
    "tflop": report.flops / 1e12,
    "bytes_accessed_gb": report.bytes_accessed / 1e9,
    "collectives": report.collectives,
    "compile_seconds": time.monotonic() - start,
  }


def inputs(config, mesh):
  """Shapes and shardings of a batch."""
  batch, size = config.train.global_batch_size, config.model.image_size
  sharding = rules.batch_sharding(mesh)
  return {
    "images": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8, sharding=sharding),
    "tokens": jax.ShapeDtypeStruct((batch, config.model.text.context_length), jnp.int32, sharding=sharding),
  }


def show(row):
  """Prints a row."""
  about = "{config} {topology} batch {batch:,}, {microbatches} microbatches of {pairs_at_a_time} a chip, {loss_method}".format(**row)
  if row["error"]:
    print(f"{about}: does not fit ({row['error']})", flush=True)
    return
  print(
    f"{about}: peak {row['peak_gib']:.2f} of {row['usable_gib']:.2f} GiB, {row['left_gib']:.2f} left; inputs "
    f"{row['arguments_gib']:.2f} GiB; {row['tflop']:,.1f} TFLOP, {row['bytes_accessed_gb']:,.0f} GB; "
    f"compiled in {row['compile_seconds']:.0f} s",
    flush=True,
  )
  for kind, (count, size) in row["collectives"].items():
    print(f"  {kind:<20}{count:>10,} times {size / 1e9:>10,.2f} GB", flush=True)


if __name__ == "__main__":
  main()
