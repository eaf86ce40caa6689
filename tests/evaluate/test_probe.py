"""Probes against scikit-learn, float64 NumPy and brute force."""

import math
import re

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from clip_jax.errors import DataError
from clip_jax.evaluate import logistic, probe


@pytest.fixture(scope="module")
def digits():
  """Training and test split of scikit-learn's digits, 8 x 8 pixels: real data, ill-conditioned, and of ten classes."""
  features, labels = load_digits(return_X_y=True)
  features = np.float32(features / 16)
  return (features[:600], labels[:600]), (features[600:], labels[600:])


def blobs(n, classes, embed=6, spread=1.0, seed=0):
  """Examples about one centre a class, far from the origin as features of a tower are."""
  random = np.random.default_rng(seed)
  centres = np.random.default_rng(7).normal(size=(classes, embed))
  labels = np.arange(n) % classes
  features = 3 + centres[labels] + spread * random.normal(size=(n, embed))
  return features.astype(np.float32), labels


def probabilities(logits):
  odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return odds / odds.sum(axis=-1, keepdims=True)


def objective(weights, bias, features, labels, regulariser):
  """What is minimised, and its gradient, from the definition and in float64."""
  features = np.float64(features)
  chances = probabilities(features @ weights + bias)
  rows = np.arange(len(labels))
  value = -np.log(chances[rows, labels]).sum() + regulariser / 2 * np.sum(weights**2)
  chances[rows, labels] -= 1
  return value, features.T @ chances + regulariser * weights, chances.sum(axis=0)


@pytest.mark.parametrize("regulariser", [0.1, 1, 100])
def test_equals_scikit_learn(digits, regulariser):
  (features, labels), (held_out, right) = digits
  # The mean is taken off for scikit-learn's sake, which is slow without: the bias makes up for it.
  mean = features.mean(axis=0, dtype=np.float64)
  model = LogisticRegression(C=1 / regulariser, solver="lbfgs", tol=1e-7, max_iter=10_000)
  model.fit(features - mean, labels)
  want = model.predict_proba(held_out - mean)
  weights, bias = probe.fit(features, labels, 10, regulariser)
  assert weights.dtype == bias.dtype == np.float32
  found = probabilities(np.float64(held_out) @ weights + bias)
  np.testing.assert_allclose(found, want, rtol=0, atol=5e-4)
  accuracy = np.mean(found.argmax(axis=1) == right)
  assert accuracy == np.mean(model.predict(held_out - mean) == right)
  assert accuracy > 0.8


@pytest.mark.parametrize("regulariser", [1e-2, 1, 1e3])
@pytest.mark.parametrize("scale", [1, 1e3, 1e-3])
def test_ends_at_the_optimum_however_features_are_scaled(regulariser, scale):
  features, labels = blobs(200, 4)
  features, regulariser = features * np.float32(scale), regulariser * scale**2
  weights, bias = map(np.float64, probe.fit(features, labels, 4, regulariser))
  _, *at_zero = objective(0 * weights, 0 * bias, features, labels, regulariser)
  _, *at_end = objective(weights, bias, features, labels, regulariser)
  for end, zero in zip(at_end, at_zero, strict=True):
    assert np.abs(end).max() < 2e-5 * max(np.abs(zero).max(), np.abs(at_zero[0]).max() / scale)


