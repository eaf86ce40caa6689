"""The yardstick: what it finds, what it never can, and its vectors against a slow reference."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.images import DecodeError
from clip_jax.data.sources import Record
from clip_jax.errors import DataError
from clip_jax.evaluate import nearest_image
from clip_jax.evaluate.nearest_image import describe, gradient_histograms, scores
from tests.evaluate.conftest import png


def drawings(count, seed=0):
  """Pictures of a few large shapes, uint8 [count, 40, 40, 3]."""
  random = np.random.default_rng(seed)
  coarse = random.integers(0, 256, (count, 5, 5, 3), np.uint8)
  return np.stack([Image.fromarray(c).resize((40, 40), Image.Resampling.BILINEAR) for c in coarse])


def noisy(picture, seed, strength=8):
  noise = np.random.default_rng(seed).normal(0, strength, picture.shape)
  return np.clip(picture + noise, 0, 255).astype(np.uint8)


def source(pictures, names):
  """A data set in memory; the caption after a picture's name is not to be looked at."""
  return [Record(png(p), [n, "something"], n) for p, n in zip(pictures, names, strict=True)]


def test_noisy_copies_are_named_as_their_originals():
  pictures, names = drawings(30), [f"drawing {i}" for i in range(30)]
  held_out = source([noisy(p, i) for i, p in enumerate(pictures)], names)
  found = scores(source(pictures, names), held_out)
  assert found == {"nearest_pixels_R@1": 1.0, "nearest_pixels_R@5": 1.0}
  # With the wrong names the nearest is wrong each time.
  wrong = scores(source(pictures, names[1:] + names[:1]), held_out, ks=(1,))
  assert wrong == {"nearest_pixels_R@1": 0.0}


def test_a_name_that_no_training_image_has_is_never_found():
  pictures = drawings(10)
  training = source(pictures, [f"known {i}" for i in range(10)])
  # The very same pictures, half of them under names that were never seen.
  held_out = source(pictures, [f"{'known' if i % 2 else 'unknown'} {i}" for i in range(10)])
  found = scores(training, held_out, ks=(1, 10))
  assert found == {"nearest_pixels_R@1": 0.5, "nearest_pixels_R@10": 0.5}


def test_drawings_of_one_name_count_once_however_many_there_are():
  near, far = drawings(2)
  many = 3 * nearest_image._NEIGHBOURS
  training = source([noisy(near, i) for i in range(many)] + [far], ["near"] * many + ["far"])
  held_out = source([near], ["far"])
  # "far" is the second of two names, though a hundred drawings are nearer.
  found = scores(training, held_out, ks=(1, 2))
  assert found == {"nearest_pixels_R@1": 0.0, "nearest_pixels_R@2": 1.0}


class WithUnreadable(list):
  """A source with a record that cannot be read at all."""

  def __getitem__(self, index):
    if index == 1:
      raise DataError("shard/1: gone")
    return super().__getitem__(index)


def test_training_images_that_cannot_be_read_are_passed_over_as_in_training():
  pictures, names = drawings(6), list("abcdef")
  training = WithUnreadable(source(pictures, names))
  training[4] = training[4]._replace(image=training[4].image[:50])
  found = scores(training, source(pictures, names), ks=(1,))
  assert found["nearest_pixels_R@1"] == pytest.approx(4 / 6)
  # A held-out set must be whole.
  with pytest.raises((DataError, DecodeError)):
    scores(source(pictures, names), training)


