"""How well does data.order="blocks" mix, and how many reads does it save?

    python benchmarks/data_mixing.py [--json]

Stored order is taken to be the worst case: whatever two records have in common, neighbours have it. For 40 random steps of
a batch over 100 million records in shards of 10,000: how many of a row's batch mates come from its own block and from its
own shard, next to what one permutation of everything gives; over how many steps a block is used; and how many reads
a host of 16 makes a step.
"""

import argparse
import json

import numpy as np

from clip_jax.data import order

RECORDS, SHARD, HOSTS, STEPS = 100_000_000, 10_000, 16, 40
SETTINGS = [(batch, setting) for batch in (4_096, 32_768) for setting in (None, (128, 16, 64), (128, 64, 64), (1_024, 16, 64), (128, 16, 256), (128, 16, 16))]


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  rows = [measured(batch, setting) for batch, setting in SETTINGS]
  if arguments.json:
    print(json.dumps(rows))
    return
  names = list(rows[0])
  print("".join(f"{name:>16}" for name in names))
  for row in rows:
    print("".join(f"{row[name]:>16}" if isinstance(row[name], str) else f"{row[name]:>16,.2f}" for name in names))


def measured(batch, setting):
  """One line of the table."""
  blocks = order.Blocks(*setting) if setting else None
  found = order.Order(0, (RECORDS,), (1,), blocks, batch)
  block = blocks.block if blocks else 128
  same = {"block": [], "shard": []}
  for step in np.random.default_rng(0).integers(0, RECORDS // batch, STEPS):
    _, examples = found.examples(order.positions_of_step(step, batch))
    for name, size in (("block", block), ("shard", SHARD)):
      _, counts = np.unique(examples // size, return_counts=True)
      same[name].append((counts * (counts - 1)).sum() / batch)
  steps, reads = spread(found, batch, block)
  return {
    "batch": f"{batch:,}",
    "order": "/".join(map(str, setting)) if setting else "global",
    "mates of block": float(np.mean(same["block"])),
    "mates of shard": float(np.mean(same["shard"])),
    "steps a block": steps if setting else RECORDS / batch,
    "reads a step": reads if setting else batch / HOSTS,
    "open records": float(blocks.block * blocks.window * max(blocks.lanes // HOSTS, 1)) if setting else 0.0,
  }


def spread(found, batch, block):
  """Steps from the first to the last record of a block, and new blocks a step, of one host in the middle of the run."""
  if found.blocks is None:
    return 0.0, 0.0
  rows = np.arange(batch // HOSTS) + batch // 2
  first, last, begin = {}, {}, RECORDS // batch // 2
  # Long enough for all lanes to go through some windows.
  length = 4 * found.blocks.block * found.blocks.window * found.blocks.lanes // batch + 8
  for step in range(begin, begin + length):
    _, examples = found.examples(order.positions_of_step(step, batch, rows))
    for number in np.unique(examples // block).tolist():
      first.setdefault(number, step)
      last[number] = step
  # Those that were open at the ends are not known whole.
  whole = [last[n] - first[n] + 1 for n in first if begin < first[n] and last[n] < begin + length - 1]
  return float(np.mean(whole)), len(first) / length


if __name__ == "__main__":
  main()
