"""What happens beside training: logging, evaluation, checkpoints, profiles. Each hook has one job and one period.

A hook is called after each step with the number of steps done, the state and the step's metrics, which
are still being computed: reading one waits for the device.
"""

import contextlib
import json
import math
import time
from pathlib import Path

import jax

from clip_jax.errors import StorageError, UsageError
from clip_jax.files import tell, write_text
from clip_jax.parallel import agreement


class Clock:
  """Where the loop's time goes: waiting for data, beside training, and the rest, which is training."""

  def __init__(self):
    self.waited = self.beside = 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Counts the time inside as waiting for data, and names it in a trace."""
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation("waiting for data"):
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

  def __init__(self, writer, config, clock, start, measure, show, guard=lambda step, values: None):
    """Prepares.

    Args:
      writer: a `MetricsWriter`.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      start: updates done before this run.
      measure: a function from samples per second to more values, such as a `performance.Meter`.
      show: called with the step and its values, for a person to see.
      guard: called with the step and its values before they are written, such as a `guard.Guard`; what it returns is raised after.
    """
    self._writer, self._train, self._clock, self._measure, self._show = writer, config.train, clock, measure, show
    self._guard, self._pending, self._wrong = guard, None, False
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
      what = "; the step was skipped" if values.get("skipped_in_a_row") else ""
      tell(f"\nstep {step:,}: not finite: {', '.join(wrong)}{what}")
    self._wrong = bool(wrong)
    now, waited, beside = time.perf_counter(), self._clock.waited, self._clock.beside
    last_step, last, last_waited, last_beside = self._mark
    seconds = max(now - last - (beside - last_beside), 1e-9)
    batch = self._train.global_batch_size
    values["samples_per_second"] = (step - last_step) * batch / seconds
    values |= self._measure(values["samples_per_second"])
    values["data_wait"] = min((waited - last_waited) / seconds, 1.0)
    self._mark = step, now, waited, beside
    conclusion = self._guard(step, values)
    self._writer.write(step, step * batch, values)
    self._show(step, values)
    if conclusion is not None:
      raise conclusion


class SlowData:
  """Says when a run loses time to its data, and how much."""

  EVERY = 60.0  # seconds that are looked at together
  SHARE = 0.1  # of them that may be lost
  QUIET = 600.0  # seconds until it is said again

  def __init__(self, clock, now=time.monotonic):
    """Prepares.

    Args:
      clock: the loop's `Clock`.
      now: seconds of a clock that nobody sets.
    """
    self._clock, self._now, self._mark, self._said = clock, now, None, -math.inf

  def __call__(self, step, state, metrics):
    """Looks, once a minute."""
    now, waited, beside = self._now(), self._clock.waited, self._clock.beside
    if self._mark is None:  # the first batch is always waited for
      self._mark = now, waited, beside
    last, last_waited, last_beside = self._mark
    if now - last < self.EVERY:
      return
    share = (waited - last_waited) / max(now - last - (beside - last_beside), 1e-9)
    self._mark = now, waited, beside
    if share > self.SHARE and now - self._said > self.QUIET:
      self._said = now
      tell(
        f"\nSLOW DATA: {share:.0%} of the last {now - last:,.0f} s were spent waiting for it (process {jax.process_index()}). "
        "`clip-jax data bench` says what takes its time; docs/data.md, what to do about it."
      )


class Evaluate:
  """Runs the evaluators at their period, and all of them at the end of the run."""

  def __init__(self, evaluators, log, writer, config, clock, workdir, alive=lambda what: None):
    """Prepares.

    Args:
      evaluators: functions from parameters to a `clip_jax.evaluate.result.Result`.
      log: the `Log`, which writes what is pending before each evaluation.
      writer: a `MetricsWriter`.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      workdir: where `examples.json` is written.
      alive: called with what is evaluated now.
    """
    self._evaluators, self._log, self._writer, self._clock, self._alive = evaluators, log, writer, clock, alive
    self._config, self._train, self._workdir = config, config.train, workdir

  def due(self, step):
    """Whether a step is evaluated."""
    return bool(self._evaluators) and evaluation_due(self._config, step)

  def __call__(self, step, state, metrics):
    """Evaluates if it is due."""
    if not self.due(step):
      return
    last = step == self._train.steps
    self._log.flush()  # waits for the step, which is not time beside training
    with self._clock.paused():
      values, examples = {}, []
      for evaluator in self._evaluators:
        self._alive(f"evaluation of {evaluator.set.name}")
        found = evaluator(state.weights)
        values |= found.flat(evaluator.set.name)
        if "retrieval" in found.details:
          examples.append(found.details)
        if last and hasattr(evaluator, "yardstick"):
          values |= evaluator.yardstick()
      self._writer.write(step, step * self._train.global_batch_size, values)
      if examples and jax.process_index() == 0:
        write_text(Path(self._workdir) / "examples.json", json.dumps(examples_page(examples)))


class Save:
  """Saves the state at its period of steps or of time, when one could not be saved before, and at the end of the run."""

  PATIENCE = (0.0, 10.0, 60.0, 300.0)  # seconds until a save that failed is tried again; the last counts for all later ones
  LAST = (1.0, 4.0, 15.0)  # at the end of a run, when nothing else can be done

  def __init__(self, checkpoints, card, log, writer, config, clock, now=time.monotonic):
    """Prepares.

    Args:
      checkpoints: a `Checkpoints`.
      card: a dict for each checkpoint: `records`, which the order of examples depends on, and `data`, what they are.
      log: the `Log`, which writes what is pending before each save.
      writer: a `MetricsWriter`, put on disk before each save.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      now: seconds of a clock that nobody sets.
    """
    self._checkpoints, self._card, self._now = checkpoints, card, now
    self._log, self._writer, self._clock = log, writer, clock
    self._every, self._minutes = config.checkpoint.every, config.checkpoint.every_minutes
    self._keep = config.checkpoint.keep_steps
    self._train, self._last, self._retry, self._in_a_row = config.train, now(), None, 0

  def __call__(self, step, state, metrics):
    """Saves if it is due by the number of the step."""
    self._look(step)
    if step % self._every == 0 or step in self._keep or step == self._train.steps:
      self.now(step, state)

  def wished(self):
    """Whether this process wants to save now: time is up, or a save that failed is to be tried again."""
    now = self._now()
    if self._retry is not None:
      return now >= self._retry
    # One clock decides: those of others would only ask once more.
    return bool(self._minutes) and jax.process_index() == 0 and now - self._last >= 60 * self._minutes

  def now(self, step, state):
    """Starts to save, unless this step is saved already.

    A save that cannot be made is told of, counted and tried again; training goes on.

    Raises:
      TrainingError: devices have different copies of the same numbers.
    """
    if self._checkpoints.has(step):
      return
    # A checkpoint must never be ahead of the lines before it: a resumed run would not write them.
    self._log.flush()
    with self._clock.paused():
      self._look(step, wait=True)  # or one process, whose last one failed, would leave the others waiting in this one
      self._last, self._retry = self._now(), None
      try:
        if not agreement.everyone(self._writer.sync()):
          raise StorageError("metrics.jsonl, which goes first, is not on disk.")
        self._checkpoints.save(step, state, **self._card)
      except StorageError as error:
        self._failed(step, error)

  def last(self, step, state):
    """Saves, and waits until that is on disk, trying several times.

    Raises:
      StorageError: it cannot be made. The message says which steps are lost.
    """
    for patience in (*self.LAST, 0.0):
      self.now(step, state)
      with self._clock.paused():
        self._look(step, wait=True)
        if agreement.everyone(step == self._checkpoints.whole):
          return
        time.sleep(patience)
    whole = self._checkpoints.whole or 0
    raise StorageError(f"Step {step:,} could not be saved; the steps after {whole:,} are lost.")

  def _look(self, step, wait=False):
    try:
      self._checkpoints.wait() if wait else self._checkpoints.check()
    except StorageError as error:
      self._failed(step, error)
    else:
      if self._in_a_row and self._retry is None and not self._checkpoints.saving:
        self._in_a_row = 0
        tell(f"\nstep {step:,}: checkpoints can be written again.")

  def _failed(self, step, error):
    wait = self.PATIENCE[min(self._in_a_row, len(self.PATIENCE) - 1)]
    self._in_a_row, self._retry = self._in_a_row + 1, self._now() + wait
    whole = self._checkpoints.whole or 0
    tell(
      f"\nstep {step:,}: NO CHECKPOINT: {error} It is tried again. If the run ends now, the {step - whole:,} steps since {whole:,} are lost. "
      f"Failures in a row: {self._in_a_row}."
    )
    values = {"checkpoint_failures": float(self._checkpoints.failures), "checkpoint_steps_at_risk": float(step - whole)}
    self._writer.write(step, step * self._train.global_batch_size, values)


class Profile:
  """Traces a window of steps, for XProf and Perfetto.

  Only the first process does: its devices run what all run. A run that ends inside the window writes what it has.
  """

  def __init__(self, window, start, config, clock, workdir):
    """Prepares.

    Args:
      window: the first step to trace and the first not to trace any more, as `metrics.jsonl` numbers them; or None.
      start: updates done before this run. If they include the window's beginning its rest is traced, and of a window that is over nothing.
      config: a resolved `Config`.
      clock: the loop's `Clock`.
      workdir: the trace is written to its folder `profile`.
    """
    self._folder, self._clock, self._tracing = Path(workdir) / "profile", clock, False
    self._first = self._last = self._done = 0
    if window is None or jax.process_index() > 0:
      return
    first, end = window
    if start + 1 >= end:
      tell(f"profile: nothing is traced, because step {end - 1:,} was done before.")
    else:
      self._first, self._last = max(first, start + 1), min(end - 1, config.train.steps)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._write()

  def step(self, number):
    """A context for a step, from waiting for its data on, that gives it its number in the trace."""
    if not self._first <= number <= self._last:
      return contextlib.nullcontext()
    if number == self._first:
      with self._clock.paused():
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # the calls of decoding threads would fill the trace
        jax.profiler.start_trace(self._folder, create_perfetto_trace=True, profiler_options=options)
        self._tracing = True
    self._done = number
    return jax.profiler.StepTraceAnnotation("train", step_num=number)

  def __call__(self, step, state, metrics):
    """Waits for the device at both ends of the window, so that all of its steps are in the trace, and nothing else."""
    if step in (self._first - 1, self._last):
      jax.block_until_ready(metrics)
    if step == self._last:
      self._write()

  def _write(self):
    if not self._tracing:
      return
    self._tracing = False
    with self._clock.paused():
      jax.profiler.stop_trace()
    perfetto = max(self._folder.rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
    tell(
      f"\nprofile: steps {self._first:,} to {self._done:,} are traced. Look at them with `xprof {self._folder}` (pip install xprof), "
      f"or open {perfetto} in https://ui.perfetto.dev."
    )


def evaluation_due(config, step):
  """Whether a run that has something to evaluate does so at a step, of which there is none before the first update."""
  return step > 0 and (step == config.train.steps or config.eval.every > 0 and step % config.eval.every == 0)


def evaluation_missing(lines, config, step):
  """Whether a run that goes on from a step has still to evaluate it.

  Args:
    lines: the end of its `metrics.jsonl`, as `clip_jax.train.metrics.read` gives it.
    config: a resolved `Config`.
    step: updates done.
  """
  if not (evaluation_due(config, step) and (config.eval.retrieval or config.eval.zero_shot or config.eval.datasets)):
    return False
  return not any(name.startswith("eval/") for line in lines if line["step"] == step for name in line)


def check_window(window, steps):
  """Checks that a window of steps to trace makes sense.

  Args:
    window: a pair of ints: the first step to trace, and the first not to trace any more.
    steps: updates of the whole run.

  Raises:
    UsageError: it has no step of the run.
  """
  first, end = window
  if first < 1:
    raise UsageError(f"--profile={first}:{end} begins before the first step, which is 1.")
  if end <= first:
    raise UsageError(f"--profile={first}:{end} has no steps: END comes after START and is not traced; {first}:{first + 5} has five.")
  if first > steps:
    raise UsageError(f"--profile={first}:{end} begins after the last step of the run, which is {steps:,}.")


def examples_page(examples):
  """What evaluators saw, as the report reads it: all retrievals, and the first similarity picture."""
  similarity = next((e["similarity"] for e in examples if e["similarity"]), None)
  return {"retrieval": [r for e in examples for r in e["retrieval"]], "similarity": similarity}
