"""Standard errors against simulation, and tests against SciPy and against all sign flips."""

import itertools

import numpy as np
import pytest
from scipy import stats

from clip_jax.evaluate import uncertainty


def test_of_zeros_and_ones_it_is_binomial():
  values = np.arange(50) < 12
  assert uncertainty.of_mean(values) == pytest.approx(np.sqrt(0.24 * 0.76 / 50))


def test_examples_that_belong_together_count_as_one():
  """Each picture five times with the same outcome tells as much as each once."""
  once = np.random.default_rng(0).random(80) < 0.3
  groups = np.repeat(np.arange(80), 5)
  assert uncertainty.of_mean(np.repeat(once, 5), groups) == pytest.approx(uncertainty.of_mean(once))


def test_the_error_is_the_spread_of_sets_drawn_again():
  random = np.random.default_rng(1)
  means, errors, recalls, recall_errors = [], [], [], []
  for _ in range(1_500):
    sizes = random.integers(1, 5, 60)
    groups = np.repeat(np.arange(60), sizes)
    values = random.random(len(groups)) < np.repeat(random.random(60), sizes)
    means.append(values.mean())
    errors.append(uncertainty.of_mean(values, groups))
    right = random.random((3, 40)) < np.array([[0.2], [0.5], [0.9]])
    recalls.append(right.mean())
    recall_errors.append(uncertainty.of_recalls(right.mean(axis=1), np.full(3, 40)))
  assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)
  assert np.mean(recall_errors) == pytest.approx(np.std(recalls), rel=0.06)


def test_bootstrap_of_a_mean_is_its_standard_error_and_the_same_each_time():
  values = np.random.default_rng(2).normal(size=400)
  found = uncertainty.bootstrap(lambda drawn: values[drawn].mean(), 400)
  assert found == pytest.approx(uncertainty.of_mean(values), rel=0.15)
  assert found == uncertainty.bootstrap(lambda drawn: values[drawn].mean(), 400)


@pytest.mark.parametrize("one, other", [(0, 0), (3, 0), (12, 5), (5, 12), (400, 380), (60, 1)])
def test_zeros_and_ones_are_compared_as_mcnemar_did(one, other):
  first = np.array([1] * one + [0] * other + [1] * 30 + [0] * 9)
  second = np.array([0] * one + [1] * other + [1] * 30 + [0] * 9)
  found = uncertainty.paired(first, second)
  want = stats.binomtest(one, one + other).pvalue if one + other else 1.0
  assert found["p_value"] == pytest.approx(want, rel=1e-9)
  assert (found["only_first"], found["only_second"]) == (one, other) and "McNemar" in found["test"]
  assert found["difference"] == pytest.approx((one - other) / len(first))


@pytest.mark.parametrize("binary", [True, False])
def test_groups_are_compared_by_all_their_signs(binary):
  random = np.random.default_rng(3)
  groups = np.repeat(np.arange(9), 3)
  first, second = random.random((2, 27))
  if binary:
    first, second = first < 0.8, second < 0.4
  sums = np.bincount(groups, weights=np.float64(first) - second)
  all_signs = np.array(list(itertools.product((-1, 1), repeat=9)))
  want = np.mean(np.abs(all_signs @ sums) >= abs(sums.sum()) - 1e-9)
  found = uncertainty.paired(first, second, groups)
  assert found["p_value"] == pytest.approx(want, abs=0.015)
  assert ("only_first" in found) == binary and found["test"] == "sign-flip test"


def test_the_same_scores_do_not_differ():
  values = np.random.default_rng(4).random(20)
  assert uncertainty.paired(values, values)["p_value"] == 1
