"""ArrayRecord: what the package array_record wrote is read the same, and every way in which a file can be damaged."""

import concurrent.futures
import os
import random
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from clip_jax.data.sources import opening, riegeli
from clip_jax.data.sources.array_record import ArrayRecordSource, Shards, example
from clip_jax.data.sources.protocol import Options, Record
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError, UsageError

COMPRESSIONS = ["", "uncompressed", "zstd:1", "brotli:1", "snappy"]
OPTIONS = [f"group_size:{n},{c}".rstrip(",") for n in (1, 2, 7) for c in COMPRESSIONS]
OPTIONS += ["", "group_size:1,pad_to_block_boundary:true", "group_size:3,uncompressed,pad_to_block_boundary:true"]


def write(path, records, options="group_size:1"):
  writer = ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()
  return str(path)


def content(size, seed):
  """Half noise, half zeros, so that compression does something, and finds something that it cannot do."""
  return random.Random(seed).randbytes(size // 2) + bytes(size - size // 2)


def shard(path, count=5, start=0, options="group_size:1", **more):
  return write(path, [example(f"image {i}".encode(), [f"caption {i}"], i, **more) for i in range(start, start + count)], options)


def raw(path, **options):
  """All records of a file as bytes."""
  shards = Shards([str(path)], Options(**options))
  return shards.read(range(len(shards)))


# The file format, against the package that defines it.


@pytest.mark.parametrize("options", OPTIONS)
def test_records_of_every_kind(tmp_path, options):
  sizes = [0, 1, 100, 0, 65_536 - 24, 65_536, 65_537, 3, 200_000, 1_300_000, 0]
  records = [content(size, seed) for seed, size in enumerate(sizes)]
  path = write(tmp_path / "a.array_record", records, options)
  assert raw(path) == records
  with ArrayRecordDataSource(path) as theirs:
    assert list(theirs) == records


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 300_000), st.integers(65_400, 65_600)), max_size=30),
  options=st.sampled_from(OPTIONS),
  order=st.randoms(use_true_random=False),
)
def test_records_of_any_sizes_in_any_order(tmp_path, sizes, options, order):
  records = [content(size, seed) for seed, size in enumerate(sizes)]
  path = write(tmp_path / "a.array_record", records, options)
  indices = [order.randrange(len(records)) for _ in records]
  assert Shards([path], Options()).read(indices) == [records[i] for i in indices]
  os.remove(path)


@given(st.integers(0, 400_000), st.integers(0, 400_000))
def test_block_headers_are_taken_out(at, size):
  """A byte is of a header if it is among the first 24 of a block of the file."""
  assume(not 0 < at % 65_536 <= 24)  # where no chunk begins
  places = np.arange(at, at + size)
  plain = (places % 251).astype(np.uint8)
  kept = plain[places % 65_536 >= 24]
  assert bytes(riegeli._strip(plain.tobytes(), at)) == kept.tobytes()


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_numbers_of_variable_length(numbers):
  encoded = bytearray()
  for number in numbers:
    while number > 127:
      encoded.append(number & 127 | 128)
      number >>= 7
    encoded.append(number)
  assert riegeli.varints(bytes(encoded)).tolist() == numbers


@pytest.mark.parametrize("group", [1, 4])
def test_many_records_in_several_shards(tmp_path, group):
  counts = [300, 1, 0, 57]
  records = [[b"%d of %d" % (i, n) for i in range(count)] for n, count in enumerate(counts)]
  paths = [write(tmp_path / f"{n}", some, f"group_size:{group}") for n, some in enumerate(records)]
  shards = Shards(paths, Options())
  assert shards.ends.tolist() == [300, 301, 301, 358]
  assert shards.read(range(358)) == sum(records, [])
  assert [shards.key(i) for i in (0, 299, 300, 301, 357)] == ["0/0", "0/299", "1/0", "3/0", "3/56"]


def test_transposed_records_are_refused(tmp_path):
  path = write(tmp_path / "a", [b"x"] * 4, "group_size:2,transpose:true")
  with pytest.raises(UsageError, match="a: its records are transposed.*without the option 'transpose'"):
    raw(path)
  with pytest.raises(DataError, match="transposed"):
    riegeli.decode(Path(path).read_bytes()[64:], 64)


# What a record is.


