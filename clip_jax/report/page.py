"""The report: one self-contained HTML page about a work directory.

    page.write("runs/quickstart")        # -> runs/quickstart/report.html

run_log.py takes the log in, results.py turns evaluation keys into rows (a terminal printer uses them
as well), plots.py lays out charts; here all is arranged for templates/report.html.
"""

import base64
import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from clip_jax.files import write_text
from clip_jax.report import plots
from clip_jax.report.results import DIRECTIONS, Row, family, headline_rows, results_table
from clip_jax.report.run_log import Run, number, open_required, read_bad_records, read_run

TEMPLATES = Path(__file__).parent / "templates"
# Training metric -> (title, running median or not, options of its chart), in the order of the page.
TRAINING_CHARTS = {
  "loss": ("Loss", True, {"may_be_log": True}),
  "learning_rate": ("Learning rate", False, {"from_zero": True}),
  "logit_scale": ("Logit scale", False, {}),
  "gradient_norm": ("Gradient norm", True, {"may_be_log": True}),
  "parameter_norm": ("Parameter norm", False, {}),
  "samples_per_second": ("Samples per second", True, {"from_zero": True}),
  "data_wait": ("Time waiting on data", True, {"from_zero": True, "form": plots.percent}),
}
LOGIT_SCALE_CAP = 100.0  # of runs from before the config said it; Radford et al. 2021, section 2.5
GALLERY_LIMIT = 60  # queries shown; beyond that the page gets heavy and nobody scrolls

_IMAGE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+")


def write(workdir: str | Path) -> Path:
  """Writes WORKDIR/report.html, whole or not at all.

  Args:
    workdir: holds config.json and metrics.jsonl, and where they were written examples.json and
      environment.json; without these their sections say so.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: config.json or metrics.jsonl is missing.
    ValueError: one of the files is not what it should be; the message names it.
  """
  workdir = Path(workdir)
  config = _read_object(workdir / "config.json")
  run = read_run(workdir / "metrics.jsonl")
  examples = _read_object(workdir / "examples.json", required=False)
  environment = _read_object(workdir / "environment.json", required=False)
  html = _template().render(
    model=_setting(config, "model", "name") or workdir.resolve().name,
    workdir=workdir.resolve().name,
    last_line=_date(run.times[1]),
    rewinds=run.rewinds,
    tiles=headline(run, config),
    results=_by_set(results_table(run.results())),
    results_at=_results_at(run),
    **_charts(run, config),
    **_examples(workdir / "examples.json", examples),
    config=_flat_sections(config),
    bad=read_bad_records(workdir / "bad_records.jsonl"),
    environment={k: _value_text(v) for k, v in environment.items()},
  )
  target = workdir / "report.html"
  # A caption can hold half a surrogate pair, which JSON allows and UTF-8 does not.
  write_text(target, html.encode("utf-8", "replace").decode())
  return target


def _read_object(path: Path, required: bool = True) -> dict[str, Any]:
  if not required and not path.exists():
    return {}
  with open_required(path) as file:
    try:
      content = json.load(file)
    except ValueError as error:
      raise ValueError(f"{path} is not JSON: {error}.") from None
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
  return content


