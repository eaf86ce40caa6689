"""The page of a scaling experiment: one self-contained HTML file in the folder of a sweep.

    scaling_page.write("sweeps/emoji_grid")        # -> sweeps/emoji_grid/report.html

scaling_results.py checks what the folder holds, scaling_plots.py draws; here all is arranged for templates/scaling.html.
"""

import csv
import math
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from clip_jax.errors import DataError, UsageError
from clip_jax.files import read_json, write_text
from clip_jax.report import page, plots
from clip_jax.report import scaling_plots as drawn
from clip_jax.report.evaluation_results import label
from clip_jax.report.run_log import Run, read_run
from clip_jax.report.scaling_axes import Look
from clip_jax.report.scaling_results import (
  FORMAT,
  Law,
  Optimal,
  Planned,
  between,
  compute_text,
  read_laws,
  read_optimal,
  read_runs,
  short,
)

LAST = 0.05  # the share of a run's lines whose median is its final loss


@dataclass(frozen=True)
class Folder:
  """What the folder of a sweep holds of its runs, by their names.

  Attributes:
    done: those that are finished.
    logs: what was logged; runs that have not begun are missing.
    reports: those that have a page of their own, runs/NAME/report.html.
  """

  done: frozenset[str] = frozenset()
  logs: Mapping[str, Run] | None = None
  reports: frozenset[str] = frozenset()


def write(folder: str | Path) -> Path:
  """Writes FOLDER/report.html, whole or not at all.

  Args:
    folder: holds sweep.json, and as far as the sweep has come laws.json, results.csv and runs/NAME/metrics.jsonl.

  Returns:
    The path of the page.

  Raises:
    UsageError: sweep.json is missing, or one of the files is not what it should be.
  """
  folder = Path(folder)
  sweep = read_json(folder / "sweep.json")
  laws = read_json(folder / "laws.json") if (folder / "laws.json").exists() else {}
  runs = _in(folder / "sweep.json", lambda: _runs(sweep))
  _in(folder / "laws.json", lambda: _laws(laws))
  # A name that is a path would lead elsewhere.
  names = [run.name for run in runs if Path(run.name).name == run.name]
  logs = {name: log for name in names if (log := _log(folder / "runs" / name / "metrics.jsonl"))}
  reports = frozenset(name for name in names if (folder / "runs" / name / "report.html").is_file())
  html = render(sweep, laws, Folder(_done(folder / "results.csv"), logs, reports))
  target = folder / "report.html"
  # A name can hold half a surrogate pair, which JSON allows and UTF-8 does not.
  write_text(target, html.encode("utf-8", "replace").decode())
  return target


def _in(path: Path, read: Callable[[], Any]) -> Any:
  try:
    return read()
  except UsageError as error:
    raise UsageError(f"{path}: {error}") from None


def _done(path: Path) -> frozenset[str]:
  if not path.exists():
    return frozenset()
  try:
    with path.open(encoding="utf-8", newline="") as file:
      return frozenset(row["name"] for row in csv.DictReader(file))
  except KeyError:
    raise DataError(f"{path} has no column name.") from None
  except (OSError, ValueError, csv.Error) as error:
    raise DataError(f"{path} cannot be read as CSV ({error}).") from None


def _log(path: Path) -> Run | None:
  """The log of a run; None if nothing has been logged."""
  try:
    with path.open("rb") as file:
      begun = file.readline().endswith(b"\n")
    return read_run(path) if begun else None
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError) as error:
    raise DataError(str(error)) from None


def render(sweep: Mapping[str, Any], laws: Mapping[str, Any], folder: Folder = Folder()) -> str:
  """The page as text.

  Args:
    sweep: the object in sweep.json.
    laws: the object in laws.json, or an empty one.
    folder: what there is of the runs.

  Raises:
    UsageError: one of them is not what it should be.
  """
  runs, logs = _runs(sweep), folder.logs or {}
  found, optimal = _laws(laws)
  everyone = [point for law in found for point in law.points] + [point for one in optimal for point in one.frontier]
  look = Look.of([*runs, *everyone])
  curves = [curve for run in runs if run.name in logs and (curve := _own(run, logs[run.name]))]
  losses = {curve.name: _final(curve) for curve in curves}
  errors = _errors(found)
  done = sum(run.name in folder.done for run in runs)
  return page.pages().get_template("scaling.html").render(
    title=str(sweep.get("sweep") or "Scaling experiment"),
    tiles=_tiles(runs, folder.done),
    planned=len(runs),
    missing=len(runs) - done,
    charts=_charts(found, laws.get("laws") or [], look, folder.reports),
    optimal=[_optimal(one, look, folder.reports) for one in optimal],
    curves=Markup(drawn.curves_svg(curves, look=look)) if curves else None,
    curves_left_out=len(runs) - len(curves),
    transfer=[Markup(drawn.transfer_svg(tried, name, look=look)) for name, tried in _transfer(runs, losses, errors)],
    error_columns=[{"task": task, "metric": label(metric)} for task, metric in errors],
    runs=[_row(run, folder, losses, errors) for run in runs],
    last=f"{100 * LAST:g}",
  )


