"""Runs that are killed and stopped, started again, and end as if nothing had happened."""

import random
import signal
import time

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


@pytest.fixture(scope="module")
def export(undisturbed, tmp_path_factory):
  """What `clip-jax export` makes of it."""
  return exported(undisturbed, tmp_path_factory.mktemp("export") / "exported")


@pytest.fixture
def nothing_happened(undisturbed, export, tmp_path):
  """A function that checks it of a work directory."""

  def check(workdir):
    assert_same_run(workdir, undisturbed)
    assert exported(workdir, tmp_path / "exported") == export
    assert not list(workdir.rglob("*tmp*"))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["35", "40"]

  return check


def kill(process):
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL  # and not done before


@pytest.mark.slow
def test_killed_at_any_moment_and_in_the_middle_of_saves_the_run_ends_bit_identical(start, nothing_happened, tmp_path):
  moments, workdir = random.Random(7), tmp_path / "run"
  for moment in ("starting", "training", "saving", "saving", "training"):
    process = start(workdir, environment=SLOW)
    seen = training_lines(workdir)[-1]["step"] if (workdir / "metrics.jsonl").exists() else 0
    if moment == "starting":
      time.sleep(moments.uniform(0.5, 3))
    elif moment == "training":
      wait_for_step(process, workdir, min(seen + moments.randint(2, 8), 39))
      time.sleep(moments.random() * 0.05)
    else:
      wait_until(process, lambda: list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")), "a save")
    kill(process)
  finish(start(workdir))
  nothing_happened(workdir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_while_it_starts_it_ends_at_once_with_the_code_for_try_again(start, tmp_path, number):
  process = start(tmp_path / "run")
  wait_until(process, (tmp_path / "run").exists, "the work directory")
  process.send_signal(number)
  out, err = finish(process, code=75)
  assert f"{number.name}: stopping before the first step." in err and "Stopped after step 0 of 40" in out
  # Where Python was in a callback of its garbage collector, it says that it dropped the exception; the run stops all the same.
  assert "Traceback" not in err or "Exception ignored in: <function _xla_gc_callback" in err


def test_a_second_ctrl_c_leaves_at_once_and_loses_no_checkpoint(start, nothing_happened, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, environment=SLOW)
  wait_for_step(process, workdir, 6)
  process.send_signal(signal.SIGSTOP)  # so that both are there before the step ends
  process.send_signal(signal.SIGINT)
  process.send_signal(signal.SIGCONT)
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode in (1, 75)  # 75: the step ended between the two
  finish(start(workdir))
  nothing_happened(workdir)


@pytest.mark.slow
def test_one_host_of_two_is_killed_the_other_ends_in_time_and_both_go_on_exactly(start, tmp_path):
  whole, workdir, shorter = tmp_path / "whole", tmp_path / "run", ("--config.train.steps=10", "--config.train.host_timeout=10")
  for process in start_together(start, 2, whole, *shorter):
    finish(process)
  first, second = start_together(start, 2, workdir, *shorter, environment=SLOW)
  wait_for_step(first, workdir, 6)
  begun = time.monotonic()
  second.kill()
  second.communicate()
  _, err = first.communicate(timeout=60)
  took = time.monotonic() - begun
  assert first.returncode not in (0, 2, 75) and took < 30, (first.returncode, took, err)
  for process in start_together(start, 2, workdir, *shorter):
    finish(process)
  assert_same_run(workdir, whole, steps=10)
  assert exported(workdir, tmp_path / "a") == exported(whole, tmp_path / "b")


@pytest.mark.slow
def test_hosts_that_do_not_agree_all_stop_with_the_difference_and_write_nothing(start, tmp_path):
  workdir = tmp_path / "run"
  for process in start_together(start, 2, workdir, of_each=[(), ("--config.train.seed=1",)]):
    _, err = finish(process, code=2)
    assert "config.train.seed is 0 on process 0, and 1 on process 1 of 2" in err and "Traceback" not in err
  assert not workdir.exists()
