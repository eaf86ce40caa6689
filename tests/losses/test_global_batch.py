"""The configured loss: which method, what it is estimated to take, what it refuses, and hidden negatives."""

import collections

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.losses import global_batch
from tests.losses.reference import loss_of, mesh_of, unit_rows


def test_auto_gathers_what_is_small_and_sends_the_rest_round():
  loss = configs.Loss()
  assert global_batch.method_of(loss, 32_768, 512, 256) == "gather"
  assert global_batch.method_of(loss, 1_048_576, 512, 256) == "ring"
  assert global_batch.method_of(configs.Loss(method="gather"), 1_048_576, 512, 256) == "gather"
  line = global_batch.describe(loss, 1_048_576, 512, 256)
  assert line.startswith("loss: softmax over 1,048,576 pairs, ring (about ") and "gather 4," in line


def test_what_gather_takes_grows_with_the_batch_and_what_ring_takes_does_not():
  loss = configs.Loss()
  take = {m: [global_batch.estimated_bytes(loss, m, n * 4096, 512, n) for n in (8, 64)] for m in ("gather", "ring")}
  assert take["ring"][0] == take["ring"][1]
  assert take["gather"][1] - take["gather"][0] == 56 * 4096 * 512 * (4 + 4)


@pytest.mark.parametrize("what, message", [
  ("not finite", "Row 5 of the text embeddings is not finite"),
  ("too long", "Row 5 of the text embeddings has length 3; expected L2-normalised rows."),
  ("zero", "Row 5 of the text embeddings has length 0"),
])  # fmt: skip
def test_embeddings_that_are_not_of_unit_length_are_refused_where_they_can_be_seen(what, message):
  image, text = unit_rows(8, 16, 0), unit_rows(8, 16, 1)
  text[5] *= {"not finite": np.nan, "too long": 3.0, "zero": 0.0}[what]
  with pytest.raises(ValueError) as error:
    loss_of("softmax", mesh_of(2, 1, 1))(image, text, 10.0)
  assert message in str(error.value)


def test_rounding_to_bfloat16_is_not_taken_for_a_wrong_length():
  image, text = (jax.numpy.bfloat16(unit_rows(64, 16, seed)) for seed in (0, 1))
  assert np.isfinite(loss_of("softmax", mesh_of(1, 1, 1))(image, text, 10.0))


def test_a_batch_that_cannot_be_split_is_refused():
  with pytest.raises(ValueError, match="6 pairs cannot be split over 4 shards"):
    loss_of("softmax", mesh_of(4, 1, 1))(unit_rows(6, 8, 0), unit_rows(6, 8, 1), 10.0)


def test_caption_keys_are_equal_for_equal_captions_and_spread_for_others():
  random = np.random.default_rng(0)
  tokens = random.integers(0, 49_408, (4096, 16)).astype(np.int32)
  tokens[1], tokens[2] = tokens[0], tokens[0]
  tokens[2, -1] ^= 1
  keys = np.asarray(global_batch.caption_keys(tokens))
  assert keys.dtype == np.uint32 and keys[0] == keys[1] != keys[2]
  assert len(np.unique(keys)) == 4095
  # Short captions are alike but for a few words; 4,096 draws of 2**32 collide with a probability of 0.2 %.
  short = np.zeros((4096, 16), np.int32)
  short[:, 0], short[:, 1], short[:, 2] = 49_406, np.arange(4096), 49_407
  assert len(np.unique(global_batch.caption_keys(short))) == 4096
  buckets = collections.Counter(np.asarray(global_batch.caption_keys(short)) >> 28)
  assert len(buckets) == 16 and max(buckets.values()) < 2 * 4096 / 16