def test_a_record_is_an_example(tmp_path):
  more = {"key": "k", "score": 0.5, "scores": [0.5, 1.0], "numbers": [1, 2], "nothing": None}
  path = write(tmp_path / "a.array_record", [example(b"image", ["one", "zwei – 二"], 3, **more), example(b"i", "text")])
  source = ArrayRecordSource(path)
  assert source[0] == Record(b"image", ["one", "zwei – 二"], "a.array_record/k", 3)
  assert source[1] == Record(b"i", ["text"], "a.array_record/1")
  assert [source.key(i) for i in (0, 1)] == ["a.array_record/0", "a.array_record/1"]


def test_an_example_is_a_function_of_its_arguments():
  """The same bytes, in whatever order the features are given; the wire format is TensorFlow's."""
  first, second = example(b"i", ["c"], 1, a="x", b=2), example(b"i", ["c"], 1, b=2, a="x")
  assert first == second
  expected = b"\n\x22\n\x10\n\x07caption\x12\x05\n\x03\n\x01c\n\x0e\n\x05image\x12\x05\n\x03\n\x01i"
  assert example(b"i", "c") == expected


@pytest.mark.parametrize("image", opening.IMAGES)
@pytest.mark.parametrize("caption", opening.CAPTIONS)
def test_usual_names(tmp_path, image, caption):
  more = {image: b"pixels", caption: ["words"]}
  path = write(tmp_path / "a", [example(more.pop("image", None), more.pop("caption", []), **more)])
  assert ArrayRecordSource(path)[0] == Record(b"pixels", ["words"], "a/0")


def test_names_that_are_asked_for(tmp_path):
  path = write(tmp_path / "a", [example(b"i", "c", other=b"o", short="s", long=["l", "m"])])
  options = Options(captions=(("short", 0.5), ("long", 1.0)), image="other")
  assert ArrayRecordSource(path, options)[0] == Record(b"o", ["s", "l", "m"], "a/0", None, (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
  ("record", "options", "message"),
  [
    (example(None, "c", photo=b"x"), {}, "a/0: no feature image or jpg .* holds an image. There are: caption, photo"),
    (example(b"i", "c"), {"image": "imag"}, "a/0: no feature imag holds an image. Did you mean image?"),
    (example(b"i", []), {}, "a/0: none of caption, captions, text, txt holds a caption"),
    (example(b"i", "  "), {}, "a/0: none of caption"),
    (example(b"i", "c"), {"captions": (("texd", 1.0),)}, "a/0: none of texd holds a caption"),
    (example(b"i", 5), {}, "a/0: 'caption' is neither a text nor a list of texts"),
    (b"\xff\xff\xff", {}, "a/0 is no tf.train.Example"),
    (b"", {}, "a/0: no feature"),
  ],
)
def test_a_record_that_cannot_be_used(tmp_path, record, options, message):
  source = ArrayRecordSource(write(tmp_path / "a", [record, example(b"i", "c", texd="t", imag=b"j")]), Options(**options))
  bad, good = source.fetch([0, 1])
  assert isinstance(bad, DataError)
  with pytest.raises(DataError, match=message):
    source[0]
  assert isinstance(good, Record)


# Opening.


def test_indices_outside(tmp_path):
  source = ArrayRecordSource(shard(tmp_path / "a"))
  for index in (-1, 5):
    with pytest.raises(IndexError):
      source[index]
    with pytest.raises(IndexError):
      source.key(index)


def test_the_index_is_kept(tmp_path, cache, monkeypatch):
  path = shard(tmp_path / "a.array_record")
  first = ArrayRecordSource(path)
  (kept,) = (cache / "index").iterdir()
  assert kept.stat().st_size == 8 * (3 + 5 + 1)
  monkeypatch.setattr(riegeli, "chunks", None)
  again = ArrayRecordSource(path)
  assert again.fetch(range(5)) == first.fetch(range(5))
  assert again.fingerprint == first.fingerprint
  kept.write_bytes(b"123")  # damaged: made anew
  monkeypatch.undo()
  monkeypatch.setenv("CLIP_JAX_CACHE", str(cache))
  assert len(ArrayRecordSource(path)) == 5


def test_a_shard_that_changes_is_read_again(tmp_path):
  before = ArrayRecordSource(shard(tmp_path / "a", 5))
  after = ArrayRecordSource(shard(tmp_path / "a", 6))
  assert (len(before), len(after)) == (5, 6)
  assert before.fingerprint != after.fingerprint != ArrayRecordSource(str(tmp_path / "a"), Options(image="x")).fingerprint


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "file"))
  assert len(ArrayRecordSource(shard(tmp_path / "a"))) == 5


