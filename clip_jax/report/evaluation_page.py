"""The page of an evaluation: one self-contained HTML file beside results.json.

    evaluation_page.write("results.json")        # -> results.html

evaluation_results.py checks the results, evaluation_plots.py lays out the charts, published.py has what others reached;
here all is arranged for templates/evaluation.html.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.errors import UsageError
from clip_jax.files import read_json, write_text
from clip_jax.report import evaluation_plots as drawn
from clip_jax.report import page, plots, published
from clip_jax.report.evaluation_results import (
  Details,
  Evaluation,
  Measured,
  Model,
  Score,
  label,
  read,
)

# Of each task the metric to see first; of recalls that at 5, or the nearest to it, as in a run's report.
MAIN = ("acc1", "mean_average_precision", "lp_acc1", "knn_acc1", "acc")
RECALLS = ("image_retrieval_recall@", "text_retrieval_recall@")
NEAREST = 3  # published results beside a bar
PAIRS, PICTURES, CLASSES, QUERIES = 12, 4, 10, 24  # shown of each model and data set
SIGNIFICANT = 0.05


def write(results: str | Path) -> Path:
  """Writes the page beside the results, whole or not at all.

  Args:
    results: what `clip-jax eval` wrote, results.json or the results.csv beside it.

  Returns:
    The path of the page: that of the results, ending in .html.

  Raises:
    UsageError: the file is missing, or is not what it should be.
  """
  path = Path(results).with_suffix(".json")
  found = read_json(path)
  try:
    html = render(found)
  except UsageError as error:
    raise UsageError(f"{path}: {error}") from None
  target = path.with_suffix(".html")
  # A caption can hold half a surrogate pair, which JSON allows and UTF-8 does not.
  write_text(target, html.encode("utf-8", "replace").decode())
  return target


def render(results: Mapping[str, Any]) -> str:
  """The page as text.

  Args:
    results: the object in results.json.

  Raises:
    UsageError: it is not what it should be.
  """
  found = read(results)
  models, groups = found.models, _groups(found.rows)
  bars = [_bar_chart(group, metric, models) for group in groups for metric in _main_metrics(group)]
  shifts = list(_shifts(found.rows, models))
  template = page.pages().get_template("evaluation.html")
  return template.render(
    title=f"Evaluation of {models[0].name if len(models) == 1 else f'{len(models)} models'}",
    models=models,
    tiles=_tiles(groups, [chart for chart, _ in bars], models),
    bar_charts=[chart for chart, _ in bars],
    has_errors=any(math.isfinite(score.error) for row in found.rows for score in row.scores.values()),
    comparisons=found.comparisons,
    clear=SIGNIFICANT / max(len(found.comparisons), 1),
    shifts=[plot for plot, _ in shifts],
    groups=[_table(group, models) for group in groups],
    reliability=_reliability(found),
    confusions=[_confusions(part) for part in found.details if part.confusions],
    classes=[_classes(part) for part in found.details if part.classes],
    gallery=[_gallery(part, i) for i, part in enumerate(found.details) if part.gallery],
    sources=_sources([one for _, used in (*bars, *shifts) for one in used]),
  )


def _groups(rows: Sequence[Measured]) -> list[list[Measured]]:
  """Rows whose numbers stand side by side, each model once: a later row of its own replaces an earlier one."""
  groups = {}
  for row in rows:
    groups.setdefault(row.key, {})[row.model] = row
  return [list(group.values()) for group in groups.values()]


def _main_metrics(group: Sequence[Measured]) -> list[str]:
  """The metrics to draw as bars: one, or both directions of retrieval."""
  shares = list(dict.fromkeys(name for row in group for name, score in row.scores.items() if score.share))

  def ending(pattern):
    return {int(found[1]): name for name in shares if (found := re.fullmatch(pattern, name))}

  recalls = [at for prefix in RECALLS if (at := ending(re.escape(prefix) + r"(\d+)"))]
  if recalls:
    return [at[min(at, key=lambda k: abs(k - 5))] for at in recalls]
  shots = ending(r"fs(\d+)_acc1")
  if shots:
    return [shots[max(shots)]]
  return [name for name in (*MAIN, *shares) if name in shares and name != "ece"][:1]


def _bar_chart(
  group: Sequence[Measured], metric: str, models: Sequence[Model]
) -> tuple[drawn.BarChart, list[published.Reference]]:
  row = group[0]
  scores = [(models[one.model], one.scores[metric]) for one in group if metric in one.scores]
  nearest = _nearest(row, metric, [score.value for _, score in scores if score.known])
  return drawn.bar_chart(row.dataset, label(metric), row.note, scores, nearest), nearest


def _nearest(row: Measured, metric: str, values: Sequence[float]) -> list[published.Reference]:
  """The published results nearest to any of the values, the best last."""
  if not row.task.startswith("zeroshot") or not row.english or not values:
    return []
  known = published.references(row.dataset, metric)
  known.sort(key=lambda one: min(abs(one.value - value) for value in values))
  return sorted(known[:NEAREST], key=lambda one: one.value)


def _shifts(
  rows: Sequence[Measured], models: Sequence[Model]
) -> Iterator[tuple[drawn.Plane, list[published.Reference]]]:
  """A plot for each shifted set that some model has beside ImageNet."""
  found: dict[str, dict[int, Score]] = {}
  for row in rows:
    score = row.scores.get("acc1")
    if row.task == "zeroshot_classification" and row.english and score and score.known:
      found.setdefault(published.plain(row.dataset), {})[row.model] = score
  on_imagenet = found.get(published.IMAGENET, {})
  for dataset in published.SHIFTED:
    points = [
      drawn.Point(models[i].label, models[i].colour, on_imagenet[i], score)
      for i, score in found.get(dataset, {}).items()
      if i in on_imagenet
    ]
    pairs = published.shifts(dataset)
    others = [
      drawn.Point(y.model, "published" if y.zero_shot else "supervised", Score(x.value), Score(y.value)) for x, y in pairs
    ]
    if points:
      yield drawn.shift(dataset, f"{published.IMAGENET} acc1", points, others), [one for pair in pairs for one in pair]


def _tiles(
  groups: Sequence[Sequence[Measured]], charts: Sequence[drawn.BarChart], models: Sequence[Model]
) -> list[page.Tile]:
  """How much was evaluated, and the best model on the first data sets."""
  if not groups:
    return []
  sets = len({group[0].dataset for group in groups})
  largest = {}  # a set may have been looked at in several ways
  for row in (row for group in groups for row in group):
    largest[row.dataset, row.split] = max(row.items or 0, largest.get((row.dataset, row.split), 0))
  items = sum(largest.values())
  tiles = [page.Tile("data set" if sets == 1 else "data sets", f"{sets:,}", f"{plots.compact(items, 3)} items" if items else "")]
  for chart in charts[:3]:
    own = [bar for bar in chart.bars if bar.width is not None and not bar.published]
    if own:
      best = max(own, key=lambda bar: bar.value)
      note = best.label if len(models) > 1 else ""
      tiles.append(page.Tile(f"{chart.title} {chart.metric}", plots.percent(best.value), note))
  return tiles


def _table(group: Sequence[Measured], models: Sequence[Model]) -> dict[str, Any]:
  """The numbers of one data set: a line a metric, a column a model."""
  scores = {(row.model, name): score for row in group for name, score in row.scores.items()}
  main, metrics = _main_metrics(group), []
  for name in dict.fromkeys(name for _, name in scores):
    line = [scores.get((i, name)) for i in range(len(models))]
    chance = next((one.write(one.chance) for one in line if one and math.isfinite(one.chance)), "")
    texts = [one.text if one else "" for one in line]
    metrics.append({"label": label(name), "texts": texts, "chance": chance, "main": name in main})
  return {"dataset": group[0].dataset, "note": group[0].note, "metrics": metrics}


def _reliability(found: Evaluation) -> list[drawn.Plane]:
  """A diagram a data set, with a curve for each model that has bins, and its ECE where it is among the metrics."""
  diagrams = {}
  for part in found.details:
    if not part.bins:
      continue
    errors = [
      row.scores["ece"].value
      for row in found.rows
      if found.models[row.model] == part.model
      and row.dataset == part.dataset
      and part.task in ("", row.task)
      and "ece" in row.scores
    ]
    note = f"ECE {plots.percent(errors[0])}" if errors and math.isfinite(errors[0]) else ""
    curve = drawn.Curve(part.model.label, part.model.colour, note, part.bins)
    diagrams.setdefault((part.dataset, part.task), []).append(curve)
  return [drawn.reliability(dataset, curves) for (dataset, _), curves in diagrams.items()]


def _confusions(part: Details) -> dict[str, Any]:
  pairs = sorted(part.confusions, key=lambda pair: -pair["count"])
  shown = [
    pair | {"count": f"{pair['count']:,}", "pictures": [page.image_uri(uri) for uri in pair["pictures"][:PICTURES]]}
    for pair in pairs[:PAIRS]
  ]
  return {"dataset": part.dataset, "model": part.model, "pairs": shown, "left_out": len(pairs) - len(shown)}


def _classes(part: Details) -> dict[str, Any]:
  """The worst classes, worst first, and the best, best first; if there are few, all of them are among the worst."""
  known = sorted((one for one in part.classes if math.isfinite(one["recall"])), key=lambda one: one["recall"])
  shown = [
    one | {"recall": plots.percent(one["recall"]), "width": round(100 * min(max(one["recall"], 0), 1), 1)} for one in known
  ]
  few = len(shown) <= 2 * CLASSES
  return {
    "dataset": part.dataset,
    "model": part.model,
    "worst": shown if few else shown[:CLASSES],
    "best": [] if few else shown[: -CLASSES - 1 : -1],
  }


def _gallery(part: Details, place: int) -> dict[str, Any]:
  try:
    shown = [page.retrieval_query(query) for query in part.gallery[:QUERIES]]
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise UsageError(f"the gallery of details[{place}] does not have the expected shape ({error!r}).") from None
  return {"dataset": part.dataset, "model": part.model, "queries": shown, "left_out": len(part.gallery) - len(shown)}


def _sources(used: Sequence[published.Reference]) -> dict[str, list[str]]:
  """Which models' published results are on the page, by where they are from."""
  sources = {}
  for one in used:
    sources.setdefault(one.source, {})[one.model] = None
  return {source: list(names) for source, names in sources.items()}
