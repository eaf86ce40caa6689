"""Training on a part of each example: dropped patches and shortened captions, and none of it at inference."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.models import text as texts
from clip_jax.models import vit
from tests.conftest import tiny
from tests.models.test_clip import inputs, model_config, random_params

START, END = 49_406, 49_407
PATCHES = 16


def keys_of(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


@pytest.fixture(scope="module")
def dropping():
  config = model_config(vision={**tiny()["model"]["vision"], "patch_size": 4, "patch_drop": 0.75})
  return config, *random_params(config)


def test_pixels_of_dropped_patches_do_not_matter_and_the_others_do(dropping):
  config, module, params = dropping
  images, _ = inputs(config, rows=2)
  keys = keys_of(2)
  run = jax.jit(lambda params, x: module.apply({"params": params}, x, keys=keys, method="encode_image"))
  encode = lambda x: np.asarray(run(params, x))  # noqa: E731
  before = encode(images)
  seen = np.asarray(vit.random_patches(keys, PATCHES, 4))
  assert [len(set(row)) for row in seen] == [4, 4]
  for patch in range(PATCHES):
    changed = images.copy()
    row, column = divmod(patch, 4)
    changed[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
    moved = np.abs(encode(changed) - before).max(axis=1)
    for example in range(2):
      assert (moved[example] > 1e-4) == (patch in seen[example])


def test_which_patches_are_seen_depends_on_the_own_key_alone_and_is_uniform():
  keys = keys_of(4000)
  seen = np.asarray(vit.random_patches(keys, PATCHES, 4))
  np.testing.assert_array_equal(vit.random_patches(keys[7:9], PATCHES, 4), seen[7:9])
  share = np.bincount(seen.ravel(), minlength=PATCHES) / 4000
  np.testing.assert_allclose(share, 4 / PATCHES, atol=5 * (0.25 * 0.75 / 4000) ** 0.5)


def test_without_keys_examples_are_seen_whole(dropping):
  config, module, params = dropping
  images, tokens = inputs(config)
  whole = model_config(vision={**tiny()["model"]["vision"], "patch_size": 4})
  want = jax.jit(type(module)(whole).apply)({"params": params}, images, tokens)
  np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, images, tokens)[0], want[0])


shorten = jax.jit(texts.shorten, static_argnums=(2, 3))  # one program for each length and reduction


def caption(words, context):
  row = np.zeros(context, np.int32)
  row[: len(words) + 2] = [START, *words, END]
  return row


@settings(max_examples=60, deadline=None)
@given(
  words=st.lists(st.lists(st.integers(1, 49_000), max_size=14, unique=True), min_size=3, max_size=3),
  length=st.sampled_from([3, 4, 7, 15, 16]),
  reduction=st.sampled_from(["truncate", "random", "block"]),
  seed=st.integers(0, 2**31),
)
def test_a_shortened_caption_is_a_part_of_it_in_order_between_start_and_end(words, length, reduction, seed):
  tokens = np.stack([caption(w, 16) for w in words])
  short = np.asarray(shorten(tokens, keys_of(len(words), seed), length, reduction))
  assert short.shape == (len(words), length) and short.dtype == np.int32
  for row, given_words in zip(short, words, strict=True):
    kept = min(len(given_words), length - 2)
    assert row[0] == START and row[kept + 1] == END and not row[kept + 2 :].any()
    got = [given_words.index(word) for word in row[1 : kept + 1]]  # fails where a word is not of the caption
    assert got == sorted(set(got))
    if reduction == "truncate":
      assert got == list(range(kept))
    if reduction == "block" and kept:
      assert got == list(range(got[0], got[0] + kept))


@pytest.mark.parametrize("reduction, parts", [("truncate", 1), ("block", 5), ("random", 15)])
def test_every_part_that_may_be_kept_is_kept_as_often(reduction, parts):
  tokens = np.repeat(caption([1, 2, 3, 4, 5, 6], 10)[None], 3000, axis=0)
  length = {"truncate": 4, "block": 4, "random": 6}[reduction]  # 2 of 6, and 4 of 6 in 15 ways
  short = np.asarray(shorten(tokens, keys_of(3000), length, reduction))
  counts = np.unique(short, axis=0, return_counts=True)[1]
  assert len(counts) == parts
  share = 1 / parts
  np.testing.assert_allclose(counts / 3000, share, atol=5 * (share * (1 - share) / 3000) ** 0.5)


def test_the_tower_sees_the_short_caption_at_the_first_positions():
  config = model_config(text={**tiny()["model"]["text"], "train_length": 5})
  module, params = random_params(config)
  _, tokens = inputs(config, rows=4, seed=3)
  encode = jax.jit(functools.partial(module.apply, method="encode_text"))
  got = encode({"params": params}, tokens, keys=keys_of(4))
  short = np.asarray(shorten(tokens, keys_of(4), 5, "truncate"))
  padded = np.pad(short, ((0, 0), (0, config.text.context_length - 5)))
  np.testing.assert_allclose(got, encode({"params": params}, padded), atol=2e-6)


def test_positions_are_resized_as_a_picture_is():
  random = np.random.default_rng(0)
  positions = random.normal(size=(1 + 49, 4)).astype(np.float32)
  assert vit.resize_positions(positions, 50) is positions
  for rows in (14, 5):  # larger, and smaller, where Pillow's filter is antialiased too
    got = np.asarray(vit.resize_positions(positions, 1 + rows * rows))
    np.testing.assert_array_equal(got[0], positions[0])
    for channel in range(4):
      picture = Image.fromarray(positions[1:, channel].reshape(7, 7))
      want = np.asarray(picture.resize((rows, rows), Image.Resampling.BICUBIC))
      np.testing.assert_allclose(got[1:, channel].reshape(rows, rows), want, atol=1e-5)