def test_starts_anywhere_and_ends_at_the_same_place(digits):
  (features, labels), (held_out, _) = digits
  cold = probe.fit(features, labels, 10, 1)
  random = np.random.default_rng(0)
  start = random.normal(size=(64, 10)).astype(np.float32), random.normal(size=10)
  warm = probe.fit(features, labels, 10, 1, start=start)
  want, found = (probabilities(held_out @ w + b) for w, b in (cold, warm))
  np.testing.assert_allclose(found, want, rtol=0, atol=1e-4)
  # From the optimum there is nothing left to do, which shows that what is given is where it starts.
  problem = logistic.Problem(features, labels, 10)
  assert problem.fit(1, start=cold)[2] < problem.fit(1)[2] / 2
  stopped = probe.fit(features, labels, 10, 1, start=start, max_iterations=0)
  np.testing.assert_allclose(stopped[0], start[0], rtol=1e-5)
  np.testing.assert_allclose(stopped[1], start[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [7, 50, 100])  # with padding, without, and all at once
def test_value_and_gradient(monkeypatch, rows):
  monkeypatch.setattr(logistic, "ROWS", rows)
  features, labels = blobs(50, 3)
  random = np.random.default_rng(0)
  weights, bias = random.normal(size=(6, 3)), random.normal(size=3)
  problem = logistic.Problem(features, labels, 3)
  scale = problem._scale
  centred = (features - features.mean(axis=0, dtype=np.float64)) / scale
  value, by_weights, by_bias = objective(weights, bias, centred, labels, 0.3)
  arguments = (np.float32(weights), np.float32(bias)), (*problem._examples, 50.0, 0.3)
  found, (of_weights, of_bias) = jax.jit(logistic._value_and_gradient)(*arguments)
  np.testing.assert_allclose(found, value / 50, rtol=1e-6)
  np.testing.assert_allclose(of_weights, by_weights / 50, rtol=1e-5, atol=1e-7)
  np.testing.assert_allclose(of_bias, by_bias / 50, rtol=1e-5, atol=1e-7)
  again = jax.value_and_grad(logistic._objective)(*arguments)
  want = found, (of_weights, of_bias)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), again, want)
  # The reference itself, by differences.
  step = 1e-6 * random.normal(size=(6, 3))
  ahead, behind = (objective(weights + s, bias, centred, labels, 0.3)[0] for s in (step, -step))
  np.testing.assert_allclose((ahead - behind) / 2, np.sum(step * by_weights), rtol=1e-5)


def test_logits_never_exist_for_all_examples(monkeypatch):
  monkeypatch.setattr(logistic, "LOGITS", 40)
  features, labels = blobs(51, 4)
  problem = logistic.Problem(features, labels, 4)
  chunks, rows, _ = problem._examples[0].shape
  assert (chunks, rows) == (6, 9)
  parameters = np.zeros((6, 4), np.float32), np.zeros(4, np.float32)
  arguments = (*problem._examples, 51.0, 1.0), parameters
  text = logistic._minimise.lower(*arguments, 10).as_text()
  assert "tensor<9x4xf32>" in text and "tensor<6x9x4xf32>" not in text
  # What the scan's own derivative keeps, to see that it would be found.
  naive = jax.grad(lambda p, x: logistic._value_and_gradient(p, x)[0])
  assert "tensor<6x9x4xf32>" in jax.jit(naive).lower(*arguments[::-1]).as_text()
  weights, bias = probe.fit(features, labels, 4, 1)
  parts = list(logistic.logits(features, weights, bias))
  assert [at.stop - at.start for at, _ in parts] == [9, 9, 9, 9, 9, 6]
  np.testing.assert_allclose(
    np.concatenate([part for _, part in parts]), features @ weights + bias, rtol=1e-4, atol=1e-5
  )


def test_a_class_without_training_examples_comes_last():
  features, labels = blobs(60, 3)
  dense = probe.fit(features, labels, 3, 0.5)
  weights, bias = probe.fit(features, np.array([1, 2, 4])[labels], 6, 0.5)
  np.testing.assert_array_equal(weights[:, [1, 2, 4]], dense[0])
  np.testing.assert_array_equal(bias[[1, 2, 4]], dense[1])
  scores = logistic.scores(features, weights, bias)
  assert np.isfinite(scores).all()
  assert np.all(np.sort(np.argsort(scores, axis=1)[:, :3]) == [0, 3, 5])
  assert np.all(probabilities(scores)[:, [0, 3, 5]] == 0)


