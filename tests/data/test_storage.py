"""Byte ranges of files and of objects in real stores on loopback, with faults between."""

import io
import os
import tarfile
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import dataset, storage
from clip_jax.data.pipeline import train_batches
from clip_jax.data.sources import Options, TarSource
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError, UsageError
from tests.conftest import tiny
from tests.data import buckets


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request):
  """An emulated bucket, and the environment that leads to it."""
  with pytest.MonkeyPatch.context() as patch, getattr(buckets, request.param)("pictures") as found:
    for name, value in found.environment.items():
      patch.setenv(name, value)
    yield found


@pytest.fixture(autouse=True)
def calm(request):
  yield
  if "bucket" in request.fixturenames:
    proxy = request.getfixturevalue("bucket").proxy
    proxy.share, proxy.hang, proxy.forbid = 0.0, False, False


def test_what_is_put_is_read(bucket):
  content = bytes(range(256)) * 40
  bucket.put("a/b c-ü.bin", content)
  path, found = f"{bucket.root}/a/b c-ü.bin", Storage()
  assert found.read(path) == content
  assert found.read(path, 300, 700) == content[300:700]
  assert found.read(path, 5, 5) == b""
  assert found.size(path) == len(content)
  with found.open(path) as file:
    file.seek(-10, os.SEEK_END)
    assert file.read() == content[-10:]
    file.seek(0)
    assert file.read() == content


def test_what_is_not_there_is_said(bucket):
  bucket.put("short.bin", b"0123456789")
  found = Storage()
  short, missing = found.read_many([(f"{bucket.root}/short.bin", 5, 11), (f"{bucket.root}/missing.bin", 0, 1)])
  assert isinstance(short, DataError) and f"{bucket.root}/short.bin: ends before byte 11" in str(short)
  assert isinstance(missing, DataError) and f"{bucket.root}/missing.bin: no such file" in str(missing)
  with pytest.raises(DataError, match="no such file"):
    found.read(f"{bucket.root}/missing.bin")


def test_a_glob_does_not_go_into_folders(bucket):
  for name in ("g/00000.tar", "g/00001.tar", "g/00001.json", "g/sub/00002.tar", "g2/00003.tar"):
    bucket.put(name, b"x")

  def names(pattern):
    return [path.removeprefix(f"{bucket.root}/") for path in Storage().expand(f"{bucket.root}/{pattern}")]

  assert names("g/*.tar") == ["g/00000.tar", "g/00001.tar"]
  assert names("g/0000[1-9].*") == ["g/00001.json", "g/00001.tar"]
  assert names("g/{00000..00001}.tar") == ["g/00000.tar", "g/00001.tar"]
  assert names("g*/*.tar") == ["g/00000.tar", "g/00001.tar", "g2/00003.tar"]
  for pattern in ("g/*.parquet", "g/{00000..00002}.tar", "nothing/*"):
    with pytest.raises(DataError, match="no such file"):
      names(pattern)


def test_a_stamp_changes_with_the_object(bucket):
  bucket.put("stamped", b"one")
  (first,) = Storage().stamps([f"{bucket.root}/stamped"])
  assert Storage().stamps([f"{bucket.root}/stamped"]) == [first]
  bucket.put("stamped", b"two")
  assert Storage().stamps([f"{bucket.root}/stamped"]) != [first]


def test_writing_into_a_bucket(bucket):
  Storage().write(f"{bucket.root}/written/by us", b"content")
  assert Storage().read(f"{bucket.root}/written/by us") == b"content"


def test_nothing_is_lost_or_doubled_when_a_third_of_the_requests_fails(bucket):
  contents = {f"f/{i}.bin": np.random.default_rng(i).bytes(3_000 + i) for i in range(12)}
  for key, content in contents.items():
    bucket.put(key, content)
  random = np.random.default_rng(0)
  bucket.misbehave(0.33)
  found, ranges = Storage(), []
  for _ in range(250):
    key = random.choice(list(contents))
    start, stop = sorted(random.integers(0, 3_000, 2).tolist())
    ranges.append((key, start, stop))
  got = found.read_many([(f"{bucket.root}/{key}", start, stop) for key, start, stop in ranges])
  assert got == [contents[key][start:stop] for key, start, stop in ranges]
  one_by_one = [found.read(f"{bucket.root}/{key}", start, stop) for key, start, stop in ranges[:10]]
  assert one_by_one == got[:10]
  assert all(bucket.proxy.counts[fault] for fault in buckets.FAULTS), bucket.proxy.counts


