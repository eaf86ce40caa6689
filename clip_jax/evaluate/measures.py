"""What a set of scores is worth: accuracy, recall a class, average precision, calibration. NumPy alone."""

import numpy as np

BINS = 15  # of confidence, as Guo et al. 2017 (arXiv 1706.04599) have them


def ranks(scores, labels):
  """How many classes come before the right one; of equal scores the class with the smaller number comes first.

  Args:
    scores: float [n, classes].
    labels: int [n].

  Returns:
    int64 [n]; 0 where the right class is first.
  """
  right = np.take_along_axis(scores, labels[:, None], axis=1)
  before = np.arange(scores.shape[1]) < labels[:, None]
  return ((scores > right) | ((scores == right) & before)).sum(axis=1)


def softmax(logits):
  """Probabilities of rows of logits, in float64."""
  logits = np.asarray(logits, np.float64)
  shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return shifted / shifted.sum(axis=-1, keepdims=True)


def recall_by_class(correct, labels, classes):
  """The share of each class that is found.

  Args:
    correct: bool [n].
    labels: int [n].
    classes: how many there are.

  Returns:
    float64 [classes], not a number for a class without examples, and int64 [classes], how many it has.
  """
  counts = np.bincount(labels, minlength=classes)
  found = np.bincount(labels, weights=correct, minlength=classes)
  with np.errstate(invalid="ignore"):
    return np.where(counts, found / counts, np.nan), counts


def average_precision(scores, relevant):
  """Average precision: the mean over thresholds of precision, weighted with what each adds to recall.

  Equal scores are one threshold, so that the order of examples does not matter; as `sklearn.metrics.average_precision_score`.

  Args:
    scores: float [n].
    relevant: bool [n].

  Returns:
    A share of 1; not a number if nothing is relevant.
  """
  total = int(relevant.sum())
  if not total:
    return float("nan")
  order = np.argsort(-scores, kind="stable")
  last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # the last one of each threshold
  found = np.cumsum(relevant[order])[last]
  precision = found / (last + 1)
  return float(np.sum(np.diff(found, prepend=0) / total * precision))


def average_precisions(scores, relevant):
  """`average_precision` of each class.

  Args:
    scores: float [n, classes].
    relevant: bool [n, classes].

  Returns:
    float64 [classes].
  """
  return np.array([average_precision(*columns) for columns in zip(scores.T, relevant.T, strict=True)])


def reliability(confidence, correct, bins=BINS):
  """Confidence against accuracy, in bins of equal width (Guo et al. 2017, section 2).

  Args:
    confidence: float [n], probabilities of what was guessed.
    correct: bool [n].
    bins: how many.

  Returns:
    float64 [bins, 3]: the sum of confidence, the number that is correct, and how many there are.
  """
  # Bins are open below: a probability of 0.2 is in the one that ends there.
  number = np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(int) - 1, 0, bins - 1)
  return np.stack([np.bincount(number, weights=w, minlength=bins) for w in (confidence, correct, np.ones(len(number)))], axis=1)


def calibration_error(binned):
  """Expected calibration error: the mean of |accuracy - confidence| of bins, weighted with what is in them.

  Args:
    binned: [..., bins, 3], as `reliability` gives.
  """
  sums, correct, counts = np.moveaxis(binned, -1, 0)
  return np.abs(correct - sums).sum(axis=-1) / counts.sum(axis=-1)
