"""Training batches: the same numbers however they are split, started and loaded; and bad records.

`Painted` is a source in memory whose pictures say which record they are, so that a batch can be
read back without going through the code that made it.
"""

import collections
import gc
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import order, pipeline, sources
from clip_jax.data.dataset import Dataset
from clip_jax.data.pipeline import BadRecords, evaluation_pixels, train_batches
from clip_jax.data.sources import Record
from clip_jax.data.sources.protocol import RandomAccess
from clip_jax.errors import DataError, StorageError
from tests.conftest import tiny

EVERYTHING = dict(
  crop_scale=(0.3, 1.0), color_jitter=0.4, flip=0.5, rotation=15.0, other_captions=0.5
)


class Painted(RandomAccess):
  """Records of one plain colour each, which no crop changes; those in `bad` do not decode."""

  def __init__(self, length, *, bad=(), refused=(), textured=False, captions=1, delay=0.0):
    self.length, self.bad, self.refused = length, frozenset(bad), frozenset(refused)
    self.textured, self.captions, self.delay = textured, captions, delay
    self.reads = collections.Counter()
    self._lock = threading.Lock()
    self.fingerprint = "painted"

  def __len__(self):
    return self.length

  def fetch(self, indices):
    return [self._record(index) for index in indices]

  def _record(self, index):
    with self._lock:
      self.reads[index] += 1
    time.sleep(self.delay)
    if index in self.refused:
      return DataError(f"{self.key(index)}: its .json holds neither.")
    captions = [f"record {index} caption {i}" for i in range(self.captions)]
    return Record(self.encoded(index), captions, self.key(index))

  def key(self, index):
    return f"painted/{index}"

  def encoded(self, index):
    if index in self.bad:
      return b"not an image"
    if self.textured:
      pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    else:
      pixels = np.full((9, 9, 3), (index // 256, index % 256, 77), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def run_config(steps, batch=16, **data):
  return configs.resolve(tiny(train={"global_batch_size": batch, "steps": steps}, data=data))


def load(source, config, *, rows=None, start=0, bad_records=None):
  rows = np.arange(config.train.global_batch_size) if rows is None else rows
  return list(train_batches(Dataset({"": source}, config), config, rows=rows, start=start, bad_records=bad_records))


def indices(batches):
  """The records that plain batches show."""
  images = np.concatenate([batch["images"] for batch in batches]).astype(int)
  assert (images == images[:, :1, :1]).all()
  assert (images[..., 2] == 77).all()
  return (images[:, 0, 0, 0] * 256 + images[:, 0, 0, 1]).tolist()


def assert_same(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    assert a.keys() == b.keys() == {"images", "tokens"}
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)


# Which examples.


def test_a_batch_holds_what_the_config_asks_for():
  config = run_config(3, batch=16)
  batches = load(Painted(50), config)
  assert len(batches) == 3
  for batch in batches:
    assert batch["images"].shape == (16, 16, 16, 3)
    assert batch["images"].dtype == np.uint8
    assert batch["tokens"].shape == (16, 12)
    assert batch["tokens"].dtype == np.int32


@pytest.mark.parametrize(("length", "batch"), [(1, 4), (3, 4), (16, 16), (37, 16), (100, 8)])
def test_every_epoch_has_every_record_once(length, batch):
  steps = -(-3 * length // batch)
  seen = indices(
    load(
      Painted(length),
      run_config(steps, batch, **EVERYTHING | {"color_jitter": 0.0, "rotation": 0.0}),
    )
  )
  epochs = [seen[i * length : (i + 1) * length] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(length))
  if length > 10:
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_records_are_those_of_the_order():
  """Images and captions of the same record, in the order that order.py promises for the seed."""
  config = run_config(5, 16, seed=7)
  batches = load(Painted(37), config)
  want = order.examples(7, 37, np.arange(5 * 16)).tolist()
  assert indices(batches) == want
  tokens = np.concatenate([batch["tokens"] for batch in batches])
  captions = [f"record {i} caption 0" for i in want]
  np.testing.assert_array_equal(tokens, pipeline.tokenizer_for(config.model)(captions))


@pytest.mark.parametrize("seed", [1, 2**63 - 1])
def test_the_seed_changes_order_and_augmentation(seed):
  one, other = (
    load(Painted(64, textured=True), run_config(1, 64, seed=s, crop_scale=(0.3, 0.8)))
    for s in (0, seed)
  )
  assert (one[0]["tokens"] != other[0]["tokens"]).any()
  # Sorted by record, the pictures still differ: their crops are others.
  by_record = [batch[0]["images"][np.lexsort(batch[0]["tokens"].T)] for batch in (one, other)]
  assert np.mean((by_record[0] != by_record[1]).any(axis=(1, 2, 3))) > 0.95


def test_a_record_is_cropped_anew_in_each_epoch():
  batches = load(Painted(1, textured=True), run_config(4, 8, crop_scale=(0.3, 0.8)))
  pictures = {picture.tobytes() for batch in batches for picture in batch["images"]}
  assert len(pictures) == 32


# The same, however it is loaded.


@settings(max_examples=12, deadline=None)
@given(
  hosts=st.sampled_from([1, 2, 4]),
  shuffled=st.booleans(),
  batch=st.sampled_from([4, 12, 40, 96]),
  length=st.integers(1, 60),
  seed=st.integers(0, 2**63 - 1),
)
def test_any_split_over_hosts(hosts, shuffled, batch, length, seed):
  """Each host counts bad records by itself, and there are some: still the same global batch."""
  bad = {i for i in range(length) if i % 7 == 3}
  config = run_config(3, batch, seed=seed, max_bad_share=1.0, **EVERYTHING)
  source = Painted(length, bad=bad, textured=True, captions=3)
  want = load(source, config)
  rows = np.arange(batch)
  if shuffled:
    rows = np.random.default_rng(0).permutation(batch)
  parts = [load(source, config, rows=r) for r in np.split(rows, hosts)]
  back = np.argsort(rows)
  got = [
    {key: np.concatenate([part[step][key] for part in parts])[back] for key in want[0]}
    for step in range(3)
  ]
  assert_same(got, want)


@pytest.mark.parametrize("rows", [[5], [3, 4, 9], list(range(7)), list(range(2, 15))])
def test_any_number_of_rows(rows):
  config = run_config(2, 16, **EVERYTHING)
  source = Painted(30, textured=True)
  want = [{key: value[rows] for key, value in batch.items()} for batch in load(source, config)]
  assert_same(load(source, config, rows=np.array(rows)), want)


def test_started_at_any_step():
  config = run_config(6, 12, max_bad_share=1.0, **EVERYTHING)
  source = Painted(25, bad={4, 11}, textured=True, captions=2)
  want = load(source, config)
  for start in range(7):
    assert_same(load(source, config, start=start), want[start:])


@pytest.mark.parametrize(
  ("threads", "prefetch"), [(1, 1), (2, 1), (1, 7), (8, 3), (16, 16), (0, 4)]
)
def test_threads_and_prefetch_change_nothing(threads, prefetch):
  source = Painted(30, bad={7}, textured=True, captions=2)
  want = load(source, run_config(5, 64, max_bad_share=1.0, threads=1, prefetch=2, **EVERYTHING))
  config = run_config(5, 64, max_bad_share=1.0, threads=threads, prefetch=prefetch, **EVERYTHING)
  assert_same(load(source, config), want)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_bounds_what_is_loaded_ahead(prefetch):
  source = Painted(1000)
  config = run_config(12, 64, threads=4, prefetch=prefetch)
  batches = train_batches(Dataset({"": source}, config), config, rows=np.arange(64), start=0)
  for taken in range(1, 6):
    next(batches)
    deadline = time.monotonic() + 30
    while source.reads.total() < (taken + prefetch) * 64 and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)  # for what should not come
    # The batches taken and `prefetch` more, all of them.
    assert source.reads.total() == (taken + prefetch) * 64
  batches.close()


@pytest.mark.parametrize("why", ["dropped", "closed", "error"])
def test_who_stops_early_does_not_wait_for_what_is_queued(why):
  """A preempted process has seconds to save; it must not load the rest of its queue first.

  Nor must one that ends by an error, whose traceback still holds the iterator.
  """

  class Slow(Painted):
    def _record(self, index):
      if why == "error" and index == unlucky:
        raise StorageError("the disk is gone")
      return super()._record(index)

  unlucky = int(order.examples(0, 1000, 100))  # in the second batch
  source = Slow(1000, delay=0.005)
  config = run_config(50, 64, threads=2, prefetch=10)
  batches = train_batches(Dataset({"": source}, config), config, rows=np.arange(64), start=0)
  next(batches)
  if why == "dropped":
    del batches
    gc.collect()
  elif why == "closed":
    batches.close()
  else:
    with pytest.raises(StorageError) as caught:
      list(batches)
    assert caught.tb is not None
  at_stop = source.reads.total()
  time.sleep(0.5)
  # Each of two threads finishes the chunk of 32 that it has begun. Ten batches would be 640 reads.
  assert source.reads.total() - at_stop <= 64


def test_nothing_is_loaded_before_it_is_asked_for():
  source = Painted(10)
  config = run_config(4)
  batches = train_batches(Dataset({"": source}, config), config, rows=np.arange(16), start=0)
  assert source.reads.total() == 0
  next(batches)
  assert source.reads.total() > 0
  batches.close()


# Captions.


def captions_of(batches, config):
  """As (record, number of the caption); the tokenizer takes digits apart."""
  tokenizer = pipeline.tokenizer_for(config.model)
  texts = [tokenizer.decode(row).replace(" ", "") for batch in batches for row in batch["tokens"]]
  return [tuple(map(int, text.removeprefix("record").split("caption"))) for text in texts]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_other_captions(share):
  config = run_config(10, 64, other_captions=share)
  chosen = [number for _, number in captions_of(load(Painted(40, captions=4), config), config)]
  counts = np.bincount(chosen, minlength=4)
  if share == 0:
    assert counts.tolist() == [640, 0, 0, 0]
  elif share == 1:
    assert counts[0] == 0
  else:
    assert abs(counts[0] - 480) < 55  # five deviations of 11
  if share:
    # Among the others each as often: of n, n/3 with a deviation of at most 12.
    assert np.abs(counts[1:] - counts[1:].sum() / 3).max() < 60


def test_a_single_caption_is_taken_whatever_the_share():
  config = run_config(2, 32, other_captions=1.0)
  assert {number for _, number in captions_of(load(Painted(40), config), config)} == {0}


def test_the_caption_of_a_record_changes_between_epochs():
  config = run_config(40, 1, other_captions=0.5)
  assert len(set(captions_of(load(Painted(1, captions=2), config), config))) == 2


# Bad records.


def expected_indices(seed, length, positions, bad):
  """Who stands where: the order, and for a bad record its first substitute that is not bad."""
  found = []
  for wanted in order.examples(seed, length, positions).tolist():
    index, attempt = wanted, 0
    while index in bad:
      attempt += 1
      index = order.substitute(seed, length, wanted, attempt)
    found.append(index)
  return found


@pytest.mark.parametrize("bad", [{3}, {3, 8, 20}, set(range(0, 40, 2))])
@pytest.mark.parametrize("how", ["bad", "refused"])
def test_a_bad_record_is_replaced_by_its_substitute(bad, how):
  """Whether its image does not decode or the source cannot read it, and its caption with it."""
  config = run_config(10, 16, seed=5, max_bad_share=1.0)
  source = Painted(40, **{how: bad})
  counter = BadRecords(None, 1.0)
  batches = load(source, config, bad_records=counter)
  want = expected_indices(5, 40, np.arange(160), bad)
  assert indices(batches) == want
  assert captions_of(batches, config) == [(i, 0) for i in want]
  assert counter.tried == 160
  assert counter.bad == sum(source.reads[i] for i in bad)
  assert counter.bad >= 4 * len(bad)  # in each of four epochs


def test_bad_records_are_listed_once(tmp_path):
  """Over four epochs, and over two runs of which the first was killed while it wrote."""
  path = tmp_path / "bad_records.jsonl"
  config = run_config(10, 16, seed=5, max_bad_share=1.0, threads=4)
  bad = {3, 8, 20}
  load(Painted(40, bad=bad), config, bad_records=BadRecords(path, 1.0))
  first = path.read_text()
  lines = [json.loads(line) for line in first.splitlines()]
  assert sorted(line["index"] for line in lines) == sorted(bad)
  for line in lines:
    assert line["key"] == f"painted/{line['index']}"
    assert "not an i" in line["error"]
    assert line["substitute"] == order.substitute(5, 40, line["index"], 1)

  # The same again, now with one more that is bad.
  load(Painted(40, bad=bad | {30}), config, bad_records=BadRecords(path, 1.0))
  assert path.read_text().startswith(first)
  added = path.read_text()[len(first) :].splitlines()
  assert [json.loads(line)["index"] for line in added] == [30]


@pytest.mark.parametrize("left", ['{"index": 8, "key": "pai', '{"index": 8', "{", '"', "8"])
def test_what_a_killed_run_was_writing_spoils_nothing(tmp_path, left):
  path = tmp_path / "bad_records.jsonl"
  path.write_text('{"index": 3, "key": "painted/3", "error": "e", "substitute": 1}\n' + left)
  for _ in range(3):  # opened again and again: no line may be glued to another
    counter = BadRecords(path, 1.0)
    for index in (3, 8, 9):
      counter.report({"index": index}, f"painted/{index}", ValueError("ünreadable"), index + 1)
  lines = path.read_text(encoding="utf-8").splitlines()
  assert lines[1] == left
  whole = [json.loads(line) for line in lines[:1] + lines[2:]]
  assert [line["index"] for line in whole] == [3, 8, 9]
  assert whole[1] == {"index": 8, "key": "painted/8", "error": "ünreadable", "substitute": 9}


def test_bad_records_from_many_threads(tmp_path):
  path = tmp_path / "bad_records.jsonl"
  counter = BadRecords(path, 1.0)
  start = threading.Barrier(8)

  def work():
    start.wait()
    for index in range(100):
      counter.count(2)
      counter.report({"index": index}, "key " * 50, ValueError("bad"), 0)

  threads = [threading.Thread(target=work) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (counter.tried, counter.bad) == (1600, 800)
  assert sorted(json.loads(line)["index"] for line in path.read_text().splitlines()) == list(
    range(100)
  )


def test_the_share_is_judged_once_it_means_something():
  """19 of 200 are under a tenth; 21 are over it; before 200 nothing is said."""
  early = BadRecords(None, 0.1)
  early.count(199)
  for index in range(199):
    early.report({"index": index}, "key", "error", 0)
  assert early.bad == 199

  counter = BadRecords(None, 0.1)
  counter.count(200)
  for index in range(20):
    counter.report({"index": index}, "key", "error", 0)
  with pytest.raises(DataError, match="21 of 200 records could not be read"):
    counter.report({"index": 20}, "key", "error", 0)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("listed", [True, False])
def test_too_many_bad_records_stop_the_run(tmp_path, threads, listed):
  path = tmp_path / "bad_records.jsonl" if listed else None
  config = run_config(40, 32, threads=threads, max_bad_share=0.05)
  source = Painted(1000, bad=range(0, 1000, 10))
  batches = train_batches(
    Dataset({"": source}, config), config, rows=np.arange(32), start=0, bad_records=BadRecords(path, 0.05)
  )
  with pytest.raises(DataError) as caught:
    for _ in batches:
      pass
  message = str(caught.value)
  assert type(caught.value) is DataError
  assert "records could not be read, more than data.max_bad_share=0.05 allows" in message
  assert "the last was painted/" in message
  if listed:
    assert f"They are listed in {path}." in message
    assert len(path.read_text().splitlines()) >= 11
  else:
    assert "listed" not in message
  # It is over, not stuck: whoever asks again is told so at once.
  assert list(batches) == []


def test_few_bad_records_do_not_stop_the_run():
  config = run_config(40, 32, max_bad_share=0.05)
  assert len(load(Painted(1000, bad=range(0, 1000, 40)), config)) == 40


def test_nothing_but_bad_records():
  source = Painted(50, bad=range(50))
  with pytest.raises(DataError, match=r"painted/\d+: neither it nor 100 substitutes could be read"):
    load(source, run_config(1, 1, max_bad_share=1.0))
  assert source.reads.total() == 101


def test_the_default_counts_by_the_config():
  with pytest.raises(DataError, match="data.max_bad_share=0 allows"):
    load(Painted(1000, bad={1, 2, 3, 4, 5}), run_config(40, 32, max_bad_share=0.0))


def test_an_error_that_is_no_bad_record_arrives_as_it_is():
  class Broken(Painted):
    def fetch(self, indices):
      raise PermissionError("the disk is gone")

  with pytest.raises(PermissionError, match="the disk is gone"):
    load(Broken(10), run_config(2))


# From a shard.


def test_from_tar_shards(tmp_path):
  """The whole way: two shards on disk, one damaged picture, one damaged caption."""
  painted = Painted(40, bad={5})
  for n, part in enumerate([range(25), range(25, 40)]):
    with tarfile.open(tmp_path / f"{n:05}.tar", "w") as tar:
      for i in part:
        about = b"{}" if i == 30 else json.dumps({"caption": f"record {i} caption 0"}).encode()
        for extension, content in {"png": painted.encoded(i), "json": about}.items():
          member = tarfile.TarInfo(f"{i:08}.{extension}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
  source = sources.create("tar", f"{tmp_path}/{{00000..00001}}.tar")
  config = run_config(10, 16, seed=5, max_bad_share=1.0)
  path = tmp_path / "bad_records.jsonl"
  batches = load(source, config, bad_records=BadRecords(path, 1.0))
  want = expected_indices(5, 40, np.arange(160), {5, 30})
  assert indices(batches) == want
  assert captions_of(batches, config) == [(i, 0) for i in want]
  listed = {line["index"]: line for line in map(json.loads, path.read_text().splitlines())}
  assert listed.keys() == {5, 30}
  assert listed[5]["key"] == "00000.tar/00000005.png"
  assert "neither 'caption' nor 'captions'" in listed[30]["error"]


# Held-out sets.


def test_evaluation_pixels_are_those_of_the_evaluation_transform():
  pixels = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "png")
  got = evaluation_pixels(Record(buffer.getvalue(), ["a"], "key"), 16, "shortest")
  resized = Image.fromarray(pixels).resize((16 * 47 // 31, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(got, np.asarray(resized.crop((4, 0, 20, 16))))


@pytest.mark.parametrize("image", [b"", b"not an image"])
def test_a_held_out_set_must_be_whole(image):
  with pytest.raises(DataError, match=r"00000\.tar/7\.jpg: .*; a held-out set must be whole\."):
    evaluation_pixels(Record(image, ["a"], "00000.tar/7.jpg"), 16, "shortest")


# No JAX.


def test_batches_are_loaded_without_jax(tmp_path):
  """Grain imports JAX where it finds it, so the test is that all works where there is none.

  Also that our own modules of this room do not ask for it.
  """
  program = textwrap.dedent("""
    import sys

    class NoJax:
      asked = set()

      def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax"):
          caller = sys._getframe(1)
          while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
          self.asked.add(caller.f_globals.get("__name__", ""))
          raise ImportError(name)

    sys.meta_path.insert(0, NoJax())
    import numpy as np
    from clip_jax import config
    from clip_jax.data import dataset, emoji, pipeline
    run = config.resolve({
      "model": {"name": "ViT-B-32"},
      "data": {"threads": 2, "path": sys.argv[1]},
      "train": {"global_batch_size": 4, "steps": 2},
    })
    batches = pipeline.train_batches(dataset.create(run), run, rows=np.arange(4), start=0)
    shapes = [batch["images"].shape for batch in batches]
    print(shapes == [(4, 224, 224, 3)] * 2, "jax" in sys.modules)
    print(sorted(name for name in NoJax.asked if name.startswith("clip_jax")))
  """)
  painted = Painted(5)
  with tarfile.open(tmp_path / "a.tar", "w") as tar:
    for i in range(5):
      for extension, content in {"png": painted.encoded(i), "txt": b"words"}.items():
        member = tarfile.TarInfo(f"{i}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path / "a.tar")],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "CLIP_JAX_CACHE": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n")[:2] == ["True False", "[]"]


def report(counter, *indices):
  for index in indices:
    counter.report({"index": index}, f"painted/{index}", ValueError("unreadable"), index + 1)


def listed(path):
  return [json.loads(line)["index"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_list_of_bad_records_that_cannot_be_written_stops_nothing(tmp_path, capsys):
  """It is written once that is possible again: each record once, in order."""
  path = tmp_path / "bad_records.jsonl"
  counter = BadRecords(path, 0.04)
  path.symlink_to("/dev/full")
  counter.count(200)
  report(counter, 3, 4, 3)
  assert counter.bad == 3
  said = [line for line in capsys.readouterr().err.splitlines() if line]
  assert said == [f"{path} cannot be written (No space left on device); what it lacks is kept in memory."]
  report(counter, 5, 6, 7, 8, 9)
  with pytest.raises(DataError) as caught:
    report(counter, 10)
  assert "9 of 200 records could not be read" in str(caught.value) and "listed" not in str(caught.value)
  path.unlink()
  with pytest.raises(DataError, match="They are listed in"):
    report(counter, 11)
  assert listed(path) == [3, 4, 5, 6, 7, 8, 9, 10, 11]
  assert capsys.readouterr().err == ""


def test_a_training_run_goes_on_where_bad_records_cannot_be_listed(tmp_path, capsys):
  path = tmp_path / "nowhere" / "bad_records.jsonl"
  config = run_config(10, 16, seed=5, max_bad_share=1.0, threads=4)
  batches = load(Painted(40, bad={3, 8, 20}), config, bad_records=BadRecords(path, 1.0))
  assert indices(batches) == expected_indices(5, 40, np.arange(160), {3, 8, 20})
  assert capsys.readouterr().err.count("cannot be written (No such file or directory)") == 1


@pytest.mark.parametrize("torn", ["", '{"index": 1, "ke'])
def test_a_full_disk_leaves_no_part_of_a_bad_records_line(tmp_path, torn):
  """Whatever is left of the disk; a part that a kill has left stays a line of its own."""
  program = """
    import json, resource, sys
    from pathlib import Path
    from clip_jax.data.pipeline import BadRecords

    for room in range(120):
      path = Path(sys.argv[1], f"{room}.jsonl")
      path.write_text(sys.argv[2])
      counter = BadRecords(path, 1.0)
      resource.setrlimit(resource.RLIMIT_FSIZE, (len(sys.argv[2]) + room, resource.RLIM_INFINITY))
      for index in range(3):
        counter.report({"index": index}, "painted", ValueError("unreadable"), 0)
      kept = path.read_text().removeprefix(sys.argv[2])
      assert not kept or kept.endswith("}\\n"), kept
      resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
      counter.report({"index": 3}, "painted", ValueError("unreadable"), 0)
      lines = path.read_text().removeprefix(sys.argv[2]).splitlines()
      assert [json.loads(line)["index"] for line in lines if line] == [0, 1, 2, 3], lines
      assert (lines[0] == "") == bool(sys.argv[2])
  """
  done = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), torn], capture_output=True, text=True, timeout=120, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("cannot be written (File too large)") == 120


def test_a_bad_record_whose_name_is_no_text_is_listed(tmp_path):
  counter = BadRecords(tmp_path / "bad_records.jsonl", 1.0)
  counter.report({"index": 1}, "half \ud83d", ValueError("\udcff"), 2)
  (line,) = (tmp_path / "bad_records.jsonl").read_text(encoding="utf-8").splitlines()
  assert json.loads(line)["key"] == "half \ud83d"
