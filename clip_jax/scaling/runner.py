"""Runs what of a sweep is missing, in the order in which it becomes possible, until all of it is there."""

import dataclasses
import time

from clip_jax.errors import EXIT_TRY_AGAIN
from clip_jax.scaling import status as statuses

PATIENCE = 3  # ends in a row without a step, before a run counts as failed


@dataclasses.dataclass
class Row:
  """A run, for people.

  Attributes:
    planned: a `clip_jax.scaling.sweep.Planned`.
    state: "done", "running", "ready", "waits for PARENT", "failed" or "blocked".
    status: a `clip_jax.scaling.status.Status`.
    reason: why it failed.
  """

  planned: object
  state: str
  status: statuses.Status
  reason: str = ""


class Runner:
  """What is going on with the runs of a sweep."""

  def __init__(self, plans, executor):
    """Prepares.

    Args:
      plans: a list of `clip_jax.scaling.sweep.Planned`.
      executor: of `clip_jax.scaling.executors`.
    """
    self._plans, self._executor = {one.run.name: one for one in plans}, executor
    self._failed, self._begun, self._in_vain = {}, {}, {}

  def run(self, show=lambda rows: None, stopped=lambda: False):
    """Runs until everything is done, nothing more can be, or it is to stop.

    Args:
      show: called with a list of `Row`s, again and again.
      stopped: asked whether to stop.

    Returns:
      A list of `Row`s.
    """
    while True:
      # Before the states are read: what ends after this is seen the next time, with all that it wrote.
      for name, code in self._executor.ended():
        self._over(name, code)
      rows = self.look()
      if stopped():
        self._executor.stop()
        for name, code in self._executor.ended():
          self._over(name, code)
        rows = self.look()
        show(rows)
        return rows
      started = self._start(rows)
      show(rows)
      if not started and not any(row.state == "running" for row in rows):
        return rows
      again = time.monotonic() + self._executor.pause
      while not stopped() and (left := again - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))

  def look(self):
    """The state of every run."""
    running = self._executor.running(set(self._plans))
    found = {name: statuses.read(planned) for name, planned in self._plans.items()}
    rows = []
    for name, planned in self._plans.items():
      parent = planned.run.parent
      if name in running:
        state = "running"
      elif found[name].complete:
        state = "done"
      elif name in self._failed:
        state = "failed"
      elif statuses.forkable(planned):
        state = "ready"
      elif parent in self._failed or found[parent].complete:
        state = "blocked"
      else:
        state = f"waits for {parent}"
      rows.append(Row(planned, state, found[name], self._reason(state, planned, found)))
    return rows

  def _reason(self, state, planned, found):
    if state == "failed":
      return self._failed[planned.run.name]
    if state == "blocked" and planned.run.parent not in self._failed:
      return f"{planned.run.parent} is done and has kept no checkpoint at step {planned.run.fork_step:,}; a run by itself needs another name"
    return f"{planned.run.parent} failed" if state == "blocked" else ""

  def _start(self, rows):
    """Starts what can be; the longest first, so that none is left alone at the end."""
    places = self._executor.most - sum(row.state == "running" for row in rows)
    ready = [row for row in rows if row.state == "ready"]
    ready.sort(key=lambda row: row.planned.training_flops, reverse=True)
    started = 0
    for row in ready[: max(places, 0)]:
      if self._executor.start(row.planned):
        self._begun[row.planned.run.name] = row.status.step
        started += 1
      row.state = "running"
    return started

  def _over(self, name, code):
    planned = self._plans.get(name)
    if planned is None:
      return
    status = statuses.read(planned)
    if status.complete:
      return
    progress = status.step > self._begun.get(name, -1)
    self._in_vain[name] = 0 if progress else self._in_vain.get(name, 0) + 1
    # It was stopped, or killed by a signal. Of a job that is not known: one that got no further is taken for one that cannot.
    again = progress if code is None else (code == EXIT_TRY_AGAIN or code < 0) and self._in_vain[name] < PATIENCE
    if not again:
      ended = "ended" if code is None else f"ended with exit code {code}"
      self._failed[name] = f"{ended} at step {status.step:,}: {_last_words(self._executor.log(name))}"


def _last_words(path):
  """The last line of a log, and where the rest is."""
  try:
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
  except OSError:
    lines = []
  return f"{lines[-1][:300]} ({path})" if lines else str(path)
