"""The results of an evaluation, as results.json has them, checked and made ready to be shown."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_jax.errors import UsageError, redact
from clip_jax.report import plots
from clip_jax.report.results import Row
from clip_jax.report.run_log import number

FORMAT = 1
TASKS = {
  "zeroshot_classification": "zero-shot classification",
  "zeroshot_retrieval": "zero-shot retrieval",
  "linear_probe": "linear probe",
  "fewshot_linear_probe": "linear probe of few examples",
  "knn": "nearest neighbours",
  "image_caption_selection": "selection of images and captions",
}
LABELS = {"image_retrieval_recall@": "text → image R@", "text_retrieval_recall@": "image → text R@", "ece": "ECE"}
COLOURS = 5  # c1 to c5 of report.css
LABEL = 24  # letters that a model's name may have beside a bar; of a longer path the end is shown


@dataclass(frozen=True)
class Score:
  """A number of an evaluation. What is not known is NaN.

  Attributes:
    value: the number.
    error: its standard error.
    chance: what guessing reaches.
    share: whether it is a share of 0 to 1, to be written as percent.
  """

  value: float
  error: float = math.nan
  chance: float = math.nan
  share: bool = True

  @property
  def known(self) -> bool:
    """Whether there is a number at all."""
    return math.isfinite(self.value)

  def write(self, value: float) -> str:
    """A number of this score's kind, percent without its sign; a dash for what is not known."""
    if not math.isfinite(value):
      return "–"
    text = plots.percent(value).removesuffix("%") if self.share else plots.number(value)
    return text.replace("-", "−")

  @property
  def text(self) -> str:
    """`63.2 ± 0.2`, or `63.2` where no error is known."""
    if not self.known or not math.isfinite(self.error):
      return self.write(self.value)
    return f"{self.write(self.value)} ± {self.write(self.error)}"


@dataclass(frozen=True)
class Model:
  """A model: its name and weights, a short text that tells it from the others, and its colour (a CSS class)."""

  name: str
  pretrained: str
  label: str
  colour: str


@dataclass(frozen=True)
class Measured:
  """What one model reached on one data set: a row of results.json. `model` is its place among the models."""

  model: int
  dataset: str
  task: str
  language: str
  split: str
  items: int | None
  scores: dict[str, Score]

  @property
  def key(self) -> tuple[str, ...]:
    """What rows must share for their numbers to stand side by side."""
    return self.dataset, self.task, self.language, self.split

  @property
  def english(self) -> bool:
    """Whether prompts were English, as those of published results are."""
    return self.language in ("", "en")

  @property
  def note(self) -> str:
    """Task, split and size for people."""
    parts = [TASKS.get(self.task, self.task.replace("_", " ")), self.split, "" if self.english else self.language]
    return " · ".join(filter(None, [*parts, "" if self.items is None else f"{self.items:,} items"]))


@dataclass(frozen=True)
class Comparison:
  """Two models on the same items, as a line of a table."""

  dataset: str
  metric: str
  models: tuple[Model, Model]
  values: tuple[str, str]
  difference: str
  p_value: float
  test: str
  only_first: str
  only_second: str

  @property
  def p_text(self) -> str:
    """The p-value for people."""
    if not math.isfinite(self.p_value):
      return "–"
    return "< 0.0001" if self.p_value < 1e-4 else f"{self.p_value:.2g}"


@dataclass(frozen=True)
class Details:
  """What else is known of one model on one data set; parts that it does not have are empty."""

  model: Model
  dataset: str
  task: str
  confusions: list[dict[str, Any]]
  classes: list[dict[str, Any]]
  bins: list[tuple[float, float, float]]
  gallery: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluation:
  """All of results.json."""

  models: list[Model]
  rows: list[Measured]
  comparisons: list[Comparison]
  details: list[Details]


def read(results: Mapping[str, Any]) -> Evaluation:
  """Checks the content of results.json.

  Args:
    results: the object in it; all of its keys but `rows` may be missing.

  Raises:
    UsageError: it is not what it should be; the message says where.
  """
  if results.get("format", FORMAT) != FORMAT:
    raise UsageError(f"format {results['format']!r} is not known; this version of clip_jax reads format {FORMAT}.")
  if not isinstance(results.get("rows"), list):
    raise UsageError("the results have no list of rows.")
  models = _each(results, "rows", lambda row: (_text(row["model"]), _text(row.get("pretrained"))))
  models = _models(list(dict.fromkeys(models)))
  return Evaluation(
    models=models,
    rows=_each(results, "rows", lambda row: _row(row, models)),
    comparisons=_each(results, "comparisons", lambda record: _comparison(record, models)),
    details=_each(results, "details", lambda record: _details(record, models)),
  )


def label(metric: str) -> str:
  """A metric's name for people."""
  for prefix, words in LABELS.items():
    if metric.startswith(prefix):
      return words + metric.removeprefix(prefix)
  return metric.replace("_", " ")


