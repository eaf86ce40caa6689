"""Batches that make the loss not a number, or far too large: counted, skipped, left out, or the end of a run that says so."""

import json
import tarfile

import numpy as np
import pytest

from clip_jax.data import order, sources
from tests.conftest import write_colors
from tests.end_to_end.runs import (
  all_lines,
  assert_same_run,
  exported,
  finish,
  training_lines,
  wait_for_step,
)

COPIES = 24  # of eight colours: an epoch has twelve batches, and there are three and a third
FIRST = 8  # the step that has the poison for the first time
RECORD = int(order.examples(0, 8 * COPIES, np.array([16 * (FIRST - 1) + 3]))[0])


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
  """Colours of which one picture is called a poison, in the place of those that other faults are done to."""
  plain, path = (tmp_path_factory.mktemp("data") / name for name in ("plain.tar", "colors.tar"))
  write_colors(plain, copies=COPIES)
  with tarfile.open(plain) as old, tarfile.open(path, "w") as new:
    for member in old.getmembers():
      content = old.extractfile(member).read()
      if member.name == f"{RECORD // 8:03}{RECORD % 8:03}.txt":
        content = b"poison"
        member.size = len(content)
      with open(path.parent / "content", "wb+") as file:
        file.write(content)
        file.seek(0)
        new.addfile(member, file)
  return path


NAN = {"POISON": "poison"}


@pytest.mark.slow
def test_a_batch_that_is_not_a_number_is_skipped_and_counted_the_same_after_a_kill(start, undisturbed, tmp_path):
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  _, err = finish(start(whole, environment=NAN))
  lines = training_lines(whole)
  bad = [line["step"] for line in lines if line["loss"] is None]
  assert bad[0] == FIRST and len(bad) == 3 and all(line.get("nonfinite") for line in lines if line["step"] in bad)
  assert [line["skipped"] for line in lines] == [sum(step <= line["step"] for step in bad) for line in lines]
  assert f"step {bad[0]}: not finite: gradient_norm, loss; the step was skipped" in err
  # Before it all is as without it, and the step after it meets the parameters that the step before left.
  assert [line["loss"] for line in lines[: bad[0] - 1]] == [line["loss"] for line in training_lines(undisturbed)[: bad[0] - 1]]
  assert all(np.isfinite(line["loss"]) for line in lines if line["step"] not in bad)
  process = start(workdir, environment={**NAN, "SLOW": "0.1"})
  wait_for_step(process, workdir, bad[0] + 2)
  process.kill()
  process.communicate()
  finish(start(workdir, environment=NAN))
  assert_same_run(workdir, whole)
  assert [line["skipped"] for line in training_lines(workdir)] == [line["skipped"] for line in lines]


@pytest.mark.slow
def test_too_many_of_them_stop_the_run_with_their_records_and_can_be_left_out(start, colors, tmp_path):
  workdir = tmp_path / "run"
  for _ in range(2):  # the same command meets them again
    _, err = finish(start(workdir, "--config.train.max_bad_steps=1", environment=NAN), code=1)
    assert "were not finite, 1 in a row (config.train.max_bad_steps=1)" in err and "Traceback" not in err
    (line,) = map(json.loads, (workdir / "bad_batches.jsonl").read_text().splitlines())
    assert len(line["keys"]) == 16 and line["keys"][3] == sources.create("tar", str(colors)).key(RECORD) and line["batch"] == line["step"] - 1
  whole = tmp_path / "whole"
  for folder, slow in ((workdir, "0.1"), (whole, "0")):
    rollback = ("--config.train.max_bad_steps=1", "--config.train.on_spike=rollback")
    process = start(folder, *rollback, environment={**NAN, "SLOW": slow})
    if folder == workdir:  # and killed after the first one
      wait_for_step(process, workdir, line["step"] + 3)
      process.kill()
      process.communicate()
      process = start(folder, *rollback, environment=NAN)
    finish(process)
  assert_same_run(workdir, whole)
  back = [[{k: v for k, v in each.items() if k.startswith("rollback_")} for each in all_lines(folder) if "rollback_from" in each] for folder in (workdir, whole)]
  assert back[0] == back[1] and len(back[0]) >= 3
  assert all(np.isfinite(each["loss"]) and each["skipped"] == 0 for each in training_lines(whole))
  assert exported(workdir, tmp_path / "a") == exported(whole, tmp_path / "b")


@pytest.mark.slow
def test_a_spike_is_told_of_and_may_send_the_run_back_past_its_batches(start, undisturbed, tmp_path):
  spike = {"SPIKE": "poison"}
  watch = ("--config.train.spike_window=4", "--config.train.spike_factor=3")
  recorded, back = tmp_path / "recorded", tmp_path / "back"
  _, err = finish(start(recorded, *watch, environment=spike))
  lines = training_lines(recorded)
  spikes = [line["step"] for line in lines if "loss_spike" in line]
  assert spikes[0] == FIRST and all(line["loss_spike"] > 3 for line in lines if line["step"] in spikes)
  assert f"LOSS SPIKE: the loss of step {spikes[0]} is " in err
  finish(start(back, *watch, "--config.train.on_spike=rollback", environment=spike))
  (first, *_) = json.loads((back / "rollbacks.json").read_text())["rollbacks"]
  assert first["from"] == spikes[0] and first["to"] == 5 * ((spikes[0] - 1) // 5) and first["batches"] == first["from"] - first["to"]
  lines = training_lines(back)
  assert [line["step"] for line in lines] == list(range(1, 41)) and max(line["loss"] for line in lines[spikes[0] - 1 :]) < 5
  # Until the checkpoint it is the run that nobody made worse.
  assert [line["loss"] for line in lines[: first["to"]]] == [line["loss"] for line in training_lines(undisturbed)[: first["to"]]]
