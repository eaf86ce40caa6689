"""Multinomial logistic regression by L-BFGS, on one device, for any number of examples that fits there.

The objective is that of scikit-learn's `LogisticRegression`, and of Radford et al. 2021 (Learning Transferable Visual Models From
Natural Language Supervision, arXiv 2103.00020), appendix A.3. All is in float32, products too, and on the first device of this
process, so that no mesh changes a result. On a CPU the last bits depend on how many threads JAX has there.

The line search is optax's, which goes by slopes where values cannot tell: in float32 SciPy's stops short of the optimum.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clip_jax.errors import DataError

LOGITS = 1 << 22  # logits held at a time, in training and in scoring
ROWS = 1 << 14  # and examples, where classes are few
MAX_ITERATIONS = 1_000  # the paper's
# Fits end where the gradient is this fraction of the one at zero weights, or where float32 cannot tell better from worse.
TOLERANCE = 1e-6
PATIENCE = 10  # iterations that improve neither the objective nor the gradient
ABSENT = -1e30  # score of a class without a training example: below any other, and finite


class Problem:
  """Training examples on the device, to be fitted with one regulariser or several.

  They are centred there, and scaled by one number. As the bias is free, and the regulariser is scaled along, the optimum stays what
  it is, and takes several times fewer steps to reach: the features of a tower have a large mean in common.
  """

  def __init__(self, features, labels, classes):
    """Puts the examples on the device.

    Args:
      features: float32 [n, embed], finite.
      labels: int [n], from 0 to classes - 1.
      classes: number of classes.

    Raises:
      DataError: fewer than two classes have examples.
    """
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
    """Finds the optimum.

    Args:
      regulariser: as of `probe.fit`.
      start: (weights, bias) to start from, in place of zeros.
      max_iterations: of L-BFGS.

    Returns:
      (weights float32 [embed, classes], bias float32 [classes], iterations). Classes without examples have weights of zero
      and a bias of `ABSENT`.

    Raises:
      DataError: the regulariser is not above 0.
    """
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
    found = _logits(features, *parameters)
    right = jnp.take_along_axis(found, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    # Padding has labels below zero.
    return jnp.sum(jnp.where(labels >= 0, jax.nn.logsumexp(found, axis=1) - right, 0))

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
      "best": jax.tree.map(lambda *both: jnp.where(flatter, *both), parameters, now["best"]),
      "smallest": jnp.where(flatter, size(gradient), now["smallest"]),
      "lowest": jnp.where(lower, value, now["lowest"]),
      "improved": jnp.where(flatter | lower, iterations, now["improved"]),
    }

  begin = {"parameters": start, "value": value, "gradient": gradient, "solver": solver.init(start)}
  begin |= {"best": start, "smallest": size(gradient), "lowest": value}
  begin |= {"iterations": jnp.int32(0), "improved": jnp.int32(0)}
  end = jax.lax.while_loop(unfinished, step, begin)
  return {"weights": end["best"][0], "bias": end["best"][1], "iterations": end["iterations"]}


def logits(features, weights, bias):
  """Logits of examples, in blocks.

  Args:
    features: float32 [n, embed].
    weights: float32 [embed, classes].
    bias: float32 [classes].

  Yields:
    Which examples, as a slice, and float32 [their number, classes].
  """
  rows = _rows(len(features), len(bias))
  weights, bias = _put((weights, bias))
  for start in range(0, len(features), rows):
    part = features[start : start + rows]
    # Of one shape, to compile once.
    block = np.zeros((rows, features.shape[1]), np.float32)
    block[: len(part)] = part
    found = np.asarray(_logits(_put(block), weights, bias))
    yield slice(start, start + len(part)), found[: len(part)]


def scores(features, weights, bias):
  """Logits of all examples: float32 [n, classes], of the arguments of `logits`."""
  found = np.empty((len(features), len(bias)), np.float32)
  for at, block in logits(features, weights, bias):
    found[at] = block
  return found


@jax.jit
def _logits(features, weights, bias):
  return jnp.matmul(features, weights, precision=jax.lax.Precision.HIGHEST) + bias


def _rows(count, classes):
  """Rows of a chunk: within the bounds, and such that little of the last one is padding."""
  most = max(1, min(ROWS, LOGITS // classes))
  return math.ceil(count / math.ceil(count / most))


def _put(arrays):
  return jax.device_put(arrays, jax.local_devices()[0])