def test_features_that_are_all_the_same_give_the_frequencies():
  labels = np.repeat([0, 1], [30, 10])
  weights, bias = probe.fit(np.full((40, 3), 0.3, np.float32), labels, 2, 1)
  np.testing.assert_allclose(weights, 0, atol=1e-6)
  np.testing.assert_allclose(probabilities(bias), [0.75, 0.25], atol=1e-5)


def test_the_search_visits_what_the_paper_says():
  visited = []

  def accuracy(regulariser):
    visited.append(regulariser)
    return -abs(math.log10(regulariser) - 2.6)

  best, tried = probe._search(accuracy)
  exponents = [-6, -4, -2, 0, 2, 4, 6, 1, 3, 2.5, 3.5, 2.25, 2.75, 2.375, 2.625]
  np.testing.assert_allclose(np.log10(visited), exponents, atol=1e-12)
  assert best == 10**2.625 and tried == [(x, accuracy(x)) for x in visited[: len(tried)]]
  assert len(tried) == probe.FITS == 15


def test_the_search_finds_any_peak_of_a_curve_with_one():
  grid = [10 ** (step / 8) for step in range(-48, 49)]
  assert len(grid) == 96 + 1 and grid[0] == 1e-6 and grid[-1] == 1e6
  for peak in range(97):
    for left, right in [(1, 1), (1, 5), (5, 1)]:
      curve = {x: -(left if i < peak else right) * abs(i - peak) for i, x in enumerate(grid)}
      best, tried = probe._search(curve.__getitem__)
      assert best == grid[peak] and len(set(tried)) == len(tried) <= probe.FITS


@pytest.mark.parametrize("peak, fits", [(0, 15), (6, 11)])
def test_progress_is_complete_at_the_end_wherever_the_peak_is(peak, fits):
  seen = []

  def track(items):
    for item in items:
      yield item
      seen.append((item, len(tried)))

  tried = []
  probe._search(lambda x: tried.append(x) or -abs(math.log10(x) - peak), track)
  assert [item for item, _ in seen] == list(range(probe.FITS))
  assert len(tried) == fits
  # One fit is one step of it.
  assert [done for _, done in seen[: fits - 1]] == list(range(1, fits))


def test_of_equals_the_largest_regulariser_is_chosen():
  assert probe._search(lambda regulariser: 1.0)[0] == 1e6
  assert probe._search(lambda regulariser: float(regulariser < 3))[0] == 10 ** (3 / 8)


def test_the_sweep_finds_the_best_of_the_whole_grid():
  train, valid = blobs(42, 4, 20, spread=2), blobs(100, 4, 20, spread=2, seed=3)
  problem = logistic.Problem(*train, 4)
  accuracy = {}
  for step in range(-48, 49):
    scores = logistic.scores(valid[0], *problem.fit(10 ** (step / 8))[:2])
    accuracy[10 ** (step / 8)] = np.mean(scores.argmax(axis=1) == valid[1])
  best, tried = probe.sweep(*train, *valid, 4)
  assert tried == [(regulariser, accuracy[regulariser]) for regulariser, _ in tried]
  # A peak that is far above both ends of the range.
  assert accuracy[best] == max(accuracy.values()) > max(accuracy[1e-6], accuracy[1e6]) + 0.1


def test_the_linear_probe_is_trained_again_on_all_examples():
  train, test, valid = blobs(120, 4), blobs(50, 4, seed=1), blobs(40, 4, seed=2)
  found = probe.linear_probe(train, test, 4, valid=valid)
  regulariser, tried = probe.sweep(*train, *valid, 4)
  assert (found["regulariser"], found["tried"]) == (regulariser, tried)
  both = [np.concatenate(pair) for pair in zip(train, valid, strict=True)]
  want = logistic.scores(test[0], *probe.fit(*both, 4, regulariser))
  assert found["scores"].shape == (50, 4) and found["scores"].dtype == np.float32
  np.testing.assert_array_equal(found["scores"], want)
  assert 0 < found["iterations"] < logistic.MAX_ITERATIONS


