"""What an evaluator finds."""

import dataclasses
from typing import NamedTuple

# CLIP_benchmark names the side that is retrieved.
RETRIEVED = {"image_to_text": "text_retrieval", "text_to_image": "image_retrieval"}


class Score(NamedTuple):
  """One number, with how much of it is chance."""

  value: float
  standard_error: float | None = None
  chance: float | None = None  # what guessing reaches


@dataclasses.dataclass(frozen=True)
class Result:
  """The scores of a model on a set.

  Attributes:
    items: how many examples it has.
    scores: a `Score` by its metric.
    outcomes: by metric, what each example adds to the score, float64 [n], and which of them belong together, int [n] or None: what
      `uncertainty.paired` compares two models by.
    details: what a page shows of it, ready for JSON.
  """

  items: int
  scores: dict
  outcomes: dict = dataclasses.field(default_factory=dict)
  details: dict = dataclasses.field(default_factory=dict)

  def flat(self, name):
    """The scores as they are logged: "eval/NAME/METRIC", and ".../chance" and ".../standard_error" where there are any."""
    found = {}
    for metric, score in self.scores.items():
      found[f"eval/{name}/{metric}"] = score.value
      beside = {"chance": score.chance, "standard_error": score.standard_error}
      found |= {f"eval/{name}/{metric}/{key}": value for key, value in beside.items() if value is not None}
    return found


def column(metric):
  """What CLIP_benchmark calls a score that is logged here as `metric`: "image_to_text_R@5" is its "text_retrieval_recall@5"."""
  way, _, measure = metric.partition("_R@")
  full = way.removesuffix("_full")
  if full not in RETRIEVED:
    return metric
  return f"{RETRIEVED[full]}_{'full_' if full != way else ''}recall@{measure}"
