"""A sweep from the command line: real runs, killed and continued, one that fails, and the page in the end."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from clip_jax import cli
from tests.end_to_end import runs

pytestmark = pytest.mark.slow

SWEEP = """
from clip_jax.scaling import sweep


def get_sweep(durations="20,60"):
  data = {{"there": {{"data.path": {there!r}}}, "missing": {{"data.path": {missing!r}}}}}
  samples = {{text: 16 * int(text) for text in durations.split(",")}}
  return sweep.grid({recipe!r}, {{"small": {{"model.vision.layers": 1}}}}, data, samples, common={{
    "train.global_batch_size": 16, "checkpoint.every": 5, "eval.every": 0,
    "eval.data_root": {root!r}, "eval.datasets": ("held",),
  }})
"""


@pytest.fixture
def sweep(colors, tmp_path):
  """A sweep on a shard that is there, and one that is not; they are evaluated on a folder with captions."""
  from PIL import Image

  held = tmp_path / "sets/held/test"
  held.mkdir(parents=True)
  lines = []
  for name, color in {"red": "#ff0000", "green": "#00a000", "blue": "#0000ff", "black": "#000000"}.items():
    Image.new("RGB", (24, 24), color).save(held / f"{name}.png")
    lines.append(json.dumps({"file_name": f"{name}.png", "text": f"the colour {name}"}))
  (held / "metadata.jsonl").write_text("\n".join(lines) + "\n")
  path = tmp_path / "mine.py"
  path.write_text(SWEEP.format(there=colors, missing=str(tmp_path / "later.tar"), recipe=runs.RECIPE, root=str(tmp_path / "sets")))
  return path


def start(sweep, workdir, *more, environment):
  command = [sys.executable, "-m", "clip_jax.cli", "scaling", "run", sweep, "--workdir", workdir, *more]
  return subprocess.Popen(command, cwd=runs.ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, code):
  out, err = process.communicate(timeout=300)
  assert process.returncode == code, f"{out}\n{err}"
  return out, err


def wait_for(found):
  for _ in range(1200):
    if found():
      return
    time.sleep(0.1)
  raise AssertionError("it did not come")


def trainers(workdir):
  """The processes that train in a folder."""
  found = []
  for entry in os.listdir("/proc"):
    try:
      with open(f"/proc/{entry}/cmdline", "rb") as file:
        command = file.read().decode()
    except OSError:
      continue
    if "main.py" in command and f"--workdir={workdir}" in command:
      found.append(int(entry))
  return found


def test_a_sweep_is_killed_continued_fails_in_part_and_is_completed(sweep, colors, tmp_path):
  workdir, environment = tmp_path / "sweep", runs.environment_of(tmp_path / "cache")
  first = start(sweep, workdir, environment=environment)
  wait_for(lambda: (workdir / "runs/small_there_60/checkpoints/15/card").is_dir())
  os.kill(first.pid, signal.SIGKILL)
  first.communicate()
  left = trainers(workdir)  # the run goes on, and is not started a second time; unless it is killed, too
  for pid in left:
    os.kill(pid, signal.SIGKILL)

  found = json.loads(finish(start(sweep, workdir, "--max-parallel", "2", "--json", environment=environment), 1)[0])
  assert found["states"] == {
    "small_there_60": "done", "small_there_20": "done", "small_missing_60": "failed", "small_missing_20": "blocked",
  }  # fmt: skip
  assert "later.tar" in found["failed"][0] and "exit code 2" in found["failed"][0] and "small_missing_60 failed" in found["failed"][1]
  assert (found["runs"], found["forks"], found["samples"]) == (4, 2, 2 * 16 * (60 + 4)) and trainers(workdir) == []
  log = (workdir / "runs/small_there_60/metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in log if '"loss"' in line] == list(range(1, 61))

  shutil.copy(colors, tmp_path / "later.tar")
  out, err = finish(start(sweep, workdir, environment=environment), 0)
  assert out.splitlines() == ["4 of 4 runs are done.", f"{workdir}/results.csv", f"{workdir}/report.html"]
  assert "small_there_60  done  60/60" in err and "small_missing_60  running" in err
  with (workdir / "results.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert {row["name"] for row in rows} == set(found["states"]) and {row["downstream_dataset"] for row in rows} == {"held"}
  assert {float(row["samples_seen"]) for row in rows} == {320, 960} and all(0 <= float(row["image_retrieval_recall@5"]) <= 1 for row in rows)
  page = (workdir / "report.html").read_text()
  assert all(name in page for name in found["states"]) and "<svg" in page

  # What is complete is looked at and left as it is.
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("checkpoints/*")}
  again = json.loads(finish(start(sweep, workdir, "--json", environment=environment), 0)[0])
  assert set(again["states"].values()) == {"done"} and {path: path.stat().st_mtime_ns for path in before} == before


def test_stopped_by_a_signal_it_saves_all_runs_and_says_so(sweep, tmp_path):
  workdir, environment = tmp_path / "sweep", runs.environment_of(tmp_path / "cache")
  process = start(f"{sweep}:20,5000", workdir, environment=environment)
  log = workdir / "runs/small_there_5000/metrics.jsonl"
  wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 7)
  process.send_signal(signal.SIGTERM)
  out, err = finish(process, 75)
  assert "Stopped; what is trained is saved. The same command goes on." in out and trainers(workdir) == []
  step = json.loads(log.read_text().splitlines()[-1])["step"]
  assert (workdir / f"runs/small_there_5000/checkpoints/{step}/card").is_dir()
  assert out.splitlines()[:2] == ["0 of 4 runs are done.", f"{workdir}/report.html"] and "No law has been fitted" in (workdir / "report.html").read_text()


def test_what_would_be_run_is_printed_and_nothing_is_made(sweep, tmp_path, capsys):
  workdir = tmp_path / "sweep"
  assert cli.main(["scaling", "run", str(sweep), "--workdir", str(workdir), "--executor", "print"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith("# mine: 4 runs, 2 of them cooldowns that fork from another, which saves 20% of the samples. 2,048 samples to train")
  assert len(lines) == 5 and all(line.startswith("python main.py --config=") for line in lines[1:])
  assert f"--config.train.fork_from={workdir}/runs/small_there_60/checkpoints/16" in lines[3]
  arguments = ["scaling", "run", str(sweep), "--workdir", str(workdir), "--executor", "print", "--json", "--topology", "h100:8", "--price-per-chip-hour", "2"]
  assert cli.main([*arguments, "--config.train.seed=7"]) == 0
  found = json.loads(capsys.readouterr().out)
  hours = found["chip_hours"]
  assert hours > 0 and (found["cost"], found["chip_days"]) == pytest.approx((2 * hours, hours / 24))
  assert all("--config.train.seed=7" in line for line in found["commands"]) and not workdir.exists()
