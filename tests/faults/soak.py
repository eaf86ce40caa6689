"""A hundred SIGKILLs at random moments of one run: python -m tests.faults.soak [KILLS] [SEED], or `make soak`.

A third of them come while the process starts, a third while it trains, a third while it saves. The run must end with the
losses and the exported weights of one that nothing happened to, each step once in `metrics.jsonl`, and no temporary file.
"""

import collections
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

# As in tests/conftest.py, which sets the rest.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from tests.conftest import write_colors
from tests.end_to_end.runs import assert_same_run, exported, finish, starter, training_lines

STEPS = 3_000
BUDGET = 20 * 60  # seconds, after which no more kills come
MOMENTS = ("starting", "training", "saving")


def one_life(start, workdir, moment, chance):
  """Starts the run and kills it at a moment; returns seconds until its first new step, if there was one."""
  seen = len(training_lines(workdir)) if (workdir / "metrics.jsonl").exists() else 0
  begun, first = time.monotonic(), None
  process = start(workdir, f"--config.train.steps={STEPS}", environment={"SLOW": "0.03"})
  end = begun + chance.uniform(0.2, 6) if moment == "starting" else None
  while end is None or time.monotonic() < end:
    if process.poll() is not None:
      raise SystemExit(f"the run ended by itself: {process.communicate()}")
    if first is None and (workdir / "metrics.jsonl").exists():
      lines = training_lines(workdir)
      if lines and lines[-1]["time"] > time.time() - (time.monotonic() - begun) and len(lines) != seen:
        first = time.monotonic() - begun
        end = end or (first + begun + chance.uniform(0, 1.5) if moment == "training" else None)
    if moment == "saving" and list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
      time.sleep(chance.uniform(0, 0.03))  # anywhere in it
      break
    time.sleep(0.002)
  process.kill()
  process.communicate()
  return first


def main(kills=100, seed=0):
  """Runs it, and prints a table."""
  chance, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="soak-"))
  write_colors(folder / "colors.tar")
  start = starter(folder / "colors.tar", folder, ("-m", "tests.faults.faulty_main"))
  whole, workdir = folder / "whole", folder / "run"
  finish(start(whole, f"--config.train.steps={STEPS}"))
  begun, count, recovery, lost = time.monotonic(), collections.Counter(), [], []
  for number in range(kills):
    if time.monotonic() - begun > BUDGET:
      break
    moment = MOMENTS[number % 3]
    first = one_life(start, workdir, moment, chance)
    count[moment] += 1
    recovery += [first] if first else []
    saved = max((int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit()), default=0)
    done = training_lines(workdir)[-1]["step"] if (workdir / "metrics.jsonl").exists() and training_lines(workdir) else 0
    lost.append(max(done - saved, 0))
    print(f"kill {number + 1:3}  while {moment:<8}  at step {done:5,}, saved {saved:5,}", flush=True)
  finish(start(workdir, f"--config.train.steps={STEPS}"))
  assert_same_run(workdir, whole, STEPS)
  assert exported(workdir, folder / "a") == exported(whole, folder / "b")
  leftovers = [path for path in workdir.rglob("*") if "tmp" in path.name or "broken" in path.name]
  assert not leftovers, leftovers
  print(
    f"{sum(count.values())} kills ({', '.join(f'{n} while {moment}' for moment, n in count.items())}) in {time.monotonic() - begun:.0f} s: the same losses "
    f"and the same {sum(map(len, exported(whole, folder / 'c').values())):,} exported bytes, each of {STEPS:,} steps once, no temporary file.\n"
    f"From start to first new step: median {statistics.median(recovery):.1f} s, at most {max(recovery):.1f} s. "
    f"Steps done again after a kill: median {statistics.median(lost):.0f}, at most {max(lost)}."
  )
  shutil.rmtree(folder)


if __name__ == "__main__":
  main(*map(int, sys.argv[1:]))
