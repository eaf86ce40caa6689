"""What does the quickstart reach? Trains it with several seeds and prints mean and standard deviation.

    python benchmarks/quickstart.py --seeds 3 --workdir /tmp/quickstart [--config configs/emoji.py]

A seed changes the initial parameters, the order of the data and the augmentation. Work directories are kept, and
a second call with the same folder only prints.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main():
  """Trains what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--workdir", default="runs/benchmark")
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  runs = [train(arguments.config, Path(arguments.workdir) / f"seed-{seed}", seed) for seed in range(arguments.seeds)]
  rows = summarize(runs)
  if arguments.json:
    print(json.dumps(rows))
    return
  print(f"{'metric':<45}{'mean':>8}{'std':>7}{'chance':>8}   each seed")
  for row in rows:
    chance = f"{row['chance']:.1%}" if row["chance"] is not None else ""
    each = " ".join(f"{value:.1%}" for value in row["values"])
    print(f"{row['metric']:<45}{row['mean']:>8.1%}{row['std']:>7.1%}{chance:>8}   {each}")


def train(config, workdir, seed):
  """Runs one training, or resumes it, and returns its lines."""
  command = [
    *(sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}"),
    *(f"--config.train.seed={seed}", f"--config.data.seed={seed}"),
  ]
  subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def summarize(runs):
  """One row a held-out metric of the last step, over the runs."""
  last = [{k: v for line in lines for k, v in line.items() if k.startswith("eval/")} for lines in runs]
  rows = []
  for key in last[0]:
    if key.endswith("/chance"):
      continue
    values = [run[key] for run in last]
    rows.append(
      {
        "metric": key.removeprefix("eval/"),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "chance": last[0].get(f"{key}/chance"),
        "values": values,
      }
    )
  return rows


if __name__ == "__main__":
  main()
