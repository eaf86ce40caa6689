"""The table of a scaling experiment: one row a model and data set, as CSV, and the points that laws are fitted to.

Columns are those of the results that Cherti et al. 2022 (arXiv 2212.07143) published, so that theirs and ours can be read,
joined and fitted alike.
"""

import collections
import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import NamedTuple

from clip_jax.errors import DataError, UsageError, did_you_mean
from clip_jax.evaluate import datasets
from clip_jax.files import write_text

METRICS = (
  "acc1",
  "acc5",
  "mean_per_class_recall",
  "image_retrieval_recall@5",
  "text_retrieval_recall@5",
  "mean_average_precision",
)
COMPUTE = ("samples_seen", "gmacs_total", "gmacs")  # gmacs are of one example: gmacs_total = gmacs x samples_seen
COLUMNS = ("arch", *COMPUTE, "upstream_dataset", "downstream_dataset", *METRICS, "task", "name")
NUMBERS = frozenset(COMPUTE + METRICS)

TASKS = {
  "imagenet": "imagenet1k",
  "robustness": "imagenet_robustness",
  "coco": "mscoco_captions",
  "flickr30k": "flickr30k",
  "vtab+": "vtab+",
}
ROBUSTNESS = "imagenet_robustness"
SHIFTED = datasets.ROBUSTNESS  # what it is the mean of

