"""How long until something happens? `clip-jax --help`, and the first training step of the quickstart.

    python benchmarks/startup.py [--json]

The first step is measured twice from an empty work directory: with an empty compilation cache, and with the one that
the first run left behind. The emoji shards are written beforehand.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  subprocess.run([sys.executable, "-c", "from clip_jax.data import emoji; emoji.prepare()"], cwd=ROOT, check=True)
  with tempfile.TemporaryDirectory() as folder:
    rows = {
      "clip-jax --help, median of 7": statistics.median(help_seconds() for _ in range(7)),
      "first step, empty compilation cache": first_step_seconds(Path(folder), "cold"),
      "first step, warm compilation cache": first_step_seconds(Path(folder), "warm"),
    }
  if arguments.json:
    print(json.dumps(rows))
    return
  for name, seconds in rows.items():
    print(f"{name:<40}{seconds:>8.2f} s")


def help_seconds():
  """Wall time of one `clip-jax --help`."""
  start = time.perf_counter()
  subprocess.run([sys.executable, "-m", "clip_jax.cli", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def first_step_seconds(folder, name):
  """From the launch of the quickstart to the line of its first step."""
  workdir = folder / name
  command = [sys.executable, "main.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
  start = time.perf_counter()
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and b"\n" in metrics.read_bytes()):
    if process.poll() is not None:
      raise SystemExit(f"the quickstart ended with exit code {process.returncode}")
    time.sleep(0.02)
  seconds = time.perf_counter() - start
  process.send_signal(signal.SIGKILL)
  process.wait()
  return seconds


if __name__ == "__main__":
  main()