def _known_format(content: Mapping[str, Any]) -> None:
  if content.get("format", FORMAT) != FORMAT:
    raise UsageError(f"format {content['format']!r} is not known; this version of clip_jax reads format {FORMAT}.")


def _runs(sweep: Mapping[str, Any]) -> list[Planned]:
  _known_format(sweep)
  return read_runs(sweep)


def _laws(laws: Mapping[str, Any]) -> tuple[list[Law], list[Optimal]]:
  _known_format(laws)
  return read_laws(laws.get("laws")), read_optimal(laws.get("optimal"))


def _range(values: Sequence[float], form: Callable[[float], str]) -> str:
  known = sorted({value for value in values if math.isfinite(value)})
  return " to ".join(form(value) for value in (known if len(known) < 2 else (known[0], known[-1])))


def _tiles(runs: Sequence[Planned], done: frozenset[str]) -> list[page.Tile]:
  if not runs:
    return []
  models, data = ({getattr(run, key): None for run in runs} for key in ("arch", "data"))
  missing = [run for run in runs if run.name not in done]
  # A run that goes on from another's checkpoint costs only what it trains itself.
  total, left = (sum(run.gmacs * run.own_samples for run in some) for some in (runs, missing))
  trained = sum(run.own_samples for run in runs)
  return [
    page.Tile("runs done", str(len(runs) - len(missing)), f"of {len(runs)}" + (f"; {len(missing)} missing" if missing else "")),
    page.Tile("model" if len(models) == 1 else "models", str(len(models)), f"{_range([run.gmacs for run in runs], short)} GMACs"),
    page.Tile("data set" if len(data) == 1 else "data sets", str(len(data)), ", ".join(data)),
    page.Tile("samples seen", _range([run.samples for run in runs], lambda n: plots.compact(n, 3)), f"{plots.compact(trained, 3)} trained in all"),
    page.Tile("GMACs × samples in all", compute_text(total), f"{compute_text(total - left)} of it done" if missing else ""),
  ]


def _charts(laws: Sequence[Law], records: Sequence[Mapping[str, Any]], look: Look, reports: frozenset[str]) -> list[dict[str, Any]]:
  """A chart for each task and metric, with its laws and the runs on the frontier."""
  sections = {}
  for law, record in zip(laws, records, strict=True):
    sections.setdefault((law.task, law.metric), []).append((law, record))
  charts = []
  for (task, metric), members in sections.items():
    own = [law for law, _ in members]
    charts.append({
      "task": task,
      "metric": label(metric),
      "svg": Markup(drawn.law_svg([record for _, record in members], look=look)),
      "laws": [_law(law) for law in own],
      "limits": any(law.method == "saturating" for law in own),
      "frontiers": [table for law in own if law.method == "frontier" and (table := _frontier(law, reports))["rows"]],
    })
  return charts


def _law(law: Law) -> dict[str, Any]:
  return {
    "label": law.label,
    "formula": law.formula,
    "beta": (short(law.beta), between(law.beta_ci)),
    "alpha": (short(law.alpha), between(law.alpha_ci)),
    "limit": (short(law.limit), between(law.limit_ci)) if law.method == "saturating" else ("", ""),
    "mae": short(law.mae, 2),
    "leave_one_out": short(law.leave_one_out, 2),
    "n": law.n,
    "forecasts": [(compute_text(one.compute), short(one.error), between((one.low, one.high), 3)) for one in law.forecast],
  }


def _link(name: str, reports: frozenset[str]) -> str:
  return f"runs/{urllib.parse.quote(name, safe='')}/report.html" if name in reports else ""


