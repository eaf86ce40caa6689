"""Charts with two logarithmic axes, as SVG that stands alone in a file and as well inside of a page; scaling_plots.py draws on them.

Colours are attributes; the classes are for a page, whose style sheet overrides what depends on its background
(templates/scaling.css).
"""

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clip_jax.report import plots

# Told apart by those who see fewer colours, and at a contrast of 3 or more on white and on the page's dark cards.
COLOURS = ("#0072b2", "#d55e00", "#12906a", "#c2609a", "#7b61c9", "#a6761d", "#c8324a", "#1b8a9e")
INK, SOFT, HAIR = "#1c1d20", "#5c6068", "#e3e3de"
# Corners on a circle of radius 1, of about the same area; none is the circle itself.
SHAPES = (
  (),
  ((-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)),
  ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
  ((0, -1.25), (1.1, 0), (0, 1.25), (-1.1, 0)),
  ((0, 1.2), (1.1, -0.8), (-1.1, -0.8)),
  ((0, -1.1), (1.05, -0.34), (0.65, 0.89), (-0.65, 0.89), (-1.05, -0.34)),
)
DASHES = ("", "7 4", "2 3", "9 3 2 3")
# resvg draws no words where a machine has none of them: Linux has one of the last two, as a rule.
FONTS = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
LETTER = 6.9  # pixels that a letter of the legend takes at most, on average
NAME = 32  # letters of a name in a legend

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Look:
  """Which colour a model has, and which shape and dashes a data set: the same in all charts of a page."""

  models: tuple[str, ...]
  data: tuple[str, ...]
  samples: tuple[float, ...]

  @classmethod
  def of(cls, runs: Iterable[Any]) -> "Look":
    """Of anything that has arch, data, samples and gmacs; the smallest model comes first."""
    runs = list(runs)
    models = sorted(runs, key=lambda one: one.gmacs if math.isfinite(one.gmacs) else math.inf)
    samples = sorted({one.samples for one in runs if math.isfinite(one.samples)})
    return cls(tuple(dict.fromkeys(one.arch for one in models)), tuple(dict.fromkeys(one.data for one in runs)), tuple(samples))

  def colour(self, arch: str) -> str:
    """The colour of a model."""
    return COLOURS[self.models.index(arch) % len(COLOURS)]

  def dash(self, data: str) -> str:
    """The dashes of a data set's curves."""
    return DASHES[self.data.index(data) % len(DASHES)]

  def marker(self, one: Any) -> str:
    """A run's marker around the origin, larger for more samples seen."""
    rank = self.samples.index(one.samples) / max(len(self.samples) - 1, 1) if one.samples in self.samples else 0.5
    return shape(self.data.index(one.data), self.colour(one.arch), 4 + 2.6 * rank)

  def models_legend(self, runs: Iterable[Any]) -> list[tuple[str, str]]:
    """Entries for the models of some runs."""
    shown = {one.arch for one in runs}
    return [(shape(0, self.colour(arch), 5.5), cut(arch)) for arch in self.models if arch in shown and arch]

  def data_legend(self, runs: Iterable[Any], dashes: bool = False) -> list[tuple[str, str]]:
    """Entries for the data sets of some runs, as shapes or as dashes, and for what the size of a shape says."""
    runs = list(runs)
    shown, entries = {one.data for one in runs}, []
    for i, data in enumerate(self.data):
      if data in shown and data:
        entries.append((stroke("M-11 0H11", SOFT, 1.6, self.dash(data)) if dashes else shape(i, SOFT, 5.5), cut(data)))
    if not dashes and len(self.samples) > 1:
      few, many = (plots.compact(end, 3) for end in (self.samples[0], self.samples[-1]))
      sizes = f'<g transform="translate(-7 0)">{shape(0, SOFT, 3.2)}</g><g transform="translate(3 0)">{shape(0, SOFT, 5.5)}</g>'
      entries.append((sizes, f"{few} to {many} samples seen"))
    return entries


def text(value: str) -> str:
  """Anybody's text as XML holds it."""
  return html.escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value))


def cut(name: str) -> str:
  """A name that is short enough for a legend."""
  return name if len(name) <= NAME else f"{name[: NAME - 1]}…"


def shape(kind: int, colour: str, radius: float) -> str:
  """One of SHAPES around the origin."""
  corners = SHAPES[kind % len(SHAPES)]
  at = " ".join(f"{x * radius:.1f},{y * radius:.1f}" for x, y in corners)
  drawn = f'<polygon points="{at}"/>' if corners else f'<circle r="{radius:.1f}"/>'
  return f'<g class="halo" fill="{colour}" stroke="#fff">{drawn}</g>'


def stroke(d: str, colour: str, width: float, dash: str = "", css: str = "", told: str = "") -> str:
  """A path that is not filled, with what a pointer is told that rests on it."""
  css, dash = (f' class="{css}"' if css else ""), (f' stroke-dasharray="{dash}"' if dash else "")
  return f'<path{css} fill="none" stroke="{colour}" stroke-width="{width}"{dash} d="{d}">{told and f"<title>{text(told)}</title>"}</path>'


def drawable(*values: float) -> bool:
  """Whether all values have logarithms."""
  return all(math.isfinite(value) and value > 0 for value in values)


def ticks(low: float, high: float, most: int) -> list[float]:
  """Round numbers on a logarithmic axis, as many in each decade as there may be; where those are less than three, as on a linear one.

  Args:
    low: where the axis begins.
    high: where it ends.
    most: how many there may be.
  """
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  found = []
  for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
    marks = [float(f"{step}e{e}") for e in range(first, last + 1) for step in steps]
    found = [mark for mark in marks if low <= mark <= high]
    if len(found) <= most:
      break
  found = found[:: math.ceil(len(found) / most) or 1]
  return found if len(found) >= 3 or high > 12 * low else plots.ticks(low, high)


