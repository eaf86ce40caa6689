"""Nearest neighbours against a stable sort of the whole score matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr

from clip_jax.evaluate import search


@pytest.fixture
def blocks(monkeypatch):
  """A function that sets how many queries and candidates are scored at a time."""

  def set_blocks(block, chunk):
    monkeypatch.setattr(search, "BLOCK", block)
    monkeypatch.setattr(search, "CHUNK", chunk)

  return set_blocks


def brute_force(queries, candidates, k):
  scores = np.float64(queries) @ np.float64(candidates).T
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return order, np.take_along_axis(scores, order, axis=1)


SHAPES = [  # queries, candidates, k, block, chunk
  (12, 20, 5, 4, 5),  # whole blocks and chunks
  (13, 23, 5, 4, 5),  # neither
  (3, 4, 2, 8, 16),  # less than one of each
  (7, 23, 9, 4, 5),  # more wanted than a chunk holds
  (5, 6, 10, 4, 4),  # more wanted than there are
  (1, 1, 1, 4, 4),
  (9, 17, 17, 1, 1),  # all of them, one by one
]


@pytest.mark.parametrize("n, m, k, block, chunk", SHAPES)
def test_equals_a_stable_sort_with_many_ties(blocks, n, m, k, block, chunk):
  blocks(block, chunk)
  tied = 0
  for seed in range(20):
    random = np.random.default_rng(seed)
    # Small whole numbers: products are exact, and most scores occur several times.
    queries, candidates = random.integers(-1, 2, (n, 3)), random.integers(-1, 2, (m, 3))
    found, scores = search.nearest(np.float32(queries), np.float32(candidates), k)
    want, want_scores = brute_force(queries, candidates, k)
    np.testing.assert_array_equal(found, want)
    np.testing.assert_array_equal(scores, want_scores)
    tied += np.sum(np.diff(want_scores) == 0)
  assert tied > 10 or m == 1


def test_equals_brute_force_over_the_real_block_and_chunk_sizes():
  random = np.random.default_rng(0)
  n, m = search.BLOCK + 37, search.CHUNK + 211
  queries = random.normal(size=(n, 8)).astype(np.float32)
  candidates = random.normal(size=(m, 8)).astype(np.float32)
  found, scores = search.nearest(queries, candidates, 10)
  want, want_scores = brute_force(queries, candidates, 10)
  np.testing.assert_allclose(scores, want_scores, rtol=0, atol=1e-5)
  # Another candidate only where rounding cannot tell the two apart.
  exact = np.take_along_axis(np.float64(queries) @ np.float64(candidates).T, found, axis=1)
  np.testing.assert_allclose(exact, want_scores, rtol=0, atol=1e-5)
  assert np.mean(found == want) > 0.999
  assert all(len(set(row)) == 10 for row in found)


def test_scores_do_not_depend_on_what_else_is_in_a_block(blocks):
  random = np.random.default_rng(1)
  queries = random.integers(-9, 10, (11, 4)).astype(np.float32)
  candidates = random.integers(-9, 10, (19, 4)).astype(np.float32)
  results = []
  for block, chunk in [(11, 19), (3, 19), (11, 6), (4, 7)]:
    blocks(block, chunk)
    results.append(search.nearest(queries, candidates, 4))
  for found, scores in results[1:]:
    np.testing.assert_array_equal(found, results[0][0])
    np.testing.assert_array_equal(scores, results[0][1])


def test_all_scores_negative_still_beat_the_padding(blocks):
  blocks(4, 8)
  candidates = -np.arange(1, 12, dtype=np.float32)[:, None]
  found, scores = search.nearest(np.ones((2, 1), np.float32), candidates, 11)
  np.testing.assert_array_equal(found, [np.arange(11)] * 2)
  np.testing.assert_array_equal(scores, [-np.arange(1, 12)] * 2)


def test_numbers_stay_numbers_of_candidates_when_a_model_has_diverged(blocks):
  blocks(4, 4)
  for queries in (np.full((3, 2), np.nan, np.float32), np.ones((3, 2), np.float32)):
    candidates = np.ones((7, 2), np.float32)
    candidates[[1, 5]] = np.nan
    found, _ = search.nearest(queries, candidates, 6)
    assert found.min() >= 0 and found.max() < 7


def largest_made(jaxpr):
  """Elements of the largest array that any operation of a program, or of one inside it, gives."""
  largest = 0
  for equation in jaxpr.eqns:
    inner = [x for x in jax.tree.leaves(equation.params) if isinstance(x, ClosedJaxpr)]
    sizes = [v.aval.size for v in equation.outvars] + [largest_made(x.jaxpr) for x in inner]
    largest = max(largest, *sizes)
  return largest


def test_never_holds_more_than_a_block_of_scores(blocks, monkeypatch):
  block, chunk, k = 8, 16, 3
  blocks(block, chunk)
  seen, search_block = [], search._nearest

  def watched(queries, chunks, k, count):
    seen.append(jax.make_jaxpr(lambda q, c: search_block(q, c, k, count))(queries, chunks).jaxpr)
    return search_block(queries, chunks, k, count)

  monkeypatch.setattr(search, "_nearest", watched)
  queries, candidates = np.ones((30, 4), np.float32), np.ones((100, 4), np.float32)
  search.nearest(queries, candidates, k)
  assert len(seen) == 4  # blocks of eight queries
  assert block * chunk <= max(map(largest_made, seen)) <= block * (chunk + k)
  # The plain way, to see that what is too large would be found, in a loop as well.
  dense = lambda q, c: jax.lax.map(lambda _: jax.lax.top_k(q @ c.T, k), jnp.arange(2))  # noqa: E731
  assert largest_made(jax.make_jaxpr(dense)(queries, candidates).jaxpr) == 30 * 100
