"""What is started, in which order, how often, and what is concluded: with an executor that trains by writing files."""

import dataclasses
import json
import shutil

import pytest

from clip_jax.scaling import runner, sweep
from clip_jax.scaling import status as statuses

RECIPE = "tests/end_to_end/recipe.py"


class Scripted:
  """Does with each run what a script says: steps it gets to, and the code it ends with; then it is started again, or not."""

  pause = 0

  def __init__(self, folder, most, scripts):
    self.most, self._folder, self._scripts, self._over = most, folder, scripts, []
    self.started, self._running, self.largest = [], {}, 0

  def start(self, planned):
    name = planned.run.name
    self.started.append(name)
    self._running[name] = planned
    self.largest = max(self.largest, len(self._running))
    return True

  def running(self, names):
    return set(self._running) & set(names)

  def ended(self):
    over = []
    for name, planned in list(self._running.items()):
      script = self._scripts.get(name)
      step, code = script.pop(0) if script else (planned.config.train.steps, 0)
      train(planned, step)
      del self._running[name]
      over.append((name, code))
    return over

  def stop(self):
    pass

  def log(self, name):
    path = self._folder / f"{name}.log"
    path.write_text("starting\nit went wrong: a reason\n\n")
    return path


def train(planned, step):
  """Leaves what a run up to a step leaves."""
  for saved in {*planned.config.checkpoint.keep_steps, step}:
    if 0 < saved <= step:
      (planned.workdir / "checkpoints" / str(saved) / "card").mkdir(parents=True, exist_ok=True)
  lines = [{"step": one, "samples_seen": 16 * one, "time": 0.0, "loss": 2.0, "samples_per_second": 100.0} for one in range(1, step + 1)]
  planned.workdir.mkdir(parents=True, exist_ok=True)
  (planned.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def plans(tmp_path):
  """A long run, two that fork from it, and one by itself."""
  runs = sweep.grid(RECIPE, {"a": {}}, {"x": {}}, {"1": 320, "2": 640, "3": 1_280}, common={"train.global_batch_size": 16})
  runs.append(sweep.Run("alone", RECIPE, {"train.steps": 60, "train.global_batch_size": 16}))
  return [sweep.plan(run, tmp_path / "runs") for run in runs]


def run(tmp_path, plans, most=1, **scripts):
  executor = Scripted(tmp_path, most, scripts)
  seen = []
  rows = runner.Runner(plans, executor).run(seen.append)
  return executor, {row.planned.run.name: row for row in rows}, seen


def test_all_is_run_the_longest_first_and_forks_after_what_they_fork_from(tmp_path, plans):
  executor, rows, seen = run(tmp_path, plans)
  assert executor.started == ["a_x_3", "alone", "a_x_2", "a_x_1"]
  assert {row.state for row in rows.values()} == {"done"}
  assert [row.state for row in seen[0]] == ["running", "waits for a_x_3", "waits for a_x_3", "ready"]


def test_a_fork_begins_when_its_checkpoint_is_there_and_not_when_all_is(tmp_path, plans):
  executor, _, _ = run(tmp_path, plans, a_x_3=[(20, 75), (80, 0)])  # stopped after a_x_1's checkpoint, before a_x_2's
  assert executor.started == ["a_x_3", "a_x_3", "alone", "a_x_2", "a_x_1"]
  train(plans[0], 20)
  assert {row.planned.run.name: row.state for row in runner.Runner(plans, Scripted(tmp_path, 1, {})).look()}["a_x_1"] == "done"


def test_no_more_than_allowed_at_a_time(tmp_path, plans):
  executor, rows, _ = run(tmp_path, plans, most=2)
  assert executor.largest == 2 and all(row.state == "done" for row in rows.values())
  assert run(tmp_path, plans)[0].started == []  # what is done is not started again


def test_what_was_stopped_or_killed_is_started_again_while_it_gets_further(tmp_path, plans):
  executor, rows, _ = run(tmp_path, plans, alone=[(10, 75), (20, -9), (20, 75), (60, 0)])
  assert executor.started.count("alone") == 4 and rows["alone"].state == "done"
  shutil.rmtree(plans[-1].workdir)
  executor, rows, _ = run(tmp_path, plans[-1:], alone=[(10, 75)] * 9)
  assert executor.started == ["alone"] * (1 + runner.PATIENCE) and rows["alone"].state == "failed"


def test_a_job_whose_exit_code_is_not_known_goes_on_while_it_gets_further(tmp_path, plans):
  executor, rows, _ = run(tmp_path, plans[-1:], alone=[(10, None), (20, None), (20, None)])
  assert executor.started == ["alone"] * 3 and rows["alone"].state == "failed"
  assert rows["alone"].reason.startswith("ended at step 20: it went wrong: a reason (")


def test_what_fails_is_told_with_its_last_words_and_blocks_only_what_needs_it(tmp_path, plans):
  executor, rows, _ = run(tmp_path, plans, a_x_3=[(20, 1)])
  assert executor.started == ["a_x_3", "alone", "a_x_1"]  # whose checkpoint is there
  assert {name: row.state for name, row in rows.items()} == {"a_x_3": "failed", "a_x_2": "blocked", "a_x_1": "done", "alone": "done"}
  assert rows["a_x_3"].reason == f"ended with exit code 1 at step 20: it went wrong: a reason ({tmp_path}/a_x_3.log)"
  assert rows["a_x_2"].reason == "a_x_3 failed"


def test_a_checkpoint_that_is_gone_is_told(tmp_path, plans):
  train(dataclasses.replace(plans[0], config=plans[-1].config), 80)  # without those it should have kept
  _, rows, _ = run(tmp_path, plans)
  assert rows["a_x_1"].state == "blocked" and rows["a_x_1"].reason == "a_x_3 is done and has kept no checkpoint at step 16; a run by itself needs another name"


def test_stopping_leaves_the_rest(tmp_path, plans):
  executor = Scripted(tmp_path, 1, {"a_x_3": [(30, 75)]})
  asked = iter([False, False, True])
  rows = runner.Runner(plans, executor).run(stopped=lambda: next(asked))
  assert executor.started == ["a_x_3"] and {row.state for row in rows} == {"ready", "waits for a_x_3"}


def test_a_long_evaluation_in_the_log_is_seen(tmp_path, plans):
  planned = dataclasses.replace(plans[-1], config=dataclasses.replace(plans[-1].config, eval=dataclasses.replace(plans[-1].config.eval, data_root="x", datasets=("y",))))
  train(planned, 60)
  assert not statuses.read(planned).complete
  scores = {f"eval/set_{i}/a_long_name_of_a_metric": 0.5 for i in range(2_000)}
  with (planned.workdir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 60, **scores}) + "\n")
  found = statuses.read(planned)
  assert (found.complete, found.step, found.saved, found.loss) == (True, 60, 60, 2.0)
