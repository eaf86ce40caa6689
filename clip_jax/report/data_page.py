"""A self-contained HTML page about a data set, and a summary for a terminal, of what `data/inspection.py` found."""

import base64
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from clip_jax.data.inspection import Inspection
from clip_jax.errors import redact
from clip_jax.files import write_text
from clip_jax.report import plots
from clip_jax.report.page import Tile, pages

COLUMNS = 36  # of a histogram
SMALL_MODEL = 112  # pixels; up to here samples are enlarged so much that single pixels are shown sharp


def write(path: str | Path, found: Inspection, settings: dict[str, Any]):
  """Writes the page, whole or not at all.

  Args:
    path: the file; an older one is replaced.
    found: what was found, with samples.
    settings: the keys of `config.data`.
  """
  environment = pages()
  environment.filters.update(picture=_data_uri, percent=plots.percent)
  html = environment.get_template("data.html").render(
    found=found.summary,
    tiles=tiles(found.summary),
    samples=found.samples,
    sharp=found.summary["image_size"] <= SMALL_MODEL,
    histograms=_histograms(found),
    copies=found.copies,
    settings={key: _setting(value) for key, value in settings.items()},
  )
  # Half a surrogate pair, which a caption can hold, has no UTF-8.
  write_text(path, html.encode("utf-8", "replace").decode())


def tiles(found: dict[str, Any]) -> list[Tile]:
  """The few numbers to see first, of an inspection's summary."""
  bad, looked = found["bad"]["records"], found["looked_at"]
  formats = ", ".join(f"{name} {plots.percent(count / (looked - bad))}" for name, count in found["formats"].items())
  filtered = sum(part["filtered_out"] for part in found["components"])
  several = f", {filtered:,} more filtered out" if filtered else ""
  result = [
    Tile("records", f"{found['records']:,}", f"{looked:,} looked at{several}"),
    Tile("cannot be read", plots.percent(bad / looked), f"{bad:,} of {looked:,}", alarm=bad > 0),
  ]
  if bad == looked:
    return result
  side, tokens, size = found["shorter_side"], found["tokens"], found["image_size"]
  duplicates = found["duplicates"]
  return [
    *result,
    Tile("shorter side, median", f"{side['median']:,.0f} px", f"{plots.percent(found['smaller_than_model'])} under the model's {size}"),
    Tile("an image, median", byte_text(found["bytes"]["median"]), formats),
    Tile(
      "tokens of a caption, median", f"{tokens['median']:,.0f}",
      f"{plots.percent(found['fill_context'])} fill all {found['context_length']}; what is longer is cut",
    ),
    Tile("repeated images", f"{duplicates['images']:,}", f"and {duplicates['captions']:,} repeated captions"),
  ]  # fmt: skip


def lines(found: dict[str, Any]) -> list[str]:
  """An inspection's summary as lines for a terminal."""
  looked, bad = found["looked_at"], found["bad"]
  result = [f"{found['records']:,} records, {looked:,} looked at, as {found['model'] or 'the model'} gets them ({found['image_size']} pixels)"]
  for part in found["components"]:
    share = f", {plots.percent(part['share'])} of the examples" if len(found["components"]) > 1 else ""
    left_out = f", {part['filtered_out']:,} more filtered out" if part["filtered_out"] else ""
    result.append(f"  {part['path']}: {part['records']:,} records{share}{left_out}")
  if found["formats"]:
    result.append("formats: " + ", ".join(f"{name} {count:,}" for name, count in found["formats"].items()))
    result.append(f"{'':<20}" + "".join(f"{name:>9}" for name in ("min", "p5", "p25", "median", "p75", "p95", "max")))
    for name, (title, form) in _ROWS.items():
      values = found[name]
      result.append(f"{title:<20}" + "".join(f"{form(v):>9}" for key, v in values.items() if key != "mean"))
    result.append(f"{plots.percent(found['smaller_than_model'])} of the images have a shorter side under the model's {found['image_size']} pixels")
    result.append(f"{plots.percent(found['fill_context'])} of the captions fill all {found['context_length']} tokens; what is longer is cut")
    same = found["duplicates"]
    result.append(f"repeated among these: {same['images']:,} images, {same['captions']:,} captions")
  result.append(f"cannot be read: {bad['records']:,} ({plots.percent(bad['records'] / looked)})")
  for kind in bad["reasons"]:
    result.append(f"  {kind['records']:,} × {kind['reason']}")
    result += [f"      {key}" for key in kind["keys"]]
  # Names of files can hold what a terminal takes for a command.
  return ["".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line) for line in result]


def byte_text(value: float) -> str:
  """`48.2 kB`: three digits and a decimal unit."""
  for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
    if value >= 0.9995 * size:
      return f"{value / size:.3g} {unit}"
  return f"{value:.0f} B"


