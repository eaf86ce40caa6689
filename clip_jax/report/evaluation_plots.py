"""Geometry of the charts on the page of an evaluation: bars, and points in a plane. The markup is in templates/evaluation.html.

As in plots.py, positions are percentages and units of a stretched viewBox.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clip_jax.report import plots
from clip_jax.report.evaluation_results import Model, Score
from clip_jax.report.published import Reference


@dataclass(frozen=True)
class Bar:
  """A bar: whose it is, in which colour (a CSS class), and how long it is, and its whisker from where to where, in percent of the axis."""

  label: str
  colour: str
  value: float
  text: str
  width: float | None
  whisker: tuple[float, float] | None = None
  source: str = ""

  @property
  def published(self) -> bool:
    """Whether it is somebody else's result."""
    return bool(self.source)


@dataclass(frozen=True)
class BarChart:
  """Bars of one metric on one data set, on an axis of their own that begins at zero and has its ends and its middle marked."""

  title: str
  metric: str
  note: str
  bars: list[Bar]
  chance: plots.Tick | None
  ticks: list[plots.Tick]


def bar_chart(
  title: str, metric: str, note: str, scores: Sequence[tuple[Model, Score]], references: Sequence[Reference] = ()
) -> BarChart:
  """Lays out bars.

  Args:
    title: the data set.
    metric: its name for people.
    note: task, split and size.
    scores: what each model reached, all of them shares.
    references: published results, drawn beneath.
  """
  chance = next((score.chance for _, score in scores if math.isfinite(score.chance)), math.nan)
  ends = [score.value + (score.error if math.isfinite(score.error) else 0) for _, score in scores]
  ends = [min(end, 1.0) for end in (*ends, chance, *(one.value for one in references)) if end > 0]  # NaN is left out, too
  top = max(ends, default=1.0)
  step = plots.tick_step(0, top, 4)
  top = math.ceil(top / step - 1e-9) * step

  def place(value):
    return round(100 * min(max(value, 0), top) / top, 2)

  bars = []
  for model, score in scores:
    low, high = score.value - score.error, score.value + score.error
    bars.append(
      Bar(
        model.label,
        model.colour,
        score.value,
        score.text,
        place(score.value) if score.known else None,
        (place(low), place(high)) if math.isfinite(low) else None,
      )
    )
  bars += [
    Bar(one.model, "published", one.value, Score(one.value).text, place(one.value), source=one.source) for one in references
  ]
  return BarChart(
    title=title,
    metric=metric,
    note=note,
    bars=bars,
    chance=plots.Tick(place(chance), plots.percent(chance)) if math.isfinite(chance) else None,
    ticks=[plots.Tick(place(t), f"{100 * t:.4g}%") for t in (0, top / 2, top)],
  )


@dataclass(frozen=True)
class Mark:
  """A path of a plane, with what a pointer that rests on it is told. `width` is the diameter of dots, in pixels."""

  css: str
  d: str
  title: str = ""
  width: float | None = None


@dataclass(frozen=True)
class Plane:
  """Points in a plane: all that its macro in templates/evaluation.html needs."""

  title: str
  summary: str
  x_label: str
  y_label: str
  x_ticks: list[plots.Tick]
  y_ticks: list[plots.Tick]
  marks: list[Mark]
  legend: list[plots.Entry]


@dataclass(frozen=True)
class Point:
  """A model on two data sets. `css` is its colour, or how a published one is drawn."""

  label: str
  css: str
  x: Score
  y: Score


@dataclass(frozen=True)
class Curve:
  """How often a model is right (accuracy), by how sure it is (confidence). Bins are (confidence, accuracy, count)."""

  label: str
  colour: str
  note: str
  bins: Sequence[tuple[float, float, float]]


@dataclass(frozen=True)
class _Axes:
  x_low: float
  x_high: float
  y_low: float
  y_high: float

  def x(self, value: float) -> int:
    return round(plots.WIDTH * min(max((value - self.x_low) / (self.x_high - self.x_low), 0), 1))

  def y(self, value: float) -> int:
    return round(plots.HEIGHT * (1 - min(max((value - self.y_low) / (self.y_high - self.y_low), 0), 1)))

  @property
  def ticks(self) -> dict[str, list[plots.Tick]]:
    return {
      "x_ticks": _ticks(self.x_low, self.x_high),
      "y_ticks": _ticks(self.y_low, self.y_high),
    }

  @property
  def diagonal(self) -> str:
    """Where both coordinates are equal."""
    low, high = max(self.x_low, self.y_low), min(self.x_high, self.y_high)
    return f"M{self.x(low)} {self.y(low)}L{self.x(high)} {self.y(high)}"


