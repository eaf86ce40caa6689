"""Several processes of a run on this machine: real ones, of small programs and of `main.py`."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from clip_jax.errors import UsageError
from clip_jax.launch import local
from clip_jax.parallel import clusters
from tests.end_to_end.runs import RECIPE, ROOT, environment_of, training_lines, wait_until

# A program that writes down its number and start, and then does what the file `todo` of its folder says.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
number = os.environ["JAX_PROCESS_ID"]
here = Path(sys.argv[1])
start = len(list(here.glob(f"started-{number}-*")))
(here / f"started-{number}-{start}").write_text(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("out of", number, os.environ["JAX_NUM_PROCESSES"], os.environ["JAX_COORDINATOR_ADDRESS"].partition(":")[0], os.environ.get("JAX_NUM_CPU_DEVICES"))
print("err of", number, file=sys.stderr)
exec(sys.argv[2])
"""
WAIT = "time.sleep(100)"


@pytest.fixture
def group(tmp_path):
  """A function that starts the launcher with a small program that runs some code."""
  (tmp_path / "program.py").write_text(PROGRAM)
  processes = []

  def start(code, *options, count=3, **variables):
    command = [sys.executable, "-m", "clip_jax.launch.local", "--processes", str(count), *options, "--", tmp_path / "program.py", tmp_path, code]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def pids(folder, start=0, count=3):
  return [int((folder / f"started-{number}-{start}").read_text()) for number in range(count)]


def wait_for_start(process, folder, start=0, count=3):
  def there():
    files = [folder / f"started-{number}-{start}" for number in range(count)]
    return all(file.exists() and file.read_text() for file in files)

  wait_until(process, there, f"start {start} of {count} processes")


def all_gone(process_ids):
  deadline = time.monotonic() + 30
  while time.monotonic() < deadline:
    with contextlib.suppress(ProcessLookupError):
      for process_id in process_ids:
        os.kill(process_id, 0)
      time.sleep(0.05)
      continue
    return True
  return False


def test_each_knows_its_place_and_every_line_comes_behind_its_number(group):
  process = group("", "--devices-per-process", "2", JAX_PLATFORMS="cpu")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0
  assert sorted(out.splitlines()) == [f"[{number}] out of {number} 3 127.0.0.1 2" for number in range(3)]
  assert sorted(err.splitlines()) == [f"[{number}] err of {number}" for number in range(3)]


def test_a_line_that_is_written_over_comes_as_it_ends(group):
  process = group(r"sys.stdout.write('1%\r2%\r3%\ndone'); sys.stdout.flush()", count=1)
  assert process.communicate(timeout=60)[0].splitlines()[1:] == ["[0] 3%", "[0] done"]


def test_all_are_started_again_after_75_until_they_are_done(group, tmp_path):
  process = group("sys.exit(75 if start < 2 else 0)")
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0 and out.count("out of") == 9
  assert [line for line in err.splitlines() if "start " in line] == [f"All stopped early with everything saved; start {number}." for number in (2, 3)]
  process = group("sys.exit(75)", "--max-restarts", "1")
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and "after 1 restarts (--max-restarts). The same command goes on." in err


@pytest.mark.parametrize(
  "code, others, returned, told",
  [
    ("if number == '1': os.kill(os.getpid(), signal.SIGKILL)", f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WAIT}", 1, "Process 1 was ended by SIGKILL"),
    ("if number == '2': sys.exit(3)", WAIT, 1, "Process 2 ended with exit code 3"),
    ("if number == '0': sys.exit(2)", WAIT, 2, "Process 0 ended with exit code 2"),
  ],
  ids=["killed, the others are deaf", "failed", "wrong usage"],
)
def test_where_one_ends_badly_all_end_within_half_a_minute(group, tmp_path, code, others, returned, told):
  process = group(f"{code}\n{others}")
  _, err = process.communicate(timeout=30)
  assert process.returncode == returned
  assert f"{told}; the others are ended." in err
  assert all_gone(pids(tmp_path))


def test_a_signal_is_passed_on_once_and_nothing_starts_after_it(group, tmp_path):
  process = group(WAIT)
  wait_for_start(process, tmp_path)
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75 and len(list(tmp_path.glob("started-*"))) == 3


