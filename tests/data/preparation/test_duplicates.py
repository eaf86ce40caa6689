"""Copies: the hashes on pictures, and the comparison in parts against one of all pairs."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import images
from clip_jax.data.preparation import duplicates, hashes, manifest
from tests.data.preparation import pictures


def distance(a, b):
  return (hashes.perceptual(a) ^ hashes.perceptual(b)).bit_count()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
  "copy",
  [
    lambda image: images.decode(pictures.encoded(image, quality=40)),
    lambda image: images.decode(pictures.encoded(image, "webp", quality=70)),
    lambda image: cv2.resize(image, (300, 250), interpolation=cv2.INTER_AREA),
    lambda image: cv2.resize(image, (270, 240), interpolation=cv2.INTER_CUBIC),
    lambda image: image[2:-2, 2:-2],
    lambda image: cv2.convertScaleAbs(image, alpha=0.9, beta=8),
  ],
  ids=["jpeg", "webp", "smaller", "narrower", "cropped", "paler"],
)
def test_copies_look_the_same(seed, copy):
  image = pictures.picture(seed, 360, 300)
  assert distance(image, copy(image)) <= 4
  assert hashes.of_pixels(image) != hashes.of_pixels(copy(image))


def test_different_pictures_do_not():
  looks = np.array([hashes.perceptual(pictures.picture(seed)) for seed in range(600)], np.uint64)
  apart = np.bitwise_count(looks[:, None] ^ looks) + 64 * np.eye(len(looks), dtype=int)
  assert apart.min() > 8


@pytest.mark.parametrize("value", [0, 77, 255])
def test_plain_pictures_have_no_looks(value):
  plain = np.full((50, 60, 3), value, np.uint8)
  assert hashes.perceptual(plain) is None
  assert hashes.perceptual(images.decode(pictures.encoded(plain))) is None


def test_pixels_are_told_apart_by_their_shape():
  image = pictures.picture(3)
  assert hashes.of_pixels(image) == hashes.of_pixels(images.decode(pictures.encoded(image, "png")))
  assert hashes.of_pixels(image) != hashes.of_pixels(image.reshape(96, 80, 3))


@given(st.integers(0, 16), st.integers(0, 2**64 - 1), st.data())
def test_near_hashes_share_a_masked_value(bits, value, data):
  other = value
  for place in data.draw(st.sets(st.integers(0, 63), max_size=bits)):
    other ^= 1 << place
  pair = np.array([value, other], np.uint64)
  assert any((pair & mask)[0] == (pair & mask)[1] for mask in hashes.masks(bits))


def test_masks_are_as_many_as_pairs_of_bands():
  assert [len(hashes.masks(bits)) for bits in (0, 1, 2, 4, 8)] == [1, 3, 6, 15, 45]
  assert hashes.masks(0).tolist() == [2**64 - 1]


def rows_of(some):
  found = np.zeros(len(some), manifest.ROW)
  for row, (number, pixels, looks, texts, area) in zip(found, some, strict=True):
    row["id"], row["pixels"], row["looks"], row["texts"], row["area"] = number, (pixels, pixels), looks, texts, area
    row["has_looks"], row["leader"] = True, number
  return found


NUMBERS = st.one_of(st.integers(0, 40), st.integers(int(manifest.EXCLUDED), int(manifest.EXCLUDED) + 5))
ROWS = st.lists(
  st.tuples(NUMBERS, st.integers(0, 4), st.integers(0, 63), st.integers(0, 2), st.integers(1, 3)),
  max_size=25, unique_by=lambda row: row[0],
)  # fmt: skip


@given(ROWS, st.sampled_from(["merge", "first", "separate"]), st.randoms(use_true_random=False))
def test_same_pixels(some, mode, random):
  """Against the rule, record by record; in any order."""
  random.shuffle(some)
  outside = {row[1] for row in some if row[0] >= manifest.EXCLUDED}
  seen, expected = {}, []
  for number, pixels, _, texts, _ in sorted(some):
    if number < manifest.EXCLUDED and pixels not in outside:
      texts_seen = seen.setdefault(pixels, set())
      if not texts_seen or (mode != "first" and texts not in texts_seen):
        expected.append(number)
      texts_seen.add(texts)
  rows, keep_out, counts = duplicates.same_pixels(rows_of(some), mode)
  assert sorted(rows["id"].tolist()) == expected
  assert sorted(keep_out["pixels"][:, 0].tolist()) == sorted(outside)
  inside = [row for row in some if row[0] < manifest.EXCLUDED]
  assert counts["contamination"] == sum(row[1] in outside for row in inside)
  assert counts["duplicate"] == len(inside) - counts["contamination"] - len(rows)
  for row in rows:
    assert row["leader"] == min(r[0] for r in some if r[1] == row["pixels"][0])


def test_a_placeholder_with_any_number_of_captions():
  rows, _, counts = duplicates.same_pixels(rows_of([(i, 1, 1, i, 1) for i in range(200)]), "merge")
  assert rows["id"].tolist() == list(range(64)) and counts["duplicate"] == 136


@settings(max_examples=200)
@given(ROWS, st.one_of(st.none(), st.integers(0, 3)), st.one_of(st.none(), st.integers(0, 3)), st.randoms(use_true_random=False))
def test_similar_in_parts_is_all_pairs(some, near, exclude, random):
  random.shuffle(some)
  expected = {}
  for number, _, looks, _, area in some:
    for other, _, other_looks, _, other_area in some:
      apart = (looks ^ other_looks).bit_count()
      better = (-other_area, other) < (-area, number)
      if number >= manifest.EXCLUDED or number == other:
        continue
      if other >= manifest.EXCLUDED and exclude is not None and apart <= exclude:
        expected[number] = duplicates.CONTAMINATION
      elif other < manifest.EXCLUDED and better and near is not None and apart <= near:
        expected.setdefault(number, duplicates.NEAR)
  rows = rows_of(some)
  left, drops = duplicates.same_looks(rows, near, exclude)
  found = [drops]
  for mask in hashes.masks(max(near or 0, exclude or 0)):
    parts = hashes.mix(left["looks"] & mask) % np.uint64(3)
    found += [duplicates.similar(left[parts == part], mask, near, exclude) for part in range(3)]
  kept, counts = duplicates.without(rows[rows["id"] < manifest.EXCLUDED], np.concatenate(found))
  inside = {row[0] for row in some if row[0] < manifest.EXCLUDED}
  assert set(kept["id"].tolist()) == inside - set(expected)
  assert sum(counts.values()) == len(expected)


def test_a_long_run_of_one_key_is_compared_as_a_whole():
  random = np.random.default_rng(0)
  some = [(i, i, int(looks), 0, 1) for i, looks in enumerate(random.integers(0, 2**62, 2000))]
  some.append((2000, 2000, some[7][2] ^ 5, 0, 1))
  drops = duplicates.similar(rows_of(some), np.uint64(0), 4, None)
  assert drops["leader"].tolist() == [2000]


def test_the_order_is_one_of_the_seed():
  ids = np.arange(1000, dtype=np.uint64)
  first, second = hashes.order(ids, 1), hashes.order(ids, 2)
  assert len(set(first.tolist())) == 1000
  assert (hashes.order(ids[::-1], 1) == first[::-1]).all()
  assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.1
  assert hashes.order(ids, -1).shape == (1000,)
