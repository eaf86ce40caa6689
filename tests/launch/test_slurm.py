"""A run on a real Slurm of this machine, by the scripts of `launch/slurm/`."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, assert_same_run, environment_of

SCRIPT = Path(__file__).parent / "slurm.sh"
NOT_HERE = 77  # of the script: it says why


@pytest.mark.slow
def test_a_job_of_two_tasks_that_is_preempted_twice_ends_as_one_that_was_left_alone(colors, tmp_path):
  """Once by SIGTERM to its tasks, as before a time limit, and once put back into the queue by `scontrol requeue`."""
  ran = subprocess.run([SCRIPT, tmp_path, colors], cwd=ROOT, env=environment_of(tmp_path / "cache"), capture_output=True, text=True, timeout=2500)
  if ran.returncode == NOT_HERE:
    pytest.skip(ran.stdout.strip())
  assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
  assert "JobState=COMPLETED\nRestarts=2\nExitCode=0:0" in ran.stdout
  log = (tmp_path / "stopped/slurm-stopped.log").read_text()
  assert [line.split(", ")[2] for line in log.splitlines() if line.startswith("train.sbatch: stopped, job")] == ["start 1", "start 2", "start 3"]
  assert "stopped early with everything saved; job" in log
  assert json.loads((tmp_path / "stopped/environment.json").read_text())["processes"] == 2
  assert_same_run(tmp_path / "stopped", tmp_path / "whole", steps=16)
