"""How much of a score is chance: standard errors, and tests of two models on the same examples.

What is drawn is drawn from a fixed seed, so that the same scores have the same errors.
"""

import math

import numpy as np

RESAMPLES = 200  # of a bootstrap: its standard error is itself right to 5 %
FLIPS = 10_000


def of_mean(values, groups=None):
  """The standard error of a mean.

  Args:
    values: [n]. Of zeros and ones it is the binomial sqrt(p (1 - p) / n).
    groups: int [n], examples that belong together, such as captions of one picture, which do not count as independent; each is
      one by itself if not given.
  """
  values = np.asarray(values, np.float64)
  off = values - values.mean()
  if groups is not None:
    off = np.bincount(groups, weights=off)
  return float(np.sqrt(np.square(off).sum())) / len(values)


def of_recalls(recalls, counts):
  """The standard error of the mean of recalls of classes, each of them binomial.

  Args:
    recalls: float [classes]; those that are not a number are left out.
    counts: int [classes].
  """
  known = counts > 0
  variances = recalls[known] * (1 - recalls[known]) / counts[known]
  return float(np.sqrt(variances.sum())) / max(int(known.sum()), 1)


def bootstrap(measure, count, resamples=RESAMPLES):
  """The standard error of anything, as the spread over sets drawn with replacement (Efron 1979).

  Args:
    measure: a function from int [count], numbers of examples, to a number.
    count: how many examples there are.
    resamples: how often it is drawn.
  """
  random = np.random.default_rng(0)
  found = [measure(random.integers(0, count, count)) for _ in range(resamples)]
  return float(np.nanstd(found, ddof=1))


def paired(first, second, groups=None):
  """A test of whether two models differ, on the same examples.

  Zeros and ones are compared by McNemar's exact test (1947): of the examples that one model alone has right, as many should be
  each one's. Other values, and examples that belong together, by flipping the sign of the difference of each group at random
  (Fisher's randomisation test).

  Args:
    first: [n], of one model, for each example.
    second: [n], of the other one.
    groups: as in `of_mean`.

  Returns:
    A dict of "difference" (first - second), its "standard_error", the "p_value" (two-sided), the name of the "test", and of zeros
    and ones how many are right in "only_first" and "only_second".
  """
  first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
  off = first - second
  found = {"difference": float(off.mean()), "standard_error": of_mean(off, groups)}
  counts = {}
  if np.isin(np.concatenate([first, second]), (0, 1)).all():
    counts = {"only_first": int((off > 0).sum()), "only_second": int((off < 0).sum())}
  if counts and groups is None:
    return found | {"p_value": _mcnemar(*counts.values()), "test": "McNemar's exact test"} | counts
  sums = off if groups is None else np.bincount(groups, weights=off)
  return found | {"p_value": _flips(sums[sums != 0]), "test": "sign-flip test"} | counts


def _mcnemar(one, other):
  # Twice the smaller tail of a fair coin: exact in whole numbers while they are small.
  tosses = one + other
  if not tosses:
    return 1.0
  logs = [
    math.lgamma(tosses + 1) - math.lgamma(k + 1) - math.lgamma(tosses - k + 1) - tosses * math.log(2)
    for k in range(min(one, other) + 1)
  ]
  return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _flips(sums):
  if not len(sums):
    return 1.0
  random, reached, seen = np.random.default_rng(0), 0, abs(sums.sum())
  part = max(1, 2**24 // len(sums))
  for start in range(0, FLIPS, part):
    signs = random.integers(0, 2, (min(part, FLIPS - start), len(sums)), np.int8)
    drawn = np.abs((2.0 * signs - 1) @ sums)
    # What is as far off up to rounding is as far off.
    reached += int((drawn >= seen * (1 - 1e-12)).sum())
  return (1 + reached) / (1 + FLIPS)
