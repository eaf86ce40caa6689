"""Exact nearest neighbours by inner product, in blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1_024  # queries scored at a time
CHUNK = 4_096  # candidates scored at a time


def nearest(queries, candidates, k):
  """The k candidates with the largest inner product, for each query.

  Never holds more scores than BLOCK x (CHUNK + k). Equal scores are ranked by candidate number.

  Args:
    queries: float32 [n, embed].
    candidates: float32 [m, embed].
    k: how many; fewer come back where there are fewer candidates.

  Returns:
    int [n, min(k, m)] candidate numbers, best first, and their float32 scores.
  """
  k = min(k, len(candidates))
  chunk = min(CHUNK, len(candidates))
  chunks = math.ceil(len(candidates) / chunk)
  padded = np.zeros((chunks * chunk, candidates.shape[1]), np.float32)
  padded[: len(candidates)] = candidates
  padded = padded.reshape(chunks, chunk, -1)
  numbers, scores = [], []
  for start in range(0, len(queries), BLOCK):
    block = np.zeros((min(BLOCK, len(queries)), queries.shape[1]), np.float32)
    part = queries[start : start + BLOCK]
    block[: len(part)] = part
    best, at = _nearest(block, padded, k, len(candidates))
    numbers.append(np.asarray(at)[: len(part)])
    scores.append(np.asarray(best)[: len(part)])
  return np.concatenate(numbers), np.concatenate(scores)


@functools.partial(jax.jit, static_argnames=("k", "count"))
def _nearest(queries, chunks, k, count):
  width = chunks.shape[1]

  def merge(best, item):
    start, candidates = item
    scores = jnp.matmul(queries, candidates.T, precision=jax.lax.Precision.HIGHEST)
    at = start + jnp.arange(width)
    scores = jnp.where(at < count, scores, -jnp.inf)
    # Earlier candidates come first, and top_k keeps the first of equals.
    scores = jnp.concatenate([best[0], scores], axis=1)
    at = jnp.concatenate([best[1], jnp.broadcast_to(at, (len(queries), width))], axis=1)
    top, where = jax.lax.top_k(scores, k)
    return (top, jnp.take_along_axis(at, where, axis=1)), None

  nothing = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), count)
  starts = jnp.arange(len(chunks)) * width
  return jax.lax.scan(merge, nothing, (starts, chunks))[0]