def _frontier(law: Law, reports: frozenset[str]) -> dict[str, Any]:
  rows = []
  for fitted in law.fitted:
    run = drawn.frontier_run(law, fitted)
    rows.append({
      "centre": compute_text(fitted.compute),
      "name": fitted.name or (run.arch if run else ""),
      "link": _link(fitted.name, reports),
      "compute": compute_text(run.compute) if run else "–",
      "error": short(fitted.error),
    })
  return {"group": law.group, "rows": rows}


def _optimal(one: Optimal, look: Look, reports: frozenset[str]) -> dict[str, Any]:
  return {
    "task": one.task,
    "metric": label(one.metric),
    "svgs": [Markup(drawn.optimal_svg(one, of, look=look)) for of in drawn.OPTIMAL] if one.frontier else [],
    "exponents": [short(one.gmacs_exponent, 2), short(one.samples_exponent, 2)]
    if math.isfinite(one.gmacs_exponent) and math.isfinite(one.samples_exponent)
    else [],
    "frontier": [
      {
        "compute": compute_text(run.compute),
        "name": run.name or run.arch,
        "link": _link(run.name, reports),
        "gmacs": short(run.gmacs),
        "samples": plots.compact(run.samples, 3) if math.isfinite(run.samples) else "–",
        "error": short(run.error),
      }
      for run in one.frontier
    ],
    "budgets": [
      {
        "compute": compute_text(b.compute),
        "gmacs": short(b.gmacs),
        "samples": plots.compact(b.samples, 3) if math.isfinite(b.samples) else "–",
        "error": short(b.error),
      }
      for b in one.budgets
    ],
  }


def _own(run: Planned, log: Run) -> drawn.Trained | None:
  """The loss of what a run trained itself: the log of one that goes on from another's checkpoint begins with the other's lines."""
  loss = log.curve("loss")
  kept = loss.steps > run.fork_step if loss else np.zeros(0, bool)
  return drawn.Trained(run.name, run.arch, run.data, loss.samples[kept], loss.values[kept]) if kept.any() else None


def _final(curve: drawn.Trained) -> float:
  """The median of the last lines, as a single one is of a single batch."""
  last = curve.loss[-max(5, round(LAST * len(curve.loss))) :]
  last = last[np.isfinite(last)]
  return float(np.median(last)) if len(last) else math.nan


def _errors(laws: Sequence[Law]) -> dict[tuple[str, str], dict[str, float]]:
  """The error of each run, by task and metric."""
  errors = {}
  for law in laws:
    errors.setdefault((law.task, law.metric), {}).update({point.name: point.error for point in law.points})
  return errors


def _transfer(
  runs: Sequence[Planned], losses: Mapping[str, float], errors: Mapping[tuple[str, str], Mapping[str, float]]
) -> list[tuple[str, list[drawn.Tried]]]:
  """The final loss and the first error of runs that differ from another one in nothing but their learning rate."""
  settings = {"data": lambda run: run.data, "samples": lambda run: plots.compact(run.samples, 3), "batch": lambda run: f"batch {run.batch:,.0f}"}
  varied = [write_one for write_one in settings.values() if len({write_one(run) for run in runs}) > 1]
  lines = {}
  for run in runs:
    lines.setdefault((run.arch, ", ".join(write_one(run) for write_one in varied)), []).append(run)
  values = {"final loss": losses}
  for (task, metric), known in list(errors.items())[:1]:
    values[f"error, {task}, 1 − {label(metric)}"] = known
  found = []
  for name, known in values.items():
    tried = []
    for (arch, rest), line in lines.items():
      shown = [drawn.Tried(run.name, arch, rest, run.learning_rate, known[run.name]) for run in line if run.name in known]
      tried += shown if len({one.learning_rate for one in shown}) > 1 else []
    if tried:
      found.append((name, tried))
  return found


def _row(run: Planned, folder: Folder, losses: Mapping[str, float], errors: Mapping[Any, Mapping[str, float]]) -> dict[str, Any]:
  return {
    "name": run.name,
    "link": _link(run.name, folder.reports),
    "fork": f"from step {run.fork_step:,} of {run.parent}" if run.parent else "",
    "done": run.name in folder.done,
    "arch": run.arch,
    "data": run.data,
    "samples": plots.compact(run.samples, 3),
    "own": plots.compact(run.own_samples, 3),
    "batch": f"{run.batch:,.0f}",
    "learning_rate": short(run.learning_rate),
    "gmacs": short(run.gmacs),
    "parameters": plots.compact(run.parameters, 3),
    "loss": short(losses[run.name], 4) if run.name in losses else "–",
    "errors": [short(known.get(run.name, math.nan)) for known in errors.values()],
  }
