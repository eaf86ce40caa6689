"""Parquet files as pyarrow, Hugging Face datasets and img2dataset write them."""

import concurrent.futures
import random
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.data.sources import opening, parquet
from clip_jax.data.sources.parquet import ParquetSource
from clip_jax.data.sources.protocol import Options, Record
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError


def image(i):
  return b"\xff\xd8" + f"image {i} ".encode() * (1 + 37 * i % 211)


def write(path, columns, row_group_size=10, **options):
  table = columns if isinstance(columns, pa.Table) else pa.table(columns)
  pq.write_table(table, path, row_group_size=row_group_size, **options)
  return str(path)


def shard(path, count=25, start=0, **options):
  rows = range(start, start + count)
  columns = {"image": [image(i) for i in rows], "caption": [f"caption {i} – ü" for i in rows], "label": list(rows)}
  schema = pa.schema({"image": pa.binary(), "caption": pa.string(), "label": pa.int64()})  # also where there is no row
  return write(path, pa.table(columns, schema), **options)


def expected(i, name, row):
  return Record(image(i), [f"caption {i} – ü"], f"{name}/{row}", i)


def records_of(path, **options):
  source = ParquetSource(str(path), Options(**options))
  return source.fetch(range(len(source)))


# What a record is.


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "brotli", "gzip"])
def test_rows_of_several_files(tmp_path, compression):
  for n in range(3):
    shard(tmp_path / f"{n}.parquet", 25, 25 * n, compression=compression)
  found = records_of(tmp_path / "*.parquet")
  assert found == [expected(i, f"{i // 25}.parquet", i % 25) for i in range(75)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  files=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), min_size=1, max_size=5),
  order=st.randoms(use_true_random=False),
)
def test_any_record_is_found(tmp_path_factory, files, order):
  """Whatever the numbers of rows in files and row groups are."""
  folder, start, places = tmp_path_factory.mktemp("files"), 0, []
  for n, (count, group) in enumerate(files):
    shard(folder / f"{n}.parquet", count, start, row_group_size=group)
    places += [(f"{n}.parquet", row) for row in range(count)]
    start += count
  if not start:
    with pytest.raises(DataError, match="there is no row"):
      ParquetSource(f"{folder}/*.parquet")
    return
  source = ParquetSource(f"{folder}/*.parquet")
  indices = [order.randrange(start) for _ in range(50)]
  assert source.fetch(indices) == [expected(i, *places[i]) for i in indices]
  assert [source.key(i) for i in indices] == [f"{name}/{row}" for name, row in (places[i] for i in indices)]
  for outside in (-1, start):
    with pytest.raises(IndexError):
      source.fetch([0, outside])
    with pytest.raises(IndexError):
      source.key(outside)


@pytest.mark.parametrize(
  ("columns", "found"),
  [
    ({"image": [b"i"], "text": ["t"]}, (b"i", ["t"])),
    ({"image": [{"bytes": b"i", "path": "a.jpg"}], "text": ["t"]}, (b"i", ["t"])),  # Hugging Face's Image
    ({"image": [{"path": None, "bytes": b"i"}], "captions": [["s", "t"]]}, (b"i", ["s", "t"])),
    ({"jpg": [b"i"], "txt": ["t"], "url": ["http://x"], "key": ["0"]}, (b"i", ["t"])),
    ({"png": [b"i"], "caption": ["c"], "text": ["t"]}, (b"i", ["c"])),
    ({"webp": [b"i"], "caption": [None], "text": ["t"]}, (b"i", ["t"])),
    ({"image": pa.array([b"i"], pa.large_binary()), "text": pa.array(["t"], pa.large_string())}, (b"i", ["t"])),
    ({"image": [b"i"], "captions": pa.array([["s", None, " "]], pa.large_list(pa.string()))}, (b"i", ["s"])),
    ({"image": [b"i"], "text": pa.array(["t"]).dictionary_encode()}, (b"i", ["t"])),
    ({"image": [b"i"], "text": ["t"], "label": ["a cat"]}, (b"i", ["t"])),
  ],
)
def test_columns(tmp_path, columns, found):
  record = Record(*found, "a.parquet/0")
  assert records_of(write(tmp_path / "a.parquet", columns)) == [record]


