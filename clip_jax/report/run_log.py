"""metrics.jsonl, read line by line into columns."""

import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.report import plots

TRAINING_METRICS = (
  "loss",
  "learning_rate",
  "logit_scale",
  "gradient_norm",
  "parameter_norm",
  "samples_per_second",
  "data_wait",
)


@dataclass
class Run:
  """What metrics.jsonl says.

  Arrays and not lists of dicts: a million lines of seven metrics stay near 100 MB.

  Attributes:
    steps, samples: of each training line.
    training: metric -> (training line it stands in, value).
    evaluations: key -> step -> (samples seen, value), in the order in which keys appeared.
    rewinds: how often the log went back to an earlier step, as a resumed session does.
    times: unix seconds of the first and of the last line.
  """

  steps: array = field(default_factory=lambda: array("q"))
  samples: array = field(default_factory=lambda: array("d"))
  training: dict[str, tuple[array, array]] = field(default_factory=dict)
  evaluations: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
  rewinds: int = 0
  times: tuple[float, float] | None = None
  last: tuple[int, float] = (0, 0.0)

  def add(self, record: Mapping[str, Any]) -> None:
    """Takes one line in.

    Raises:
      ValueError: `step`, `samples_seen` or `time` is missing, or a metric is not a number.
    """
    step, samples, time = (number(record, key) for key in ("step", "samples_seen", "time"))
    if not (math.isfinite(step) and math.isfinite(samples)):
      raise ValueError("step and samples_seen must be finite")
    step = int(step)
    training = [key for key in TRAINING_METRICS if key in record]
    if training and self.steps and step < self.steps[-1]:
      self._rewind(step)
    if training and not (self.steps and step == self.steps[-1]):
      self.steps.append(step)
      self.samples.append(samples)
    for key in training:
      if key not in self.training:
        self.training[key] = array("I"), array("d")
      rows, values = self.training[key]
      if rows and rows[-1] == len(self.steps) - 1:  # a second line for the same step
        values[-1] = number(record, key)
      else:
        rows.append(len(self.steps) - 1)
        values.append(number(record, key))
    for key in record:
      if key.startswith("eval/"):
        self.evaluations.setdefault(key, {})[step] = samples, number(record, key)
    self.times = (self.times[0] if self.times else time, time)
    self.last = max(self.last, (step, samples))

  def _rewind(self, step: int) -> None:
    """Forgets what a resumed session is about to write anew.

    Evaluations at `step` itself stay: the new session may have written them just before this line.
    """
    self.rewinds += 1
    self.last = (0, 0.0)
    while self.steps and self.steps[-1] >= step:
      self.steps.pop()
      self.samples.pop()
    for rows, values in self.training.values():
      while rows and rows[-1] >= len(self.steps):
        rows.pop()
        values.pop()
    for points in self.evaluations.values():
      for stale in [s for s in points if s > step]:
        del points[stale]

  def curve(self, key: str) -> plots.Curve | None:
    """A training metric or an evaluation key; None if it was never logged."""
    if key in self.training:
      columns = (*self.training[key], self.steps, self.samples)
      rows, values, steps, samples = (np.asarray(column) for column in columns)  # no copies
      if len(rows) < len(steps):
        steps, samples = steps[rows], samples[rows]
      return plots.Curve(steps, samples, values) if len(rows) else None
    points = sorted(self.evaluations.get(key, {}).items())
    if not points:
      return None
    steps, pairs = zip(*points, strict=True)
    samples, values = np.array(pairs, dtype=np.float64).T
    return plots.Curve(np.array(steps), samples, values)

  def results(self) -> dict[str, float]:
    """The last value of each evaluation key."""
    return {k: points[max(points)][1] for k, points in self.evaluations.items() if points}


def number(record: Mapping[str, Any], key: str) -> float:
  """NaN may be written as NaN or null. Raises ValueError naming the key."""
  if key not in record:
    raise ValueError(f"{key} is missing")
  try:
    return math.nan if record[key] is None else float(record[key])
  except (TypeError, ValueError, OverflowError):
    raise ValueError(f"{key} is {record[key]!r}, not a number") from None


def read_run(path: Path) -> Run:
  """Reads metrics.jsonl line by line.

  A last line that was cut off (a killed process) is left out.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not what it should be (the message names it), or there is none at all.
  """
  run = Run()
  with open_required(path) as file:
    for count, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        record = json.loads(line)
        if not isinstance(record, dict):
          raise ValueError("not a JSON object")
      except ValueError as error:
        if not line.endswith(b"\n"):  # only the last line can lack it
          break
        raise ValueError(f"{path}, line {count}: {error}.") from None
      try:
        run.add(record)
      except ValueError as error:
        raise ValueError(f"{path}, line {count}: {error}.") from None
  if not run.times:
    raise ValueError(f"{path} holds no complete line: nothing has been logged yet.")
  return run


def read_bad_records(path: Path) -> list[dict[str, str]]:
  """The records that a run could not read, one each, as `bad_records.jsonl` has them.

  Args:
    path: the file; there is none where all could be read.

  Returns:
    The "key", "error" and "source" of each; the last is empty but in a mixture.
  """
  found = {}
  for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else ():
    try:
      record = json.loads(line)
      row = {name: str(record.get(name, "")) for name in ("key", "error", "source")}
      found[record.get("source"), record["index"]] = row
    except (ValueError, KeyError, TypeError, AttributeError):  # part of a line, of a run that was killed
      continue
  return list(found.values())


def open_required(path: Path):
  """Opens a file for reading bytes; one that is missing is a FileNotFoundError that says what it is of."""
  try:
    return path.open("rb")
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{path} is missing; a report is made from the work directory of a training run."
    ) from None