class Chart:
  """Two logarithmic axes, and what is drawn there from the back to the front."""

  def __init__(
    self,
    summary: str,
    x_axis: tuple[str, Callable[[float], str], Sequence[float]],
    y_axis: tuple[str, Callable[[float], str], Sequence[float]],
    legend: Sequence[tuple[str, str]] = (),
    size: tuple[int, int] = (860, 520),
  ):
    """Lays it out.

    Args:
      summary: what the chart shows, for those who cannot see it.
      x_axis: its name, how its numbers are written, and all that it must show.
      y_axis: likewise.
      legend: pairs of a drawing around the origin, at most 22 wide, and words.
      size: width and height.
    """
    self._summary, (self._width, self._height) = summary, size
    self._parts = []
    top = self._legend(legend)
    self._left, self._right, self._top, self._bottom = 62, self._width - 22, top + 40, self._height - 48
    (x_name, x_form, xs), (y_name, y_form, ys) = x_axis, y_axis
    self._x, self._y = self._range(xs, 0.05), self._range(ys, 0.08)
    for mark in ticks(*self._y, max(3, (self._bottom - self._top) // 40)):
      y = self.y(mark)
      self._parts.append(stroke(f"M{self._left} {y}H{self._right}", HAIR, 1, css="rule"))
      self.write(self._left - 8, y + 4, y_form(mark), "soft tick-y", "end")
    for mark in ticks(*self._x, max(3, (self._right - self._left) // 70)):
      x = self.x(mark)
      self._parts.append(stroke(f"M{x} {self._top}V{self._bottom}", HAIR, 1, css="rule"))
      self.write(x, self._bottom + 18, x_form(mark), "soft tick-x", "middle")
    self._parts.append(stroke(f"M{self._left} {self._bottom}H{self._right}", "#85888f", 1, css="base"))
    self.write(8, self._top - 12, y_name, "soft")
    self.write(self._right, self._bottom + 38, x_name, "soft", "end")

  def _range(self, values, margin):
    values = [value for value in values if drawable(value)] or [1.0]
    factor = max((max(values) / min(values)) ** margin, 1.06)
    return min(values) / factor, max(values) * factor

  def _legend(self, entries):
    x, y = 20, 18
    for symbol, words in entries:
      width = 30 + LETTER * len(words)
      if x > 20 and x + width > self._width - 10:
        x, y = 20, y + 20
      self._parts.append(f'<g transform="translate({x:.1f} {y - 4})">{symbol}</g>')
      self.write(x + 16, y, words, "soft")
      x += width + 12
    return y if entries else 0

  def x(self, value: float) -> float:
    """Where a value is, from the left."""
    return round(self._left + (self._right - self._left) * self._share(value, *self._x), 1)

  def y(self, value: float) -> float:
    """Where a value is, from the top."""
    return round(self._bottom - (self._bottom - self._top) * self._share(value, *self._y), 1)

  def _share(self, value, low, high):
    return min(max(math.log(value / low) / math.log(high / low), 0), 1)

  def write(self, x: float, y: float, words: str, css: str, anchor: str = "start") -> None:
    """Puts words at a place."""
    colour = SOFT if "soft" in css else INK
    self._parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{text(words)}</text>')

  def put(self, x: float, y: float, drawn: str, told: str, css: str) -> None:
    """Puts a drawing at a value, with what a pointer is told that rests on it."""
    self._parts.append(f'<g class="{css}" transform="translate({self.x(x)} {self.y(y)})"><title>{text(told)}</title>{drawn}</g>')

  def line(self, xs, ys, colour: str, width: float, dash: str = "", css: str = "", told: str = "", steps: bool = False) -> None:
    """A line through values.

    Args:
      xs: [n] numbers.
      ys: [n]; what has no logarithm is left out.
      colour: of it.
      width: of it.
      dash: as in DASHES.
      css: its class.
      told: what a pointer is told that rests on it.
      steps: whether it goes to the right before it goes up or down.
    """
    places = [(self.x(x), self.y(y)) for x, y in zip(xs, ys, strict=True) if drawable(x, y)]
    if places:
      first, *others = places
      d = f"M{first[0]} {first[1]}" + "".join(f"H{x}V{y}" if steps else f"L{x} {y}" for x, y in others)
      self._parts.append(stroke(d, colour, width, dash, css, told))

  def band(self, places: Iterable[Any], colour: str, css: str) -> None:
    """An area from `low` to `high` of each place."""
    known = [one for one in places if drawable(one.compute, one.low, one.high)]
    outline = [(one.compute, one.low) for one in known] + [(one.compute, one.high) for one in reversed(known)]
    at = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in outline)
    if len(known) > 1:
      self._parts.append(f'<polygon class="{css}" fill="{colour}" fill-opacity="0.1" points="{at}"/>')

  def svg(self, standalone: bool) -> str:
    """All of it, with a ground and a size of its own if it is to stand alone."""
    own = f' width="{self._width}" height="{self._height}"' if standalone else ' class="figure"'
    ground = f'<rect width="{self._width}" height="{self._height}" fill="#fff"/>' if standalone else ""
    return (
      f'<svg xmlns="http://www.w3.org/2000/svg"{own} viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{text(self._summary)}"'
      f' font-family="{FONTS}" font-size="12">{ground}{"".join(self._parts)}</svg>'
    )
