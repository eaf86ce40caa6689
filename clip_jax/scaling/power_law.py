"""Power laws of error and compute, E = beta C^alpha, as Cherti et al. 2022 (arXiv 2212.07143) fit them, with intervals.

Everything is least squares in log10 of error. `frontier` is theirs: the best run of each of five bins of compute stands for the
bin. It is biased on purpose (the best of many runs is a lucky one, and lies somewhere in its bin, and not at its centre); the
estimate is left as it was published, and its intervals allow for that.

The intervals are of 95 %. In simulated grids of 5 x 3 x 3 and of 3 x 3 x 2 sizes, durations and data sets, with scatter of 0.003 to
0.03 of log10 of error, those of alpha and beta hold the truth in 95 % ("all"), 93 to 98 % ("saturating"), and 95 to 100 %
("frontier", whether all runs follow a law, or only the best of each compute). In length they are 4, 4, and 5 to 9 standard deviations
of the estimate. Of "frontier" they are longer yet, and hold more, where scatter is so small that places in bins matter more.
"""

import dataclasses

import numpy as np

from clip_jax.errors import UsageError
from clip_jax.scaling import intervals, saturating

METHODS = ("frontier", "all", "saturating")
BINS = 5
MARGIN = 0.1  # of log10 of compute, by which the last bin goes beyond the largest
_SAME = 1e-9  # logarithms of compute that differ by less are of the same compute


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A point that least squares saw.

  Attributes:
    compute: in the unit of the computes given; for "frontier" the centre of the bin.
    error: of the run.
    index: of the run among those given.
  """

  compute: float
  error: float
  index: int


@dataclasses.dataclass(frozen=True)
class Law:
  """E = limit + beta C^alpha, and how well it fits. Called with compute, it gives the error.

  Attributes:
    method: one of METHODS.
    n: how many runs were given.
    beta: the factor, which depends on the unit of compute.
    alpha: the exponent.
    limit: the error that no compute goes below; 0 except for "saturating".
    beta_ci: a pair, the interval of confidence; None where the law is fitted to two points.
    alpha_ci: likewise.
    limit_ci: likewise; None except for "saturating", too.
    mae: the mean absolute error of the law at the points it was fitted to, in units of error.
    leave_one_out: the mean absolute error, in units of error, at each of those points of the law fitted to the others; of
      "frontier" a bin is left out at a time. None where the others would be of one compute.
    residuals: log10 of error less that of the law, one for each of `fitted`.
    fitted: of type `Fitted`, by ascending compute.
  """

  method: str
  n: int
  beta: float
  alpha: float
  limit: float
  beta_ci: tuple | None
  alpha_ci: tuple | None
  limit_ci: tuple | None
  mae: float
  leave_one_out: float | None
  residuals: tuple
  fitted: tuple
  _anchor: tuple = dataclasses.field(repr=False, compare=False)  # log10 of a compute, and of error less the limit there
  _intervals: object = dataclasses.field(repr=False, compare=False)

  def __call__(self, compute):
    """The error of the law.

    Args:
      compute: above 0; a number or an array.
    """
    middle, height = self._anchor  # beta is far away, and may be out of range where alpha is large
    return self.limit + 10 ** (height + self.alpha * (np.log10(compute) - middle))

  def forecast(self, compute):
    """What a new run will find.

    Args:
      compute: of it.

    Returns:
      The error of the law, and a pair (low, high), the prediction interval of the run's: of the law, and of the scatter of runs about
      it; for "frontier" of all runs, and not of the best alone. None in place of the pair where the law is fitted to two points.

    Raises:
      UsageError: the compute is not above 0.
    """
    if not 0 < compute < np.inf:
      raise UsageError(f"There is no forecast for a compute of {compute:g}; it must be above 0.")
    error = float(self(compute))
    if self._intervals is None:
      return error, None
    return error, _pair(end[0] for end in self._intervals.values([np.log10(compute)], new_run=True))

  def band(self, computes):
    """The interval of confidence of the law itself at each of several computes.

    Args:
      computes: [n].

    Returns:
      Lows and highs, each float64 [n]; None where the law is fitted to two points.
    """
    if self._intervals is None:
      return None
    low, high = self._intervals.values(np.log10(computes))
    return _power(low), _power(high)


def fit(computes, errors, method="frontier"):
  """Fits a law.

  Args:
    computes: [n], above 0, of any unit.
    errors: [n], above 0.
    method: "all" fits a line to log10 of all errors. "frontier" fits it to the lowest error of each of BINS equal bins of log10 of
      compute, from the smallest to MARGIN above the largest, at the bin's centre. "saturating" fits limit + beta C^alpha, with
      0 <= limit < the lowest error, to all.

  Returns:
    A `Law`.

  Raises:
    UsageError: these points determine no law.
  """
  if method not in METHODS:
    raise UsageError(f"{method!r} is no method; there are {', '.join(METHODS)}.")
  x, y = _checked(computes, errors)
  order = np.lexsort((y, x))  # what is drawn for intervals must not depend on the order of rows
  x, y = x[order], y[order]
  if method == "saturating":
    return _saturating(x, y, order)
  places, indices, pick = _frontier(x, y) if method == "frontier" else (x, np.arange(len(x)), lambda values: values)
  return _straight(x, y, order, method, places, indices, pick)


def _checked(computes, errors):
  found = []
  for name, values in (("compute", computes), ("error", errors)):
    values = np.asarray(values, np.float64)
    for index in np.flatnonzero(~(np.isfinite(values) & (values > 0)))[:1]:
      raise UsageError(f"Point {index} has the {name} {values[index]:g}; a power law needs numbers above 0.")
    found.append(np.log10(values))
  x, y = found
  if len(x) < 2:
    raise UsageError(f"A law needs at least two points, of different compute, and there is {'one' if len(x) else 'none'}.")
  if np.ptp(x) < _SAME:
    raise UsageError(f"All {len(x)} points have the same compute, {10 ** x[0]:.4g}; a law needs at least two different ones.")
  return x, y


def _frontier(x, y):
  # Of x in ascending order: centres of bins that have points, indices of their lowest, and a function that finds the lowest of
  # any values at these x.
  edges = np.linspace(x.min(), x.max() + MARGIN, BINS + 1)
  numbers = np.digitize(x, edges) - 1  # a point on an edge is in the bin above it
  kept, starts = np.unique(numbers, return_index=True)
  if len(kept) < 2:
    raise UsageError(
      f"All {len(x)} points fall in one bin of compute, from {10 ** x.min():.4g} to {10 ** x.max():.4g}, and a frontier "
      "needs two; fit all points, or add runs of other compute."
    )
  best = [start + y[numbers == number].argmin() for start, number in zip(starts, kept, strict=True)]
  centres = (edges[:-1] + edges[1:])[kept] / 2
  return centres, np.array(best), lambda values: np.minimum.reduceat(values, starts, axis=-1)


def _straight(x, y, order, method, places, indices, pick):
  seen = y[indices]
  height, slope, _ = intervals.line(places, seen)
  residuals = seen - height - slope * (places - places.mean())
  free = 1 - intervals.leverages(places)
  left_out = None
  if len(places) > 2 and free.min() > 1e-9:  # else one point alone holds the line
    left_out = np.abs(10 ** (seen - residuals / free) - 10**seen).mean()
  found = intervals.Straight(x, y, places, pick) if len(places) > 2 else None
  line = 0.0, places.mean(), float(height), float(slope)
  return _law(method, len(x), line, left_out, residuals, places, seen, order[indices], found)


def _saturating(x, y, order):
  different = 1 + int((np.diff(x) > _SAME).sum())
  if different < 4:
    raise UsageError(
      f"A law that saturates has three parameters and needs at least four different computes, and there are {different}; "
      "fit all points, or the frontier."
    )
  middle = x.mean()
  limit, height, slope = saturating.fit(x - middle, y)
  residuals = y - np.log10(limit + 10 ** (height + slope * (x - middle)))
  others = [saturating.fit(np.delete(x, i) - middle, np.delete(y, i)) for i in range(len(x))]
  limits, heights, slopes = np.transpose(others)
  left_out = np.abs(limits + 10 ** (heights + slopes * (x - middle)) - 10**y).mean()
  found = saturating.Profile(x - middle, y, middle, limit)
  curve = limit, middle, height, slope
  return _law("saturating", len(x), curve, left_out, residuals, x, y, order, found)


def _law(method, n, parameters, left_out, residuals, places, seen, indices, found):
  limit, middle, height, slope = parameters
  pairs = found.parameters() if found else (None, None, None)
  return Law(
    method=method,
    n=n,
    beta=float(_power(height - slope * middle)),
    alpha=slope,
    limit=limit,
    beta_ci=pairs[0] and _pair(pairs[0]),
    alpha_ci=pairs[1] and tuple(map(float, pairs[1])),
    limit_ci=pairs[2] and tuple(map(float, pairs[2])),
    mae=float(np.abs(10 ** (seen - residuals) - 10**seen).mean()),
    leave_one_out=None if left_out is None else float(left_out),
    residuals=tuple(map(float, residuals)),
    fitted=tuple(Fitted(float(10**p), float(10**e), int(i)) for p, e, i in zip(places, seen, indices, strict=True)),
    _anchor=(middle, height),
    _intervals=found,
  )


def _power(logarithms):
  return 10 ** np.clip(logarithms, -300, 300)  # intervals of few points may go beyond all floats


def _pair(logarithms):
  low, high = map(_power, logarithms)
  return float(low), float(high)
