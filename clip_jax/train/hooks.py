"""What happens beside training: logging, evaluation, checkpoints. Each hook has one job and one period.

A hook is called after each step with the number of steps done, the state and the step's metrics, which
are still being computed: reading one waits for the device.
"""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import jax

from clip_jax.files import write_text


class Clock:
  """Where the loop's time goes: waiting for data, beside training, and the rest, which is training."""

  def __init__(self):
    self.waited = self.beside = 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time inside as waiting for data."""
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self):
    """Counts the time inside as not training: evaluation and the like."""
    start = time.perf_counter()
    yield
    self.beside += time.perf_counter() - start


class Log:
  """Writes training metrics, one step late so that the device never waits for it."""

  def __init__(self, writer, config, clock, start, show):
    """Prepares.

    Args:
      writer: a `MetricsWriter`.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      start: updates done before this run.
      show: called with the step and its values, for a person to see.
    """
    self._writer, self._train, self._clock, self._show = writer, config.train, clock, show
    self._pending, self._wrong = None, False
    self._mark = (start, time.perf_counter(), 0.0, 0.0)

  def __call__(self, step, state, metrics):
    """Keeps this step's metrics and writes those of the one before."""
    self.flush()
    if step % self._train.log_every == 0 or step == self._train.steps:
      self._pending = step, metrics

  def flush(self):
    """Writes what is pending, waiting for it."""
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
      values["nonfinite"] = float(len(wrong))
    if wrong and not self._wrong and jax.process_index() == 0:  # the first of a row: the lines have all of them
      print(f"\nstep {step:,}: not finite: {', '.join(wrong)}", file=sys.stderr, flush=True)
    self._wrong = bool(wrong)
    now, waited, beside = time.perf_counter(), self._clock.waited, self._clock.beside
    last_step, last, last_waited, last_beside = self._mark
    seconds = max(now - last - (beside - last_beside), 1e-9)
    batch = self._train.global_batch_size
    values["samples_per_second"] = (step - last_step) * batch / seconds
    values["data_wait"] = min((waited - last_waited) / seconds, 1.0)
    self._mark = step, now, waited, beside
    self._writer.write(step, step * batch, values)
    self._show(step, values)


class Evaluate:
  """Runs the evaluators at their period, and all of them at the end of the run."""

  def __init__(self, evaluators, log, writer, config, clock, workdir):
    """Prepares.

    Args:
      evaluators: functions from parameters to a dict of metrics and a list of examples.
      log: the `Log`, which writes what is pending before each evaluation.
      writer: a `MetricsWriter`.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      workdir: where `examples.json` is written.
    """
    self._evaluators, self._log, self._writer, self._clock = evaluators, log, writer, clock
    self._train, self._every, self._workdir = config.train, config.eval.every, workdir

  def __call__(self, step, state, metrics):
    """Evaluates if it is due."""
    last = step == self._train.steps
    if not self._evaluators or not (last or self._every and step % self._every == 0):
      return
    self._log.flush()  # waits for the step, which is not time beside training
    with self._clock.paused():
      values, examples = {}, []
      for evaluator in self._evaluators:
        scores, seen = evaluator(state.params)
        values |= scores
        examples += seen
        if last:
          values |= evaluator.yardstick()
      self._writer.write(step, step * self._train.global_batch_size, values)
      if examples and jax.process_index() == 0:
        write_text(Path(self._workdir) / "examples.json", json.dumps(examples_page(examples)))


class Save:
  """Saves the state at its period and at the end of the run."""

  def __init__(self, checkpoints, records, log, writer, config, clock):
    """Prepares.

    Args:
      checkpoints: a `Checkpoints`.
      records: length of the data set, which goes into each checkpoint.
      log: the `Log`, which writes what is pending before each save.
      writer: a `MetricsWriter`, put on disk before each save.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
    """
    self._checkpoints, self._records = checkpoints, records
    self._log, self._writer, self._clock = log, writer, clock
    self._every, self._steps = config.checkpoint.every, config.train.steps

  def __call__(self, step, state, metrics):
    """Saves if it is due."""
    if step % self._every == 0 or step == self._steps:
      self.now(step, state)

  def now(self, step, state):
    """Saves, unless this step is saved already."""
    if self._checkpoints.latest_step() == step:
      return
    # A checkpoint must never be ahead of the lines before it: a resumed run would not write them.
    self._log.flush()
    with self._clock.paused():
      self._writer.sync()
      self._checkpoints.save(step, state, self._records)


def examples_page(examples):
  """What evaluators saw, as the report reads it: all retrievals, and the first similarity picture."""
  similarity = next((e["similarity"] for e in examples if e["similarity"]), None)
  return {"retrieval": [r for e in examples for r in e["retrieval"]], "similarity": similarity}