def test_without_a_validation_split_a_tenth_is_held_out_and_put_back():
  train, test = blobs(120, 4), blobs(50, 4, seed=1)
  found = probe.linear_probe(train, test, 4)
  want = logistic.scores(test[0], *probe.fit(*train, 4, found["regulariser"]))
  np.testing.assert_array_equal(found["scores"], want)
  rights = [accuracy * 12 for _, accuracy in found["tried"]]  # three of each class
  np.testing.assert_allclose(rights, np.rint(rights), atol=1e-9)
  again = probe.linear_probe(train, test, 4)
  np.testing.assert_array_equal(again["scores"], found["scores"])
  assert again["tried"] == found["tried"]


def test_what_is_held_out():
  counts = [1, 2, 9, 14, 16, 100, 0, 3]
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(8), counts))
  held_out = probe._held_out(labels, 0)
  assert np.bincount(labels[held_out], minlength=8).tolist() == [0, 1, 1, 1, 2, 10, 0, 1]
  np.testing.assert_array_equal(held_out, probe._held_out(labels, 0))
  others = [probe._held_out(labels, seed) for seed in range(1, 4)]
  assert all(np.any(other != held_out) for other in others)


def test_few_shot_draws():
  features, labels = blobs(90, 3)
  labels[labels == 2] = np.where(np.arange(30) < 2, 2, 1)  # of class 2 there are two
  test = blobs(20, 3, seed=1)
  found = probe.few_shot((features, labels), test, 3, shots=4, seeds=3)
  assert found["scores"].shape == (3, 20, 3) and found["regulariser"] == 1 / 0.316
  for scores, chosen in zip(found["scores"], found["chosen"], strict=True):
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 2]
    want = probe.fit(features[chosen], labels[chosen], 3, 1 / 0.316)
    np.testing.assert_array_equal(scores, logistic.scores(test[0], *want))
  assert len({tuple(chosen) for chosen in found["chosen"]}) == 3
  more = probe.few_shot((features, labels), test, 3, shots=8, seeds=2)
  for few, many in zip(found["chosen"], more["chosen"], strict=False):
    assert set(few) < set(many)
  again = probe.few_shot((features, labels), test, 3, shots=4, seeds=2)
  np.testing.assert_array_equal(again["scores"], found["scores"][:2])


def votes(train, test, classes, k, temperature):
  """The weighted vote, example by example."""
  scores = np.zeros((len(test[0]), classes))
  candidates = np.float64(train[0]) / np.linalg.norm(train[0], axis=1, keepdims=True)
  for row, query in zip(scores, np.float64(test[0]), strict=True):
    similarity = candidates @ (query / np.linalg.norm(query))
    # Rounded, so that what is equal is so here, too.
    for i in np.argsort(-similarity.round(6), kind="stable")[:k]:
      row[train[1][i]] += np.exp(similarity[i] / temperature)
  return scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1), (500, 0.5)])
def test_nearest_neighbours_equal_brute_force(k, temperature):
  train, test = blobs(100, 4), blobs(30, 4, seed=1)
  found = probe.k_nearest(train, test, 5, k, temperature)
  assert found.shape == (30, 5) and found.dtype == np.float32
  np.testing.assert_allclose(
    found, votes(train, test, 5, k, temperature), rtol=0, atol=2e-4 if temperature < 0.1 else 2e-6
  )


def test_nearest_neighbours_that_are_equally_near_count_from_the_first():
  # Four directions, each many times and in two classes: most similarities are ties, at the last neighbour too.
  axes = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
  random = np.random.default_rng(0)
  train = axes[random.integers(0, 8, 60)] * 2, random.integers(0, 3, 60)
  test = axes[:4] * 3, np.zeros(4, int)
  for k in (1, 2, 5, 20, 59):
    np.testing.assert_allclose(
      probe.k_nearest(train, test, 3, k), votes(train, test, 3, k, 0.07), rtol=0, atol=1e-6
    )


