"""Zero-shot classification by prompts (Radford et al. 2021, section 3.1)."""

import jax
import numpy as np

from clip_jax.data.pipeline import evaluation_pixels
from clip_jax.data.sources.protocol import TOGETHER
from clip_jax.errors import DataError
from clip_jax.evaluate import measures, prompts, uncertainty
from clip_jax.evaluate.pictures import data_uri
from clip_jax.evaluate.result import Result, Score

CHECKED = 1_000  # records whose labels are looked at before anything is encoded
PROMPTS = 16_384  # that are embedded at a time
CONFUSIONS, PICTURES = 12, 4  # pairs of classes that a page shows, and pictures of each


class ZeroShot:
  """Accuracy on a labelled held-out set; of images with several labels, average precision."""

  def __init__(self, held_out, encoder, kept=None, show=0):
    """Looks at labels of the set, of a large one at some that are spread over it.

    Args:
      held_out: a `datasets.EvaluationSet`.
      encoder: an `Encoder`.
      kept: a dict or the like to keep classifiers in, by their prompts; of one set of weights.
      show: confusions in the details, each with some pictures.

    Raises:
      DataError: a record has no label, or one that no class name belongs to.
    """
    self.set, self._encoder, self._kept, self._show = held_out, encoder, kept, show
    count = len(held_out.source)
    spread = sorted({i * (count - 1) // max(min(count, CHECKED) - 1, 1) for i in range(min(count, CHECKED))})
    for start in range(0, len(spread), TOGETHER):
      for record in held_out.source.fetch(spread[start : start + TOGETHER]):
        if isinstance(record, DataError):
          raise record
        label_of(record, held_out)

  def __call__(self, params):
    """Scores a model.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      A `Result` with "acc1", "acc5" (of more than five classes), "mean_per_class_recall" and "ece"; of a multilabel set with
      "mean_average_precision".
    """
    weights = self.classifier(params)
    if self.set.multilabel:
      return self._multilabel(params, weights)
    scale = self._encoder.logit_scale(params)
    count = len(self.set.source)
    found = {"rank": np.empty(count, np.int32), "guess": np.empty(count, np.int32)}
    found |= {"label": np.empty(count, np.int32), "confidence": np.empty(count, np.float32)}
    for start, embeddings, labels in self._encoder.chunks(params, count, self._load, np.int32(0)):
      scores = embeddings @ weights.T
      here = slice(start, start + len(scores))
      found["rank"][here], found["label"][here] = measures.ranks(scores, labels), labels
      found["guess"][here] = scores.argmax(axis=1)
      found["confidence"][here] = measures.softmax(scale * scores).max(axis=1)
    return classified(found, len(weights), details=lambda: self._details(found))

  def classifier(self, params):
    """One embedding a class: the mean over templates of normalised embeddings, normalised again.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      float32 [classes, embed_dim].
    """
    classes, templates = self.set.classes, self.set.templates
    key = (classes, templates)
    if self._kept is not None and key in self._kept:
      return self._kept[key]
    step = max(PROMPTS // len(templates), 1)
    parts = []
    for start in range(0, len(classes), step):
      names = classes[start : start + step]
      tokens = self._encoder.tokenizer([prompts.fill(template, name) for name in names for template in templates])
      parts.append(self._encoder.texts(params, tokens).reshape(len(names), len(templates), -1).mean(axis=1))
    means = np.concatenate(parts)
    weights = means / np.linalg.norm(means, axis=1, keepdims=True)
    if self._kept is not None:
      self._kept[key] = weights
    return weights

  def _multilabel(self, params, weights):
    count, classes = len(self.set.source), len(weights)
    scores, relevant = np.empty((count, classes), np.float32), np.empty((count, classes), bool)
    for start, embeddings, labels in self._encoder.chunks(params, count, self._load, np.zeros(classes, np.int32)):
      here = slice(start, start + len(embeddings))
      scores[here], relevant[here] = embeddings @ weights.T, labels > 0
    precisions = measures.average_precisions(scores, relevant)

    def mean(drawn):
      return np.nanmean(measures.average_precisions(scores[drawn], relevant[drawn]))

    # In any order of the images a precision is, on average, about the share of the class.
    score = Score(float(np.nanmean(precisions)), uncertainty.bootstrap(mean, count), float(relevant.mean()))
    named = zip(self.set.classes, relevant.sum(axis=0), precisions, strict=True)
    return Result(
      count,
      {"mean_average_precision": score},
      {"mean_average_precision": (np.nan_to_num(precisions), None)},
      {"classes": [{"name": name, "count": int(n), "recall": float(p)} for name, n, p in named if n]},
    )

  def _load(self, index):
    model, record = self._encoder.model, self.set.source[int(index)]
    return evaluation_pixels(record, model.image_size, model.resize_mode), label_of(record, self.set)

  def _details(self, found):
    if not self._show or jax.process_index():
      return {}
    label, guess, names = found["label"], found["guess"], self.set.classes
    recalls, counts = measures.recall_by_class(label == guess, label, len(names))
    binned = measures.reliability(found["confidence"], label == guess)
    wrong = np.flatnonzero(label != guess)
    pairs, times = np.unique(np.stack([label[wrong], guess[wrong]]), axis=1, return_counts=True)
    confusions = []
    for i in np.argsort(-times, kind="stable")[: self._show]:
      true, guessed = pairs[:, i]
      seen = wrong[(label[wrong] == true) & (guess[wrong] == guessed)][:PICTURES]
      confusions.append({
        "true": names[true], "guess": names[guessed], "count": int(times[i]), "of": int(counts[true]),
        "pictures": [data_uri(self.set.source[int(n)].image) for n in seen],
      })  # fmt: skip
    return {
      "confusions": confusions,
      "classes": [{"name": names[i], "count": int(counts[i]), "recall": float(recalls[i])} for i in np.flatnonzero(counts)],
      "reliability": [{"confidence": s / n, "accuracy": c / n, "count": int(n)} for s, c, n in binned.tolist() if n],
    }


def label_of(record, held_out):
  """The label of a record of a `datasets.EvaluationSet`: int32 [], or of a multilabel set [classes], zeros and ones.

  Raises:
    DataError: it has none, or one that no class name belongs to.
  """
  given, classes = record.label, len(held_out.classes)
  several = given if isinstance(given, tuple) else (given,)
  if isinstance(given, tuple) != held_out.multilabel or not all(n is not None and 0 <= n < classes for n in several):
    needed = "a .npy member" if held_out.multilabel else f"a number from 0 to {classes - 1:,}"
    raise DataError(f"{record.key}: its label is {given}; {held_out.described} has {classes:,} classes and needs {needed}.")
  if not held_out.multilabel:
    return np.int32(given)
  flags = np.zeros(classes, np.int32)
  flags[list(given)] = 1
  return flags


def classified(found, classes, prefix="", details=dict):
  """The scores of guesses.

  Args:
    found: a dict of int [n] "label", "guess" and "rank" (classes before the right one), and maybe "confidence", float [n].
    classes: how many there are.
    prefix: of the names of the metrics.
    details: a function that makes the details.

  Returns:
    A `Result`.
  """
  label, count = found["label"], len(found["label"])
  outcomes = {f"acc{k}": found["rank"] < k for k in (1, 5) if k == 1 or classes > k}
  scores = {
    f"{prefix}{name}": Score(float(right.mean()), uncertainty.of_mean(right), min(int(name[3:]) / classes, 1))
    for name, right in outcomes.items()
  }
  recalls, counts = measures.recall_by_class(outcomes["acc1"], label, classes)
  mean = float(np.nanmean(recalls))
  scores[f"{prefix}mean_per_class_recall"] = Score(mean, uncertainty.of_recalls(recalls, counts), 1 / classes)
  if "confidence" in found:
    confidence, right = found["confidence"], outcomes["acc1"]

    def error(drawn=slice(None)):
      return measures.calibration_error(measures.reliability(confidence[drawn], right[drawn]))

    scores[f"{prefix}ece"] = Score(float(error()), uncertainty.bootstrap(error, count))
  return Result(count, scores, {f"{prefix}{name}": (np.float64(right), None) for name, right in outcomes.items()}, details())


def from_scores(scores, labels, prefix):
  """The `Result` of class scores, float [n, classes], and labels, int [n]; `prefix` as in `classified`."""
  found = {"label": labels, "guess": scores.argmax(axis=1), "rank": measures.ranks(scores, labels)}
  return classified(found, scores.shape[1], prefix)
