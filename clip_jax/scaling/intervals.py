"""How sure a straight line through logarithms is: intervals of its parameters, of the line, and of what a new run will find.

All are of one form: what is asked is a linear function of the line, g0 x intercept + g1 x slope, and its interval is
the estimate less quantiles of t* = (estimate* - truth) / standard error* times its standard error. The quantiles come from two
sources, and the interval is the hull of both: Student's t, and a studentised bootstrap of residuals (Efron and Tibshirani 1993,
chapters 9 and 12). By simulation either alone falls short of its 95 % somewhere. The bootstrap does where there are
few points; Student's t where the points are minima of many, which are biased, and that only the bootstrap sees, as it repeats the
choice of the minima.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 1000  # the ends of an interval are quantiles with 25 of them beyond each
SEED = 0
TAILS = np.array([(1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2])


def line(x, y):
  """Least squares through points, or through many sets of points at the same places.

  Args:
    x: float [n], not all the same.
    y: float [..., n].

  Returns:
    Intercepts at the mean of x, slopes, and sums of squared residuals, each [...].
  """
  away = x - x.mean()
  slope = y @ away / (away @ away)
  height = y.mean(axis=-1)
  residuals = y - height[..., None] - slope[..., None] * away
  return height, slope, np.square(residuals).sum(axis=-1)


def leverages(x):
  """The weight of each point in the value of the line at its own place, float [n]."""
  away = x - x.mean()
  return 1 / len(x) + away**2 / (away @ away)


@dataclasses.dataclass(frozen=True)
class Straight:
  """Intervals of a line that is fitted to what is picked from points.

  Attributes:
    x: float [n], places of all points.
    y: float [n], their values.
    places: float [k] of what the line is fitted to.
    pick: a function from values float [..., n] to those that the line is fitted to, [..., k].
  """

  x: np.ndarray
  y: np.ndarray
  places: np.ndarray
  pick: Callable

  def __post_init__(self):
    object.__setattr__(self, "_fit", _with_error(self.places, self.pick(self.y)))
    object.__setattr__(self, "_world", _world(self.x, self.y, self.places, self.pick))

  def parameters(self):
    """Pairs (low, high) of the intercept at x = 0, of the slope, and None, as a line has no limit."""
    (low, slope_low), (high, slope_high) = self._ends(np.array([1.0, 0.0]), np.array([-self.places.mean(), 1.0]), False)
    return (low, high), (slope_low, slope_high), None

  def values(self, x, new_run=False):
    """Intervals at places.

    Args:
      x: float [m].
      new_run: of what a new run will find there, and not of the line.

    Returns:
      Lows and highs, each float [m].
    """
    x = np.asarray(x, np.float64)
    low, high = self._ends(np.ones(len(x)), x - self.places.mean(), False)
    if new_run:  # quantiles of more scatter may be closer, by a little, where the line's own are askew
      runs = self._ends(np.ones(len(x)), x - self.places.mean(), True)
      low, high = np.minimum(low, runs[0]), np.maximum(high, runs[1])
    return low, high

  def _ends(self, of_height, of_slope, new_run):
    height, slope, error = self._fit
    centre = of_height * height + of_slope * slope
    away = self.places - self.places.mean()
    spread = np.sqrt(of_height**2 / len(away) + of_slope**2 / (away @ away) + new_run)
    quantiles = stats.t.ppf(TAILS, len(away) - 2)[:, None]
    drawn = self._drawn(of_height, of_slope, spread, new_run)
    if len(drawn):
      both = np.stack([np.broadcast_to(quantiles, (2, len(spread))), np.quantile(drawn, TAILS, axis=0)])
      quantiles = np.stack([both[:, 0].max(axis=0), both[:, 1].min(axis=0)])
    low, high = centre - quantiles * spread * error
    return low, high

  def _drawn(self, of_height, of_slope, spread, new_run):
    # t* of each resample, [resamples, m]. A resample without scatter has no standard error to divide by.
    (height, slope), (heights, slopes, errors), noise = self._world
    usable = errors > 1e-9 * max(self._fit[2], np.finfo(float).tiny)
    off = np.outer(heights - height, of_height) + np.outer(slopes - slope, of_slope) - (noise * new_run)[:, None]
    return off[usable] / np.outer(errors[usable], spread)


def _with_error(x, y):
  height, slope, squares = line(x, y)
  return height, slope, np.sqrt(squares / (len(x) - 2))


def _world(x, y, places, pick):
  # A world where all points follow one line, known there, with the scatter that is seen here. What is fitted to picks of it is
  # off by what the picking does, too.
  height, slope, _ = line(x, y)
  away = x - x.mean()
  free = 1 - leverages(x)
  residuals = y - height - slope * away
  # A point that alone holds the line has no residual.
  scaled = np.where(free > 1e-9, residuals / np.sqrt(np.maximum(free, 1e-9)), 0)
  random = np.random.default_rng(SEED)
  drawn = random.choice(scaled - scaled.mean(), (RESAMPLES, len(x) + 1))
  fits = _with_error(places, pick(height + slope * away + drawn[:, :-1]))
  return (height + slope * (places.mean() - x.mean()), slope), fits, drawn[:, -1]
