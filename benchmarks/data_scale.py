"""What do billions of pairs cost before the first is read? The index of 10,000 shards, and the order of a step.

    python benchmarks/data_scale.py [--shards N] [--records N] [--json]

The shards are hard links to one tar that is really there, and so are their indexes: only the 10,000 scans are left out,
of which one is measured. Opening is measured in a process of its own.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np

from clip_jax.data import order
from clip_jax.data.sources import tar_index
from clip_jax.data.storage import Storage

HUGE = 2_000_000_000
OPEN = """
import resource, sys, time
from clip_jax.data.sources import TarSource
def rss():
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()
before, start = rss(), time.perf_counter()
source = TarSource(sys.argv[1])
seconds, opened = time.perf_counter() - start, rss()
for i in range(0, len(source), len(source) // 1000):
  source.key(i)
print(len(source), seconds, opened - before, rss() - before)
"""


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shards", type=int, default=10_000)
  parser.add_argument("--records", type=int, default=10_000, help="a shard")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    os.environ["CLIP_JAX_CACHE"] = f"{folder}/cache"
    rows = index_rows(Path(folder), arguments.shards, arguments.records) | order_rows()
  if arguments.json:
    print(json.dumps(rows))
    return
  for name, value in rows.items():
    print(f"{name:<66}{value:>16,.3f}")


def index_rows(folder, shards, records):
  """Builds, joins and opens the index of many shards."""
  first = folder / "00000.tar"
  write_shard(first, records)
  start = time.perf_counter()
  tar_index.Index([str(first)])
  scanned = time.perf_counter() - start
  for i in range(1, shards):
    os.link(first, folder / f"{i:05}.tar")
    os.link(f"{first}.index.npz", folder / f"{i:05}.tar.index.npz")
  pattern = str(folder / "*.tar")
  start = time.perf_counter()
  index = tar_index.Index(Storage().expand(pattern))
  joined = time.perf_counter() - start
  size = index.rows.nbytes + index.ends.nbytes
  seconds, opened, used = zip(*(open_once(pattern, shards * records) for _ in range(3)), strict=True)
  return {
    "records": shards * records,
    "index: bytes a record": size / (shards * records),
    "scan of one shard, s": scanned,
    "scan: records/s": records / scanned,
    "joining the indexes of all shards, s": joined,
    "opening the joined index, median of 3 processes, s": statistics.median(seconds),
    "memory after opening, MiB": statistics.median(opened) / 2**20,
    "memory after looking up 1,000 records, MiB": statistics.median(used) / 2**20,
  }


def write_shard(path, records):
  """A shard as img2dataset writes it, with images of 2 kB."""
  random = np.random.default_rng(0)
  with tarfile.open(path, "w") as tar:
    for i in range(records):
      about = json.dumps({"caption": f"caption {i}", "key": f"{i:09}", "width": 256, "height": 256}).encode()
      for extension, content in {"jpg": random.bytes(2_000), "json": about, "txt": f"caption {i}".encode()}.items():
        member = tarfile.TarInfo(f"{i:09}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def open_once(pattern, records):
  """Opens in a new process: seconds, and bytes of memory after opening and after some look-ups."""
  done = subprocess.run([sys.executable, "-c", OPEN, pattern], capture_output=True, text=True, check=True)
  found, seconds, opened, used = done.stdout.split()
  assert int(found) == records
  return float(seconds), int(opened), int(used)


def order_rows():
  """The order of random steps over two thousand million records."""
  rows = {}
  blocks = order.Blocks()
  kinds = {
    "global": lambda positions: order.examples(0, HUGE, positions),
    "blocks": lambda positions: order.examples_in_blocks(0, HUGE, positions, blocks, 32_768),
  }
  for name, examples in kinds.items():
    for epoch in range(17):
      examples(np.array([epoch * HUGE]))  # its tables, which are kept
    for count in (512, 4_096, 32_768):
      seconds = []
      for step in np.random.default_rng(1).integers(0, 10**6, 101):
        positions = order.positions_of_step(step, 32_768, np.arange(count))
        start = time.perf_counter()
        examples(positions)
        seconds.append(time.perf_counter() - start)
      rows[f"order of a random step, {name}, {count:,} rows, median of 101, ms"] = 1e3 * statistics.median(seconds)
  return rows


if __name__ == "__main__":
  main()
