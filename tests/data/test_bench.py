"""How fast input is: what is counted as what, by a clock that stands still unless a stage moves it."""

import io
import threading
import types

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import bench, dataset, images, pipeline
from clip_jax.errors import DataError
from tests.conftest import tiny
from tests.data.test_dataset import picture, write_tar


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


class Watched:
  """A data set that notes which positions are asked for, and by which thread."""

  def __init__(self, found, before=lambda: None):
    self.found, self.before, self.asked = found, before, []

  def at(self, positions):
    self.asked.append((threading.current_thread(), positions.tolist()))
    self.before()
    return self.found.at(positions)

  def __getattr__(self, name):
    return getattr(self.found, name)


def opened(path, records, **data):
  config = configs.resolve(tiny(data={"path": write_tar(path, records), **data}))
  return config, dataset.create(config)


def one_picture(path, kind="png", count=40):
  image = picture(5, 40, 30, kind)
  return len(image), *opened(path, {f"{i:03}": {kind: image, "txt": b"a caption"} for i in range(count)})


@pytest.mark.parametrize("cores, threads", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_threads_double_up_to_the_cores(cores, threads, monkeypatch):
  monkeypatch.setattr(bench.os, "cpu_count", lambda: cores)
  assert bench.default_threads() == threads


def test_real_threads_read_the_stream_of_the_run(tmp_path):
  size, config, found = one_picture(tmp_path / "a.tar")
  watched = Watched(found)
  rows = bench.measure(watched, config, [1, 3], 0.05)
  assert [row["threads"] for row in rows] == [1, 3]
  # The first chunk is not measured; then each comes once, from the first number of threads to the last.
  assert sorted(position for _, chunk in watched.asked for position in chunk) == list(range(32 * len(watched.asked)))
  assert all(chunk == list(range(chunk[0], chunk[0] + 32)) and chunk[0] % 32 == 0 for _, chunk in watched.asked)
  assert len({thread for thread, _ in watched.asked} - {threading.current_thread()}) == 4
  for row in rows:
    shares = [row[stage] for stage in ("read", "decode", "resize", "tokenize", "other")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert row["megabytes_per_second"] / row["images_per_second"] == pytest.approx(size / 1e6)


def test_time_goes_to_the_stage_in_which_it_passes(tmp_path, monkeypatch):
  _, config, found = one_picture(tmp_path / "a.tar")
  now = [0.0]
  monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

  def slow(seconds, function):
    def slower(*arguments, **keywords):
      now[0] += seconds
      return function(*arguments, **keywords)

    return slower

  monkeypatch.setattr(images, "decode", slow(3, images.decode))
  monkeypatch.setattr(images, "augment", slow(5, images.augment))
  tokenizer = pipeline.tokenizer_for(config.model)
  monkeypatch.setattr(pipeline, "tokenizer_for", lambda model: slow(32, tokenizer))
  random = slow(1, np.random.Philox)  # of each image, and of no stage
  monkeypatch.setattr(np.random, "Philox", random)
  (row,) = bench.measure(Watched(found, slow(64, lambda: None)), config, [1], 1000)
  chunk = 64 + 32 * (1 + 3 + 5) + 32  # three of them take more than 1000
  assert row == {
    "threads": 1,
    "images_per_second": pytest.approx(32 / chunk),
    "megabytes_per_second": pytest.approx(32 / chunk * len(picture(5, 40, 30)) / 1e6),
    "read": pytest.approx(64 / chunk),
    "decode": pytest.approx(32 * 3 / chunk),
    "resize": pytest.approx(32 * 5 / chunk),
    "tokenize": pytest.approx(32 / chunk),
    "other": pytest.approx(32 / chunk),
  }


def test_too_many_bad_records_stop_it(tmp_path):
  records = {f"{i}": {"png": picture(i) if i % 2 else b"nothing", "txt": b"x"} for i in range(20)}
  config, found = opened(tmp_path / "a.tar", records)
  with pytest.raises(DataError, match="could not be read, more than data.max_bad_share=0.05 allows"):
    bench.measure(found, config, [2], 60)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_decoding_can_be_told_from_the_rest_and_is_the_same(kind):
  buffer = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(buffer, kind)
  settings = dict(crop_scale=(0.3, 1.0), color_jitter=0.4, flip=0.5, rotation=10.0)
  stages, results = [], []

  def timed(stage, function, *arguments):
    stages.append(stage)
    return function(*arguments)

  for more in ({}, {"timed": timed}):
    out = np.empty((16, 16, 3), np.uint8)
    images.training_image(buffer.getvalue(), 16, np.random.default_rng(1), out=out, **settings, **more)
    results.append(out)
  np.testing.assert_array_equal(*results)
  assert stages == ["decode"]
