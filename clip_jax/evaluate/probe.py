"""Probes of frozen features: linear, few-shot and nearest neighbours, as functions of arrays.

The linear probe is multinomial logistic regression by L-BFGS, its strength of regularisation chosen on a validation split
(Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020, appendix A.3).

Everything runs on the first device of this process, in float32 with exact products, so that results are the same however
many devices there are. Training features must fit there; logits never exist for more than `LOGITS` numbers at a time.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.errors import DataError
from clip_jax.evaluate.search import nearest

LOGITS = 1 << 22  # logits held at a time, in training and in scoring
ROWS = 1 << 14  # and examples, where classes are few
MAX_ITERATIONS = 1_000  # the paper's
# Fits end where the gradient is this fraction of the one at zero weights, or where float32 cannot tell better from worse.
TOLERANCE = 1e-6
PATIENCE = 10  # iterations that improve neither the objective nor the gradient

PER_DECADE = 8  # values of the regulariser, of which the grid is 10 ** (step / PER_DECADE)
LIMIT = 6 * PER_DECADE  # steps either way: 1e-6 to 1e6
STRIDE = 2 * PER_DECADE  # of the first round
FITS = 2 * LIMIT // STRIDE + 1 + 2 * int(math.log2(STRIDE))  # at most, of a sweep
ABSENT = -1e30  # score of a class without a training example: below any other, and finite


def fit(features, labels, classes, regulariser, start=None, max_iterations=MAX_ITERATIONS):
  """Multinomial logistic regression.

  Minimises the sum over examples of the cross-entropy, plus regulariser / 2 times the sum of squared weights. The bias is not
  penalised. So `regulariser` is the lambda of Radford et al. 2021, appendix A.3, and 1 / C of scikit-learn's
  `LogisticRegression`. Solved to float32's precision, where scikit-learn's default tolerance may stop far from the optimum.

  A class without a training example gets weights of zero and a bias of `ABSENT`, which stands for the optimum, minus infinity.

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
  return _Problem(features, labels, classes).fit(regulariser, start, max_iterations)[:2]


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
  problem = _Problem(*train, classes)

  def accuracy(regulariser):
    weights, bias, _ = problem.fit(regulariser)
    right = 0
    for at, logits in _logits(valid[0], weights, bias):
      right += int(np.sum(np.argmax(logits, axis=1) == valid[1][at]))
    return right / len(valid[1])

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
  weights, bias, iterations = _Problem(*both, classes).fit(regulariser)
  scores = _scores(test[0], weights, bias)
  return {"scores": scores, "regulariser": regulariser, "tried": tried, "iterations": iterations}


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
    DataError: as `fit`, of either split; or fewer than one shot or draw.
  """
  if shots < 1 or seeds < 1:
    raise DataError(f"a few-shot probe needs at least one shot and one draw, not {shots} and {seeds}.")
  features, labels = train = _checked("training", *train, classes)
  test = _checked("test", *test, classes, like=train)
  scores = np.empty((seeds, len(test[0]), classes), np.float32)
  chosen, iterations = [], []
  for draw in range(seeds):
    chosen.append(np.flatnonzero(_ranks(labels, draw) < shots))
    problem = _Problem(features[chosen[-1]], labels[chosen[-1]], classes)
    weights, bias, count = problem.fit(regulariser)
    scores[draw] = _scores(test[0], weights, bias)
    iterations.append(count)
  return {"scores": scores, "chosen": chosen, "iterations": iterations, "regulariser": regulariser}


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
  found, similarity = nearest(_normalised(test[0]), _normalised(train[0]), k)
  votes = np.exp((similarity - similarity[:, :1]) / np.float32(temperature))
  votes /= votes.sum(axis=1, keepdims=True)
  scores, rows = np.zeros((len(found), classes), np.float32), np.arange(len(found))
  # Neighbour by neighbour: in a column no place occurs twice, and the order of the sum is fixed.
  for column, vote in zip(found.T, votes.T, strict=True):
    scores[rows, train[1][column]] += vote
  return scores


class _Problem:
  """Training examples on a device, and what is minimised over them.

  Features are centred, and scaled by one number. With a bias that is free, and the regulariser scaled along, the optimum is the same one,
  and it is reached in several times fewer steps: features of CLIP have a large mean in common.
  """

  def __init__(self, features, labels, classes):
    self._present, columns = np.unique(labels, return_inverse=True)
    if len(self._present) < 2:
      raise DataError(
        f"all training examples of the probe are of class {self._present[0]}; it needs two classes at least."
      )
    self._classes = classes
    self._mean = features.mean(axis=0, dtype=np.float64)
    rows = _rows(len(features), len(self._present))
    chunks = math.ceil(len(features) / rows)
    padded = np.zeros((chunks, rows, features.shape[1]), np.float32)
    squares = 0.0
    for chunk, start in enumerate(range(0, len(features), rows)):
      centred = features[start : start + rows] - self._mean
      squares += float(np.sum(centred**2))
      padded[chunk, : len(centred)] = centred
    # Features that are all the same have no scale.
    self._scale = math.sqrt(squares / features.size) or 1.0
    padded /= np.float32(self._scale)
    numbers = np.full(chunks * rows, -1, np.int32)
    numbers[: len(labels)] = columns
    self._examples = _put((padded, numbers.reshape(chunks, rows)))
    self._count = len(features)

  def fit(self, regulariser, start=None, max_iterations=MAX_ITERATIONS):
    """(weights float32 [embed, classes], bias float32 [classes], iterations) of the optimum."""
    if not (regulariser > 0 and math.isfinite(regulariser)):
      raise DataError(f"the regulariser of a probe is a number above 0, not {regulariser}.")
    weights = np.zeros((len(self._mean), self._classes))
    bias = np.full(self._classes, ABSENT)
    bias[self._present] = 0
    if start is not None:
      weights = np.asarray(start[0], np.float64) * self._scale
      bias = np.asarray(start[1], np.float64) + self._mean @ np.asarray(start[0], np.float64)
    inside = np.float32(weights[:, self._present]), np.float32(bias[self._present])
    scaled = np.float32(regulariser / self._scale**2)
    problem = (*self._examples, *_put((np.float32(self._count), scaled)))
    found = jax.device_get(_minimise(problem, _put(inside), _put(np.int32(max_iterations))))
    weights, bias = np.zeros_like(weights), np.full_like(bias, ABSENT)
    weights[:, self._present] = np.float64(found["weights"]) / self._scale
    bias[self._present] = found["bias"] - self._mean @ weights[:, self._present]
    return np.float32(weights), np.float32(bias), int(found["iterations"])


def _value_and_gradient(parameters, problem):
  """The objective over the number of examples, and its gradient, a chunk of logits at a time."""
  chunks, labels, count, regulariser = problem

  def losses(parameters, features, labels):
    weights, bias = parameters
    logits = jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + bias
    right = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    # Padding has labels below zero.
    return jnp.sum(jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=1) - right, 0))

  def add(gradient, chunk):
    loss, more = jax.value_and_grad(losses)(parameters, *chunk)
    return jax.tree.map(jnp.add, gradient, more), loss

  nothing = jax.tree.map(jnp.zeros_like, parameters)
  (weights, bias), loss = jax.lax.scan(add, nothing, (chunks, labels))
  penalty = regulariser / 2 * jnp.sum(parameters[0] ** 2)
  gradient = (weights + regulariser * parameters[0]) / count, bias / count
  return (jnp.sum(loss) + penalty) / count, gradient


@jax.custom_vjp
def _objective(parameters, problem):
  return _value_and_gradient(parameters, problem)[0]


# Differentiated as it is, a scan would keep the logits of all chunks.
_objective.defvjp(
  _value_and_gradient,
  lambda gradient, scale: (jax.tree.map(lambda leaf: leaf * scale, gradient), None),
)


@jax.jit
def _minimise(problem, start, max_iterations):
  solver = optax.lbfgs()

  def size(gradient):
    return jnp.maximum(*(jnp.max(jnp.abs(leaf)) for leaf in gradient))

  zeros = jax.tree.map(jnp.zeros_like, start)
  tolerance = TOLERANCE * size(_value_and_gradient(zeros, problem)[1])
  value, gradient = _value_and_gradient(start, problem)

  def unfinished(now):
    stalled = now["iterations"] - now["improved"] >= PATIENCE
    return (now["iterations"] < max_iterations) & (now["smallest"] > tolerance) & ~stalled

  def step(now):
    updates, solver_state = solver.update(
      now["gradient"],
      now["solver"],
      now["parameters"],
      value=now["value"],
      grad=now["gradient"],
      value_fn=_objective,
      problem=problem,
    )
    parameters = optax.apply_updates(now["parameters"], updates)
    # The line search has evaluated where it stopped.
    value, gradient = solver_state[-1].value, solver_state[-1].grad
    flatter, lower = size(gradient) < now["smallest"], value < now["lowest"]
    iterations = now["iterations"] + 1
    return {
      "parameters": parameters,
      "value": value,
      "gradient": gradient,
      "solver": solver_state,
      "iterations": iterations,
      # A last line search that fails may end anywhere. Near the optimum gradients tell more than values do in float32.
      "best": jax.tree.map(
        lambda new, old: jnp.where(flatter, new, old), parameters, now["best"]
      ),
      "smallest": jnp.where(flatter, size(gradient), now["smallest"]),
      "lowest": jnp.where(lower, value, now["lowest"]),
      "improved": jnp.where(flatter | lower, iterations, now["improved"]),
    }

  begin = {"parameters": start, "value": value, "gradient": gradient, "solver": solver.init(start)}
  begin |= {"best": start, "smallest": size(gradient), "lowest": value}
  begin |= {"iterations": jnp.int32(0), "improved": jnp.int32(0)}
  end = jax.lax.while_loop(unfinished, step, begin)
  return {"weights": end["best"][0], "bias": end["best"][1], "iterations": end["iterations"]}


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


@jax.jit
def _product(features, weights, bias):
  return jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + bias


def _logits(features, weights, bias):
  """Pairs of a slice of the examples and their logits."""
  rows = _rows(len(features), len(bias))
  weights, bias = _put((weights, bias))
  for start in range(0, len(features), rows):
    part = features[start : start + rows]
    block = np.zeros((rows, features.shape[1]), np.float32)
    block[: len(part)] = part
    logits = np.asarray(_product(_put(block), weights, bias))[: len(part)]
    yield slice(start, start + len(part)), logits


def _scores(features, weights, bias):
  scores = np.empty((len(features), len(bias)), np.float32)
  for at, logits in _logits(features, weights, bias):
    scores[at] = logits
  return scores


def _rows(count, classes):
  """Rows of a chunk: within the bounds, and such that little of the last one is padding."""
  most = max(1, min(ROWS, LOGITS // classes))
  return math.ceil(count / math.ceil(count / most))


def _put(arrays):
  return jax.device_put(arrays, jax.local_devices()[0])


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
    raise DataError(f"the {split} split of the probe has features that are not finite, of example {first} first.")
  wrong = ~((labels >= 0) & (labels < classes) & (labels == labels.astype(np.int64)))
  if wrong.any():
    first = int(np.argmax(wrong))
    raise DataError(
      f"the {split} split of the probe: example {first} has label {labels[first]}, and its {classes} classes are "
      f"numbered from 0 to {classes - 1}."
    )
  return features, labels.astype(np.int64)
