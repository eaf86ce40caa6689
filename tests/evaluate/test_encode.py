"""Whole sets against one example at a time, on meshes of one to eight devices."""

import threading

import jax
import numpy as np
import pytest

from clip_jax import benchmark
from clip_jax.errors import DataError
from clip_jax.evaluate.encode import Encoder
from tests.evaluate.conftest import BATCH, MESHES, MODEL, encoder, pictures, placed, tokenize

COUNTS = [1, BATCH - 1, BATCH, BATCH + 5, 3 * BATCH]
CAPTIONS = [f"{'very ' * (i % 4)}small picture number {i}" for i in range(3 * BATCH)]


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_rows_equal_one_at_a_time_on_any_mesh(data, fsdp, params, one_at_a_time):
  encode = encoder(data, fsdp)
  on_mesh = placed(params, encode.mesh)
  images, tokens = pictures(3 * BATCH), tokenize(CAPTIONS)
  want_images, want_texts = one_at_a_time.images(images), one_at_a_time.texts(CAPTIONS)
  for count in COUNTS:
    image = encode.images(on_mesh, count, images.__getitem__)
    text = encode.texts(on_mesh, tokens[:count])
    for got, want in ((image, want_images), (text, want_texts)):
      assert isinstance(got, np.ndarray) and got.dtype == np.float32
      assert got.shape == (count, MODEL.embed_dim)
      np.testing.assert_allclose(got, want[:count], rtol=0, atol=1e-6)
  # No two are alike, by a thousand times what is tolerated.
  for want in (want_images, want_texts):
    different = np.abs(want[:, None] - want[None]).max(axis=2) + np.eye(len(want))
    assert different.min() > 1e-3


@pytest.mark.parametrize("count", COUNTS)
def test_each_image_is_loaded_once_and_nothing_else(params, count):
  images, loaded, lock = pictures(3 * BATCH), [], threading.Lock()

  def load(i):
    with lock:
      loaded.append(i)
    return images[i]

  encoder().images(params, count, load)
  assert sorted(loaded) == list(range(count))


def test_a_model_is_compiled_once_for_all_sets(params):
  encode = encoder()
  for count in COUNTS:
    encode.images(params, count, pictures(count).__getitem__)
  before = encode._image._cache_size()
  encode.images(params, BATCH + 1, pictures(BATCH + 1).__getitem__)
  # One program for parameters on the host, one for those that another test laid over the mesh.
  assert encode._image._cache_size() == before <= 2


def test_an_error_of_loading_is_the_error_that_is_raised(params):
  def load(i):
    if i == BATCH + 2:
      raise DataError("shard/00010.jpg: cut off")
    return pictures(1)[0]

  with pytest.raises(DataError, match=r"shard/00010\.jpg"):
    encoder().images(params, 2 * BATCH, load)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("count", [1, 7, 29])
def test_bits_do_not_depend_on_how_many_devices_there_are(params, devices, count):
  """Each has the same number of rows, and no set size divides anything."""
  images, tokens = pictures(29), tokenize(CAPTIONS + ["a much longer one that needs all of its places"])
  found = []
  for number in (1, devices):
    mesh = benchmark.everywhere(jax.devices()[:number])
    encode, on_mesh = Encoder(MODEL, mesh, 4 * number), benchmark.on_all(params, mesh)
    parts = list(encode.chunks(on_mesh, count, lambda i: (images[i], np.int32(i)), np.int32(0)))
    assert [start for start, *_ in parts] == list(range(0, count, 4))
    assert np.concatenate([known for *_, known in parts]).tolist() == list(range(count))
    found.append((np.concatenate([rows for _, rows, _ in parts]).tobytes(), encode.texts(on_mesh, tokens[:count]).tobytes()))
  assert found[0] == found[1]


def test_short_texts_are_cut_and_embedded_as_whole_ones(params, one_at_a_time):
  captions = [" ".join(["word"] * (i % 10)) for i in range(40)]
  encode = encoder()
  lengths = [length for length, _ in encode._by_length(tokenize(captions))]
  assert lengths[0] == 8 and lengths[-1] == MODEL.text.context_length and len(lengths) == 3
  rows = np.concatenate([rows for _, rows in encode._by_length(tokenize(captions))])
  assert sorted(rows) == list(range(40))
  np.testing.assert_allclose(encode.texts(params, tokenize(captions)), one_at_a_time.texts(captions), rtol=0, atol=1e-6)
