"""The charts of a scaling experiment.

    scaling_plots.write("law.png", laws)        # of one task and metric, as laws.json has them

scaling_results.py checks what they show; scaling_axes.py has the axes, and how models and data sets look.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import MissingExtraError, UsageError
from clip_jax.files import write_bytes, write_text
from clip_jax.report import plots
from clip_jax.report.evaluation_results import label
from clip_jax.report.scaling_axes import (
  COLOURS,
  DASHES,
  INK,
  SOFT,
  Chart,
  Look,
  cut,
  drawable,
  shape,
  stroke,
)
from clip_jax.report.scaling_results import (
  Law,
  Optimal,
  Place,
  Point,
  between,
  compute_text,
  read_laws,
  short,
)

COMPUTE = "compute, GMACs × samples"
FAR = 2  # how many times beyond the points an interval may stretch the vertical axis
PNG_WIDTH = 1720  # pixels; twice that of the drawing, for screens that show two for one
OPTIMAL = {"error": ("lowest error", short), "gmacs": ("GMACs of a pair", short), "samples": ("samples seen", plots.compact)}
WIDE, HALF, PANEL = (1160, 460), (560, 360), (430, 300)  # one, two or three charts in a row of the page


@dataclass(frozen=True)
class Trained:
  """The loss of a run while it was trained."""

  name: str
  arch: str
  data: str
  samples: np.ndarray
  loss: np.ndarray


@dataclass(frozen=True)
class Tried:
  """What a run reached with a learning rate; `rest` is what else tells it from others of its model, such as its batch."""

  name: str
  arch: str
  rest: str
  learning_rate: float
  value: float


def law_svg(laws: Sequence[Mapping[str, Any]], standalone: bool = False, look: Look | None = None) -> str:
  """Error against compute: runs, laws, and what these foretell.

  Args:
    laws: of one task and metric, as laws.json has them; the first is drawn boldest.
    standalone: whether it is a file of its own, and not a part of a page.
    look: of models and data sets; if not given, that of the runs here.

  Raises:
    UsageError: the laws are not what they should be, none, or of several tasks or metrics.
  """
  laws = read_laws(laws)
  kinds = list(dict.fromkeys(f"{law.task} {law.metric}" for law in laws))
  if len(kinds) != 1:
    raise UsageError(f"A chart shows the laws of one task and metric; there are {', '.join(kinds) or 'none, as two finished runs are the fewest'}.")
  everyone = list(dict.fromkeys(point for law in laws for point in law.points))
  points = [one for one in everyone if drawable(one.compute, one.error)]
  look = look or Look.of(points)
  colours = _law_colours(laws, look)
  legend = look.models_legend(points) + look.data_legend(points)
  for law, colour, width in zip(laws, colours, _law_widths(laws), strict=True):
    interval = between(law.alpha_ci)
    legend.append((stroke("M-11 0H11", colour, width, css=_ink(colour)), f"{law.label}: {law.formula}" + (f" (alpha {interval})" if interval else "")))
  if any(law.method == "frontier" for law in laws):
    legend.append((_RING + _cross(0), "best of its bin, and where the fit puts it"))
  first = laws[0]
  summary = f"error against compute, {first.task} {first.metric}: {'; '.join(f'{law.label} {law.formula}' for law in laws)}"
  xs = [one.compute for one in (*points, *(end for law in laws for end in (*law.curve, *law.forecast)))]
  y_name = f"error, 1 − {label(first.metric)}"
  chart = Chart(summary, (COMPUTE, compute_text, xs), (y_name, short, _errors(laws, points)), legend)
  chart.band(first.curve, INK, "trace-area")
  for law, colour, width in reversed(list(zip(laws, colours, _law_widths(laws), strict=True))):
    _law_line(chart, law, colour, width)
  for one in points:
    seen = f", {plots.compact(one.samples)} samples" if math.isfinite(one.samples) else ""
    chart.put(one.compute, one.error, look.marker(one), f"{one.name or one.arch}{seen}: error {short(one.error)}", "point")
  for law, colour in reversed(list(zip(laws, colours, strict=True))):
    _frontier(chart, law)
    _forecasts(chart, law, colour, named=law is first)
  return chart.svg(standalone)


_RING = f'<circle class="trace" r="9.5" fill="none" stroke="{INK}" stroke-width="1.4"/>'


def _cross(x):
  return stroke(f"M{x - 3.5} -3.5L{x + 3.5} 3.5M{x - 3.5} 3.5L{x + 3.5} -3.5", INK, 1.4, css="trace")


def _ink(colour):
  return "trace" if colour == INK else ""


def _law_colours(laws, look):
  # From the end, which the models, from the beginning, reach last.
  return [INK if i == 0 else COLOURS[-i % len(COLOURS)] for i, _ in enumerate(laws)]


def _law_widths(laws):
  return [2 if i == 0 else 1.2 for i, _ in enumerate(laws)]


def _errors(laws, points):
  """What the vertical axis must show: intervals only as far as they leave room for the points."""
  lines = [one for law in laws for one in (*law.curve, *law.forecast)]
  errors = [one.error for one in (*points, *lines) if drawable(one.error)] or [1.0]
  low, high = min(errors) / FAR, max(errors) * FAR
  return errors + [end for one in lines for end in (one.low, one.high) if low <= end <= high]


def _law_line(chart, law, colour, width):
  """Solid as far as there are runs, and dashed beyond."""
  end = max((one.compute for one in law.points), default=math.inf) * (1 + 1e-9)
  places = sorted((*law.curve, *law.forecast), key=lambda one: one.compute)
  within = [one for one in places if one.compute <= end]
  beyond = within[-1:] + [one for one in places if one.compute > end]
  for part, dash in ((within, ""), (beyond, "6 5")):
    told = f"{law.label}: {law.formula}"
    chart.line([one.compute for one in part], [one.error for one in part], colour, width, dash, _ink(colour) or "law", told)


def _frontier(chart, law):
  if law.method != "frontier":
    return
  for i, fitted in enumerate(law.fitted, 1):
    run = frontier_run(law, fitted)
    if run is None or not drawable(run.compute, run.error, fitted.compute):
      continue
    told = f"{run.name or run.arch}: the best of bin {i}, at {compute_text(run.compute)}; the fit puts it at {compute_text(fitted.compute)}"
    chart.line([run.compute, fitted.compute], [run.error, fitted.error], INK, 0.8, "1.5 2.5", "trace")
    chart.put(run.compute, run.error, _RING, told, "ringed")
    chart.put(fitted.compute, fitted.error, _cross(0), told, "centre")


def frontier_run(law: Law, fitted: Place) -> Point | None:
  """The run that stands for a bin; None if the law has none of its name and error."""
  # Runs of a table of others' results may have no names.
  same = [one for one in law.points if one.name == fitted.name and math.isclose(one.error, fitted.error, rel_tol=1e-6)]
  return min(same, key=lambda one: abs(one.compute - fitted.compute), default=None)


def _forecasts(chart, law, colour, named):
  for one in law.forecast:
    if not drawable(one.compute, one.error):
      continue
    interval = between((one.low, one.high), 3)
    words = short(one.error) + (f" ({interval})" if interval else "")
    if drawable(one.low, one.high):
      chart.line([one.compute] * 2, [one.low, one.high], colour, 1.4, css=_ink(colour))
    dot = f'<circle class="{_ink(colour)} ground" r="4" fill="#fff" stroke="{colour}" stroke-width="1.6"/>'
    chart.put(one.compute, one.error, dot, f"{law.label}, forecast at {compute_text(one.compute)}: {words}", "forecast")
    if named:
      chart.write(chart.x(one.compute) - 9, chart.y(one.error) + 15, words, "ink", "end")


def curves_svg(curves: Sequence[Trained], standalone: bool = False, look: Look | None = None) -> str:
  """The losses of all runs on the same axes.

  Args:
    curves: one a run; with more lines than are smoothed in a run's report, they are running medians.
    standalone: whether it is a file of its own, and not a part of a page.
    look: of models and data sets; if not given, the models are in the order of the curves.
  """
  look = look or Look(*(tuple(dict.fromkeys(getattr(one, key) for one in curves)) for key in ("arch", "data")), ())
  drawn = []
  for one in curves:
    samples, loss = one.samples, one.loss
    if len(loss) >= plots.FEWEST_TO_SMOOTH:
      samples, loss, _ = plots.smooth(plots.Curve(samples, samples, loss))
    drawn.append((one, samples, loss))
  xs = [value for _, samples, _ in drawn for value in samples]
  ys = [value for _, _, loss in drawn for value in loss]
  summary = f"training loss against samples seen, {len(curves)} runs"
  chart = Chart(summary, ("samples seen", plots.compact, xs), ("training loss", short, ys), look.models_legend(curves) + look.data_legend(curves, dashes=True), size=WIDE)
  for one, samples, loss in drawn:
    chart.line(samples, loss, look.colour(one.arch), 1.5, look.dash(one.data), "curve", one.name)
  return chart.svg(standalone)


def optimal_svg(optimal: Optimal, of: str, standalone: bool = False, look: Look | None = None) -> str:
  """What is best for each amount of compute: the runs that none of less compute reaches, and how they grow.

  Args:
    optimal: of one task and metric.
    of: a key of OPTIMAL, the vertical axis.
    standalone: whether it is a file of its own, and not a part of a page.
    look: of models and data sets; if not given, that of the runs here.
  """
  title, form = OPTIMAL[of]
  runs, look = optimal.frontier, look or Look.of(optimal.frontier)
  xs, ys = [one.compute for one in runs], [getattr(one, of) for one in runs]
  fitted = [(one.compute, getattr(one, of)) for one in optimal.budgets]
  everyone = [*zip(xs, ys, strict=True), *fitted]
  axes = (COMPUTE, compute_text, [x for x, _ in everyone]), (title, form, [y for _, y in everyone])
  chart = Chart(f"{title} against compute, {optimal.task} {optimal.metric}", *axes, size=PANEL)
  chart.line(xs, ys, INK, 1.4, css="trace", steps=True)
  chart.line([x for x, _ in fitted], [y for _, y in fitted], SOFT, 1.4, "6 5", "budgets")
  for one, x, y in zip(runs, xs, ys, strict=True):
    if drawable(x, y):
      chart.put(x, y, look.marker(one), f"{one.name or one.arch}: {plots.compact(one.samples)} samples, error {short(one.error)}", "point")
  return chart.svg(standalone)


def transfer_svg(tried: Sequence[Tried], y_name: str, standalone: bool = False, look: Look | None = None) -> str:
  """What runs reached against their learning rate: a line for all that differ in nothing else, its lowest point ringed.

  Args:
    tried: the runs.
    y_name: what they reached, such as "final loss".
    standalone: whether it is a file of its own, and not a part of a page.
    look: of models; if not given, these are in the order of the runs.
  """
  look = look or Look(tuple(dict.fromkeys(one.arch for one in tried)), (), ())
  rests = list(dict.fromkeys(one.rest for one in tried))
  legend = look.models_legend(tried)
  legend += [(stroke("M-11 0H11", SOFT, 1.6, DASHES[i % len(DASHES)]), cut(rest)) for i, rest in enumerate(rests) if rest]
  known = [one for one in tried if drawable(one.learning_rate, one.value)]
  axes = ("learning rate", short, [one.learning_rate for one in known]), (y_name, short, [one.value for one in known])
  chart = Chart(f"{y_name} against learning rate", *axes, legend, size=HALF)
  lines = {}
  for one in sorted(known, key=lambda one: one.learning_rate):
    lines.setdefault((one.arch, one.rest), []).append(one)
  for (arch, rest), line in lines.items():
    colour, i = look.colour(arch), rests.index(rest)
    xs, ys = zip(*((one.learning_rate, one.value) for one in line), strict=True)
    chart.line(xs, ys, colour, 1.6, DASHES[i % len(DASHES)], "tried", " ".join(filter(None, (arch, rest))))
    for one in line:
      chart.put(one.learning_rate, one.value, shape(i, colour, 4.5), f"{one.name}: {short(one.value)}", "point")
    best = min(line, key=lambda one: one.value)
    chart.put(best.learning_rate, best.value, _RING, f"{one.name}: the lowest, {short(best.value)}", "ringed")
  return chart.svg(standalone)


def write(path: str | Path, laws: Sequence[Mapping[str, Any]], width: int = PNG_WIDTH) -> Path:
  """Writes the chart of `law_svg`.

  Args:
    path: ends in .svg or .png.
    laws: of one task and metric, as laws.json has them.
    width: pixels of a PNG.

  Returns:
    The path.

  Raises:
    UsageError: another ending, no laws or wrong ones, or resvg is not installed, which a PNG needs.
  """
  path = Path(path)
  ending = path.suffix.lower()
  if ending not in (".svg", ".png"):
    raise UsageError(f"{path} ends in neither .svg nor .png, which are what a chart can be written as.")
  svg = law_svg(laws, standalone=True)
  if ending == ".svg":
    write_text(path, svg + "\n")
  else:
    write_bytes(path, _rasterised(svg, width))
  return path


def _rasterised(svg, width):
  try:
    resvg = importlib.import_module("resvg_py")
  except ImportError as error:
    raise MissingExtraError("a chart as PNG", "quickstart", "resvg-py") from error
  return bytes(resvg.svg_to_bytes(svg_string=svg, width=width))
