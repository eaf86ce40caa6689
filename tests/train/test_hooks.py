"""Hooks and progress: the right line at the right step, and honest clocks."""

import io
import json

import pytest

from clip_jax import config as configs
from clip_jax.errors import StorageError, UsageError
from clip_jax.evaluate.datasets import RETRIEVAL, EvaluationSet
from clip_jax.evaluate.result import Result, Score
from clip_jax.train import hooks
from clip_jax.train.progress import Progress, duration
from tests.conftest import tiny


class Written:
  def __init__(self):
    self.lines, self.synced = [], 0

  def write(self, step, samples_seen, values):
    self.lines.append((step, samples_seen, values))

  def sync(self):
    self.synced += 1
    return True


class Saved:
  """Checkpoints on a disk that may be full."""

  def __init__(self, writer):
    self.writer, self.there, self.full, self.pending, self.failures = writer, [], False, None, 0

  saving = property(lambda self: self.pending is not None)

  @property
  def whole(self):
    return self.there[-1] if self.there else None

  def has(self, step):
    return step in (*self.there, self.pending)

  def save(self, step, state, records):
    assert records == 9 and not self.saving
    # What a checkpoint of a step must never be ahead of.
    assert self.writer.lines[-1][0] >= step and self.writer.synced > len(self.there)
    self.pending = step

  def wait(self):
    step, self.pending = self.pending, None
    if step is not None:
      if self.full:
        self.failures += 1
        raise StorageError(f"checkpoints/{step} could not be written.")
      self.there.append(step)

  check = wait


class State:
  params = {"the": "parameters"}
  weights = {"what": "is used"}


class Evaluator:
  set = EvaluationSet("x", RETRIEVAL, None)

  def __init__(self):
    self.seen = []

  def __call__(self, params):
    self.seen.append(params)
    return Result(1, {"acc1": Score(0.5)}, details={"retrieval": [{"set": "x"}], "similarity": {"set": "x"}})

  def yardstick(self):
    return {"eval/x/nearest_pixels_R@1": 0.25}


def ignore(step, values):
  del step, values


def nothing(samples_per_second):
  del samples_per_second
  return {}


def test_each_hook_keeps_its_period_and_the_end(tmp_path):
  config = configs.resolve(
    tiny(
      train={"global_batch_size": 16, "steps": 7, "log_every": 2},
      eval={"batch_size": 16, "every": 3},
      checkpoint={"every": 4},
    )
  )
  writer, clock, evaluator = Written(), hooks.Clock(), Evaluator()
  saved = Saved(writer)
  log = hooks.Log(writer, config, clock, 0, nothing, ignore)
  evaluate = hooks.Evaluate([evaluator], log, writer, config, clock, tmp_path)
  save = hooks.Save(saved, {"records": 9}, log, writer, config, clock)
  for step in range(1, 8):
    for hook in (log, save, evaluate):
      hook(step, State, {"loss": 0.5})
  save.last(7, State)
  training = [(step, samples) for step, samples, values in writer.lines if "loss" in values]
  evaluated = {step: values for step, _, values in writer.lines if "eval/x/acc1" in values}
  assert training == [(2, 32), (4, 64), (6, 96), (7, 112)]
  assert list(evaluated) == [3, 6, 7]
  assert [step for step, v in evaluated.items() if "eval/x/nearest_pixels_R@1" in v] == [7]
  assert evaluator.seen == [State.weights] * 3
  assert saved.there == [4, 7]
  assert [evaluate.due(step) for step in range(8)] == [False, False, False, True, False, False, True, True]
  assert [step for step, _, _ in writer.lines] == sorted(step for step, _, _ in writer.lines)
  page = json.loads((tmp_path / "examples.json").read_text())
  assert page == {"retrieval": [{"set": "x"}], "similarity": {"set": "x"}}