def test_nearest_neighbours_with_a_small_temperature_and_without_a_direction():
  train = np.float32([[1, 0], [0.9, 0.1], [0, 1]]), np.array([0, 1, 1])
  test = np.float32([[1, 0], [-1, 0], [0, 0]]), np.array([0, 0, 0])
  found = probe.k_nearest(train, test, 2, k=3, temperature=1e-4)
  np.testing.assert_allclose(found, [[1, 0], [0, 1], [1 / 3, 2 / 3]], atol=1e-6)


def test_results_do_not_depend_on_the_default_device():
  train, test = blobs(80, 3), blobs(20, 3, seed=1)
  results = []
  for device in (jax.devices()[0], jax.devices()[5]):
    with jax.default_device(device):
      results.append(probe.few_shot(train, test, 3, 5, seeds=1)["scores"])
  np.testing.assert_array_equal(*results)
  assert {d.id for d in logistic.Problem(*train, 3)._examples[0].devices()} == {0}


GOOD = blobs(12, 3)


def changed(index, value):
  features = GOOD[0].copy()
  features[index, 1] = value
  return features, GOOD[1]


def labelled(labels):
  return GOOD[0], np.asarray(labels)


WRONG = [
  (changed(3, np.nan), "features that are not finite, of example 3 first"),
  (changed(4, -np.inf), "features that are not finite, of example 4 first"),
  (labelled([0, 1, 2, 3] * 3), "example 3 has label 3, and its 3 classes are numbered from 0 to 2"),
  (labelled([0, 1, -1] * 4), "example 2 has label -1"),
  (labelled([0.0, 1.0, 0.5] * 4), "float64, not whole numbers"),
  (labelled([0, 1]), "features [12, 6] and labels [2]; it needs [examples, embed] and [examples]"),
  ((GOOD[0][0], GOOD[1]), "features [6] and labels [12]"),
  ((GOOD[0][:0], GOOD[1][:0]), "has no example"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[message[:25] for _, message in WRONG])
def test_wrong_input_is_told_in_a_sentence(wrong, message):
  for split, call in {
    "training": [
      lambda: probe.fit(*wrong, 3, 1),
      lambda: probe.sweep(*wrong, *GOOD, 3),
      lambda: probe.linear_probe(wrong, GOOD, 3),
      lambda: probe.few_shot(wrong, GOOD, 3, 1),
      lambda: probe.k_nearest(wrong, GOOD, 3),
    ],
    "validation": [
      lambda: probe.sweep(*GOOD, *wrong, 3),
      lambda: probe.linear_probe(GOOD, GOOD, 3, valid=wrong),
    ],
    "test": [
      lambda: probe.linear_probe(GOOD, wrong, 3),
      lambda: probe.few_shot(GOOD, wrong, 3, 1),
      lambda: probe.k_nearest(GOOD, wrong, 3),
    ],
  }.items():
    for one in call:
      with pytest.raises(DataError, match=re.escape(message)) as caught:
        one()
      assert f"{split} split" in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: probe.fit(*labelled([1] * 12), 3, 1), "are of class 1; it needs two classes"),
    (lambda: probe.fit(*GOOD, 3, 0), "the regulariser of a probe is a number above 0, not 0"),
    (lambda: probe.fit(*GOOD, 3, math.nan), "not nan"),
    (lambda: probe.few_shot(GOOD, GOOD, 3, 0), "not 0 and 5"),
    (lambda: probe.k_nearest(GOOD, GOOD, 3, k=0), "k of at least 1"),
    (lambda: probe.k_nearest(GOOD, GOOD, 3, temperature=0), "a temperature above 0"),
    (lambda: probe.linear_probe(GOOD, (GOOD[0][:, :5], GOOD[1]), 3), "5 numbers; those of the tr"),
    (lambda: probe.linear_probe([x[:3] for x in GOOD], GOOD, 3), "give a validation split"),
  ],
)
def test_other_things_that_cannot_be(call, message):
  with pytest.raises(DataError, match=re.escape(message)):
    call()