def _count(value: float) -> str:
  return f"{value:,.0f}"


def _ratio(value: float) -> str:
  return f"{value:.2f}"


# What the table in a terminal shows: its name, and how a value is written.
_ROWS = {
  "bytes": ("image, bytes", byte_text),
  "width": ("width", _count),
  "height": ("height", _count),
  "shorter_side": ("shorter side", _count),
  "aspect": ("width / height", _ratio),
  "captions": ("captions a record", _count),
  "characters": ("caption, characters", _count),
  "tokens": ("caption, tokens", _count),
}


@dataclass(frozen=True)
class Histogram:
  """All that templates/data.html needs for one."""

  title: str
  note: str
  columns: str  # the path of the columns, in units of the viewBox
  x_ticks: list[plots.Tick]
  y_ticks: list[plots.Tick]
  level: plots.Tick | None  # something to compare with


def _histograms(found: Inspection) -> list[Histogram]:
  values, summary = found.values, found.summary
  if not len(values["bytes"]):
    return []
  size, length = summary["image_size"], summary["context_length"]
  return [
    histogram("Shorter side, pixels", values["shorter_side"], log=True, level=(f"the model's {size}", size)),
    histogram("Width, pixels", values["width"], log=True),
    histogram("Height, pixels", values["height"], log=True),
    histogram("Width / height", values["aspect"], log=True, form=lambda ratio: f"{ratio:.3g}"),
    histogram("Image, bytes", values["bytes"], log=True, form=byte_text),
    histogram("Caption, tokens", values["tokens"], level=(f"all {length} are full", length)),
  ]


def histogram(
  title: str, values: np.ndarray, *, log: bool = False, form: Callable = _count, level: tuple[str, float] | None = None
) -> Histogram:
  """Lays out a histogram.

  Args:
    title: its heading.
    values: [n] numbers, at least one; positive ones if `log`.
    log: columns of equal ratios instead of equal widths; the others are of whole numbers.
    form: writes a value.
    level: label and value of a line to compare with; it is left out if it is far from all values.
  """
  low, high = float(values.min()), float(values.max())
  if level and low / 2 <= level[1] <= high * 2:
    low, high = min(low, level[1]), max(high, level[1])
  else:
    level = None
  if log:
    low, high = (low / 1.3, high * 1.3) if high < low * 1.3 else (low, high * (1 + 1e-9))
    edges = np.geomspace(low, high, COLUMNS + 1)
  else:
    step = math.ceil((high - min(low, 0) + 1) / COLUMNS)  # whole numbers a column
    edges = np.arange(min(low, 0), high + 1 + step, step) - 0.5
  counts, _ = np.histogram(values, edges)

  def place(value):
    first, at, last = (math.log(v) if log else v for v in (edges[0], value, edges[-1]))
    return 100 * (at - first) / (last - first)

  top = plots.tick_step(0, counts.max(), 4)
  top = max(math.ceil(top), 1) * math.ceil(counts.max() / max(math.ceil(top), 1))
  middle, few, many = (form(float(v)) for v in np.percentile(values, (50, 5, 95)))
  note = f"median {middle}; 90% are from {few} to {many}" if few != many else f"mostly {middle}"
  if values.min() == values.max():
    note = f"all are {middle}"
  return Histogram(
    title=title,
    note=note,
    columns=_columns(counts / top),
    x_ticks=[plots.Tick(place(v), form(v)) for v in _ticks(edges[0], edges[-1], log)],
    y_ticks=[plots.Tick(100 * v / top, plots.compact(v)) for v in plots.ticks(0, top)],
    level=plots.Tick(place(level[1]), level[0]) if level else None,
  )


def _ticks(low: float, high: float, log: bool) -> list[float]:
  marks = plots.ticks(low, high)
  if not log or high < 4 * low:
    return marks
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for steps in ((1, 2, 5), (1, 3), (1,)):
    marks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
    if len(marks) <= 6:
      break
  return marks


def _columns(heights: np.ndarray) -> str:
  width = plots.WIDTH / len(heights)
  return "".join(
    f"M{i * width + 0.08 * width:.0f} {plots.HEIGHT}v{-max(height * plots.HEIGHT, 6):.0f}h{0.84 * width:.0f}V{plots.HEIGHT}z"
    for i, height in enumerate(heights)
    if height
  )


def _data_uri(pixels: np.ndarray) -> str:
  """Pixels as they are: PNG loses nothing."""
  _, encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
  return "data:image/png;base64," + base64.b64encode(encoded).decode()


def _setting(value: Any) -> str:
  return redact(value if isinstance(value, str) else repr(value))