def _ticks(low: float, high: float) -> list[plots.Tick]:
  return [plots.Tick(100 * (t - low) / (high - low), f"{100 * t:.4g}%") for t in plots.ticks(low, high)]


def _tens(values: Sequence[float]) -> tuple[float, float]:
  """The values' range, widened to whole tenths that leave the outermost points within the frame."""
  low, high = math.floor(10 * min(values) - 0.1) / 10, math.ceil(10 * max(values) + 0.1) / 10
  return max(low, 0.0), min(high, 1.0)


def shift(dataset: str, x_label: str, points: Sequence[Point], published: Sequence[Point]) -> Plane:
  """Accuracy on a shifted set against accuracy on the set it is shifted from (Taori et al. 2020, figure 1).

  Args:
    dataset: the shifted set.
    x_label: name of the other set's axis.
    points: the models evaluated, at least one.
    published: models to compare with, drawn beneath.
  """
  everyone = [*published, *points]
  xs, ys = [p.x.value for p in everyone], [p.y.value for p in everyone]
  # The vertical axis holds the horizontal one's range, so that the line x = y crosses the whole plot.
  axes = _Axes(*_tens(xs), *_tens([*xs, *ys]))
  marks = [Mark("level chance", axes.diagonal, "as accurate under the shift as on ImageNet")]
  for p in everyone:
    marks += _whiskers(axes, p)
  for p in everyone:
    dot = f"M{axes.x(p.x.value)} {axes.y(p.y.value)}h0"
    marks.append(Mark(f"spot {p.css}", dot, f"{p.label}: {p.x.write(p.x.value)}% → {p.y.write(p.y.value)}%"))
    if p.css == "supervised":
      marks.append(Mark("hole", dot))
  legend = [
    plots.Entry(f"swatch dot {p.css}", p.label, f"{p.y.write(p.y.value)}%, {_signed(p.y.value - p.x.value)}") for p in points
  ]
  told = "; ".join(f"{p.label} {p.x.write(p.x.value)}% to {p.y.write(p.y.value)}%" for p in points)
  y_label = f"{dataset} acc1"
  return Plane(dataset, f"{y_label} against {x_label}: {told}", x_label, y_label, **axes.ticks, marks=marks, legend=legend)


def _whiskers(axes: _Axes, point: Point) -> list[Mark]:
  x, y, marks = point.x, point.y, []
  if math.isfinite(x.error):
    marks.append(Mark(f"thin {point.css}", f"M{axes.x(x.value - x.error)} {axes.y(y.value)}H{axes.x(x.value + x.error)}"))
  if math.isfinite(y.error):
    marks.append(Mark(f"thin {point.css}", f"M{axes.x(x.value)} {axes.y(y.value - y.error)}V{axes.y(y.value + y.error)}"))
  return marks


def _signed(difference: float) -> str:
  """A difference of shares in points: `+2.0`, `−7.3`."""
  return f"{100 * difference:+.1f}".replace("-", "−")


def reliability(title: str, curves: Sequence[Curve]) -> Plane:
  """Accuracy against confidence, each between 0 and 1 (Guo et al. 2017, figure 4). Larger dots stand for more items.

  Args:
    title: the data set.
    curves: one a model, each with at least one bin.
  """
  axes = _Axes(0.0, 1.0, 0.0, 1.0)
  marks = [Mark("level chance", axes.diagonal, "as often right as it is sure")]
  legend = []
  for curve in curves:
    bins = sorted(curve.bins)
    most = max(count for _, _, count in bins)
    places = [f"{axes.x(confidence)} {axes.y(accuracy)}" for confidence, accuracy, _ in bins]
    marks.append(Mark(f"line {curve.colour}", "M" + "L".join(places)))
    for (confidence, accuracy, count), at in zip(bins, places, strict=True):
      told = f"{curve.label}: sure {plots.percent(confidence)}, right {plots.percent(accuracy)}, {count:,.0f} items"
      # The area, not the diameter, goes with the count.
      marks.append(Mark(f"spot {curve.colour}", f"M{at}h0", told, round(4 + 9 * math.sqrt(count / most), 1)))
    legend.append(plots.Entry(f"swatch {curve.colour}", curve.label, curve.note))
  told = "; ".join(f"{curve.label} {curve.note}".strip() for curve in curves)
  return Plane(title, f"accuracy against confidence: {told}", "confidence", "accuracy", **axes.ticks, marks=marks, legend=legend)
