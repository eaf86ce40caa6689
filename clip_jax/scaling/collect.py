"""What a sweep has found: a row for each finished run and each set it was evaluated on, and the laws in them."""

import json
from pathlib import Path

import numpy as np

from clip_jax.errors import DataError, UsageError
from clip_jax.evaluate import datasets
from clip_jax.evaluate.result import column
from clip_jax.files import read_json, write_json
from clip_jax.scaling import power_law, sweep, table

FORMAT = 1  # of sweep.json and laws.json
SWEEP, RESULTS, LAWS = "sweep.json", "results.csv", "laws.json"
EVALUATION = "evaluation.json"  # of `clip-jax eval FOLDER/runs/* --output FOLDER/evaluation.csv`
CURVE = 61  # computes at which a law is drawn
BEYOND = (1.0, 10.0)  # times the largest compute: what is forecast unless something else is asked for


def describe(folder, name, plans):
  """Writes `sweep.json`, by which the folder is known for a sweep.

  Args:
    folder: of the sweep.
    name: what the sweep is called.
    plans: a list of `clip_jax.scaling.sweep.Planned`.
  """
  write_json(Path(folder) / SWEEP, {"format": FORMAT, "sweep": name, "runs": [one.described() for one in plans]})


def rows(folder):
  """The table of a sweep.

  Args:
    folder: of the sweep.

  Returns:
    A list of dicts with the columns of `clip_jax.scaling.table`, in the order of the runs.

  Raises:
    DataError: it is not the folder of a sweep, or a log in it cannot be read.
  """
  folder = Path(folder)
  described = read_json(folder / SWEEP)
  if described.get("format") != FORMAT:
    raise DataError(f"{folder / SWEEP} has format {described.get('format')}; this version reads format {FORMAT}.")
  beside, found = _evaluated_later(folder), []
  for run in described["runs"]:
    scores = _last_evaluation(folder / sweep.RUNS / run["name"] / "metrics.jsonl", run["steps"])
    if scores is None:
      continue
    about = {
      "arch": run["arch"] or run["name"],
      "samples_seen": run["samples"],
      "gmacs_total": run["gmacs"] * run["samples"],
      "gmacs": run["gmacs"],
      "upstream_dataset": run["data"],
      "name": run["name"],
    }
    for dataset, values in (scores | beside.get(run["name"], {})).items():
      kind = datasets.RETRIEVAL if any("retrieval" in name for name in values) else datasets.CLASSIFICATION
      found.append({**about, "downstream_dataset": dataset, **values, "task": kind})
  return found


def _last_evaluation(path, step):
  """Scores at a step, as a dict from set to a dict from column to value; None if the run did not get there."""
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
    evaluations = [json.loads(line) for line in lines if "eval/" in line]
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read ({error}).") from error
  found = None
  for values in (one for one in evaluations if one["step"] == step):
    found = found or {}
    for key, value in values.items():
      dataset, _, metric = key.removeprefix("eval/").rpartition("/")
      name = column(metric)
      if key.startswith("eval/") and name in table.METRICS and value is not None:
        found.setdefault(dataset, {})[name] = value
  return found


def _evaluated_later(folder):
  """What `clip-jax eval` found of runs, by their names; its rows win over those of training."""
  path, found = folder / EVALUATION, {}
  if not path.exists():
    return found
  runs = (folder / sweep.RUNS).resolve()
  for row in read_json(path).get("rows", []):
    where = Path(row["pretrained"].partition(" (")[0]).resolve()
    values = {name: value for name, value in row["metrics"].items() if name in table.METRICS and value is not None}
    if where.is_relative_to(runs) and where != runs and values:
      found.setdefault(where.relative_to(runs).parts[0], {})[row["dataset"]] = values
  return found


def results(folder, output=None):
  """Writes the table of a sweep.

  Args:
    folder: of the sweep.
    output: the file; `results.csv` in the folder if not given.

  Returns:
    Its path, and the rows, as dicts.

  Raises:
    DataError: as `rows`; or no run is finished.
  """
  found = rows(folder)
  if not found:
    raise DataError(f"{folder} has no finished run that was evaluated yet; `clip-jax scaling run` goes on with it.")
  return write_results(folder, found, output), found


def write_results(folder, found, output=None):
  """Writes the rows of a sweep.

  Args:
    folder: of the sweep.
    found: what `rows` returns.
    output: the file; `results.csv` in the folder if not given.

  Returns:
    Its path.
  """
  path = Path(output or Path(folder) / RESULTS)
  table.write(path, found)
  return path


