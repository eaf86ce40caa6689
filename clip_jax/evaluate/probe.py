"""Probes of frozen features: linear, few-shot and nearest neighbours, as functions of arrays.

The linear probe is that of Radford et al. 2021 (Learning Transferable Visual Models From Natural Language Supervision, arXiv
2103.00020), appendix A.3: logistic regression by L-BFGS, its regulariser chosen on a validation split.
"""

import numpy as np

from clip_jax.errors import DataError
from clip_jax.evaluate.logistic import MAX_ITERATIONS, Problem, logits, scores
from clip_jax.evaluate.search import nearest

PER_DECADE = 8  # values of the regulariser; the grid is 10 ** (step / PER_DECADE)
LIMIT = 6 * PER_DECADE  # steps either way: 1e-6 to 1e6
STRIDE = 2 * PER_DECADE  # of the first round; a power of two
FITS = 2 * LIMIT // STRIDE + 1 + 2 * (STRIDE.bit_length() - 1)  # of a sweep, at most


def fit(features, labels, classes, regulariser, start=None, max_iterations=MAX_ITERATIONS):
  """Multinomial logistic regression.

  Minimises the sum over examples of the cross-entropy, plus regulariser / 2 times the sum of squared weights. The bias is not
  penalised. So `regulariser` is the lambda of Radford et al. 2021, appendix A.3, and 1 / C of scikit-learn's
  `LogisticRegression`. Solved as far as float32 allows, where scikit-learn's default tolerance may stop far from the optimum.

  A class without a training example is allowed: the best bias for it is minus infinity, for which `logistic.ABSENT` stands, and
  its weights are zero.

  Args:
    features: float32 [n, embed].
    labels: int [n], from 0 to classes - 1.
    classes: number of classes.
    regulariser: above 0.
    start: (weights, bias) to start from, in place of zeros.
    max_iterations: of L-BFGS.

  Returns:
    (weights float32 [embed, classes], bias float32 [classes]), so that logits are features @ weights + bias.

  Raises:
    DataError: no example, a label out of range, features that are not finite, fewer than two classes with examples, or a
      regulariser that is not above 0.
  """
  features, labels = _checked("training", features, labels, classes)
  return Problem(features, labels, classes).fit(regulariser, start, max_iterations)[:2]


def sweep(train_features, train_labels, valid_features, valid_labels, classes, track=None):
  """Chooses the regulariser by accuracy on a validation split.

  The parametric binary search of Radford et al. 2021, appendix A.3: of 96 logarithmic steps from 1e-6 to 1e6, 1e-6, 1e-4, ...,
  1e6 are tried first; then the interval around the best so far is halved until there are 8 steps a decade. Of equals the
  largest is best. Each fit starts from zeros, so that its result does not depend on what was tried before.

  Args:
    train_features: float32 [n, embed].
    train_labels: int [n].
    valid_features: float32 [m, embed].
    valid_labels: int [m].
    classes: number of classes.
    track: wraps a range of fits that is gone through, to show progress.

  Returns:
    (regulariser, tried): the best, and a list of (regulariser, validation accuracy) in the order of trying.

  Raises:
    DataError: as `fit`, of either split.
  """
  train = _checked("training", train_features, train_labels, classes)
  valid = _checked("validation", valid_features, valid_labels, classes, like=train)
  problem = Problem(*train, classes)

  def accuracy(regulariser):
    weights, bias, _ = problem.fit(regulariser)
    blocks = logits(valid[0], weights, bias)
    right = [np.argmax(block, axis=1) == valid[1][at] for at, block in blocks]
    return float(np.mean(np.concatenate(right)))

  return _search(accuracy, track)