def test_columns_that_are_asked_for(tmp_path):
  path = write(tmp_path / "a", {"photo": [b"p"], "image": [b"i"], "short": ["s"], "long": [["l", "m"]], "cls": [7]})
  found = records_of(path, captions=(("short", 2.0), ("long", 1.0)), image="photo")
  assert found == [Record(b"p", ["s", "l", "m"], "a/0", 7, (2.0, 0.5, 0.5))]


def test_what_is_missing_is_missing_in_its_record_only(tmp_path):
  nested = pa.array([{"bytes": b"i"}, {"bytes": None}, None, {"bytes": b"i"}, {"bytes": b"i"}, {"bytes": b"i"}])
  columns = {"image": nested, "captions": [["c"], ["c"], ["c"], None, [], ["c"]], "label": [1, 2, 3, None, None, None]}
  found = records_of(write(tmp_path / "a", columns))
  assert found[0] == Record(b"i", ["c"], "a/0", 1)
  assert found[5] == Record(b"i", ["c"], "a/5", None)
  messages = [str(error) for error in found[1:5]]
  assert messages == ["a/1: its image, in column 'image', is missing.", "a/2: its image, in column 'image', is missing."] + [
    f"a/{i}: none of captions holds a caption." for i in (3, 4)
  ]


def test_texts_that_are_no_texts(tmp_path):
  text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"\xffok"))
  bad, good = records_of(write(tmp_path / "a", {"image": [b"i", b"j"], "text": text}))
  assert str(bad) == "a/0: a caption is not UTF-8."
  assert good.captions == ["ok"]


# Opening.


@pytest.mark.parametrize(
  ("columns", "options", "message"),
  [
    ({"url": ["u"], "caption": ["c"]}, {}, r"has no image column.*holds links \(url\) in place of images: download them with img2dataset first"),
    ({"URL": ["u"], "TEXT": ["c"]}, {}, r"holds links \(URL\)"),
    ({"photo": [b"i"], "caption": ["c"]}, {}, "has no image column: image or jpg .* name it with data.image"),
    ({"image": ["a.jpg"], "caption": ["c"]}, {}, "has no image column"),
    ({"image": [b"i"], "caption": ["c"]}, {"image": "imgae"}, "has no image column 'imgae'. Did you mean image?"),
    ({"image": [b"i"], "title": ["c"]}, {}, "has no caption column: .* Name one with data.captions: title"),
    ({"image": [b"i"], "caption": [5]}, {}, "has no caption column: .*there is none of texts"),
    ({"image": [b"i"], "caption": ["c"]}, {"captions": (("captoin", 1.0),)}, "no caption column 'captoin'. Did you mean caption?"),
    ({"image": [b"i"], "caption": ["c"]}, {"captions": (("q", 1.0),)}, "no caption column 'q'. There are: caption."),
  ],
)
def test_columns_that_are_not_there(tmp_path, columns, options, message):
  path = write(tmp_path / "a.parquet", columns)
  with pytest.raises(DataError, match=f"a.parquet.*{message}"):
    ParquetSource(path, Options(**options))


