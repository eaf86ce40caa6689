"""How long does the contrastive loss take on a processor? Times both methods against plain formulations, in turns.

    python benchmarks/loss_speed.py [--batch 8192] [--embed 512] [--runs 7] [--json]

Value and gradients over eight devices of one processor. Yardsticks: `all_gather`, both towers gathered and two
tiles of logits a shard, and `dense`, whole arrays with their placement left to the compiler. Ratios are medians over
rounds in which each ran once; absolute times of a shared machine say little.
"""

import argparse
import json
import statistics
import time

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
from loss_memory import METHODS, loss_by

from clip_jax import config as configs
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules


def main():
  """Times the table and prints it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=8192)
  parser.add_argument("--embed", type=int, default=512)
  parser.add_argument("--runs", type=int, default=7)
  parser.add_argument("--json", action="store_true", help="print a list of objects")
  arguments = parser.parse_args()
  train = {"steps": 1, "global_batch_size": arguments.batch}
  mesh = meshes.create(configs.resolve({"model": {"name": "ViT-B-16"}, "train": train}))
  rows = [r for loss in ("softmax", "sigmoid") for r in times(loss, mesh, arguments)]
  if arguments.json:
    print(json.dumps(rows))
    return
  print(f"batch {arguments.batch:,}, {arguments.embed} wide, {len(mesh.devices.ravel())} devices of one processor")
  print(f"{'loss':<9}{'method':<12}{'seconds':>9}{'of all_gather':>15}")
  for row in rows:
    print(f"{row['loss']:<9}{row['method']:<12}{row['seconds']:>9.3f}{row['ratio']:>15.2f}")


def times(name, mesh, arguments):
  """Rows of one loss."""
  random = np.random.default_rng(0)
  image, text = (
    jax.device_put(unit_rows(random, arguments.batch, arguments.embed), rules.batch_sharding(mesh)) for _ in range(2)
  )
  scale = np.float32(20)
  losses = {m: jax.jit(jax.value_and_grad(loss_by(name, m, "float32", mesh), (0, 1, 2))) for m in METHODS}
  seconds = {method: [] for method in METHODS}
  for run in range(arguments.runs + 1):
    for method, loss in losses.items():
      start = time.perf_counter()
      jax.block_until_ready(loss(image, text, scale))
      if run:  # the first one compiles
        seconds[method].append(time.perf_counter() - start)
  yardstick = seconds["all_gather"]
  return [
    {
      "loss": name,
      "method": method,
      "seconds": statistics.median(each),
      "ratio": statistics.median(a / b for a, b in zip(each, yardstick, strict=True)),
    }
    for method, each in seconds.items()
  ]


def unit_rows(random, rows, width):
  """Random embeddings of unit length."""
  x = random.normal(size=(rows, width))
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
  main()
