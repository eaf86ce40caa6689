"""Held-out results as rows, for the page and for terminals."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from clip_jax.report import plots

# Numbers to be had without any training, logged beside the model's; they go in a column of their own.
YARDSTICK = "nearest_pixels_"
DIRECTIONS = {"image_to_text_": "image → text ", "text_to_image_": "text → image "}

_SHARE = re.compile(r"(^|_)(R@\d+|(acc|top)@?\d*|accuracy|recall|precision|mAP|AUC|ece)(_|$)")


@dataclass(frozen=True)
class Row:
  """One held-out result.

  Attributes:
    name: for people, set and metric ("emoji_unseen image → text R@5").
    value: as logged, usually a share of 0 to 1.
    chance: what guessing reaches, or None.
    yardstick: what the nearest training drawing by pixels reaches, or None.
    set: the evaluation set.
    metric: as in the key ("image_to_text_R@5").
    standard_error: of the value, or None.
  """

  name: str
  value: float
  chance: float | None = None
  yardstick: float | None = None
  set: str = ""
  metric: str = ""
  standard_error: float | None = None

  @property
  def label(self) -> str:
    """The metric for people, without the set."""
    return _metric_label(self.metric)

  @property
  def result(self) -> str:
    """The value as it should be read, with its standard error: "20.9% ± 1.2"."""
    error = "" if self.standard_error is None else f" ± {self.text(self.standard_error).removesuffix('%')}"
    return self.text(self.value) + error

  @property
  def key(self) -> str:
    """The key it was logged under."""
    return "/".join(filter(None, ("eval", self.set, self.metric)))

  @property
  def is_share(self) -> bool:
    """Whether the numbers are shares, to be written as percent, rather than ranks or losses."""
    return bool(_SHARE.search(self.metric)) and not self.value > 1

  def text(self, number: float | None) -> str:
    """A number of this row as it should be read: percent, or four digits, or a dash for None."""
    if number is None:
      return "–"
    return plots.percent(number) if self.is_share else plots.number(number)


def results_table(metrics: Mapping[str, float]) -> list[Row]:
  """Turns flat evaluation keys into rows.

  Args:
    metrics: `eval/SET/METRIC` -> number, with `eval/SET/METRIC/chance`, `eval/SET/METRIC/standard_error` and
      `eval/SET/nearest_pixels_...` beside it or not; other keys are ignored.

  Returns:
    Rows by set in order of appearance; within a set image to text, then text to image, then the
    others; K ascending. A yardstick stands in the row of the image-to-text metric it belongs to,
    or in a row of its own where there is none.
  """
  values, chances, errors, yardsticks = {}, {}, {}, {}
  for key, value in metrics.items():
    if not key.startswith("eval/"):
      continue
    name = key.removeprefix("eval/")
    ending = next((ending for ending in ("/chance", "/standard_error") if name.endswith(ending)), "")
    target = {"/chance": chances, "/standard_error": errors, "": values}[ending]
    set_, _, metric = name.removesuffix(ending).rpartition("/")
    target[set_, metric] = value
  for set_, metric in list(values):
    if not metric.startswith(YARDSTICK):
      continue
    rest = metric.removeprefix(YARDSTICK)
    owner = next((m for m in (f"image_to_text_{rest}", rest) if (set_, m) in values), None)
    if owner:
      yardsticks[set_, owner] = values.pop((set_, metric))

  sets = list(dict.fromkeys(set_ for set_, _ in values))
  families = list(dict.fromkeys(family(metric) for _, metric in values))

  def order(key):
    set_, metric = key
    direction = [*(metric.startswith(d) for d in DIRECTIONS), True].index(True)
    return sets.index(set_), direction, families.index(family(metric)), _at_k(metric)

  return [
    Row(
      name=f"{set_} {_metric_label(metric)}".strip(),
      value=values[set_, metric],
      chance=chances.get((set_, metric)),
      yardstick=yardsticks.get((set_, metric)),
      set=set_,
      metric=metric,
      standard_error=errors.get((set_, metric)),
    )
    for set_, metric in sorted(values, key=order)
  ]


def _metric_label(metric: str) -> str:
  for prefix, words in DIRECTIONS.items():
    if metric.startswith(prefix):
      return words + metric.removeprefix(prefix).replace("_", " ")
  return "ECE, its calibration error" if metric == "ece" else metric.replace("_", " ")


def family(metric: str) -> str:
  """A metric without its K: R@1, R@5 and R@10 are one family."""
  return re.sub(r"\d+$", "", metric)


def _at_k(metric: str) -> int:
  digits = re.search(r"\d+$", metric)
  return int(digits.group()) if digits else 0


def headline_rows(rows: list[Row]) -> list[Row]:
  """Of each set and direction the one share to look at: R@5, or the K nearest to it; acc1."""
  chosen = {}
  for row in rows:
    if not row.is_share:
      continue
    best_k = 5 if "R@" in row.metric else 1
    kind = row.set, family(row.metric)
    if kind not in chosen or abs(_at_k(row.metric) - best_k) < abs(
      _at_k(chosen[kind].metric) - best_k
    ):
      chosen[kind] = row
  return list(chosen.values())
