"""A yardstick that needs no training: name a drawing as the most similar training image is named.

Similarity is the cosine of a vector of pixels and gradient histograms (Dalal & Triggs 2005). It can only
give names that it has seen.
"""

import math

import numpy as np

from clip_jax.data import images
from clip_jax.errors import DataError
from clip_jax.evaluate.search import nearest

SIZE = 32
CELL = 4  # pixels a side
ORIENTATIONS = 9  # of the half circle: a dark edge on light is the same edge as light on dark
# More neighbours than names wanted: several drawings of one name count once. To begin with.
_NEIGHBOURS = 40


def scores(training, held_out, ks=(1, 5)):
  """Recall at K of names, by the nearest training images.

  Args:
    training: a `Source` of named images (its first captions are the names); records that cannot be
      read are passed over, as in training.
    held_out: a `Source` of images whose first captions are to be found.
    ks: the K of R@K.

  Returns:
    A dict of "nearest_pixels_R@K", fractions.
  """
  names, known = _described(training, passed_over=(DataError, images.DecodeError))
  wanted, queries = _described(held_out)
  ranked = _ranked_names(queries, known, names, max(ks))
  return {
    f"nearest_pixels_R@{k}": float(np.mean([w in r[:k] for w, r in zip(wanted, ranked, strict=True)]))
    for k in ks
  }


def describe(image):
  """The vector an image is compared by.

  Args:
    image: uint8 [height, width, 3].

  Returns:
    float32 vector of unit length: half of its square is pixels, half gradient histograms. A half in
    which nothing varies is zero.
  """
  small = images.resize_and_crop(image, SIZE)
  pixels = small.astype(np.float32).ravel()
  pixels -= pixels.mean()
  parts = [part / max(np.linalg.norm(part), 1e-6) for part in (pixels, gradient_histograms(small))]
  return np.concatenate(parts).astype(np.float32) / math.sqrt(2)


def gradient_histograms(image):
  """Histograms of edge directions in cells, normalised over blocks of 2 x 2 cells.

  Args:
    image: uint8 [SIZE, SIZE, 3].

  Returns:
    float32 vector.
  """
  grey = image.astype(np.float32).mean(axis=2)
  down, right = np.gradient(grey)
  strength = np.hypot(down, right)
  position = np.arctan2(down, right) % np.pi / np.pi * ORIENTATIONS
  lower = position.astype(int) % ORIENTATIONS
  upper_share = position - np.floor(position)  # each edge counts for the two nearest directions
  cells = SIZE // CELL
  histograms = np.zeros((cells, cells, ORIENTATIONS), np.float32)
  row, column = np.indices(grey.shape) // CELL
  np.add.at(histograms, (row, column, lower), strength * (1 - upper_share))
  np.add.at(histograms, (row, column, (lower + 1) % ORIENTATIONS), strength * upper_share)
  blocks = [histograms[i : cells - 1 + i, j : cells - 1 + j] for i in (0, 1) for j in (0, 1)]
  blocks = np.concatenate(blocks, axis=-1)
  return (blocks / (np.linalg.norm(blocks, axis=-1, keepdims=True) + 1)).ravel()


def _ranked_names(queries, known, names, count):
  # For each query different names, best first: `count` of them at least, or all there are.
  wanted = min(count, len(set(names)))
  neighbours = _NEIGHBOURS
  while True:
    found, _ = nearest(queries, known, neighbours)
    ranked = [list(dict.fromkeys(names[i] for i in row)) for row in found]
    if min(map(len, ranked)) >= wanted:
      return ranked
    neighbours *= 4


def _described(source, passed_over=()):
  names, vectors = [], []
  for i in range(len(source)):
    try:
      record = source[i]
      vectors.append(describe(images.decode(record.image)))
    except passed_over:
      continue
    names.append(record.captions[0])
  return names, np.stack(vectors)
