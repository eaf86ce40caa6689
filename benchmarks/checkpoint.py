"""What does a checkpoint cost the loop, and how fast is it written and read, against the disk itself?

    python benchmarks/checkpoint.py [--model ViT-B-32] [--batch 32] [--rounds 5] [--json]

One process trains on random numbers and saves every few steps, as a run does. The step in which a save starts is compared with
the steps before it, once all is written; what it adds is compared with a plain copy of the state from device to host. The disk's
own speed is that of one file of the same size, written with fsync, and read again after the system was asked to forget it.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

jax.config.update("jax_platforms", "cpu") if not os.environ.get("JAX_PLATFORMS") else None

import numpy as np

from clip_jax import config as configs
from clip_jax.parallel import digest, rules
from clip_jax.parallel import mesh as meshes
from clip_jax.train import checkpoint
from clip_jax.train import state as states
from clip_jax.train import step as steps
from main import use_huge_pages

BETWEEN = 4  # plain steps before each save
PIECE = 64 * 2**20  # bytes that the disk's own speed is measured with


def timed(function):
  start = time.perf_counter()
  result = function()
  return time.perf_counter() - start, result


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="ViT-B-32")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--scratch", help="a folder on the disk to measure")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  folder = Path(tempfile.mkdtemp(dir=arguments.scratch))
  try:
    found = measure(arguments, folder)
  finally:
    shutil.rmtree(folder)
  if arguments.json:
    print(json.dumps(found))
    return
  for name, value in found.items():
    print(f"{name:<48}{value if isinstance(value, str) else f'{value:,.3f}':>16}")


def measure(arguments, folder):
  """A dict of figures."""
  values = {"model": {"name": arguments.model}, "train": {"steps": 1000, "global_batch_size": arguments.batch}}
  config = configs.resolve({**values, "checkpoint": {"keep_last": 1}})
  mesh = meshes.create(config)
  step, state, described = steps.create(config, mesh), states.create(config, mesh), states.describe(config, mesh)[0]
  random = np.random.default_rng(0)
  shapes = steps.inputs(config, mesh)
  batch = {key: random.integers(0, 256, shape.shape, shape.dtype) for key, shape in shapes.items()}
  batch = rules.to_global(batch, mesh, arguments.batch)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  checkpoints = checkpoint.Checkpoints(folder, config)
  times = {name: [] for name in ("plain", "first", "during", "write", "copy", "digest")}

  def train():
    nonlocal state
    state, metrics = step(state, batch)
    return jax.block_until_ready(metrics)

  digests, host = digest.Digests(checkpoint.fields(state)), [np.ones(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
  for number in range(arguments.rounds + 1):  # the first round compiles
    mark = {name: len(seen) for name, seen in times.items()}
    for _ in range(BETWEEN):
      times["plain"].append(timed(train)[0])
    times["copy"].append(timed(lambda: [np.copyto(into, leaf) for into, leaf in zip(host, jax.tree.leaves(state), strict=True)])[0])
    times["digest"].append(timed(lambda: digests(checkpoint.fields(state)))[0])

    def train_and_save(number=number):
      train()
      checkpoints.save(number + 1, state, records=1)

    begun = time.perf_counter()
    times["first"].append(timed(train_and_save)[0])
    while not checkpoints.written():
      times["during"].append(timed(train)[0])
    checkpoints.wait()
    times["write"].append(time.perf_counter() - begun)
    if not number:
      times = {name: seen[: mark[name]] for name, seen in times.items()}
  # As at the end of a run: nothing else computes.
  seconds_alone, _ = timed(lambda: (checkpoints.save(900, state, records=1), checkpoints.wait()))
  seconds_read, _ = timed(lambda: checkpoints.restore(described))
  disk_write, disk_read = disk(folder, size)
  checkpoints.close()
  alone = {"save": size / 1e6 / seconds_alone, "restore": size / 1e6 / seconds_read}
  return figures(times, size / 1e9, alone, {"save": disk_write, "restore": disk_read})


def figures(times, gigabytes, alone, disk_itself):
  """What the times say: medians, and ratios of them.

  Args:
    times: lists of seconds by what took them.
    gigabytes: size of the state.
    alone: MB/s of "save" and "restore" with nothing beside them.
    disk_itself: MB/s of a file.
  """
  middle = {name: statistics.median(seen) for name, seen in times.items() if seen}
  return {
    "device": jax.devices()[0].device_kind,
    "state, GB": gigabytes,
    "plain step, s": middle["plain"],
    "step in which a save starts, s": middle["first"],
    "  of a plain step": middle["first"] / middle["plain"],
    "  without a copy to the host, of a plain step": (middle["first"] - middle["copy"]) / middle["plain"],
    "what the save adds to it, ms/GB": 1000 * (middle["first"] - middle["plain"]) / gigabytes,
    "  of which a copy to the host, ms/GB": 1000 * middle["copy"] / gigabytes,
    "  of which digests, ms/GB": 1000 * middle["digest"] / gigabytes,
    "step while it is written, of a plain one": middle.get("during", float("nan")) / middle["plain"],
    "until written, with steps beside, s": middle["write"],
    "save alone, MB/s": alone["save"],
    "restore and check, MB/s": alone["restore"],
    "disk, write and fsync, MB/s": disk_itself["save"],
    "disk, read, MB/s": disk_itself["restore"],
    "save, of the disk": alone["save"] / disk_itself["save"],
    "restore, of the disk": alone["restore"] / disk_itself["restore"],
  }



def disk(folder, size):
  """MB/s of one file of random bytes: written and synced, and read."""
  piece, path = np.random.default_rng(0).bytes(PIECE), folder / "file"

  def write():
    with path.open("wb") as file:
      for _ in range(max(size // PIECE, 1)):
        file.write(piece)
      file.flush()
      os.fsync(file.fileno())

  def read():
    with path.open("rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
      while file.read(PIECE):
        pass

  written = max(size // PIECE, 1) * PIECE / 1e6
  return written / timed(write)[0], written / timed(read)[0]


if __name__ == "__main__":
  use_huge_pages()  # as a run does
  main()