def test_progress(tmp_path, monkeypatch):
  monkeypatch.setattr(opening, "LOG_SECONDS", 0)
  lines = []
  for n in range(3):
    shard(tmp_path / f"{n}.array_record")
  ArrayRecordSource(str(tmp_path / "*.array_record"), Options(log=lines.append))
  assert lines == [f"index: {n} of 3 files" for n in (1, 2, 3)]


@pytest.mark.parametrize(
  "damage",
  [
    lambda content: b"",
    lambda content: content[:1000],
    lambda content: content[:-1],
    lambda content: content[:-65_536],
    lambda content: content + bytes(65_536),
    lambda content: bytes(len(content)),
    lambda content: random.Random(0).randbytes(len(content)),
    lambda content: content[:-65_536] + content[-65_536:].replace(b"\xfe\x84\xce", b"\xfe\x84\xcf"),
    lambda content: content[:-65_500] + b"\xff" * 65_500,
  ],
)
def test_a_file_that_is_none(tmp_path, damage):
  path = tmp_path / "a"
  shard(path)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(DataError, match="a is no ArrayRecord file, or is cut off"):
    ArrayRecordSource(str(path))


def test_any_damage_is_one_sentence(tmp_path):
  """Bytes turned over anywhere give the record, another one, or a DataError; nothing else."""
  path = tmp_path / "a"
  shard(path, 30, options="group_size:3")
  whole, chance = path.read_bytes(), random.Random(0)
  for _ in range(400):
    damaged = bytearray(whole)
    end = chance.choice([2500, 65_536 * 2 - 62_000, len(whole)])
    for _ in range(chance.randrange(1, 5)):
      damaged[chance.randrange(min(end, len(whole)))] = chance.randrange(256)
    damaged[-65_536 + 64 : -65_536 + 90] = bytes(chance.choice([damaged, whole])[-65_536 + 64 : -65_536 + 90])
    path.write_bytes(damaged)
    try:
      source = ArrayRecordSource(str(path))
      assert all(isinstance(record, Record | DataError) for record in source.fetch(range(len(source))))
    except DataError:
      pass


def test_nothing_to_read(tmp_path):
  with pytest.raises(DataError, match="no such file"):
    ArrayRecordSource(str(tmp_path / "*.array_record"))
  with pytest.raises(DataError, match="there is no record"):
    ArrayRecordSource(write(tmp_path / "a", []))


# Storage.


def test_a_store_that_does_not_answer(tmp_path):
  class Broken(Storage):
    def read_many(self, ranges):
      raise StorageError("away")

  path = shard(tmp_path / "a", options="group_size:2")
  ArrayRecordSource(path)
  source = ArrayRecordSource(path, Options(storage=Broken()))
  for _ in range(2):
    with pytest.raises(StorageError, match="away"):
      source.fetch([0, 3])


def test_a_shard_that_is_gone(tmp_path):
  source = ArrayRecordSource(shard(tmp_path / "a"))
  os.remove(tmp_path / "a")
  with pytest.raises(DataError, match="a/2: a at byte .*no such file"):
    source[2]


@pytest.mark.parametrize("group", [1, 3])
def test_from_a_bucket(tmp_path, s3, group):
  for n in range(3):
    shard(tmp_path / f"{n}.array_record", 20, 20 * n, f"group_size:{group}")
  url = s3.put_folder(tmp_path, f"array_record/{group}")
  here, there = ArrayRecordSource(str(tmp_path / "*")), ArrayRecordSource(f"{url}/*.array_record")
  assert there.fetch(range(60)) == here.fetch(range(60))
  with pytest.raises(DataError, match="no such file"):
    ArrayRecordSource(f"{url}/*.tar")


@pytest.mark.parametrize("options", ["group_size:1", "group_size:5", "group_size:5,snappy"])
def test_eight_threads_read_what_one_reads(tmp_path, options):
  source = ArrayRecordSource(shard(tmp_path / "a", 200, options=options))
  expected = source.fetch(range(200))
  again = ArrayRecordSource(str(tmp_path / "a"))
  orders = [random.Random(seed).sample(range(200), 200) for seed in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    for order, found in zip(orders, executor.map(again.fetch, orders), strict=True):
      assert found == [expected[i] for i in order]