_DEFAULTS = {
  "mscoco_captions": "image_retrieval_recall@5",
  "flickr30k": "image_retrieval_recall@5",
  "voc2007_multilabel": "mean_average_precision",
}
_FALLBACKS = ("acc1", "image_retrieval_recall@5", "mean_average_precision")
_EXAMPLE = "write COLUMN=VALUE or COLUMN!=VALUE, such as upstream_dataset!=CLIP-WIT"


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a table.

  Attributes:
    values: from column to value: a float, or None where it is empty, in columns of NUMBERS; else the text, "" where it is empty.
    line: where it is in its file, from 1 (the header).
    path: the file.
  """

  values: dict
  line: int
  path: str

  @property
  def place(self):
    """Where it is, for messages."""
    return f"{self.path}, line {self.line}"


@dataclasses.dataclass(frozen=True)
class Point:
  """What one model adds to a law.

  Attributes:
    compute: in GMACs: of one example, times the examples seen.
    error: 1 - metric, above 0.
    arch: of the model.
    samples: that it has seen, or None where the table does not say.
    gmacs: of one example, or None.
    data: that it was trained on.
    name: of the model.
    metric: the column that the error is 1 minus.
    row: that it comes from; the first of the five for a mean over shifted sets.
  """

  compute: float
  error: float
  arch: str
  samples: float | None
  gmacs: float | None
  data: str
  name: str
  metric: str
  row: Row


class Condition(NamedTuple):
  """A column that must have a value ("="), or must not ("!=")."""

  column: str
  operator: str
  value: str


def read(path):
  """Reads a table.

  Args:
    path: a CSV file in UTF-8 whose first line names the columns. Any of COLUMNS may be empty; further columns are kept.

  Returns:
    A list of `Row`, at least one.

  Raises:
    DataError: there is no such table; the message names the file, the line and the column.
  """
  lines = _lines(path)
  header = [name.strip() for name in lines[0][1]]
  _check_header(path, header)
  rows = []
  for number, cells in lines[1:]:
    place = f"{path}, line {number}"
    if len(cells) != len(header):
      raise DataError(f"{place} has {len(cells)} values, and the header names {len(header)} columns.")
    values = dict(zip(header, cells, strict=True))
    rows.append(Row({c: _number(v, c, place) if c in NUMBERS else v for c, v in values.items()}, number, str(path)))
  if not rows:
    raise DataError(f"{path} has a header and no rows; each model and data set is a row.")
  return rows


def write(path, rows):
  """Writes a table whole or not at all.

  Args:
    path: the file; an older one is replaced.
    rows: of type `Row`, or dicts from column to value. COLUMNS come first, further ones after them, as they appear.

  Raises:
    DataError: a value is none that `read` accepts.
  """
  found = [_values(row) for row in rows]
  columns = list(dict.fromkeys([*COLUMNS, *(column for values in found for column in values)]))
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(columns)
  for number, values in enumerate(found, start=2):
    cells = ["" if values.get(column) is None else str(values[column]) for column in columns]
    for column, cell in zip(columns, cells, strict=True):
      if column in NUMBERS:
        _number(cell, column, f"{path}, line {number}")
    writer.writerow(cells)
  write_text(path, text.getvalue())


def condition(text):
  """Parses a condition on rows.

  Args:
    text: such as "upstream_dataset!=CLIP-WIT" or "gmacs=7.4".

  Returns:
    A `Condition`.

  Raises:
    UsageError: it is none.
  """
  column, equals, value = (part.strip() for part in text.partition("="))
  operator = "!=" if column.endswith("!") else "="
  column = column.removesuffix("!").strip()
  if not equals or not column or value.startswith("="):
    raise UsageError(f"{_short(text)} is no condition on rows; {_EXAMPLE}.")
  return Condition(column, operator, value)


def points(rows, task, metric=None, where=()):
  """The points of one task.

  The mean over the five shifted sets of ImageNet is computed for each model that has all five of them and no row of its own.

  Args:
    rows: as `read` gives them.
    task: a key of TASKS, or the name of a data set as the table has it; "-" and "_" are alike.
    metric: the column whose distance to 1 is the error. If None, the one that the data set is known for: recall at 5 of
      retrieving images, mean average precision of several labels, else accuracy.
    where: of type `Condition`, or tuples like it; a row must fulfil all. Numbers are compared as numbers.

  Returns:
    A list of `Point`, at least one, in order of rows, computed means last. Rows whose metric is empty are left out.

  Raises:
    UsageError: nothing is selected, a column is unknown, or a row has no compute or an error of 0.
  """
  wanted = TASKS.get(task, task)
  columns = _columns(rows)
  kept = [row for row in rows if all(_fulfils(row, Condition(*one), columns) for one in where)]
  if not kept:
    conditions = " and ".join("".join(map(str, one)) for one in where)
    raise UsageError(f"No row fulfils {conditions}." if rows else "The table has no rows.")
  own = [row for row in kept if _same(row.values["downstream_dataset"], wanted)]
  parts = [row for row in kept if _shifted(row)] if _same(wanted, ROBUSTNESS) else []
  if not own + parts:
    known = list(dict.fromkeys(row.values["downstream_dataset"] for row in kept))
    hint = did_you_mean(task, [*TASKS, *known], f"There are {', '.join(known[:20])}.", cutoff=0.5)
    raise UsageError(f"No row is of the data set {wanted}. {hint}")
  metric = metric or _default(wanted, own + parts)
  _check_column(metric, columns)
  found = [(row, value) for row in own if (value := _metric(row, metric)) is not None]
  found += _means(parts, metric, {_model(row) for row, _ in found})
  if not found:
    raise UsageError(f"No row of the data set {wanted} has a value of {metric}{', and no model all five shifted sets' if parts else ''}.")
  return [_point(row, value, metric) for row, value in found]


def grouped(points_or_rows, column):
  """Sorts points or rows by what they have in a column.

  Args:
    points_or_rows: of type `Point` or `Row`.
    column: any of the table.

  Returns:
    A dict from value, as text, to a list, both in order of appearance.

  Raises:
    UsageError: there is no such column.
  """
  rows = [(one, one.row if isinstance(one, Point) else one) for one in points_or_rows]
  _check_column(column, _columns(row for _, row in rows))
  groups = collections.defaultdict(list)
  for one, row in rows:
    groups[_rounded(row.values.get(column, ""))].append(one)
  return dict(groups)


def _lines(path):
  # Pairs of line number and cells, without blank lines. A quoted value may have line breaks, so a row begins after the last.
  try:
    text = Path(path).read_bytes().decode("utf-8-sig")
  except FileNotFoundError as error:
    raise DataError(f"{path} is missing; it would be a CSV file of results.") from error
  except UnicodeDecodeError as error:
    raise DataError(f"{path} is no CSV file in UTF-8: byte {error.start} is {error.reason}.") from error
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
  found, reader, last = [], csv.reader(io.StringIO(text, newline=""), strict=True), 0
  try:
    for cells in reader:
      if cells:
        found.append((last + 1, cells))
      last = reader.line_num
  except csv.Error as error:
    raise DataError(f"{path}, line {last + 1} is not CSV: {error}.") from error
  if not found:
    raise DataError(f"{path} is empty; its first line must name columns, such as {','.join(COLUMNS[:4])}.")
  return found


def _check_header(path, header):
  if not set(header) & set(COLUMNS):
    raise DataError(f"{path} has no header: its first line must name columns, separated by commas, such as {','.join(COLUMNS[:4])}.")
  twice = next((name for name in header if header.count(name) > 1), None)
  if twice is not None:
    raise DataError(f"{path}, line 1 names the column {_short(twice)} twice.")
  if "downstream_dataset" not in header:
    raise DataError(f"{path} has no column downstream_dataset, which says what a model was evaluated on.")
  missing = [name for name in ("gmacs", "samples_seen") if name not in header]
  if missing and "gmacs_total" not in header:
    raise DataError(f"{path} has no column {' and no column '.join(missing)}; it needs both gmacs and samples_seen, or gmacs_total.")


def _number(text, column, place):
  # A cell of a column of numbers. Other columns are shares of 1, too, where they are asked for as a metric.
  if not text.strip():
    return None
  place = f"{place}, column {column}"
  try:
    value = float(text) if "_" not in text else math.nan
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise DataError(f"{place}: {_short(text)} is not a number; leave it empty where there is none.")
  if column in COMPUTE and value <= 0:
    raise DataError(f"{place}: {text} must be above 0.")
  if column not in COMPUTE and not 0 <= value <= 1:
    right = f" ({value / 100:g} and not {value:g})" if 1 < value <= 100 else ""
    raise DataError(f"{place}: {text} must be a share from 0 to 1{right}.")
  return value


def _short(text):
  text = text if len(text) <= 60 else f"{text[:60]}..."
  return repr(text)  # in one line, whatever it holds


def _values(row):
  return row.values if isinstance(row, Row) else row


def _columns(rows):
  return list(dict.fromkeys(column for row in rows for column in row.values))


def _check_column(column, columns):
  if column not in columns:
    hint = did_you_mean(column, columns, f"There are {', '.join(columns)}.")
    raise UsageError(f"The table has no column {_short(column)}. {hint}")


def _rounded(value):
  # Products and quotients of compute differ in their last bits from file to file: 7.4 and 7.399999999999999 are one model.
  if value is None:
    return ""
  return value if isinstance(value, str) else format(float(f"{value:.9e}"), ".15g")


def _same(name, other):
  return name.replace("-", "_") == other.replace("-", "_")


def _shifted(row):
  return next((name for name in SHIFTED if _same(row.values["downstream_dataset"], name)), None)


def _fulfils(row, one, columns):
  _check_column(one.column, columns)
  if one.operator not in ("=", "!="):
    raise UsageError(f"{_short(one.operator)} compares nothing; {_EXAMPLE}.")
  value = str(one.value)
  if one.column in NUMBERS and value:
    try:
      value = _rounded(float(value))
    except ValueError as error:
      raise UsageError(f"{_short(value)} is not a number, as the column {one.column} has; {_EXAMPLE}.") from error
  return (_rounded(row.values.get(one.column, "")) == value) == (one.operator == "=")


def _default(dataset, rows):
  known = next((metric for name, metric in _DEFAULTS.items() if _same(dataset, name)), None)
  return known or next((m for m in _FALLBACKS if any(row.values.get(m) is not None for row in rows)), "acc1")


def _metric(row, metric):
  value = row.values.get(metric)
  return _number(value, metric, row.place) if isinstance(value, str) else value


def _model(row):
  return tuple(_rounded(row.values.get(c, "")) for c in ("name", "arch", "upstream_dataset", "samples_seen", "gmacs"))


def _means(parts, metric, known):
  # For each model that is not known: its first row, and the mean over the five sets.
  models = collections.defaultdict(dict)
  for row in parts:
    value, name = _metric(row, metric), _shifted(row)
    if value is None or _model(row) in known:
      continue
    if name in models[_model(row)]:
      first = models[_model(row)][name][0]
      raise DataError(f"{row.place} has {name} of the model of line {first.line} again, so its mean over shifted sets is not clear; keep one.")
    models[_model(row)][name] = row, value
  complete = [sets for sets in models.values() if len(sets) == len(SHIFTED)]
  return [(next(iter(sets.values()))[0], math.fsum(value for _, value in sets.values()) / len(SHIFTED)) for sets in complete]


def _point(row, value, metric):
  get = row.values.get
  gmacs, samples, total = get("gmacs"), get("samples_seen"), get("gmacs_total")
  compute = gmacs * samples if gmacs and samples else total
  if compute is None:
    raise DataError(f"{row.place} has no compute: it needs gmacs and samples_seen, or gmacs_total.")
  if value == 1:
    raise DataError(f"{row.place}: {metric} is 1, an error of 0, which has no logarithm; leave the row out.")
  return Point(compute, 1 - value, get("arch", ""), samples, gmacs, get("upstream_dataset", ""), get("name", ""), metric, row)