def test_files_with_other_columns(tmp_path):
  write(tmp_path / "0.parquet", {"image": [b"i"], "caption": ["c"]})
  write(tmp_path / "1.parquet", {"image": [b"i"], "text": ["c"]})
  with pytest.raises(DataError, match="1.parquet has other columns than .*0.parquet"):
    ParquetSource(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-1], lambda c: c[: len(c) // 2], lambda c: bytes(len(c)), lambda c: b"x" * 3])
def test_a_file_that_is_none(tmp_path, damage):
  path = tmp_path / "a.parquet"
  shard(path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(DataError, match="a.parquet is no parquet file, or is cut off"):
    ParquetSource(str(path))


def test_a_row_group_that_is_damaged(tmp_path):
  path = tmp_path / "a.parquet"
  shard(path, 30, compression="zstd")
  column = pq.ParquetFile(path).metadata.row_group(1).column(0)
  whole = bytearray(path.read_bytes())
  start = column.dictionary_page_offset or column.data_page_offset
  whole[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
  path.write_bytes(whole)
  found = records_of(path)
  assert [isinstance(record, Record) for record in found] == [True] * 10 + [False] * 10 + [True] * 10
  assert str(found[10]).startswith("a.parquet/10: row group 1 cannot be read (")


def test_the_index_is_kept(tmp_path, monkeypatch):
  for n in range(3):
    shard(tmp_path / f"{n}.parquet", 25, 25 * n)
  pattern = str(tmp_path / "*.parquet")
  first = ParquetSource(pattern)
  monkeypatch.setattr(ParquetSource, "_rows", None)
  again = ParquetSource(pattern)
  assert again.fetch(range(75)) == first.fetch(range(75))
  assert again.fingerprint == first.fingerprint
  monkeypatch.undo()


def test_fingerprints(tmp_path):
  path = shard(tmp_path / "a.parquet")
  before = ParquetSource(path).fingerprint
  assert ParquetSource(path, Options(captions=(("caption", 1.0),))).fingerprint != before
  shard(tmp_path / "a.parquet", 26)
  assert ParquetSource(path).fingerprint != before


def test_progress_and_a_warning(tmp_path, monkeypatch):
  monkeypatch.setattr(opening, "LOG_SECONDS", 0)
  monkeypatch.setattr(parquet, "LARGE_GROUP", 0)
  shard(tmp_path / "0.parquet")
  shard(tmp_path / "1.parquet")
  lines = []
  ParquetSource(str(tmp_path / "*.parquet"), Options(log=lines.append))
  assert lines[:2] == ["footers: 1 of 2 files", "footers: 2 of 2 files"]
  assert "row groups of 0 MiB" in lines[2]


# Row groups.


class Counting(Storage):
  """Counts the files that are opened, and fails when told to."""

  def __init__(self):
    super().__init__()
    self.opened, self.fail, self._lock = 0, False, threading.Lock()

  def open(self, path):
    with self._lock:
      self.opened += 1
    return super().open(path)

  def read(self, *arguments):
    if self.fail:
      raise StorageError("away")
    return super().read(*arguments)


def test_a_row_group_is_read_once(tmp_path):
  storage = Counting()
  source = ParquetSource(shard(tmp_path / "a.parquet", 40), Options(storage=storage))
  storage.opened = 0
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    list(executor.map(source.__getitem__, [*range(40)] * 4))
  assert storage.opened == 4


def test_row_groups_are_dropped_past_the_limit(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet, "DECODED_BYTES", 1)
  storage = Counting()
  source = ParquetSource(shard(tmp_path / "a.parquet", 40), Options(storage=storage))
  storage.opened = 0
  for i in (0, 9, 10, 19, 0):
    assert source[i] == expected(i, "a.parquet", i)
  assert storage.opened == 3
  assert source.fetch(range(40)) == [expected(i, "a.parquet", i) for i in range(40)]


def test_a_store_that_does_not_answer(tmp_path):
  storage = Counting()
  source = ParquetSource(shard(tmp_path / "a.parquet", 40), Options(storage=storage))
  storage.fail = True
  for indices in ([3], range(40), [3]):
    with pytest.raises(StorageError, match="away"):
      source.fetch(indices)
  with pytest.raises(StorageError, match="away"):
    ParquetSource(str(tmp_path / "a.parquet"), Options(storage=storage))
  storage.fail = False
  assert source[3] == expected(3, "a.parquet", 3)


def test_eight_threads_read_what_one_reads(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet, "DECODED_BYTES", 20_000)
  source = ParquetSource(shard(tmp_path / "a.parquet", 200))
  orders = [random.Random(seed).sample(range(200), 60) for seed in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    for order, found in zip(orders, executor.map(source.fetch, orders), strict=True):
      assert found == [expected(i, "a.parquet", i) for i in order]


def test_from_a_bucket(tmp_path, s3):
  for n in range(3):
    shard(tmp_path / f"{n}.parquet", 25, 25 * n)
  url = s3.put_folder(tmp_path, "parquet")
  assert records_of(f"{url}/*.parquet") == records_of(tmp_path / "*.parquet")
