"""The law that levels off, E = limit + beta C^alpha: least squares in log10 E, and intervals by profile likelihood.

For a known limit the law has two parameters and is nearly a line, so it is solved for a whole grid of limits at once
(variable projection, Golub and Pereyra 1973), and the best limit is found by looking closer and closer. The grid is the profile,
too: parameters belong to the interval of confidence if they raise the sum of squares by no more than F allows (Bates and Watts
1988, section 6.1). A bootstrap would need to refit a thousand times what is at the edge, limit = 0, in many of the worlds.
"""

import dataclasses

import numpy as np
from scipy import stats

from clip_jax.scaling.intervals import CONFIDENCE, TAILS

LN10 = np.log(10)  # exp and log are faster than powers of 10
GRID = 33  # limits that are looked at in each turn
TURNS = 7  # each is 16 times as close as the last
CLOSEST = -6.0  # log10 of how near, as a share, the limit may come to the lowest error
STEPS = 40
CLOSE = 1e-10  # steps that are shorter change nothing
PROFILE = 400  # limits of it


def fit(x, y):
  """Fits the law.

  Args:
    x: float [n], log10 of compute; best around 0, as the intercept is that at x = 0.
    y: float [n], log10 of error.

  Returns:
    The limit, log10 of beta, and alpha.
  """
  lowest = 10 ** y.min()
  near, far = CLOSEST, 0.0
  for _ in range(TURNS):
    shares = np.linspace(far, near, GRID)  # a limit of 0 comes first, and wins ties
    limits = lowest * (1 - 10**shares)
    squares, heights, slopes, _ = _given(limits, x, y)
    best = squares.argmin()
    step = (far - near) / (GRID - 1)
    near, far = max(shares[best] - step, CLOSEST), min(shares[best] + step, 0.0)
  return float(limits[best]), float(heights[best]), float(slopes[best])


@dataclasses.dataclass(frozen=True)
class Profile:
  """Intervals of the law.

  Attributes:
    x: float [n], log10 of compute, with `middle` subtracted.
    y: float [n], log10 of error.
    middle: a float.
    limit: the best one.
  """

  x: np.ndarray
  y: np.ndarray
  middle: float
  limit: float

  def __post_init__(self):
    shares = np.linspace(CLOSEST, 0, PROFILE)
    limits = np.union1d(10 ** self.y.min() * (1 - 10**shares), self.limit)
    squares, heights, slopes, weights = _given(limits, self.x, self.y)
    free = len(self.x) - 3
    least = squares.min()
    slack = least * (1 + stats.f.ppf(CONFIDENCE, 1, free) / free) - squares
    weights = np.square(weights)
    moments = np.stack([weights.sum(-1), (weights * self.x).sum(-1), (weights * self.x**2).sum(-1)])
    inside = (slack >= 0) & (moments[0] * moments[2] > moments[1] ** 2)
    for name, value in {
      "_limits": limits[inside],
      "_lines": np.stack([heights, slopes])[:, inside],
      "_moments": moments[:, inside],
      "_slack": slack[inside],
      "_scatter": np.sqrt(least / free),
    }.items():
      object.__setattr__(self, name, value)

  def parameters(self):
    """Pairs (low, high) of log10 of beta, of alpha, and of the limit."""
    pairs = []
    for of_height, of_slope in ((1, -self.middle), (0, 1)):
      low, high = self._ends(of_height, of_slope)
      pairs.append((low.min(), high.max()))
    return *pairs, (self._limits.min(), self._limits.max())

  def values(self, x, new_run=False):
    """Intervals of log10 of the error at places, as `intervals.Straight` gives them.

    Args:
      x: float [m], log10 of compute.
      new_run: of what a new run will find there, and not of the law.

    Returns:
      Lows and highs, each float [m].
    """
    x = np.asarray(x, np.float64)[:, None] - self.middle
    low, high = self._ends(1, x)
    low = np.log10(self._limits + 10 ** np.clip(low, -300, 300)).min(axis=-1)
    high = np.log10(self._limits + 10 ** np.clip(high, -300, 300)).max(axis=-1)
    if not new_run:
      return low, high
    best = np.flatnonzero(self._limits == self.limit)[0]
    height, slope = self._lines[:, best]
    centre = np.log10(self.limit + 10 ** (height + slope * x[:, 0]))
    scatter = stats.t.ppf(TAILS[0], len(self.x) - 3) * self._scatter
    return centre - np.hypot(centre - low, scatter), centre + np.hypot(high - centre, scatter)

  def _ends(self, of_height, of_slope):
    # For a known limit the parameters that are inside are an ellipse; these are its ends in a direction.
    zeroth, first, second = self._moments
    spread = (of_height**2 * second - 2 * of_height * of_slope * first + of_slope**2 * zeroth) / (zeroth * second - first**2)
    half = np.sqrt(self._slack * np.maximum(spread, 0))
    centre = of_height * self._lines[0] + of_slope * self._lines[1]
    return centre - half, centre + half


def _given(limits, x, y):
  # Levenberg-Marquardt in the two parameters that are left, for all limits [g] at once. Returns sums of squares, heights, slopes,
  # each [g], and the derivative of the law by its height, [g, n].
  base = limits[:, None]

  def look(height, slope):
    rising = np.exp(LN10 * (height[:, None] + slope[:, None] * x))
    off = y - np.log(base + rising) / LN10
    return off, rising / (base + rising), np.square(off).sum(axis=-1)

  def solve(weights, aims, damping):
    zeroth, first, second = ((weights * x**k).sum(axis=-1) for k in range(3))
    zeroth, second = zeroth * damping, second * damping
    up, tilt = aims.sum(axis=-1), (aims * x).sum(axis=-1)
    size = zeroth * second - first**2
    return (second * up - first * tilt) / size, (zeroth * tilt - first * up) / size

  with np.errstate(all="ignore"):  # steps that go too far are not taken
    weights = (1 - base / 10**y) ** 2
    height, slope = solve(weights, weights * np.log10(10**y - base), 1.0)
    off, weights, squares = look(height, slope)
    damping = np.full(squares.shape, 1e-3)
    for _ in range(STEPS):
      up, tilt = solve(weights**2, weights * off, 1 + damping)
      new = look(height + up, slope + tilt)
      better = new[2] <= squares
      height, slope = np.where(better, height + up, height), np.where(better, slope + tilt, slope)
      off, weights = (np.where(better[:, None], *pair) for pair in zip(new[:2], (off, weights), strict=True))
      squares = np.where(better, new[2], squares)
      damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-12, 1e6)
      if not (np.abs(up) + np.abs(tilt) > CLOSE).any():
        break
  return np.where(np.isfinite(squares), squares, np.inf), height, slope, weights