def pages() -> jinja2.Environment:
  """What the templates of all pages are rendered with: what comes from data is escaped, and `style` is theirs."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.globals.update(style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")))
  return environment


def _template() -> jinja2.Template:
  environment = pages()
  script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
  # The page's policy admits this one script by its hash: were data ever to slip through the
  # escaping, a browser would still not run it, nor load anything from anywhere.
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  environment.globals.update(script=Markup(script), script_hash=f"sha256-{digest}")
  environment.filters.update(
    join_bar=lambda texts: "|".join(map(str, texts)),
    family=family,
    bar=lambda share: round(100 * min(max(share, 0), 1), 1) if math.isfinite(share) else 0,
  )
  return environment.get_template("report.html")


def _setting(config: Mapping[str, Any], section: str, key: str) -> Any:
  values = config.get(section)
  return values.get(key) if isinstance(values, dict) else None


def _date(seconds: float) -> str:
  try:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  except (ValueError, OverflowError, OSError):
    return "an unknown time"
  return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def duration(seconds: float) -> str:
  """`2 h 13 min`: the two largest units."""
  seconds = max(0, round(seconds))
  units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
  first = next((i for i, (_, size) in enumerate(units) if seconds >= size), 3)
  texts = []
  for name, size in units[first : first + 2]:
    count, seconds = divmod(seconds, size)
    if count or not texts:
      texts.append(f"{count} {name}")
  return " ".join(texts)


@dataclass(frozen=True)
class Tile:
  """A big number on top of the page."""

  label: str
  text: str
  note: str = ""
  alarm: bool = False


def headline(run: Run, config: Mapping[str, Any]) -> list[Tile]:
  """The few numbers to see first; what was not logged has no tile."""
  loss, rate, wait = map(run.curve, ("loss", "samples_per_second", "data_wait"))
  steps = _setting(config, "train", "steps")
  planned = f" of {steps:,}" if isinstance(steps, int) else ""
  tiles = [
    _loss_tile(loss, config) if loss else None,
    Tile("samples seen", plots.compact(run.last[1], 3), f"step {run.last[0]:,}{planned}"),
    _result_tile(headline_rows(results_table(run.results()))),
  ]
  wall = run.times[1] - run.times[0]
  between = duration(wall) if math.isfinite(wall) else "an unknown time"
  known = np.isfinite(rate.values) & (rate.values > 0) if rate else np.zeros(0, bool)
  if known.any():
    median = float(np.median(rate.values[known]))
    waiting = wait.values[np.isfinite(wait.values)] if wait else np.zeros(0)
    note = (
      f"{plots.percent(float(waiting.mean()))} of the time waiting on data" if len(waiting) else ""
    )
    tiles.append(Tile("samples per second, median", plots.number(median), note))
    # From throughput and not from the clock, which runs on while a job waits to be resumed.
    start = 0.0 if rate.samples[0] < 0.5 * rate.samples[-1] else rate.samples[0]
    seconds = np.diff(rate.samples, prepend=start) / np.where(known, rate.values, median)
    tiles.append(
      Tile("time in training steps", duration(seconds.sum()), f"{between} from first to last line")
    )
  else:
    tiles.append(Tile("duration", between, "from first to last line of the log"))
  return [tile for tile in tiles if tile]


def _loss_tile(loss: plots.Curve, config: Mapping[str, Any]) -> Tile:
  finite = np.flatnonzero(np.isfinite(loss.values))
  if math.isfinite(loss.values[-1]):
    chance = _loss_of_chance(config)
    return Tile(
      "loss, last logged",
      plots.number(loss.values[-1]),
      f"{chance.label}: {plots.number(chance.value)}" if chance else "",
    )
  note = "never finite"
  if len(finite):
    note = (
      f"last finite: {plots.number(loss.values[finite[-1]])} at step {loss.steps[finite[-1]]:,}"
    )
  return Tile("loss, last logged", "not finite", note, alarm=True)


def _loss_of_chance(config: Mapping[str, Any]) -> plots.Reference | None:
  """ln(batch), which is what a softmax over the batch costs when all similarities are equal."""
  batch = _setting(config, "train", "global_batch_size")
  loss = config.get("loss")
  names = [str(v) for v in loss.values()] if isinstance(loss, dict) else [str(loss)]
  if not isinstance(batch, int) or batch < 2 or any(re.search("sigmoid|siglip", n) for n in names):
    return None
  return plots.Reference(f"chance, ln {batch:,}", math.log(batch))


def _result_tile(rows: list[Row]) -> Tile | None:
  """The result farthest above chance, as a share of the way from chance to 100%.

  The plain share would prefer sets with few candidates, the multiple of chance sets with many.
  """
  rows = [row for row in rows if math.isfinite(row.value)]
  if not rows:
    return None
  best = max(
    rows, key=lambda row: (row.value - (row.chance or 0)) / max(1 - (row.chance or 0), 1e-9)
  )
  notes = [f"chance {best.text(best.chance)}"] if best.chance is not None else []
  notes += [f"nearest pixels {best.text(best.yardstick)}"] if best.yardstick is not None else []
  return Tile(best.name, best.text(best.value), ", ".join(notes))


def _by_set(rows: list[Row]) -> dict[str, list[Row]]:
  sets = {}
  for row in rows:
    sets.setdefault(row.set, []).append(row)
  return sets


def _results_at(run: Run) -> str:
  steps = sorted({max(points) for points in run.evaluations.values() if points})
  if len(steps) > 1:
    return f"Each number is the last one logged; they are from steps {steps[0]:,} to {steps[-1]:,}."
  return f"Evaluated at step {steps[0]:,}." if steps else ""


def _charts(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
  """Charts of training and of evaluation, over one axis of samples seen."""
  curves = {key: curve for key in TRAINING_CHARTS if (curve := run.curve(key))}
  rows = headline_rows(results_table(run.results()))
  evaluated = {row.key: run.curve(row.key) for row in rows}
  domain = plots.samples_domain([*curves.values(), *evaluated.values()])
  levels = {"loss": _loss_of_chance(config)}
  loss = config.get("loss")
  cap = loss.get("max_logit_scale", LOGIT_SCALE_CAP) if isinstance(loss, dict) else LOGIT_SCALE_CAP
  # Far below the cap its line would only press the curve flat.
  if cap and "logit_scale" in curves and np.any(curves["logit_scale"].values > 0.6 * cap):
    levels["logit_scale"] = plots.Reference("cap", cap)
  training = []
  for key, curve in curves.items():
    title, smoothed, options = TRAINING_CHARTS[key]
    line = plots.Line("", curve, smoothed=smoothed)
    references = [levels[key]] if levels.get(key) else []
    training.append(plots.chart(title, [line], domain, references=references, **options))
  return {
    "training": training,
    "not_logged": [
      title.lower() for key, (title, *_) in TRAINING_CHARTS.items() if key not in curves
    ],
    "accuracy": [
      _accuracy_chart(set_, members, evaluated, domain) for set_, members in _by_set(rows).items()
    ],
  }


def _accuracy_chart(set_, rows: list[Row], curves, domain) -> plots.Chart:
  others = iter(f"c{3 + i % 3}" for i in range(len(rows)))
  fixed = dict(zip(DIRECTIONS, ("c1", "c2"), strict=True))
  lines, levels = [], {}
  for row in rows:
    colour = next((c for d, c in fixed.items() if row.metric.startswith(d)), None) or next(others)
    lines.append(plots.Line(row.label, curves[row.key], colour))
    if row.chance is not None:
      levels.setdefault(row.chance, []).append(row.label)
  references = [
    plots.Reference("chance" if len(levels) == 1 else f"chance, {', '.join(labels)}", level)
    for level, labels in levels.items()
  ]
  references += [
    plots.Reference(f"nearest pixels {row.label.split()[-1]}", row.yardstick, "yardstick")
    for row in rows
    if row.yardstick is not None
  ]
  return plots.chart(
    set_ or "evaluation", lines, domain, form=plots.percent, references=references, from_zero=True
  )


def image_uri(uri: Any) -> str | None:
  """The data URI of a raster picture, or None: nothing else may end up in a src."""
  return uri if isinstance(uri, str) and _IMAGE.fullmatch(uri) else None


def _examples(path: Path, examples: Mapping[str, Any]) -> dict[str, Any]:
  try:
    retrieval = examples.get("retrieval") or []
    gallery = {}
    for query in retrieval[:GALLERY_LIMIT]:
      gallery.setdefault(str(query["set"]), []).append(retrieval_query(query))
    similarity = _heat_map(examples["similarity"]) if examples.get("similarity") else None
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f"{path} does not have the expected shape: {error!r}.") from None
  return {
    "gallery": gallery,
    "gallery_left_out": max(0, len(retrieval) - GALLERY_LIMIT),
    "similarity": similarity,
  }


def retrieval_query(query: Mapping[str, Any]) -> dict[str, Any]:
  """A picture and the captions it found, checked, as templates show them."""
  scores = [number(answer, "score") for answer in query["top"]]
  return {
    "image": image_uri(query["image"]),
    "caption": str(query["caption"]),
    "answers": [
      {"caption": str(a["caption"]), "score": _cosine(s), "correct": bool(a["correct"])}
      for a, s in zip(query["top"], scores, strict=True)
    ],
  }


def _cosine(value: float) -> str:
  return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else "–"


def _heat_map(similarity: Mapping[str, Any]) -> dict[str, Any]:
  """Cells by caption (down) and image (across), shaded from the lowest to the highest cosine."""
  images, captions = similarity["images"], similarity["captions"]
  # None (a NaN of a stricter writer) becomes NaN here.
  matrix = np.array(similarity["matrix"], dtype=np.float64)
  if matrix.shape != (len(images), len(captions)) or not matrix.size:
    raise ValueError(
      f"similarity.matrix is {matrix.shape}, for {len(images)} images and {len(captions)} captions"
    )
  finite = np.where(np.isfinite(matrix), matrix, np.nan)
  low, high = (
    (float(f(finite)) for f in (np.nanmin, np.nanmax)) if np.isfinite(matrix).any() else (0.0, 0.0)
  )
  shades = np.nan_to_num((finite - low) / (high - low or 1.0)) * 100
  best = np.where(np.isfinite(matrix), matrix, -np.inf).argmax(axis=1)
  paired = len(images) == len(captions)
  return {
    "set": str(similarity["set"]),
    "images": [image_uri(uri) for uri in images],
    "low": _cosine(low),
    "high": _cosine(high),
    "right": int((best == np.arange(len(images))).sum()) if paired else None,
    "rows": [
      {
        "caption": str(caption),
        "cells": [
          {
            "shade": round(float(shades[i, j])),
            "text": _cosine(matrix[i, j]),
            "best": best[i] == j,
            "own": paired and i == j,
          }
          for i in range(len(images))
        ],
      }
      for j, caption in enumerate(captions)
    ],
  }


def _flat_sections(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
  """config.json as section -> dotted key -> text; settings outside of any section come first."""
  loose = {key: _value_text(v) for key, v in config.items() if not isinstance(v, dict)}
  sections = {"general": loose} if loose else {}

  def flatten(values, prefix=""):
    for key, value in values.items():
      if isinstance(value, dict) and value:
        yield from flatten(value, f"{prefix}{key}.")
      else:
        yield prefix + key, _value_text(value)

  sections.update({k: dict(flatten(v)) for k, v in config.items() if isinstance(v, dict)})
  return sections


def _value_text(value: Any) -> str:
  if isinstance(value, str):
    return value
  return "None" if value is None else json.dumps(value, ensure_ascii=False)