def colours(records, first):
  """A shard of pictures whose colour is their number."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as tar:
    for i in range(first, first + records):
      picture = io.BytesIO()
      Image.fromarray(np.full((9, 9, 3), (i // 256, i % 256, 77), np.uint8)).save(picture, "png")
      for extension, content in {"png": picture.getvalue(), "txt": f"number {i}".encode()}.items():
        member = tarfile.TarInfo(f"{i:05}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return buffer.getvalue()


@pytest.mark.parametrize("how", ["global", "blocks"])
def test_training_from_a_bucket_with_faults_is_training_from_a_disk(bucket, tmp_path, how):
  """Two epochs and more: the batches are the same to the last byte, so no example is lost and none doubled."""
  for i, records in enumerate((70, 50, 61)):
    shard = colours(records, 100 * i)
    bucket.put(f"{how}/{i:05}.tar", shard)
    (tmp_path / f"{i:05}.tar").write_bytes(shard)

  def batches(folder):
    data = dict(path=f"{folder}/{{00000..00002}}.tar", order=how, block=8, window=3, lanes=4, threads=4)
    config = configs.resolve(tiny(train={"global_batch_size": 32, "steps": 13}, data=data))
    found = dataset.create(config)
    assert len(found) == 181
    return list(train_batches(found, config, rows=np.arange(32), start=0))

  want = batches(tmp_path)
  bucket.misbehave(0.2, seed=1)
  got = batches(f"{bucket.root}/{how}")
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a["images"], b["images"])
    np.testing.assert_array_equal(a["tokens"], b["tokens"])
  seen = np.concatenate([batch["images"][:, 0, 0].astype(int) for batch in got]) @ [256, 1, 0]
  numbers = [100 * i + j for i, records in enumerate((70, 50, 61)) for j in range(records)]
  assert sorted(seen[:181]) == sorted(seen[181:362]) == numbers
  assert sum(bucket.proxy.counts[fault] for fault in buckets.FAULTS) > 5, bucket.proxy.counts


def test_blocks_are_few_reads(bucket):
  """Of 256 records in blocks of 32, on one host: not 256 requests."""
  bucket.put("few/00000.tar", colours(256, 0))
  counts = {}
  for how in ("global", "blocks"):
    data = dict(path=f"{bucket.root}/few/00000.tar", order=how, block=32, window=2, lanes=2, threads=2)
    config = configs.resolve(tiny(train={"global_batch_size": 32, "steps": 8}, data=data))
    found = dataset.create(config)
    bucket.misbehave(0.0)
    batches = list(train_batches(found, config, rows=np.arange(32), start=0))
    assert len(batches) == 8
    counts[how] = bucket.proxy.counts[None]
  assert counts["blocks"] <= 12
  assert counts["global"] >= 64


def test_the_index_of_a_bucket_is_kept_in_the_cache_and_beside_only_when_asked(bucket):
  from clip_jax.data.sources.tar_index import Index

  bucket.put("indexed/0.tar", colours(40, 0))
  path = f"{bucket.root}/indexed/0.tar"
  assert len(TarSource(path, Options())) == 40
  assert Storage().expand(f"{bucket.root}/indexed/*") == [path]
  Index([path], rebuild=True, beside=True)
  assert Storage().expand(f"{bucket.root}/indexed/*") == [path, f"{path}.index.npz"]
  assert len(TarSource(f"{bucket.root}/indexed/*").paths) == 1
  bucket.put("indexed/0.tar", colours(41, 0))
  assert len(TarSource(path)) == 41


def test_a_store_that_hangs_is_named_when_the_deadline_is_over(bucket):
  bucket.put("hangs/0.bin", b"content")
  found = Storage(deadline=1.0)
  assert found.read(f"{bucket.root}/hangs/0.bin") == b"content"
  bucket.proxy.hang = True
  with pytest.raises(StorageError, match=f"{bucket.root}/hangs/0.bin has not been read within 1 seconds"):
    found.read(f"{bucket.root}/hangs/0.bin")


def test_what_may_not_be_read_is_wrong_usage_and_no_bad_record(bucket):
  bucket.put("secret/0.tar", colours(5, 0))
  source = TarSource(f"{bucket.root}/secret/0.tar")
  bucket.proxy.forbid = True
  with pytest.raises(UsageError, match="secret/0.tar cannot be read: ") as caught:
    source.fetch([0])
  assert not isinstance(caught.value, DataError)


def test_eight_threads_over_a_bucket(bucket):
  content = np.random.default_rng(0).bytes(20_000)
  bucket.put("threads.bin", content)
  found, wrong = Storage(), []

  def work(seed):
    random = np.random.default_rng(seed)
    for _ in range(30):
      start, stop = sorted(random.integers(0, 20_000, 2).tolist())
      if found.read(f"{bucket.root}/threads.bin", start, stop) != content[start:stop]:
        wrong.append((start, stop))

  threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong


# Without a bucket.


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 100_000), st.integers(0, 40_000)), max_size=12),
)
def test_ranges_in_any_order_near_each_other_and_beyond_the_end(tmp_path, wanted):
  contents = [bytes([i]) + np.random.default_rng(i).bytes(60_000 + 999 * i) for i in range(3)]
  for i, content in enumerate(contents):
    if not (tmp_path / f"{i}").exists():
      (tmp_path / f"{i}").write_bytes(content)
  got = Storage().read_many([(str(tmp_path / f"{i}"), start, start + count) for i, start, count in wanted])
  for (i, start, count), found in zip(wanted, got, strict=True):
    if start + count > len(contents[i]) and count:
      assert isinstance(found, DataError)
    elif count:
      assert found == contents[i][start : start + count]


def test_a_path_with_credentials_is_refused_before_it_is_asked_for():
  with pytest.raises(DataError, match="credentials do not belong in a path") as caught:
    Storage().expand("s3://user:secret@bucket/*.tar")
  assert "secret" not in str(caught.value)


def test_a_disk_that_fails_is_no_bad_record(tmp_path, monkeypatch):
  (tmp_path / "a").write_bytes(b"0123456789")

  def broken(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(storage.os, "pread", broken)
  with pytest.raises(StorageError, match="Input/output error"):
    Storage().read(str(tmp_path / "a"), 0, 5)