def _each(results: Mapping[str, Any], key: str, read_one: Callable[[Any], Any]) -> list[Any]:
  records = results.get(key) or []
  if not isinstance(records, list):
    raise UsageError(f"{key} is not a list.")
  found = []
  for i, record in enumerate(records):
    try:
      found.append(read_one(record))
    except KeyError as error:
      raise UsageError(f"{key}[{i}] does not have {error}.") from None
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
      raise UsageError(f"{key}[{i}] does not have the expected shape ({error}).") from None
  return found


def _text(value: Any) -> str:
  return "" if value is None else redact(str(value))


def _models(keys: Sequence[tuple[str, str]]) -> list[Model]:
  names = list(dict.fromkeys(name for name, _ in keys))
  short = {name: _end(name) for name in names}
  if len(set(short.values())) < len(names):
    short = {name: name for name in names}
  times = Counter(name for name, _ in keys)
  return [
    Model(
      name=name,
      pretrained=pretrained,
      label=short[name] if times[name] == 1 else f"{short[name]} · {pretrained}",
      colour=f"c{1 + i % COLOURS}",
    )
    for i, (name, pretrained) in enumerate(keys)
  ]


def _end(path: str) -> str:
  """As many of a path's last parts as are no longer than LABEL, and at least one."""
  if len(path) <= LABEL:
    return path
  parts = path.rstrip("/").split("/")
  end = parts.pop()
  while parts and len(end) + len(parts[-1]) + 1 <= LABEL - 2:
    end = f"{parts.pop()}/{end}"
  return f"…/{end}" if parts else end


def _model(models: Sequence[Model], record: Mapping[str, Any]) -> Model:
  """The model that a part of the results is about, or one of its name that has no row."""
  name, pretrained = _text(record["model"]), record.get("pretrained")
  known = [one for one in models if one.name == name and (pretrained is None or one.pretrained == _text(pretrained))]
  return known[0] if known else Model(name, "", name, "c1")


def _row(record: Mapping[str, Any], models: Sequence[Model]) -> Measured:
  metrics, errors, chances = record["metrics"], record.get("standard_errors") or {}, record.get("chance") or {}
  model = _text(record["model"]), _text(record.get("pretrained"))
  scores = {}
  for name in metrics:
    numbers = [number(metrics, name), *(number(known, name) if name in known else math.nan for known in (errors, chances))]
    scores[name] = _score(name, *numbers)
  return Measured(
    model=next(i for i, one in enumerate(models) if (one.name, one.pretrained) == model),
    dataset=_text(record["dataset"]),
    task=_text(record.get("task")),
    language=_text(record.get("language")),
    split=_text(record.get("split")),
    items=None if record.get("items") is None else int(record["items"]),
    scores=scores,
  )


def _score(metric: str, value: float, error: float = math.nan, chance: float = math.nan) -> Score:
  # What is a share is the rule of a run's log, where the recalls of retrieval are called R@5.
  share = metric == "ece" or Row("", value, metric=metric.replace("recall@", "R@")).is_share
  return Score(value, error, chance, share)


def _comparison(record: Mapping[str, Any], models: Sequence[Model]) -> Comparison:
  metric, (first, second), values = record["metric"], record["models"], record["values"]
  difference = _score(
    metric, number(record, "difference"), number(record, "standard_error") if "standard_error" in record else math.nan
  )
  one, other = (_score(metric, number({"values": value}, "values")).text for value in values)
  return Comparison(
    dataset=_text(record["dataset"]),
    metric=label(metric),
    models=tuple(
      _model(models, {"model": name, "pretrained": where})
      for name, where in zip((first, second), record.get("pretrained", (None, None)), strict=True)
    ),
    values=(one, other),
    difference=f"+{difference.text}" if difference.value > 0 else difference.text,
    p_value=number(record, "p_value") if "p_value" in record else math.nan,
    test=_text(record.get("test")),
    only_first=_count(record.get("only_first")),
    only_second=_count(record.get("only_second")),
  )


def _count(value: Any) -> str:
  return "" if value is None else f"{int(value):,}"


def _details(record: Mapping[str, Any], models: Sequence[Model]) -> Details:
  bins = [
    tuple(number(one, key) for key in ("confidence", "accuracy", "count")) for one in record.get("reliability") or []
  ]
  return Details(
    model=_model(models, record),
    dataset=_text(record["dataset"]),
    task=_text(record.get("task")),
    confusions=[
      {
        "true": str(pair["true"]),
        "guess": str(pair["guess"]),
        "count": int(pair["count"]),
        "of": _count(pair.get("of")),
        "pictures": list(pair.get("pictures") or []),
      }
      for pair in record.get("confusions") or []
    ],
    classes=[
      {"name": str(one["name"]), "count": _count(one.get("count")), "recall": number(one, "recall")}
      for one in record.get("classes") or []
    ],
    bins=[one for one in bins if all(map(math.isfinite, one)) and one[2] > 0],
    gallery=list(record.get("gallery") or []),
  )
