"""Measures against scikit-learn, and against themselves spelled out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics

from clip_jax.evaluate import measures


def draw(seed, count=300, classes=7, levels=None):
  random = np.random.default_rng(seed)
  scores = random.normal(size=(count, classes)).astype(np.float32)
  if levels:
    scores = np.round(scores * levels) / levels  # many are equal
  return scores, random.integers(0, classes, count)


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_accuracies_are_those_of_scikit_learn(levels):
  scores, labels = draw(0, levels=levels)
  ranks = measures.ranks(scores, labels)
  assert np.mean(ranks < 1) == metrics.accuracy_score(labels, scores.argmax(axis=1))
  if levels is None:  # it counts equals in another order
    for k in (2, 5):
      assert np.mean(ranks < k) == metrics.top_k_accuracy_score(labels, scores, k=k)
  for row, label, rank in zip(scores, labels, ranks, strict=True):
    assert sorted(range(7), key=lambda i: (-row[i], i)).index(label) == rank


def test_mean_per_class_recall_is_balanced_accuracy():
  scores, labels = draw(1)
  guess = scores.argmax(axis=1)
  recalls, counts = measures.recall_by_class(guess == labels, labels, 9)  # of two classes there is none
  assert np.nanmean(recalls) == pytest.approx(metrics.balanced_accuracy_score(labels, guess), abs=1e-15)
  assert counts.tolist() == np.bincount(labels, minlength=9).tolist() and np.isnan(recalls[7:]).all()


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_average_precision_is_that_of_scikit_learn(levels):
  scores, _ = draw(2, levels=levels)
  relevant = np.random.default_rng(3).random(scores.shape) < 0.2
  want = metrics.average_precision_score(relevant, scores, average=None)
  np.testing.assert_allclose(measures.average_precisions(scores, relevant), want, rtol=1e-13)


@given(
  arrays.arrays(np.float32, st.integers(1, 30), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
  st.data(),
)
def test_average_precision_of_ties_does_not_depend_on_the_order(scores, data):
  relevant = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
  order = np.array(data.draw(st.permutations(range(len(scores)))))
  first, second = measures.average_precision(scores, relevant), measures.average_precision(scores[order], relevant[order])
  if not relevant.any():
    assert np.isnan(first) and np.isnan(second)
  else:
    assert first == pytest.approx(second, abs=1e-12)
    assert first == pytest.approx(metrics.average_precision_score(relevant, scores), abs=1e-12)


def test_calibration_error_spelled_out():
  random = np.random.default_rng(4)
  confidence, right = random.random(500), random.random(500) < 0.6
  want = 0
  for low in range(15):
    inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
    if inside.any():
      want += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
  assert measures.calibration_error(measures.reliability(confidence, right)) == pytest.approx(want, abs=1e-12)


def test_confidence_at_the_ends_is_in_the_first_and_the_last_bin():
  binned = measures.reliability(np.array([0.0, 1.0, 1.0]), np.array([True, True, False]))
  assert binned[0].tolist() == [0, 1, 1] and binned[-1].tolist() == [2, 1, 2]


def test_softmax_of_large_logits():
  assert measures.softmax(np.float32([[1e4, 1e4, -1e4]])).tolist() == [[0.5, 0.5, 0.0]]
