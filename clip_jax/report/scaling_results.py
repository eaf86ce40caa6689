"""What a scaling experiment leaves behind, sweep.json and laws.json, checked and made ready to be shown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_jax.errors import UsageError
from clip_jax.report.run_log import number

FORMAT = 1  # of both files


@dataclass(frozen=True)
class Point:
  """A run and its error. What a table of others' results does not say is empty, or NaN."""

  name: str
  arch: str
  data: str
  samples: float
  gmacs: float
  compute: float
  error: float


@dataclass(frozen=True)
class Place:
  """A point of a law: what was fitted to, or what is foretold, with an interval (NaN where there is none)."""

  compute: float
  error: float
  low: float
  high: float
  name: str


@dataclass(frozen=True)
class Law:
  """A law as laws.json has it; an interval is a pair, of NaN where there is none."""

  group: str
  task: str
  metric: str
  method: str
  n: int
  beta: float
  alpha: float
  limit: float
  beta_ci: tuple[float, float]
  alpha_ci: tuple[float, float]
  limit_ci: tuple[float, float]
  mae: float
  leave_one_out: float
  points: tuple[Point, ...]
  fitted: tuple[Place, ...]
  curve: tuple[Place, ...]
  forecast: tuple[Place, ...]

  @property
  def label(self) -> str:
    """Its method, and the group of runs it is of."""
    return f"{self.method}, {self.group}" if self.group else self.method

  @property
  def formula(self) -> str:
    """`E = 5.86 C^−0.111`."""
    limit = f"{short(self.limit)} + " if self.limit else ""
    return f"E = {limit}{short(self.beta)} C^{short(self.alpha)}"


def _each(records: Any, key: str, read_one: Callable[[Any], Any]) -> list[Any]:
  """Reads the records of a list, one by one.

  Args:
    records: the list, or None for none.
    key: its name, for errors.
    read_one: makes something of a record.

  Raises:
    UsageError: a record is not what it should be; the message says which.
  """
  if not isinstance(records or [], list | tuple):
    raise UsageError(f"{key} is not a list.")
  found = []
  for i, record in enumerate(records or []):
    try:
      found.append(read_one(record))
    except KeyError as error:
      raise UsageError(f"{key}[{i}] does not have {error}.") from None
    except UsageError as error:
      raise UsageError(f"{key}[{i}]: {error}") from None
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
      raise UsageError(f"{key}[{i}] does not have the expected shape ({error}).") from None
  return found


def _point(record):
  names = [_name(record[key]) for key in ("name", "arch", "data")]
  return Point(*names, *(number(record, key) for key in ("samples", "gmacs", "compute", "error")))


def read_laws(records: Sequence[Mapping[str, Any]]) -> list[Law]:
  """Checks laws as laws.json has them.

  Raises:
    UsageError: one is not what it should be; the message says which.
  """
  return _each(records, "laws", _law)


def _law(record):
  texts = {key: _name(record[key]) for key in ("group", "task", "metric", "method")}
  numbers = {key: number(record, key) for key in ("beta", "alpha", "limit", "mae", "leave_one_out")}
  intervals = {key: _interval(record[key]) for key in ("beta_ci", "alpha_ci", "limit_ci")}
  parts = {key: tuple(_each(record[key], key, _place)) for key in ("fitted", "curve", "forecast")}
  points = tuple(_each(record["points"], "points", _point))
  return Law(**texts, **numbers, **intervals, **parts, points=points, n=int(record["n"]))


def _name(value):
  return "" if value is None else str(value)


def _interval(pair):
  low, high = (None, None) if pair is None else pair
  return number({"low": low}, "low"), number({"high": high}, "high")


def _place(record):
  low, high = _interval((record.get("low"), record.get("high")))
  return Place(number(record, "compute"), number(record, "error"), low, high, _name(record.get("name")))


@dataclass(frozen=True)
class Planned:
  """A run of a sweep; `parent` is the run that it goes on from at `fork_step`, or empty."""

  name: str
  arch: str
  data: str
  parent: str
  fork_step: int
  gmacs: float
  parameters: float
  samples: float
  own_samples: float
  batch: float
  learning_rate: float


def read_runs(sweep: Mapping[str, Any]) -> list[Planned]:
  """Checks the runs of sweep.json.

  Raises:
    UsageError: one is not what it should be; the message says which.
  """
  if not isinstance(sweep.get("runs"), list):
    raise UsageError("the sweep has no list of runs.")
  return _each(sweep["runs"], "runs", _planned)


def _planned(record):
  keys = ("gmacs", "parameters", "samples", "own_samples", "global_batch_size", "learning_rate")
  numbers = [number(record, key) for key in keys]
  return Planned(*(_name(record[key]) for key in ("name", "arch", "data", "parent")), int(record["fork_step"]), *numbers)


@dataclass(frozen=True)
class Budget:
  """The best model and number of samples for an amount of compute, as fitted."""

  compute: float
  gmacs: float
  samples: float
  error: float


@dataclass(frozen=True)
class Optimal:
  """Of one task and metric: the runs that were better than all of less compute, and how they grow (NaN: not known)."""

  task: str
  metric: str
  frontier: tuple[Point, ...]
  gmacs_exponent: float
  samples_exponent: float
  budgets: tuple[Budget, ...]


def read_optimal(records: Sequence[Mapping[str, Any]]) -> list[Optimal]:
  """Checks what laws.json has as "optimal".

  Raises:
    UsageError: a part is not what it should be; the message says which.
  """
  return _each(records, "optimal", _optimal)


def _optimal(record):
  return Optimal(
    task=_name(record["task"]),
    metric=_name(record["metric"]),
    frontier=tuple(_each(record["frontier"], "frontier", _point)),
    gmacs_exponent=number(record, "gmacs_exponent"),
    samples_exponent=number(record, "samples_exponent"),
    budgets=tuple(_each(record["budgets"], "budgets", _budget)),
  )


def _budget(record):
  return Budget(*(number(record, key) for key in ("compute", "gmacs", "samples", "error")))


def short(value: float, digits: int = 3) -> str:
  """A number in a few digits: `0.0123`, `45,600`, `1.2e−7`; a dash for what is not known."""
  if not math.isfinite(value):
    return "–"
  if 1e3 <= abs(value) < 1e6:
    return f"{float(f'{value:.{digits}g}'):,.0f}".replace("-", "−")
  mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
  return (f"{mantissa}e{int(exponent)}" if e else mantissa).replace("-", "−")


def compute_text(value: float) -> str:
  """An amount of compute: `34,600`, or `3.46e11`."""
  if not math.isfinite(value) or value == 0 or 1e-3 <= value < 1e5:
    return short(value)
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def between(interval: tuple[float, float], digits: int = 2) -> str:
  """`−0.13 to −0.09`; nothing where there is no interval."""
  return " to ".join(short(end, digits) for end in interval) if all(map(math.isfinite, interval)) else ""