def linear_probe(train, test, classes, valid=None, seed=0, track=None):
  """Sweeps the regulariser, trains with the best on training and validation examples together, and scores the test split.

  Radford et al. 2021, appendix A.3.

  Args:
    train: (features float32 [n, embed], labels int [n]).
    test: the same, for what is scored.
    classes: number of classes.
    valid: the same, of the validation split. Without it a tenth of each class of `train` is held out for the sweep, at least one
      example of a class that has two.
    seed: of the choice of what is held out.
    track: wraps a range of fits that is gone through, to show progress.

  Returns:
    {"scores": float32 [n_test, classes] logits, "regulariser": the chosen, "tried": a list of (regulariser, validation accuracy),
    "iterations": of the last fit}.

  Raises:
    DataError: as `fit`, of any split; or no class has two examples, of which one could be held out.
  """
  train = _checked("training", *train, classes)
  test = _checked("test", *test, classes, like=train)
  if valid is None:
    held_out = _held_out(train[1], seed)
    parts, both = [[x[~held_out] for x in train], [x[held_out] for x in train]], train
  else:
    valid = _checked("validation", *valid, classes, like=train)
    parts, both = [train, valid], [np.concatenate(pair) for pair in zip(train, valid, strict=True)]
  regulariser, tried = sweep(*parts[0], *parts[1], classes, track)
  weights, bias, iterations = Problem(*both, classes).fit(regulariser)
  found = {"scores": scores(test[0], weights, bias), "regulariser": regulariser}
  return found | {"tried": tried, "iterations": iterations}


def few_shot(train, test, classes, shots, seeds=5, regulariser=1 / 0.316):
  """Linear probes trained on a few examples of each class, drawn several times.

  The regulariser is fixed, as so few examples leave none to choose it by. C = 0.316 is what OpenAI's own example of a linear
  probe uses (README of github.com/openai/CLIP).

  Args:
    train: (features float32 [n, embed], labels int [n]).
    test: the same, for what is scored.
    classes: number of classes.
    shots: examples of each class; a class that has fewer gives all it has.
    seeds: number of draws. Draw i depends on i and the order of `train` alone, and holds what the same draw with fewer shots does.
    regulariser: as of `fit`.

  Returns:
    {"scores": float32 [seeds, n_test, classes] logits, "chosen": a list of int arrays, which examples were drawn,
    "iterations": a list of those of each fit, "regulariser": as given}.

  Raises:
    DataError: as `fit`, of either split; or no shot, or no draw.
  """
  if shots < 1 or seeds < 1:
    raise DataError(
      f"a few-shot probe needs at least one shot and one draw, not {shots} and {seeds}."
    )
  features, labels = train = _checked("training", *train, classes)
  test = _checked("test", *test, classes, like=train)
  found = np.empty((seeds, len(test[0]), classes), np.float32)
  chosen, iterations = [], []
  for draw in range(seeds):
    chosen.append(np.flatnonzero(_ranks(labels, draw) < shots))
    problem = Problem(features[chosen[-1]], labels[chosen[-1]], classes)
    weights, bias, count = problem.fit(regulariser)
    found[draw] = scores(test[0], weights, bias)
    iterations.append(count)
  return {"scores": found, "chosen": chosen, "iterations": iterations, "regulariser": regulariser}


def k_nearest(train, test, classes, k=20, temperature=0.07):
  """Scores of classes by a weighted vote of the nearest training examples.

  Neighbours by cosine similarity vote for their class with weight exp(similarity / temperature) (Wu et al. 2018, Unsupervised
  Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978, section 3.4; k and temperature as Caron et al.
  2021, Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294, appendix F.1). Here votes are shares of all of
  an example's votes, which leaves the order of its classes and no weight too large for float32. Of equally near examples the
  first count.

  Args:
    train: (features float32 [n, embed], labels int [n]); normalised here.
    test: the same, for what is scored.
    classes: number of classes.
    k: neighbours that vote; all, where there are fewer.
    temperature: above 0.

  Returns:
    float32 [n_test, classes] that sum to 1 over classes. Without a vote a class has 0.

  Raises:
    DataError: no example, a label out of range, features that are not finite, k below 1, or a temperature not above 0.
  """
  if k < 1 or not temperature > 0:
    raise DataError(
      f"nearest neighbours need k of at least 1 and a temperature above 0, not {k} and {temperature}."
    )
  train = _checked("training", *train, classes)
  test = _checked("test", *test, classes, like=train)
  neighbours, similarity = nearest(_normalised(test[0]), _normalised(train[0]), k)
  votes = np.exp((similarity - similarity[:, :1]) / np.float32(temperature))
  votes /= votes.sum(axis=1, keepdims=True)
  shares, rows = np.zeros((len(neighbours), classes), np.float32), np.arange(len(neighbours))
  # A rank at a time: each example has one neighbour of a rank, so nothing is added twice at once.
  for column, vote in zip(neighbours.T, votes.T, strict=True):
    shares[rows, train[1][column]] += vote
  return shares