def test_the_second_signal_ends_all_at_once(group, tmp_path):
  process = group("signal.signal(signal.SIGTERM, lambda *_: (here / f'told-{number}').touch())\nwhile True: time.sleep(1)")
  wait_for_start(process, tmp_path)
  process.send_signal(signal.SIGTERM)
  wait_until(process, lambda: len(list(tmp_path.glob("told-*"))) == 3, "all to be told")
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 1 and all_gone(pids(tmp_path))


def test_processes_do_not_outlive_the_launcher(group, tmp_path):
  process = group(WAIT)
  wait_for_start(process, tmp_path)
  process.kill()
  process.communicate(timeout=30)
  assert all_gone(pids(tmp_path))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--processes", "4"], "What is to be run follows --, as in: python -m clip_jax.launch.local"),
    (["main.py", "--", "main.py"], "What is to be run follows --"),
    (["--processes", "0", "--", "main.py"], "--processes 0: expected 1 or more."),
    (["--devices-per-process", "-1", "--", "main.py"], "--devices-per-process -1: expected 1 or more."),
    (["--max-restarts", "-1", "--", "main.py"], "--max-restarts -1: expected 0 or more."),
    (["--processes", "two", "--", "main.py"], "invalid int value: 'two'"),
    (["--", "mian.py"], f"There is no program mian.py in {ROOT}."),
  ],
)
def test_wrong_usage_is_one_sentence(arguments, message):
  ran = subprocess.run([sys.executable, "-m", "clip_jax.launch.local", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert ran.returncode == 2 and not ran.stdout
  assert message in ran.stderr and "Traceback" not in ran.stderr


def test_gpus_are_shared_out_and_too_few_are_told(monkeypatch, capfd):
  monkeypatch.setattr(clusters, "has_gpu_plugin", lambda: True)
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
  assert local.gpus(4) == ["4", "5", "6", "7"]
  with pytest.raises(UsageError, match="8 GPUs are needed, and there are 4; JAX_PLATFORMS=cpu takes the processor instead"):
    local.gpus(8)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert local.gpus(8) == []
  code = "import os; print(os.environ['JAX_PROCESS_ID'], os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('JAX_NUM_CPU_DEVICES'))"
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  group = local.Group([sys.executable, "-c", code], 2, 2, ["4", "5", "6", "7"])
  assert all(process.wait(timeout=30) == 0 for process in group.processes)
  group.finish_output()
  assert sorted(capfd.readouterr().out.splitlines()) == ["[0] 0 4,5 None", "[1] 1 6,7 None"]


@pytest.mark.slow
def test_four_processes_of_two_devices_train_as_one_process_and_go_on_after_one_is_killed(colors, tmp_path):
  steps = 4
  run = ["main.py", f"--config={RECIPE}", f"--config.data.path={colors}", f"--config.train.steps={steps}", "--config.checkpoint.every=2"]
  environment = environment_of(tmp_path / "cache")
  one = subprocess.run([sys.executable, *run, f"--workdir={tmp_path / 'one'}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  assert one.returncode == 0, one.stderr
  local = [sys.executable, "-m", "clip_jax.launch.local", "--processes", "4", "--devices-per-process", "2", "--", *run, f"--workdir={tmp_path / 'four'}"]
  process = subprocess.Popen(local, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  metrics = tmp_path / "four/metrics.jsonl"
  wait_until(process, lambda: metrics.exists() and len(training_lines(tmp_path / "four")) >= 3, "three steps")
  children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
  os.kill(int(children[2]), signal.SIGKILL)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 1 and "Process 2 was ended by SIGKILL; the others are ended." in err
  again = subprocess.run(local, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
  assert again.returncode == 0, again.stderr
  assert re.search(r"^\[0\] .*Done: 4 steps", again.stdout, re.MULTILINE)
  described = json.loads((tmp_path / "four/environment.json").read_text())
  assert described["processes"] == 4 and described["devices"] == 8
  ours, theirs = training_lines(tmp_path / "four"), training_lines(tmp_path / "one")
  assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, steps + 1))
  assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=2e-5)