def laws(rows, tasks, metric=None, method="frontier", where=(), group=None, at=(), tell=lambda sentence: None):
  """Laws fitted to the rows of a table.

  Args:
    rows: as `clip_jax.scaling.table.read` gives them.
    tasks: as `clip_jax.scaling.table.points` takes each.
    metric: as there.
    method: as `clip_jax.scaling.power_law.fit` takes it.
    where: as `clip_jax.scaling.table.points` takes it.
    group: a column; a law for each value of it. None: one law.
    at: computes to forecast, GMACs times samples; BEYOND times the largest if empty.
    tell: called with a sentence for each group that has no law.

  Returns:
    A list of dicts, ready for JSON (docs/scaling.md has their keys).

  Raises:
    UsageError: there is nothing to fit, in any group.
  """
  found, missing = [], []
  for task in tasks:
    points = table.points(rows, task, metric, where)
    for value, members in (table.grouped(points, group) if group else {None: points}).items():
      try:
        law = power_law.fit([one.compute for one in members], [one.error for one in members], method)
      except UsageError as error:
        about = f"{task}{'' if value is None else f', {group} {value}'}"
        missing.append(f"{about}: {error}")
        continue
      found.append({"group": value, "task": task, "metric": metric or members[0].metric} | _law(law, members, at))
  if not found:
    raise UsageError(missing[0])
  for sentence in missing:
    tell(sentence)
  return found


def _law(law, members, at):
  computes = np.array([one.compute for one in members])
  places = np.geomspace(computes.min(), 10 * computes.max(), CURVE)
  band = law.band(places) or (np.full(CURVE, None),) * 2
  forecasts = [(compute, *law.forecast(compute)) for compute in at or [computes.max() * times for times in BEYOND]]

  def row(compute, error, low, high):
    if low is not None:
      low, high = float(low), min(float(high), 1.0)  # which no error is above
    return {"compute": float(compute), "error": float(error), "low": low, "high": high}

  keys = ("method", "n", "beta", "alpha", "limit", "beta_ci", "alpha_ci", "limit_ci", "mae", "leave_one_out", "residuals")
  return {key: getattr(law, key) for key in keys} | {
    "points": [_point(one) for one in members],
    "fitted": [{"compute": one.compute, "error": one.error, "name": members[one.index].name, "index": one.index} for one in law.fitted],
    "curve": [row(*one) for one in zip(places, law(places), *band, strict=True)],
    "forecast": [row(compute, error, *(interval or (None, None))) for compute, error, interval in forecasts],
  }


def _point(one):
  return {key: getattr(one, key) for key in ("name", "arch", "data", "samples", "gmacs", "compute", "error")}


def optimal(law):
  """Which model, and how many samples, a compute is best spent on (Hoffmann et al. 2022, arXiv 2203.15556, approach 1).

  Args:
    law: as `laws` gives it.

  Returns:
    A dict, ready for JSON: `frontier`, the runs that no other one with as much compute betters; the exponents of compute to
    which the best model's size and samples grow, by least squares over the runs that the law was fitted to, None where these
    are all of one model; and `budgets`, what they say of the computes that are forecast.
  """
  points = sorted(law["points"], key=lambda one: (one["compute"], one["error"]))
  frontier = [one for i, one in enumerate(points) if all(one["error"] < other["error"] for other in points[:i])]
  winners = [point for point in (law["points"][one["index"]] for one in law["fitted"]) if point["gmacs"]]
  exponent, budgets = None, []
  if len({one["gmacs"] for one in winners}) > 1 and len({one["compute"] for one in winners}) > 1:
    exponent, height = np.polyfit(*(np.log10([one[key] for one in winners]) for key in ("compute", "gmacs")), 1)
    for one in law["forecast"]:
      gmacs = 10 ** (height + exponent * np.log10(one["compute"]))
      budgets.append({"compute": one["compute"], "gmacs": float(gmacs), "samples": float(one["compute"] / gmacs), "error": one["error"]})
  exponents = {"gmacs_exponent": exponent and float(exponent), "samples_exponent": exponent and float(1 - exponent)}
  return {"task": law["task"], "metric": law["metric"], "frontier": frontier, **exponents, "budgets": budgets}


def write_laws(folder):
  """Writes `laws.json`: of every set in the sweep's table the published law, and that of all points.

  Args:
    folder: of the sweep, with its `results.csv`.

  Returns:
    A list of sentences: why there is no law of a set.
  """
  found = table.read(Path(folder) / RESULTS)
  fitted, best, missing = [], [], []
  for task in dict.fromkeys(row.values["downstream_dataset"] for row in found):
    for method in ("frontier", "all"):
      try:
        fitted += laws(found, [task], method=method)
      except UsageError as error:
        missing.append(f"{method}: {error}")
        continue
      if method == "frontier":
        best.append(optimal(fitted[-1]))
  write_json(Path(folder) / LAWS, {"format": FORMAT, "laws": fitted, "optimal": best})
  return missing
