"""What a run does about bad numbers: by definition for spikes, by brute force for the batches that are left out."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax import config as configs
from clip_jax.data import dataset
from clip_jax.errors import DataError, TrainingError
from clip_jax.train import guard
from tests.conftest import tiny


def made(lines=(), **train):
  """A guard, and what it was asked to write down."""
  config = configs.resolve(tiny(train={"global_batch_size": 16, "steps": 100, **train}))
  explained = []

  def explain(steps, reason):
    explained.append((list(steps), reason))
    return "bad_batches.jsonl"

  return guard.Guard(config, list(lines), explain), explained


def values(loss, row=0):
  return {"loss": loss, "skipped_in_a_row": float(row)} | ({} if np.isfinite(loss) else {"nonfinite": 1.0})


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0.0625, 10, width=32), min_size=1, max_size=40), st.integers(2, 9), st.floats(1, 4))
def test_a_spike_is_far_above_the_median_of_the_losses_before(losses, window, factor):
  watch, _ = made(spike_window=window, spike_factor=factor)
  for i, loss in enumerate(losses):
    before = losses[max(i - window, 0) : i]
    want = None
    if len(before) == window:
      median = statistics.median(before)
      usual = statistics.median([abs(x - median) for x in before])
      want = loss / median if loss > factor * median and loss > median + 6 * usual else None
    line = values(loss)
    assert watch(i + 1, line) is None  # recorded, and nothing else
    assert line.get("loss_spike") == (None if want is None else pytest.approx(want))


def test_no_factor_no_spike():
  watch, _ = made(spike_window=2, spike_factor=None)
  for step, loss in enumerate((1.0, 1.0, 1.0, 100.0), 1):
    line = values(loss)
    assert watch(step, line) is None and "loss_spike" not in line


def test_resumed_from_the_lines_of_a_run_it_concludes_what_the_run_did():
  losses = [*np.linspace(3, 1, 30), 9.0, *np.linspace(1, 0.9, 10), 7.0]
  whole, _ = made(spike_window=10)
  seen = []
  for step, loss in enumerate(losses, 1):
    line = values(loss)
    whole(step, line)
    seen.append({"step": step, **line})
  assert [line["step"] for line in seen if "loss_spike" in line] == [31, 42]
  for start in (25, 31, 41):
    resumed, _ = made([*seen[:start], {"step": start, "eval/x/acc1": 0.5}], spike_window=10)
    for line in seen[start:]:
      again = values(line["loss"])
      resumed(line["step"], again)
      assert again.get("loss_spike") == line.get("loss_spike")


def test_a_spike_may_send_the_run_back(capsys):
  watch, explained = made(spike_window=3, on_spike="rollback")
  for step in (1, 2, 3):
    assert watch(step, values(1.0)) is None
  wrong = watch(4, values(5.0))
  assert isinstance(wrong, guard.Rollback) and wrong.step == 4 and explained[0][0] == [4]
  assert "LOSS SPIKE: the loss of step 4 is 5, 5.0 times the median of the 3 before" in capsys.readouterr().err


@pytest.mark.parametrize("on_spike", ["record", "rollback"])
def test_too_many_steps_that_are_not_finite_stop_the_run_or_send_it_back(on_spike):
  watch, explained = made(max_bad_steps=3, on_spike=on_spike, log_every=2)
  assert watch(8, values(float("nan"), row=2)) is None and not explained
  wrong = watch(10, values(float("inf"), row=4))
  assert explained[0][0] == [7, 8, 9, 10]
  if on_spike == "rollback":
    assert isinstance(wrong, guard.Rollback) and wrong.step == 10
  else:
    assert isinstance(wrong, TrainingError)
    assert "steps 7 to 10 were not finite, 4 in a row" in str(wrong) and "bad_batches.jsonl" in str(wrong)


def spike(step):
  return guard.Rollback(step, f"the loss of step {step} is bad")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), max_size=5))
def test_the_batches_since_a_checkpoint_are_left_out_and_no_others(tmp_path_factory, trips):
  """A run is simulated that takes batches one by one from the stream, and is sent back again and again."""
  workdir = tmp_path_factory.mktemp("run")
  rollbacks = guard.Rollbacks(workdir)
  taken, stream, checkpoint = {}, iter(range(1000)), 0
  for forward, length in trips:
    checkpoint += forward  # a new one each time
    spiked = checkpoint + length
    for step in range(len(taken) + 1, spiked + 1):
      taken[step] = next(stream)
      assert rollbacks.batch_of(step) == taken[step]
    rollbacks.add(spike(spiked), checkpoint)
    taken = {step: batch for step, batch in taken.items() if step <= checkpoint}
    again = guard.Rollbacks(workdir)  # as a run that is started again reads it
    for step in range(1, checkpoint + 1):
      assert again.batch_of(step) == rollbacks.batch_of(step) == taken[step]
  assert rollbacks.batch_of(len(taken) + 1) == next(stream)


def test_what_metrics_do_not_say_yet_is_to_be_written(tmp_path):
  rollbacks = guard.Rollbacks(tmp_path)
  assert rollbacks.to_write(4, []) == []
  rollbacks.add(spike(7), 4)
  rollbacks.add(spike(9), 4)
  lines = [{"step": 4, "loss": 1.0}, {"step": 4, "rollback_from": 7.0, "rollback_batches": 3.0}]
  assert rollbacks.to_write(4, lines) == [{"rollback_from": 9.0, "rollback_batches": 5.0}]
  assert rollbacks.to_write(5, lines) == []


def test_it_gives_up_after_some_times_back_to_one_checkpoint(tmp_path):
  rollbacks = guard.Rollbacks(tmp_path)
  for step in (5, 6, 7):
    rollbacks.add(spike(step), 4)
  with pytest.raises(TrainingError, match="went back to step 4 3 times"):
    rollbacks.add(spike(6), 4)
  assert guard.Rollbacks(tmp_path).batch_of(5) == 4 + 1 + 2 + 3
  rollbacks.add(spike(9), 8)  # to another one it may


def test_a_file_that_cannot_be_read_is_said(tmp_path):
  (tmp_path / "rollbacks.json").write_text("{")
  with pytest.raises(DataError, match="cannot be read as JSON"):
    guard.Rollbacks(tmp_path)


def test_the_batches_of_steps_are_named_once_each_by_their_records(colors, tmp_path):
  config = configs.resolve(tiny(data={"source": "tar", "path": colors}))
  data, rollbacks = dataset.create(config), guard.Rollbacks(tmp_path)
  named = guard.Batches(tmp_path, data, config, rollbacks)
  keys = named.keys(2)
  assert len(keys) == 16 and not set(keys) & set(named.keys(1))  # 64 records: an epoch has four batches
  places = [place for place, _ in data.at(np.arange(16, 32))]
  assert keys == [data.key(place) for place in places]
  rollbacks.add(spike(3), 1)
  assert named.keys(2) != keys and named.keys(1)[0] == data.key(data.at(np.arange(1))[0][0])
  named.last = 2
  assert named.keys_of_last() == named.keys(2)
  for _ in range(2):
    assert named.write(range(1, 3), "why") == tmp_path / "bad_batches.jsonl"
  lines = [json.loads(line) for line in (tmp_path / "bad_batches.jsonl").read_text().splitlines()]
  assert [(line["step"], line["batch"], line["reason"], line["keys"]) for line in lines] == [
    (1, 0, "why", named.keys(1)),
    (2, 3, "why", named.keys(2)),
  ]