def saving(now, **checkpoint):
  """A `Save` of a run of 40 steps, its checkpoints and its writer."""
  config = configs.resolve(tiny(train={"global_batch_size": 16, "steps": 40}, checkpoint=checkpoint))
  writer, clock = Written(), hooks.Clock()
  log = hooks.Log(writer, config, clock, 0, nothing, ignore)
  saved = Saved(writer)
  save = hooks.Save(saved, {"records": 9}, log, writer, config, clock, now=lambda: now[0])

  def step(number):
    log(number, State, {"loss": 0.5})
    save(number, State, None)
    if save.wished():
      save.now(number, State)

  return save, saved, writer, step


def test_time_alone_may_decide_when_to_save():
  now = [1000.0]
  _, saved, _, step = saving(now, every=1000, every_minutes=2.0)
  for number in range(1, 13):
    step(number)
    now[0] += 25
  assert saved.there == [6, 11]  # 125 s after the start, and after the last


def test_a_save_that_fails_is_told_of_counted_and_tried_again_later_each_time(capsys):
  now = [0.0]
  _, saved, writer, step = saving(now, every=10)
  for number in range(1, 10):
    step(number)
  saved.full = True
  tried = []
  for number in range(10, 40):
    if number == 35:
      saved.full = False
    before = saved.pending
    step(number)
    if saved.pending not in (None, before):
      tried.append((number, now[0]))
    now[0] += 9
  # At once, after 10 s, after a minute and after five of them; step 20 and 30 were due anyway.
  assert tried == [(10, 0.0), (11, 9.0), (14, 36.0), (20, 90.0), (30, 180.0)]
  assert saved.failures == 5 and saved.whole is None
  said = [line for line in capsys.readouterr().err.splitlines() if "NO CHECKPOINT" in line]
  assert len(said) == 5 and "the 31 steps since 0 are lost. Failures in a row: 5." in said[-1]
  counted = [values["checkpoint_failures"] for _, _, values in writer.lines if "checkpoint_failures" in values]
  assert counted == [1, 2, 3, 4, 5]
  now[0] += 300
  step(39)
  step(40)
  assert saved.there == [39] and "checkpoints can be written again" in capsys.readouterr().err


def test_the_last_save_is_tried_several_times_and_then_says_what_is_lost(monkeypatch, capsys):
  now = [0.0]

  def sleep(seconds):
    now[0] += seconds

  monkeypatch.setattr(hooks.time, "sleep", sleep)
  save, saved, _, step = saving(now, every=10)
  for number in range(1, 22):
    step(number)
  saved.full = True
  with pytest.raises(StorageError, match="Step 21 could not be saved; the steps after 20 are lost."):
    save.last(21, State)
  assert saved.failures == 4 and now[0] == 1 + 4 + 15
  saved.full = False
  save.last(21, State)
  assert saved.whole == 21


def test_slow_data_is_told_once_in_a_while_with_the_share_that_is_lost(capsys):
  clock, now = hooks.Clock(), [0.0]
  slow = hooks.SlowData(clock, now=lambda: now[0])
  clock.waited = 55.0  # for the first batch
  said = []
  for second in range(1, 1300):
    now[0] = float(second)
    clock.waited += 0.3 if 300 <= second < 1000 else 0.005
    if second == 100:
      clock.beside += 50  # an evaluation
    slow(second, State, None)
    said += [(second, line) for line in capsys.readouterr().err.splitlines() if line]
  assert [second for second, _ in said] == [361, 1021]
  assert "30% of the last 60 s" in said[0][1]