def _search(accuracy, track=None):
  progress = iter((track or iter)(range(FITS)))
  found, stride = {}, STRIDE
  steps = range(-LIMIT, LIMIT + 1, STRIDE)
  while stride:
    for step in steps:
      if abs(step) <= LIMIT:
        next(progress, None)
        found[step] = accuracy(10 ** (step / PER_DECADE))
    peak = max(found, key=lambda step: (found[step], step))
    stride //= 2
    steps = (peak - stride, peak + stride)
  # At an end of the range there is less to try, and a bar of progress is still to be closed.
  list(progress)
  return 10 ** (peak / PER_DECADE), [(10 ** (step / PER_DECADE), a) for step, a in found.items()]


def _normalised(features):
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return features / np.maximum(norms, np.finfo(np.float32).tiny)


def _ranks(labels, seed):
  """Places of the examples in a random order of their own class: int [n], from 0."""
  shuffled = np.random.default_rng(seed).permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  counts = np.bincount(labels)
  ranks = np.empty(len(labels), np.int64)
  ranks[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
  return ranks


def _held_out(labels, seed):
  counts = np.bincount(labels)
  taken = np.where(counts > 1, np.maximum(1, np.rint(counts / 10)), 0)
  held_out = _ranks(labels, seed) < taken[labels]
  if not held_out.any():
    raise DataError(
      "no class of the training split has two examples, of which one could be held out to choose the regulariser; "
      "give a validation split."
    )
  return held_out


def _checked(split, features, labels, classes, like=None):
  """A split as float32 [n, embed] and int64 [n], or what is wrong with it."""
  features, labels = np.asarray(features), np.asarray(labels)
  if features.ndim != 2 or labels.shape != features.shape[:1]:
    raise DataError(
      f"the {split} split of the probe has features {list(features.shape)} and labels {list(labels.shape)}; "
      "it needs [examples, embed] and [examples]."
    )
  if not features.size:
    raise DataError(f"the {split} split of the probe has no example.")
  if like is not None and features.shape[1] != like[0].shape[1]:
    raise DataError(
      f"the {split} split of the probe has features of {features.shape[1]} numbers; those of the training split have "
      f"{like[0].shape[1]}."
    )
  features = np.asarray(features, np.float32)
  # A sum in float64 cannot overflow, and makes no copy of what may be gigabytes.
  if not np.isfinite(features.sum(dtype=np.float64)):
    first = next(i for i, row in enumerate(features) if not np.isfinite(row).all())
    raise DataError(
      f"the {split} split of the probe has features that are not finite, of example {first} first."
    )
  if not np.issubdtype(labels.dtype, np.integer):
    raise DataError(
      f"the labels of the {split} split of the probe are {labels.dtype}, not whole numbers."
    )
  wrong = (labels < 0) | (labels >= classes)
  if wrong.any():
    first = int(np.argmax(wrong))
    raise DataError(
      f"the {split} split of the probe: example {first} has label {labels[first]}, and its {classes} classes are "
      f"numbered from 0 to {classes - 1}."
    )
  return features, labels.astype(np.int64)
