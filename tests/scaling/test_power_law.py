"""Power laws against NumPy, SciPy and loops in plain Python; what they promise by their intervals, by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from clip_jax.errors import UsageError
from clip_jax.scaling import power_law, saturating

GMACS = (7.4, 20.57, 87.73, 190.97, 290.74)
SAMPLES = (3e9, 13e9, 34e9)
PLACE = np.log10(1.14e12)  # about the middle of the grids, where laws have the error of 0.27
GRIDS = {"large": (GMACS, SAMPLES, 3), "small": (GMACS[:3], SAMPLES, 2)}


def grid(name):
  """GMACs of one example, examples seen, and the number of the data set, of the runs of a grid."""
  sizes, durations, sets = GRIDS[name]
  return [one.ravel() for one in np.meshgrid(sizes, durations, np.arange(sets), indexing="ij")]


def noise(random, kind, count, scale):
  drawn = {
    "normal": lambda: random.normal(size=count),
    "t": lambda: random.standard_t(3, count) / np.sqrt(3),
    "laplace": lambda: random.laplace(size=count) / np.sqrt(2),
  }[kind]()
  return scale * drawn


def simulated(random, name, world, kind, scale):
  """log10 of compute and of error, and the true alpha and log10 of beta.

  In world "law" all runs follow it. In world "envelope" only the best do: a run whose size and duration do not fit each other, or
  whose data are few, is worse, and the law is that of the best sizes and durations.
  """
  gmacs, samples, sets = grid(name)
  x, alpha = np.log10(gmacs * samples), -0.125
  y = math.log10(0.27) + alpha * (x - PLACE)
  if world == "envelope":
    y = np.log10(0.135 * ((gmacs / 87.73) ** -0.25 + (samples / 13e9) ** -0.25)) + np.array([0.0, 0.03, 0.12])[sets]
  return x, y + noise(random, kind, len(x), scale), alpha, math.log10(0.27) - alpha * PLACE


def frontier(computes, errors):
  """The published frontier, in plain loops: centres of bins, and the lowest error in each."""
  x = [math.log10(one) for one in computes]
  edges = [min(x) + (max(x) + 0.1 - min(x)) * k / 5 for k in range(6)]
  found = []
  for low, high in zip(edges[:-1], edges[1:], strict=True):
    inside = [math.log10(e) for one, e in zip(x, errors, strict=True) if low <= one < high]
    if inside:
      found.append(((low + high) / 2, min(inside)))
  return [list(one) for one in zip(*found, strict=True)]


def random_runs(seed, count):
  random = np.random.default_rng(seed)
  x = random.uniform(9.5, 13, count)
  return 10**x, 10 ** (0.8 - 0.11 * x + 0.02 * random.normal(size=count))


runs = st.builds(random_runs, st.integers(0, 10**6), st.integers(6, 40))


@given(runs)
@settings(deadline=None)
def test_all_is_linear_regression(found):
  computes, errors = found
  law = power_law.fit(computes, errors, "all")
  order = [one.index for one in law.fitted]
  assert order == sorted(range(len(computes)), key=lambda i: computes[i])
  computes, errors = computes[order], errors[order]
  x, y = np.log10(computes), np.log10(errors)
  assert [law.alpha, math.log10(law.beta)] == pytest.approx(np.polyfit(x, y, 1), rel=1e-9)
  assert law.residuals == pytest.approx(y - np.polyval(np.polyfit(x, y, 1), x), abs=1e-11)
  assert law(computes) == pytest.approx(law.beta * computes**law.alpha, rel=1e-9)
  assert law.mae == pytest.approx(np.abs(law(computes) - errors).mean(), rel=1e-9)
  without = [power_law.fit(np.delete(computes, i), np.delete(errors, i), "all")(computes[i]) for i in range(len(x))]
  assert law.leave_one_out == pytest.approx(np.abs(without - errors).mean(), rel=1e-9)
  # Student's interval is inside of ours, and not by much.
  alpha, error = stats.linregress(x, y).slope, stats.linregress(x, y).stderr
  students = error * stats.t.ppf(0.975, len(x) - 2)
  low, high = law.alpha_ci
  assert low <= alpha - students * 0.999 and alpha + students * 0.999 <= high
  assert len(x) < 12 or high - low < 3 * students
  assert [one.compute for one in law.fitted] == pytest.approx(computes) and [one.error for one in law.fitted] == pytest.approx(errors)
  assert (law.n, law.limit, law.limit_ci) == (len(x), 0, None)


@given(runs)
@settings(deadline=None)
def test_frontier_is_the_published_one(found):
  computes, errors = found
  law = power_law.fit(computes, errors)
  centres, lowest = frontier(computes, errors)
  assert law.method == "frontier" and law.n == len(computes)
  assert [law.alpha, math.log10(law.beta)] == pytest.approx(np.polyfit(centres, lowest, 1), rel=1e-9)
  assert [math.log10(one.compute) for one in law.fitted] == pytest.approx(centres)
  assert [one.error for one in law.fitted] == pytest.approx([errors[one.index] for one in law.fitted])
  assert law.residuals == pytest.approx(np.array(lowest) - np.polyval(np.polyfit(centres, lowest, 1), centres), abs=1e-11)
  if len(centres) > 2:
    others = [np.polyfit(np.delete(centres, i), np.delete(lowest, i), 1) for i in range(len(centres))]
    off = [10 ** np.polyval(line, centre) - 10**low for line, centre, low in zip(others, centres, lowest, strict=True)]
    assert law.leave_one_out == pytest.approx(np.abs(off).mean(), rel=1e-9)


def test_a_point_on_an_edge_is_in_the_bin_above():
  x = np.array([0, 0.25, 0.5, 1.15])  # bins of 0.25; the last ends at 1.25
  law = power_law.fit(10**x, [0.5, 0.45, 0.4, 0.3])
  assert [one.compute for one in law.fitted] == pytest.approx(10 ** np.array([0.125, 0.375, 0.625, 1.125]))
  assert [one.index for one in law.fitted] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(12))
def test_saturating_is_what_scipy_finds(seed):
  random = np.random.default_rng(seed)
  x, alpha, limit = np.log10(grid("small")[0] * grid("small")[1]), random.uniform(-0.5, -0.1), random.uniform(0, 0.25)
  y = np.log10(limit + 0.2 * 10 ** (alpha * (x - PLACE))) + 0.02 * random.normal(size=len(x))
  law = power_law.fit(10**x, 10**y, "saturating")
  far = 10 ** y.min()

  def off(found):
    return np.log10(found[0] + 10 ** (found[1] + found[2] * (x - PLACE))) - y

  best = min(
    (
      optimize.least_squares(off, [start * far, -0.7, -0.2], bounds=([0, -9, -9], [far, 9, 9]), xtol=1e-13, ftol=1e-13, gtol=1e-13)
      for start in (0.01, 0.3, 0.6, 0.9)
    ),
    key=lambda found: found.cost,
  )
  assert np.square(law.residuals).sum() == pytest.approx(2 * best.cost, rel=1e-7)
  assert (law.limit, law.alpha) == pytest.approx((best.x[0], best.x[2]), rel=1e-3, abs=1e-4)
  assert law.limit_ci[0] <= law.limit <= law.limit_ci[1] and law.alpha_ci[0] <= law.alpha <= law.alpha_ci[1]
  without = [saturating.fit(np.delete(x, i) - PLACE, np.delete(y, i)) for i in range(len(x))]
  predicted = [limit + 10 ** (height + slope * (one - PLACE)) for (limit, height, slope), one in zip(without, x, strict=True)]
  assert law.leave_one_out == pytest.approx(np.abs(predicted - 10**y).mean(), rel=1e-4)


@pytest.mark.parametrize("method", power_law.METHODS)
def test_a_law_without_noise_is_found(method):
  # Bins of 0.2 from 10 to 11, whose lowest are at their centres.
  computes = 10 ** np.array([10.1, 10.3, 10.5, 10.7, 10.9, 10.0])
  limit = 0.1 if method == "saturating" else 0.0
  law = power_law.fit(computes, limit + 5 * computes**-0.12, method)
  assert [one.index for one in law.fitted] == ([0, 1, 2, 3, 4] if method == "frontier" else [5, 0, 1, 2, 3, 4])
  assert (law.beta, law.alpha) == pytest.approx((5, -0.12), rel=1e-5)
  assert law.limit == pytest.approx(limit, abs=1e-6)
  assert law.mae < 1e-7 and law.leave_one_out < 1e-5
  assert (*law.beta_ci, *law.alpha_ci) == pytest.approx((5, 5, -0.12, -0.12), rel=1e-3)
  error, ends = law.forecast(1e13)
  assert (error, *ends) == pytest.approx((limit + 5 * 1e13**-0.12,) * 3, rel=1e-3)


@given(runs, st.floats(1e-6, 1e6), st.floats(0.1, 1), st.randoms(use_true_random=False), st.sampled_from(power_law.METHODS))
@settings(deadline=None, max_examples=40)
def test_units_and_order_do_not_matter(found, unit, share, random, method):
  computes, errors = found
  order = random.sample(range(len(computes)), len(computes))
  law = power_law.fit(computes, errors, method)
  scaled = power_law.fit(computes[order] * unit, errors[order] * share, method)
  assert (scaled.alpha, scaled.limit) == pytest.approx((law.alpha, law.limit * share), rel=1e-3, abs=1e-4)
  assert scaled(computes * unit) == pytest.approx(law(computes) * share, rel=1e-4)
  assert [order[one.index] for one in scaled.fitted] == [one.index for one in law.fitted]
  if method != "saturating":
    assert scaled.beta == pytest.approx(law.beta * unit**-law.alpha * share, rel=1e-7)
  if law.alpha_ci:
    assert scaled.alpha_ci == pytest.approx(law.alpha_ci, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("method", power_law.METHODS)
def test_bands_and_forecasts_hold_the_law_and_are_the_same_each_time(method):
  computes, errors = random_runs(3, 30)
  law, again = (power_law.fit(computes, errors, method) for _ in range(2))
  places = np.logspace(9, 15, 7)
  low, high = law.band(places)
  assert ((low < law(places)) & (law(places) < high)).all() and high[-1] / low[-1] > high[3] / low[3]
  for place, *band in zip(places, low, high, strict=True):
    error, (least, most) = law.forecast(place)
    assert error == law(place) and 0 < least <= band[0] and most >= band[1]
    assert again.forecast(place) == (error, (least, most))
  assert again == law
  for compute in (0, -1.0, math.nan, math.inf):
    with pytest.raises(UsageError, match="no forecast for a compute of"):
      law.forecast(compute)


def test_few_points_have_few_intervals():
  two = power_law.fit([1, 100], [0.5, 0.05], "all")
  assert (two.alpha, two.beta, two.mae) == pytest.approx((-0.5, 0.5, 0), abs=1e-12)
  assert (two.beta_ci, two.alpha_ci, two.leave_one_out, two.band([10])) == (None,) * 4
  assert two.forecast(10**4) == (pytest.approx(0.005), None)
  for method in ("all", "frontier"):
    three = power_law.fit([1, 100, 10**4], [0.5, 0.06, 0.005], method)
    assert np.isfinite([*three.alpha_ci, *three.beta_ci, *three.forecast(1e5)[1], *np.ravel(three.band([1, 1e9]))]).all()
    assert np.ptp(three.alpha_ci) > 0.1  # one degree of freedom
  alone = power_law.fit([1, 1, 100], [0.5, 0.4, 0.05], "all")  # without the last there is one compute
  assert alone.leave_one_out is None and np.isfinite(alone.alpha_ci).all()


@pytest.mark.parametrize(
  "computes, errors, method, message",
  [
    ([], [], "all", "at least two points, of different compute, and there is none"),
    ([1e9], [0.5], "frontier", "at least two points, of different compute, and there is one"),
    ([7.4e9, 7.399999999999999e9], [0.5, 0.4], "all", "All 2 points have the same compute, 7.4e"),
    ([1e9, 1.01e9], [0.5, 0.4], "frontier", "fall in one bin of compute, from 1e.09 to 1.01e.09, and a frontier needs two"),
    ([1e9, 1e10, 1e11, 1e11], [0.5, 0.4, 0.3, 0.3], "saturating", "at least four different computes, and there are 3"),
    ([1e9, 1e10], [0.5, 0.4], "best", "'best' is no method; there are frontier, all, saturating"),
    ([1e9, 0], [0.5, 0.4], "all", "Point 1 has the compute 0; a power law needs numbers above 0"),
    ([1e9, 1e10], [-0.5, 0.4], "all", "Point 0 has the error -0.5"),
    ([1e9, math.nan], [0.5, 0.4], "all", "Point 1 has the compute nan"),
    ([1e9, math.inf], [0.5, 0.4], "all", "Point 1 has the compute inf"),
  ],
)
def test_what_is_no_law(computes, errors, method, message):
  with pytest.raises(UsageError, match=message) as found:
    power_law.fit(computes, errors, method)
  assert "\n" not in str(found.value)


@pytest.mark.parametrize("method", power_law.METHODS)
@pytest.mark.parametrize("errors", [[0.3] * 6, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.1, 0.1, 0.1, 0.1, 0.1], [0.9, 1e-9, 0.8, 0.7, 0.2, 0.3]])
def test_odd_results_are_fitted_too(method, errors):
  law = power_law.fit(10.0 ** np.arange(6, 12), errors, method)
  found = [law.beta, law.alpha, law.limit, law.mae, law.leave_one_out, *law.beta_ci, *law.alpha_ci, *law.forecast(1e13)[1]]
  assert np.isfinite(found).all() and 0 <= law.limit < min(errors)


def covered(draw, fit, count):
  """Tests that in simulated grids intervals hold what is true: of pairs of truth and interval that `fit` gives for each grid."""
  random = np.random.default_rng(0)
  hits = np.mean([[low <= truth <= high for truth, (low, high) in fit(*draw(random))] for _ in range(count)], axis=0)
  print("coverage", hits)
  assert (hits >= 0.92).all(), hits  # 95 % are seldom fewer, by chance alone


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
  "method, world, kind, scale",
  [
    ("all", "law", "normal", 0.02),
    ("all", "law", "t", 0.02),
    ("all", "law", "laplace", 0.02),
    ("frontier", "law", "normal", 0.01),
    ("frontier", "law", "normal", 0.03),
    ("frontier", "law", "t", 0.02),
    ("frontier", "envelope", "normal", 0.003),
    ("frontier", "envelope", "normal", 0.01),
    ("frontier", "envelope", "normal", 0.03),
  ],
)
def test_intervals_hold_the_truth(name, method, world, kind, scale):
  """Alpha, beta, the law ten times beyond the grid, and a new run there."""

  def draw(random):
    return (*simulated(random, name, world, kind, scale), noise(random, kind, 1, scale)[0])

  def fit(x, y, alpha, height, off):
    law = power_law.fit(10**x, 10**y, method)
    place = x.max() + 1
    truth = 10 ** (height + alpha * place)
    low, high = law.band([10**place])
    return (alpha, law.alpha_ci), (10**height, law.beta_ci), (truth, (low[0], high[0])), (truth * 10**off, law.forecast(10**place)[1])

  covered(draw, fit, 400)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, kind, limit, alpha",
  [("large", "normal", 0.1, -0.25), ("small", "laplace", 0.1, -0.25), ("small", "normal", 0.0, -0.125)],
)
def test_intervals_of_a_law_that_saturates_hold_the_truth(name, kind, limit, alpha):
  x = np.log10(grid(name)[0] * grid(name)[1]) - PLACE
  height = math.log10(0.27 - limit)

  def draw(random):
    drawn = noise(random, kind, len(x) + 1, 0.02)
    return np.log10(limit + 10 ** (height + alpha * x)) + drawn[1:], drawn[0]

  def fit(y, off):
    found = saturating.Profile(x, y, 0.0, saturating.fit(x, y)[0])
    beta, slope, level = found.parameters()
    place = x.max() + 1
    truth = np.log10(limit + 10 ** (height + alpha * place))
    new = [end[0] for end in found.values([place], new_run=True)]
    return (height, beta), (alpha, slope), (limit, level), (truth, [end[0] for end in found.values([place])]), (truth + off, new)

  covered(draw, fit, 200)