def test_evaluation_is_not_training_time_and_waiting_is_a_share(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(hooks.time, "perf_counter", lambda: now[0])
  config = configs.resolve(tiny(train={"global_batch_size": 10, "steps": 9}, eval={"batch_size": 16}))
  writer, clock = Written(), hooks.Clock()
  log = hooks.Log(writer, config, clock, 0, lambda rate: {"mfu": rate / 1000}, ignore)
  for step in (1, 2):
    with clock.waiting():
      now[0] += 0.01
    now[0] += 0.03
    log(step, State, {"loss": 1.0})
    log.flush()
    with clock.paused():
      now[0] += 3.0
  values = writer.lines[1][2]
  # Ten samples in 0.04 s; with the evaluation it would be 3.04 s.
  assert values["samples_per_second"] == pytest.approx(250)
  assert values["data_wait"] == pytest.approx(0.25)
  assert values["mfu"] == pytest.approx(0.25)  # of the rate without the evaluation


def test_progress_without_a_terminal_is_plain_lines_first_and_last():
  file = io.StringIO()
  progress = Progress(configs.resolve(tiny(train={"global_batch_size": 16, "steps": 5})), 0, file)
  for step in range(1, 6):
    progress(step, {"loss": 2.5, "samples_per_second": 160.0, "data_wait": 0.25})
  progress.close()
  assert file.getvalue().splitlines() == [
    "step 1/5  loss 2.500  compiled",
    "step 5/5  loss 2.500  160 samples/s  data wait 25%  0 s left",
  ]


def test_progress_shows_utilisation_and_memory_where_they_are_known():
  file = io.StringIO()
  progress = Progress(configs.resolve(tiny(train={"global_batch_size": 16, "steps": 3})), 0, file)
  for step, rate in ((1, 1.0), (2, 100.0), (3, 200.0)):
    progress(step, {"loss": 2.5, "samples_per_second": rate, "mfu": rate / 250, "peak_memory_gib": 12.34, "data_wait": 0.0})
  # Smoothed alike: 110 samples/s are 44%.
  assert file.getvalue().splitlines()[-1] == "step 3/3  loss 2.500  110 samples/s  MFU 44%  12.3 GiB  data wait 0%  0 s left"


def test_progress_on_a_terminal_redraws_one_line():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  file = Terminal()
  progress = Progress(configs.resolve(tiny(train={"global_batch_size": 16, "steps": 5})), 0, file)
  progress(5, {"loss": 1.25, "samples_per_second": 160.0, "data_wait": 0.0})
  progress.close()
  assert "loss 1.250" in file.getvalue() and "5/5" in file.getvalue()


@pytest.mark.parametrize(
  "seconds, said",
  [(0.2, "0 s"), (89, "89 s"), (400, "6 min"), (7199, "1 h 59 min"), (7200, "2 h 0 min"), (187_200, "2 d 4 h")],
)
def test_durations_read_as_people_say_them(seconds, said):
  assert duration(seconds) == said


@pytest.mark.parametrize(
  "window, said",
  [
    ((0, 5), "--profile=0:5 begins before the first step, which is 1."),
    ((-3, 5), "--profile=-3:5 begins before the first step"),
    ((5, 5), "--profile=5:5 has no steps: END comes after START and is not traced; 5:10 has five."),
    ((5, 3), "--profile=5:3 has no steps"),
    ((1_001, 1_005), "--profile=1001:1005 begins after the last step of the run, which is 1,000."),
  ],
)
def test_a_window_without_a_step_of_the_run_is_said(window, said):
  with pytest.raises(UsageError) as error:
    hooks.check_window(window, 1_000)
  assert said in str(error.value)


@pytest.mark.parametrize("window", [(1, 2), (1_000, 1_001), (1_000, 9_999)])
def test_a_window_may_end_after_the_run(window):
  hooks.check_window(window, 1_000)


def test_a_step_that_is_not_finite_is_reported_by_name(capsys):
  config = configs.resolve(tiny(train={"global_batch_size": 16, "steps": 3}))
  writer = Written()
  log = hooks.Log(writer, config, hooks.Clock(), 0, nothing, ignore)
  log(1, State, {"loss": float("nan"), "gradient_norm": float("inf"), "logit_scale": 14.0})
  log(2, State, {"loss": float("nan"), "gradient_norm": 1.0, "logit_scale": 14.0})
  log(3, State, {"loss": 1.0, "gradient_norm": 1.0, "logit_scale": 14.0})
  log.flush()
  said = capsys.readouterr().err.split("\n")
  assert [line for line in said if line] == ["step 1: not finite: gradient_norm, loss"]  # once a row of them
  assert [values.get("nonfinite") for _, _, values in writer.lines] == [2, 1, None]
