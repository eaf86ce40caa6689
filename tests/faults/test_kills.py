"""Runs that are killed and stopped, started again, and end as if nothing had happened."""

import random
import signal
import time

import numpy as np
import pytest

from tests.end_to_end.runs import (
  assert_same_run,
  exported,
  finish,
  start_together,
  training_lines,
  wait_for_step,
  wait_until,
)

# Time for something to happen to a run: each batch takes a thread this much longer to load, and there are two threads.
SLOW = {"SLOW": "0.1"}


def kill(process):
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL  # and not done before


def interrupt_twice(process):
  """Ctrl-C and once more: it leaves at once."""
  process.send_signal(signal.SIGSTOP)  # so that both are there before the step ends
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGCONT)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode in (1, 75)  # 75: the step ended between the two


@pytest.mark.slow
def test_killed_at_any_moment_and_in_the_middle_of_a_save_or_interrupted_twice_the_run_ends_bit_identical(start, undisturbed, tmp_path):
  """A hundred kills are those of `make soak`."""
  moments, workdir = random.Random(7), tmp_path / "run"
  for moment in ("starting", "training", "saving", "interrupted", "saving", "training"):
    process = start(workdir, environment=SLOW)
    seen = training_lines(workdir)[-1]["step"] if (workdir / "metrics.jsonl").exists() else 0
    if moment == "starting":
      time.sleep(moments.uniform(0.5, 3))
    elif moment == "saving":
      wait_until(process, lambda: list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")), "a save")
    else:
      wait_for_step(process, workdir, min(seen + moments.randint(2, 8), 39))
      time.sleep(moments.random() * 0.05)
    interrupt_twice(process) if moment == "interrupted" else kill(process)
  finish(start(workdir))
  assert_same_run(workdir, undisturbed)
  assert exported(workdir, tmp_path / "ours") == exported(undisturbed, tmp_path / "theirs")
  assert not list(workdir.rglob("*tmp*"))
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["35", "40"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_while_it_starts_it_ends_at_once_with_the_code_for_try_again(start, tmp_path, number):
  process = start(tmp_path / "run")
  wait_until(process, (tmp_path / "run").exists, "the work directory")
  process.send_signal(number)
  out, err = finish(process, code=75)
  assert f"{number.name}: stopping before the first step." in err and "Stopped after step 0 of 40" in out
  # Where Python was in a callback of its garbage collector, it says that it dropped the exception; the run stops all the same.
  assert "Traceback" not in err or "Exception ignored in: <function _xla_gc_callback" in err


@pytest.mark.slow
def test_two_processes_fork_like_one_and_when_one_is_killed_the_other_ends_in_time_and_both_go_on_exactly(start, undisturbed, tmp_path):
  """They fork from a run of one. One process that did so would be that run to the bit (tests/train/test_fork.py)."""
  fork = [f"--config.train.fork_from={undisturbed}/checkpoints/35", "--config.train.host_timeout=10", "--config.checkpoint.every=2"]
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  for process in start_together(start, 2, whole, *fork):
    finish(process)
  one, two = training_lines(undisturbed), training_lines(whole)
  assert [line["step"] for line in two] == list(range(1, 41)) and two[:35] == one[:35] and two[35:] != one[35:]
  np.testing.assert_allclose([line["loss"] for line in two], [line["loss"] for line in one], rtol=2e-4)

  first, second = start_together(start, 2, workdir, *fork, environment={"SLOW": "0.5"})
  wait_until(first, (workdir / "checkpoints/36").is_dir, "its first checkpoint")
  begun = time.monotonic()
  second.kill()
  second.communicate()
  _, err = first.communicate(timeout=60)
  took = time.monotonic() - begun
  assert first.returncode not in (0, 2, 75) and took < 30, (first.returncode, took, err)
  assert training_lines(workdir)[-1]["step"] < 40
  for process in start_together(start, 2, workdir, *fork):
    finish(process)
  assert_same_run(workdir, whole)
  assert exported(workdir, tmp_path / "a") == exported(whole, tmp_path / "b")


@pytest.mark.slow
def test_a_fork_from_no_checkpoint_is_refused_by_all_processes(start, undisturbed, tmp_path):
  for process in start_together(start, 2, tmp_path / "none", f"--config.train.fork_from={undisturbed}/checkpoints/36"):
    assert "checkpoints/36 is not a checkpoint" in finish(process, code=2)[1]


@pytest.mark.slow
def test_hosts_that_do_not_agree_all_stop_with_the_difference_and_write_nothing(start, tmp_path):
  workdir = tmp_path / "run"
  for process in start_together(start, 2, workdir, of_each=[(), ("--config.train.seed=1",)]):
    _, err = finish(process, code=2)
    assert "config.train.seed is 0 on process 0, and 1 on process 1 of 2" in err and "Traceback" not in err
  assert not workdir.exists()
