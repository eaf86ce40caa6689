"""Geometry of the report's charts: what to draw where. The markup is in templates/chart.html.

Positions come as percentages and as units of a stretched viewBox, so that one chart fills a phone
and a desk without script, while its text keeps its size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

POINTS = 1_000  # drawn points a curve; more than a screen has columns to show them in
BINS = 400  # resolution of a smoothed curve
FEWEST_TO_SMOOTH = 20
DOTS = 40  # up to here each point is marked
WIDTH, HEIGHT = 2_000, 1_000  # the viewBox


@dataclass(frozen=True)
class Curve:
  """One metric as it was logged. Values may be NaN or infinite: they become gaps.

  Attributes:
    steps: [n] integers, ascending.
    samples: [n] samples seen at each step.
    values: [n] float64.
  """

  steps: np.ndarray
  samples: np.ndarray
  values: np.ndarray


@dataclass(frozen=True)
class Line:
  """A curve in a chart: its name in the legend, its colour (a CSS class), a running median or not."""

  label: str
  curve: Curve
  colour: str = "c1"
  smoothed: bool = False


@dataclass(frozen=True)
class Reference:
  """A level to compare with, drawn dashed over the whole width ("chance") or dotted ("yardstick")."""

  label: str
  value: float
  style: str = "chance"


@dataclass(frozen=True)
class Tick:
  """A mark on an axis with its label."""

  position: float  # percent of the axis, from the left or from the bottom
  label: str


@dataclass(frozen=True)
class Path:
  """An SVG path: its class, and its `d`."""

  css: str
  d: str


@dataclass(frozen=True)
class Entry:
  """A line of the legend. `hover` has one text for each hover position of the chart, or none."""

  css: str
  label: str
  text: str
  hover: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
  """All that templates/chart.html needs. `hover_*` have one entry for each hover position."""

  title: str
  summary: str
  x_ticks: list[Tick]
  y_ticks: list[Tick]
  paths: list[Path]
  legend: list[Entry]
  hover_x: list[int]
  hover_steps: list[str]
  hover_samples: list[str]


def percent(value: float) -> str:
  """`0.6825` as `68.3%`; a small share keeps one digit that is not zero (`0.03%`)."""
  if not math.isfinite(value):
    return "not finite"
  share = 100 * value
  if 0 < abs(share) < 0.05:
    return f"{share:.1g}%"
  return f"{share:.1f}%"


def number(value: float) -> str:
  """Four significant digits, in the notation people type: `6.931`, `12,345`, `1.25e-4`."""
  if not math.isfinite(value):
    return "not finite"
  if value and not 1e-3 <= abs(value) < 1e6:
    return _scientific(value)
  if abs(value) >= 1_000:
    return f"{value:,.0f}"
  return f"{value:.4g}"


def _scientific(value: float) -> str:
  mantissa, exponent = f"{value:.3e}".split("e")
  return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def compact(value: float, digits: int = 4) -> str:
  """A count in thousands, millions, billions: `307.2k`, `12.8B`."""
  for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
    # The bound is where rounding would reach the next unit, so that 999,999 is 1M and not 1000k.
    if abs(value) >= size * (1 - 0.5 * 10.0**-digits):
      return f"{value / size:.{digits}g}{suffix}"
  return f"{value:.{digits}g}"


def tick_step(low: float, high: float, count: int = 5) -> float:
  """1, 2 or 5 times a power of ten, so that at most `count` of them fit between low and high."""
  rough = (high - low) / count
  magnitude = 10.0 ** math.floor(math.log10(rough))
  return magnitude * next(m for m in (1, 2, 5, 10) if m * magnitude >= rough * (1 - 1e-9))


def ticks(low: float, high: float) -> list[float]:
  """The multiples of `tick_step` from low to high: two to six of them."""
  step = tick_step(low, high)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def thin(values: np.ndarray, limit: int = POINTS) -> np.ndarray:
  """Rows to draw of a long series.

  Args:
    values: [n] numbers, finite or not.
    limit: about how many rows to keep.

  Returns:
    Ascending row numbers: all of them if there are no more than `limit`; else the lowest and the
    highest of each of `limit / 2` stretches, so that no spike is lost, and one row that is not
    finite of each stretch that has one, so that no gap is either.
  """
  if len(values) <= limit:
    return np.arange(len(values))
  rows = [0, len(values) - 1]
  edges = np.linspace(0, len(values), limit // 2 + 1).astype(int)
  for start, end in zip(edges[:-1], edges[1:], strict=True):
    stretch = values[start:end]
    finite = np.isfinite(stretch)
    if finite.any():
      rows.append(start + int(np.argmin(np.where(finite, stretch, np.inf))))
      rows.append(start + int(np.argmax(np.where(finite, stretch, -np.inf))))
    if not finite.all():
      rows.append(start + int(np.argmin(finite)))
  return np.unique(rows)


def smooth(curve: Curve, share: float = 0.05) -> tuple[np.ndarray, np.ndarray, int]:
  """Running median: unlike a mean it leaves no plateau around a single spike.

  Args:
    curve: the series; values that are not finite count as absent.
    share: width of the window as a share of the whole series.

  Returns:
    (samples [m], medians [m], lines in a window), m at most BINS. A median is NaN where its middle
    line is not finite. Near the left end the window shrinks on both sides, otherwise the steep
    start of a loss would be flattened.
  """
  n = len(curve.values)
  middles = np.unique(np.linspace(0, n - 1, min(n, BINS)).round().astype(int))
  half = max(2, round(n * share / 2))
  medians = np.full(len(middles), np.nan)
  for i, middle in enumerate(middles):
    left = min(half, middle)
    window = curve.values[middle - left : middle + left + 1]
    if math.isfinite(curve.values[middle]):
      medians[i] = np.median(window[np.isfinite(window)])
  return curve.samples[middles], medians, 2 * half + 1


def samples_domain(curves: Sequence[Curve]) -> tuple[float, float]:
  """The horizontal axis that all charts of a page share.

  It starts at zero, unless the log starts late (a work directory that continues another's).
  """
  samples = [c.samples for c in curves if len(c.samples)]
  if not samples:
    return 0.0, 1.0
  low, high = min(s.min() for s in samples), max(s.max() for s in samples)
  low = 0.0 if low < 0.5 * high or low == high else float(low)
  return low, float(high) if high > low else low + 1.0


def chart(
  title: str,
  lines: Sequence[Line],
  domain: tuple[float, float],
  *,
  form: Callable[[float], str] = number,
  references: Sequence[Reference] = (),
  from_zero: bool = False,
  may_be_log: bool = False,
) -> Chart:
  """Lays out one chart against samples seen.

  Args:
    title: heading of the chart.
    lines: the curves, at least one.
    domain: (lowest, highest) samples seen, from `samples_domain`.
    form: writes a value of the vertical axis.
    references: levels drawn over the whole width; the axis is stretched to show them.
    from_zero: start the vertical axis at zero.
    may_be_log: use a logarithmic axis where spikes would press a linear one flat.
  """
  axis = _vertical_axis(lines, references, from_zero, may_be_log, form)

  def x(samples):
    return (np.asarray(samples) - domain[0]) / (domain[1] - domain[0]) * WIDTH

  paths, legend = [_level(r, axis) for r in references], []
  rows = [thin(line.curve.values) for line in lines]
  hover = np.unique(
    np.concatenate([line.curve.samples[r] for line, r in zip(lines, rows, strict=True)])
  )
  for line, kept in zip(lines, rows, strict=True):
    line_paths, entries = _draw(line, kept, x, axis, hover, form)
    paths += line_paths
    legend += entries
  legend += [Entry(f"swatch {r.style}", r.label, form(r.value)) for r in references]
  first = lines[0].curve.values
  return Chart(
    title=title + (" (log scale)" if axis.log else ""),
    summary=f"{title} against samples seen, from {form(first[0])} to {form(first[-1])}",
    x_ticks=[Tick(x(t) / WIDTH * 100, _count_label(t, tick_step(*domain))) for t in ticks(*domain)],
    y_ticks=axis.ticks,
    paths=paths,
    legend=legend,
    hover_x=[round(v) for v in x(hover)],
    hover_steps=[f"{s:,}" for s in _steps_at(hover, lines, rows)],
    hover_samples=[compact(s) for s in hover],
  )


@dataclass(frozen=True)
class _Axis:
  low: float
  high: float
  log: bool
  ticks: list[Tick]

  def fraction(self, values):
    """0 at the bottom, 1 at the top; NaN where there is nothing to draw."""
    values = np.where(np.isfinite(values), values, np.nan)
    if self.log:
      share = np.log(values / self.low) / math.log(self.high / self.low)
    else:
      share = (values - self.low) / (self.high - self.low)
    return np.clip(share, 0, 1)


def _vertical_axis(lines, references, from_zero, may_be_log, form) -> _Axis:
  values = np.concatenate([line.curve.values for line in lines])
  # Far outside of this range differences overflow; no chart could tell such values apart.
  values = np.clip(values[np.isfinite(values)], -1e150, 1e150)
  levels = np.append(values, [r.value for r in references])
  if not len(levels):
    return _Axis(0.0, 1.0, False, [])
  low, high = float(levels.min()), float(levels.max())
  # The 95th percentile and not the median: a loss that starts high and then falls is no spike.
  if may_be_log and low > 0 and len(values) and values.max() > 5 * np.quantile(values, 0.95):
    return _log_axis(low, high)
  if from_zero:
    low = min(low, 0.0)
  if high - low <= 1e-6 * max(abs(low), abs(high)):
    low, high = (low - 0.1 * abs(low), high + 0.1 * abs(high)) if low else (0.0, 1.0)
  # Round both ends outwards, so that every tick has its line and nothing leaves the frame.
  step = tick_step(low, high)
  low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
  marks = [
    Tick(100 * (t - low) / (high - low), _tick_label(t, step, max(-low, high), form))
    for t in np.arange(round((high - low) / step) + 1) * step + low
  ]
  return _Axis(low, high, False, marks)


def _log_axis(low: float, high: float) -> _Axis:
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  stride = max(1, math.ceil((last - first) / 6))
  marks = [
    Tick(100 * (e - first) / (last - first), number(10.0**e) if -3 < e < 4 else f"1e{e}")
    for e in range(first, last + 1, stride)
  ]
  return _Axis(10.0**first, 10.0**last, True, marks)


def _tick_label(value, step, largest, form) -> str:
  """Ticks of one axis are written alike, with no more decimals than the step needs."""
  if abs(value) < step / 1e6:
    return "0%" if form is percent else "0"
  if form is percent:
    return f"{100 * value:.{_decimals(100 * step)}f}%"
  if largest >= 1e15 or step < 1e-3:
    return _scientific(value)
  return _count_label(value, step) if largest >= 10_000 else f"{value:,.{_decimals(step)}f}"


def _count_label(value: float, step: float) -> str:
  """A large number with as many digits as tell it from its neighbours."""
  digits = math.floor(math.log10(abs(value) or 1)) - math.floor(math.log10(step) + 1e-9) + 1
  return compact(value, max(3, digits))


def _decimals(step: float) -> int:
  return max(0, -math.floor(math.log10(step) + 1e-9))


def _draw(line, rows, x, axis, hover, form) -> tuple[list[Path], list[Entry]]:
  """Paths and legend of one line. `rows` are those to draw, `hover` the chart's hover samples."""
  curve = line.curve
  samples, values = curve.samples[rows], curve.values[rows]
  texts = dict(zip(samples, map(form, values), strict=True))
  logged = tuple(texts.get(s, "") for s in hover)
  drawn = _path(x(samples), axis.fraction(values))
  paths, entries = [], []
  finite = np.isfinite(values)
  if line.smoothed and len(curve.values) >= FEWEST_TO_SMOOTH:
    at, medians, width = smooth(curve)
    paths.append(Path(f"raw {line.colour}", drawn))
    paths.append(Path(f"line {line.colour}", _path(x(at), axis.fraction(medians))))
    entries.append(Entry(f"swatch raw {line.colour}", "logged", form(curve.values[-1]), logged))
    known = np.isfinite(medians)
    if known.any():
      hovered = tuple(map(form, np.interp(hover, at[known], medians[known])))
      last = form(float(medians[known][-1]))
      entries.append(Entry(f"swatch {line.colour}", f"median of {width:,} lines", last, hovered))
  else:
    paths.append(Path(f"line {line.colour}", drawn))
    if finite.sum() <= DOTS:
      dots = _dots(x(samples[finite]), axis.fraction(values[finite]))
      paths.append(Path(f"dot {line.colour}", dots))
    entries.append(Entry(f"swatch {line.colour}", line.label, form(curve.values[-1]), logged))
  if not finite.all():
    lost = ~np.isfinite(curve.values)
    paths.append(Path("lost", _dots(x(samples[~finite]), np.zeros((~finite).sum()))))
    step = curve.steps[np.argmax(lost)]
    entries.append(Entry("swatch lost", f"not finite, first at step {step:,}", f"{lost.sum():,}×"))
  return paths, entries


def _level(reference, axis) -> Path:
  y = (1 - axis.fraction(reference.value)) * HEIGHT
  return Path(f"level {reference.style}", f"M0 {y:.0f}H{WIDTH}")


def _points(x, fraction) -> list[tuple[int, int] | None]:
  """Units of the viewBox, None for a gap."""
  return [
    (round(a), round((1 - f) * HEIGHT)) if np.isfinite(f) else None
    for a, f in zip(x, fraction, strict=True)
  ]


def _runs(points):
  """The stretches between gaps."""
  run = []
  for point in [*points, None]:
    if point is not None:
      run.append(point)
    elif run:
      yield run
      run = []


def _path(x, fraction) -> str:
  # "h0" gives a run of one point the length zero, which round line caps show as a dot.
  return "".join(
    "M" + "L".join(f"{a} {b}" for a, b in run) + ("h0" if len(run) == 1 else "")
    for run in _runs(_points(x, fraction))
  )


def _dots(x, fraction) -> str:
  return "".join(f"M{a} {b}h0" for a, b in _points(x, fraction))


def _steps_at(hover, lines, rows) -> list[int]:
  steps = {}
  for line, kept in zip(lines, rows, strict=True):
    steps.update(zip(line.curve.samples[kept], line.curve.steps[kept], strict=True))
  return [int(steps[s]) for s in hover]