def slow_histograms(image):
  """Dalal & Triggs 2005, one pixel, cell and block at a time, in float64."""
  size, cell, bins = 32, 4, 9
  grey = [[sum(map(float, pixel)) / 3 for pixel in row] for row in image]

  def slope(line, i):
    before, after = max(i - 1, 0), min(i + 1, size - 1)
    return (line[after] - line[before]) / (after - before)

  cells = np.zeros((8, 8, bins))
  for y in range(size):
    for x in range(size):
      right, down = slope(grey[y], x), slope([row[x] for row in grey], y)
      strength = math.hypot(down, right)
      if strength:
        position = math.degrees(math.atan2(down, right)) % 180 / (180 / bins)
        low = math.floor(position)
        cells[y // cell, x // cell, low % bins] += strength * (low + 1 - position)
        cells[y // cell, x // cell, (low + 1) % bins] += strength * (position - low)
  vector = []
  for y in range(7):
    for x in range(7):
      block = [*cells[y, x], *cells[y, x + 1], *cells[y + 1, x], *cells[y + 1, x + 1]]
      norm = math.sqrt(sum(b * b for b in block))
      vector += [b / (norm + 1) for b in block]
  return vector


def shaded(down, right):
  """A plane of grey that grows by so much a pixel."""
  y, x = np.indices((32, 32))
  plane = 128 + down * (y - 16) + right * (x - 16)
  return np.repeat(plane[..., None], 3, axis=2).astype(np.uint8)


@pytest.mark.parametrize(
  "image",
  [
    *np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8),
    drawings(1)[0][:32, :32],
    shaded(0, 3),
    shaded(3, 0),
    shaded(-2, 2),
    np.full((32, 32, 3), 77, np.uint8),
  ],
  ids=["noise", "noise 2", "drawing", "right", "down", "diagonal", "flat"],
)
def test_histograms_equal_the_slow_reference(image):
  np.testing.assert_allclose(gradient_histograms(image), slow_histograms(image), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
  "down, right, shares",
  [
    (0, 3, {0: 1}),  # brighter to the right: zero degrees, the first of nine directions
    (0, -3, {0: 1}),  # darker to the right is the same edge
    (3, 0, {4: 0.5, 5: 0.5}),  # 90 degrees lie between the fifth and the sixth
    (2, 2, {2: 0.75, 3: 0.25}),  # 45 degrees are 2.25 directions
  ],
)
def test_the_direction_of_a_plane(down, right, shares):
  found = gradient_histograms(shaded(down, right)).reshape(-1, 9).sum(axis=0)
  want = np.zeros(9)
  want[list(shares)] = list(shares.values())
  np.testing.assert_allclose(found / found.sum(), want, atol=1e-5)


def test_histograms_know_no_brightness_and_no_sign_and_little_contrast():
  image = 60 + drawings(1, seed=3)[0][:32, :32] // 2
  original = gradient_histograms(image)
  assert original.dtype == np.float32
  np.testing.assert_allclose(gradient_histograms(image + 60), original, atol=1e-5)
  np.testing.assert_allclose(gradient_histograms(255 - image), original, atol=1e-5)
  # A gradient twice as steep has the same directions; the constant in the norm is small beside it.
  double = gradient_histograms(shaded(2, 4))
  np.testing.assert_allclose(double, gradient_histograms(shaded(1, 2)), rtol=0.02, atol=1e-6)
  # Another drawing is farther than any of this.
  assert np.abs(gradient_histograms(drawings(2, seed=4)[1][:32, :32]) - original).max() > 0.3


def test_a_description_is_half_pixels_half_edges_and_of_unit_length():
  pictures = drawings(4, seed=5)
  for picture in pictures:
    vector = describe(picture)
    pixels, edges = np.split(vector, [32 * 32 * 3])
    assert vector.dtype == np.float32
    assert np.sum(np.square(pixels)) == pytest.approx(0.5, abs=1e-5)
    assert np.sum(np.square(edges)) == pytest.approx(0.5, abs=1e-5)
    # The negative has the opposite pixels and the same edges: at right angles to the picture.
    assert describe(255 - picture) @ vector == pytest.approx(0, abs=1e-3)


def test_a_blank_page_is_like_nothing():
  blank = describe(np.full((40, 40, 3), 255, np.uint8))
  assert not blank.any()
  pixels, edges = np.split(describe(np.full((40, 40, 3), (200, 0, 0), np.uint8)), [32 * 32 * 3])
  assert np.sum(np.square(pixels)) == pytest.approx(0.5, abs=1e-5) and not edges.any()


def test_any_shape_and_format_of_image_is_described():
  wide = np.repeat(drawings(1), 2, axis=2)[0]
  buffer = io.BytesIO()
  Image.fromarray(wide).save(buffer, "jpeg", quality=95)
  held_out = [Record(buffer.getvalue(), ["wide"], "0")]
  training = source([*drawings(3, seed=9), wide], ["x", "y", "z", "wide"])
  assert scores(training, held_out, ks=(1,)) == {"nearest_pixels_R@1": 1.0}
