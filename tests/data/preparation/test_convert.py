"""Whole preparations on Beam's direct runner: real files, real processes, real kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clip_jax.data import images, sources
from clip_jax.data.preparation import Settings, convert
from clip_jax.data.sources.protocol import Options
from clip_jax.errors import MissingExtraError, StorageError, UsageError
from tests.data import buckets
from tests.data.preparation import pictures

pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install 'clip_jax[beam]'")

TWO = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]


def write_inputs(folder, count=60, shards=3):
  """Records that all pass."""
  for n in range(shards):
    numbers = range(n * count // shards, (n + 1) * count // shards)
    some = [pictures.members(pictures.jpeg(i), f"caption {i}", similarity=i / count, url=f"http://x/{i}") for i in numbers]
    pictures.write_tar(folder / f"{n:05}.tar", some, numbers[0])
  return f"{folder}/*.tar"


def prepared(pattern, out, options=(), **settings):
  """What is in a set that is prepared now."""
  info = convert(str(pattern), str(out), Settings(**settings), options, log=lambda _: None)
  assert info == json.loads(Path(out, "dataset_info.json").read_text())
  assert info["input"]["records"] - sum(info["dropped"].values()) == info["records"]
  return info, read(out, info)


def read(out, info):
  source = sources.create("auto", f"{out}/{info['path']}", Options(extra=True))
  assert len(source) == info["records"]
  return list(source)


def captions(records):
  return sorted(record.captions[0] for record in records)


# What comes out.


@pytest.mark.parametrize("form", ["array_record", "tar"])
def test_tars(tmp_path, form):
  pattern = write_inputs(tmp_path / "in")
  info, found = prepared(pattern, tmp_path / "out", format=form, shard_size=60_000, name="train")
  assert captions(found) == sorted(f"caption {i}" for i in range(60))
  for record in found:
    number = int(record.captions[0].split()[1])
    assert record.image == pictures.jpeg(number)  # byte for byte
    more = json.loads(record.extra["json"]) if form == "array_record" else record.extra
    assert more["url"] == f"http://x/{number}" and more["similarity"] == number / 60
    assert record.extra["key"] == f"{number // 20:05}.tar/{number:06}.jpg"
    assert (record.extra["width"], record.extra["height"]) == (96, 80)
  order = [record.captions[0] for record in found]
  assert order != captions(found)  # shuffled
  assert len(info["shards"]) > 2
  names = [f"{n:05}.tar" if form == "tar" else f"train-{n:05}-of-{len(info['shards']):05}.array_record" for n in range(len(info["shards"]))]
  assert [shard["name"] for shard in info["shards"]] == names
  for shard in info["shards"]:
    assert (tmp_path / "out" / shard["name"]).stat().st_size == shard["bytes"]
  there = [path.name for path in (tmp_path / "out").iterdir() if not path.name.endswith(".index.npz")]  # which reading has left
  assert sorted(there) == sorted(["dataset_info.json", "manifest", *names])
  assert info["versions"]["apache-beam"] and info["settings"]["shard_size"] == 60_000


def test_parquet_with_labels_and_sizes(tmp_path):
  for n in range(2):
    rows = [
      {"image": {"bytes": pictures.encoded(pictures.picture(i), "png"), "path": None}, "text": [f"caption {i}", f"other {i}"],
       "label": i, "language": "en" if i % 2 else "fr", "clip_score": 0.5}
      for i in range(20 * n, 20 * n + 20)
    ]  # fmt: skip
    pictures.write_parquet(tmp_path / "in" / f"{n}.parquet", rows)
  info, found = prepared(
    tmp_path / "in" / "*.parquet", tmp_path / "out", max_size=40, languages=("en",), min_score=0.4, range_records=10, shard_size=20_000
  )
  assert info["dropped"] == {"language": 20}
  assert sorted(record.label for record in found) == list(range(1, 40, 2))
  for record in found:
    assert record.captions == [f"caption {record.label}", f"other {record.label}"]
    assert images.header_size(record.image) == (48, 40)
    more = json.loads(record.extra["json"])
    assert more == {"clip_score": 0.5, "language": "en", "original_width": 96, "original_height": 80}
    assert record.extra["key"] == f"{record.label // 20}.parquet/{record.label % 20}"
  assert not (tmp_path / "out" / "work").exists()


def test_a_set_that_was_prepared_can_be_prepared_again(tmp_path):
  first, once = prepared(write_inputs(tmp_path / "in"), tmp_path / "a", max_size=60)
  _, twice = prepared(f"{tmp_path}/a/{first['path']}", tmp_path / "b", format="tar", min_score=0.5, max_size=60)
  expected = {record.image: json.loads(record.extra["json"]) for record in once}
  assert len(twice) == 30
  for record in twice:
    more = expected[record.image]
    assert {name: record.extra[name] for name in more} == more and more["original_width"] == 96


def test_every_filter_counts(tmp_path):
  bomb = bytearray(pictures.encoded(pictures.picture(0), "png"))
  bomb[16:24] = (40_000).to_bytes(4, "big") * 2
  records = [
    pictures.members(pictures.jpeg(1), "kept", similarity=0.5, language="en"),
    pictures.members(pictures.jpeg(2), "kept without tags"),
    pictures.members(b"\xff\xd8 no image", "broken"),
    pictures.members(bytes(bomb), "bomb", "png"),
    pictures.members(pictures.jpeg(3, width=20, height=20), "small"),
    pictures.members(pictures.jpeg(4, width=400, height=80), "wide picture"),
    pictures.members(pictures.jpeg(5), "s"),
    pictures.members(pictures.jpeg(6), "long " * 20),
    pictures.members(pictures.jpeg(7), "word " * 400_000),
    pictures.members(pictures.jpeg(8), "low", similarity=0.1, language="en"),
    pictures.members(pictures.jpeg(9), "autre", similarity=0.5, language="fr"),
    ("../../escaped", pictures.members(pictures.jpeg(10), "leads out")),
    pictures.members(pictures.jpeg(11), "   "),
    pictures.members(pictures.jpeg(1), "kept", similarity=0.5),
    pictures.members(pictures.jpeg(1, 30), "near"),
    pictures.members(pictures.jpeg(12), "of the test set"),
  ]
  pictures.write_tar(tmp_path / "in" / "0.tar", records)
  pictures.write_tar(tmp_path / "in" / "1.tar", [])
  (tmp_path / "test").mkdir()
  (tmp_path / "test" / "a.jpg").write_bytes(pictures.jpeg(12))
  info, found = prepared(
    tmp_path / "in" / "*.tar", tmp_path / "out", exclude=(str(tmp_path / "test"),),
    min_size=32, max_aspect=3, min_caption=3, max_caption=50, languages=("en",), min_score=0.3, range_records=3,
  )  # fmt: skip
  assert captions(found) == ["kept", "kept without tags"]
  assert info["dropped"] == {
    "undecodable": 1, "too_many_pixels": 1, "min_size": 1, "max_aspect": 1, "min_caption": 1, "max_caption": 1,
    "caption_too_long_to_read": 1, "min_score": 1, "language": 1, "hostile_name": 1, "no_caption": 1,
    "duplicate": 1, "near_duplicate": 1, "contamination": 1,
  }  # fmt: skip
  assert info["untagged"] == {"language": 4, "score": 3}
  assert info["excluded_images"] == {"images": 1, "unreadable": 0}


# Copies.


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
  """A shard with copies of several kinds, and pictures that are none."""
  image = pictures.picture(0, 192, 160)
  near = [pictures.encoded(image, quality=30), pictures.encoded(image[:-2, 2:]), pictures.jpeg(0, width=192, height=160, quality=60)]
  records = [pictures.members(pictures.jpeg(i), f"other {i}") for i in range(1, 40)]
  for caption in ("first", "first", "second", "third"):
    records.append(pictures.members(pictures.encoded(image, "png"), caption, "png"))
  records += [pictures.members(one, f"near {i}") for i, one in enumerate(near)]
  records.append(pictures.members(pictures.encoded(pictures.picture(0, 320, 266)), "larger"))
  records += [pictures.members(pictures.encoded(np.full((64, 64, 3), value, np.uint8)), f"plain {value}") for value in (0, 90, 255)]
  folder = tmp_path_factory.mktemp("copies")
  pictures.write_tar(folder / "0.tar", records[::2])
  pictures.write_tar(folder / "1.tar", records[1::2])
  return f"{folder}/*.tar"


OTHERS = sorted([f"other {i}" for i in range(1, 40)] + [f"plain {value}" for value in (0, 90, 255)])


@pytest.mark.parametrize(
  ("mode", "kept", "dropped"),
  [
    ("merge", [["first", "second", "third"]], {"duplicate": 1, "merged": 2}),
    ("first", [["first"]], {"duplicate": 3}),
    ("separate", [["first"], ["second"], ["third"]], {"duplicate": 1}),
  ],
)
def test_the_same_pixels(copies, tmp_path, mode, kept, dropped):
  info, found = prepared(copies, tmp_path / "out", same_image=mode, near_distance=None, range_records=5)
  texts = [sorted(record.captions) for record in found]
  assert [text for text in texts if text[0] in ("first", "second", "third")] and info["dropped"] == dropped
  assert sorted(text for text in texts if not text[0].startswith(("other", "plain", "near", "larger"))) == kept
  assert len(found) == len(kept) + len(OTHERS) + 4


def test_the_same_looks(copies, tmp_path):
  """The largest stays; no other picture goes, and plain ones are not compared."""
  info, found = prepared(copies, tmp_path / "out", range_records=7)
  assert captions(found) == sorted([*OTHERS, "larger"])
  assert info["dropped"] == {"duplicate": 1, "near_duplicate": 6}


def test_images_of_test_sets_are_kept_out(copies, tmp_path):
  (tmp_path / "test").mkdir()
  for i in (3, 5):
    (tmp_path / "test" / f"{i}.webp").write_bytes(pictures.encoded(pictures.picture(i), "webp", quality=60))
  (tmp_path / "test" / "notes.txt").write_text("no image")
  (tmp_path / "test" / "broken.jpg").write_bytes(b"?")
  plain = pictures.encoded(np.full((64, 64, 3), 90, np.uint8), "png")
  pictures.write_tar(tmp_path / "more" / "0.tar", [{"jpg": pictures.jpeg(7), "cls": b"1"}, {"png": plain, "cls": b"2"}])
  exclude = (f"{tmp_path}/test", f"{tmp_path}/more/*.tar")
  info, found = prepared(copies, tmp_path / "out", exclude=exclude, near_distance=None, same_image="separate")
  gone = {"other 3", "other 5", "other 7", "plain 90"}
  assert set(OTHERS) - set(captions(found)) == gone
  assert info["dropped"] == {"contamination": 4, "duplicate": 1}
  assert info["excluded_images"] == {"images": 5, "unreadable": 1}
  exact, _ = prepared(copies, tmp_path / "exact", exclude=exclude, exclude_distance=None, near_distance=None)
  assert exact["dropped"]["contamination"] == 2


# The same, however it is made.


def test_workers_and_ranges_change_nothing(copies, tmp_path):
  settings = {"shard_size": 40_000, "max_size": 60}
  prepared(copies, tmp_path / "a", **settings)
  prepared(copies, tmp_path / "b", TWO, **settings)
  prepared(copies, tmp_path / "c", range_records=3, **settings)
  first = pictures.tree(tmp_path / "a")
  assert pictures.tree(tmp_path / "b") == first
  small = pictures.tree(tmp_path / "c")
  assert {name: content for name, content in small.items() if "/" not in name} == {n: c for n, c in first.items() if "/" not in n}
  assert len(small) > len(first)
  _, other = prepared(copies, tmp_path / "d", seed=1, **settings)
  assert captions(other) == captions(read(tmp_path / "a", json.loads(first["dataset_info.json"])))
  assert pictures.tree(tmp_path / "d").keys() == first.keys() and pictures.tree(tmp_path / "d") != first


SCRIPT = """
import json, sys
from clip_jax.data.preparation import Settings, convert
pattern, out, settings = sys.argv[1:4]
convert(pattern, out, Settings(**json.loads(settings)), sys.argv[4:])
"""


def start(pattern, out, **settings):
  command = [sys.executable, "-c", SCRIPT, pattern, str(out), json.dumps(settings)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process, reached):
  while not reached():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.002)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_killed_in_each_stage(tmp_path, kind):
  if kind == "tar":
    pattern = write_inputs(tmp_path / "in", 240)
  else:
    rows = [{"image": pictures.jpeg(i), "caption": f"caption {i}"} for i in range(240)]
    pattern = pictures.write_parquet(tmp_path / "in" / "0.parquet", rows)
  settings = {"shard_size": 30_000, "max_size": 64, "range_records": 6}
  out, whole = tmp_path / "killed", tmp_path / "whole"
  prepared(pattern, whole, **settings)

  def count(glob):
    return len(list(out.glob(glob)))

  for reached in (
    lambda: count("manifest/*.parquet") > 5,
    lambda: count("manifest/*.parquet") > 20 and count("work/writing/*"),
    lambda: count("work/ranges.json"),
    lambda: count("work/plan/*.npy") > 2,
    lambda: count("work/shards/*.json") > 3,
    lambda: count("work/shards/*.json") > 5 and count("work/writing/*"),
  ):
    kill_when(start(pattern, out, **settings), reached)
    assert not (out / "dataset_info.json").exists()
  kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".parquet", ".array_record") and "aside" not in str(path)}
  assert any(path.suffix == ".array_record" for path in kept)
  process = start(pattern, out, **settings)
  output, errors = process.communicate()
  assert (process.returncode, output) == (0, ""), errors
  assert "3/3 writing" in errors and "1/3 analysis begins" not in errors
  assert pictures.tree(out) == pictures.tree(whole)
  unfinished = len([path for path in kept if path.stat().st_mtime_ns != kept[path]])
  assert unfinished <= 1  # the shard whose account was not written yet


def test_the_same_folder_with_other_input_in_one_process(tmp_path):
  for count in (6, 9):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    _, found = prepared(write_inputs(tmp_path / "in", count, shards=1), tmp_path / "out")
    assert captions(found) == sorted(f"caption {i}" for i in range(count))


# What is refused.


def test_nothing_is_overwritten(tmp_path):
  pattern = write_inputs(tmp_path / "in", 6)
  prepared(pattern, tmp_path / "out")
  before = pictures.tree(tmp_path / "out")
  with pytest.raises(UsageError, match="dataset_info.json is there: the data set is finished"):
    convert(pattern, str(tmp_path / "out"), log=lambda _: None)
  assert pictures.tree(tmp_path / "out") == before
  with pytest.raises(UsageError, match="in holds something already"):
    convert(pattern, str(tmp_path / "in"), log=lambda _: None)


def test_another_call_does_not_go_on(tmp_path):
  pattern, out = write_inputs(tmp_path / "in", 6), str(tmp_path / "out")
  with pytest.raises(UsageError, match=r"No record is left; dropped: min_size 6"):
    convert(pattern, out, Settings(min_size=1000), log=lambda _: None)
  with pytest.raises(UsageError, match="was begun with min_size=1000, and now it is 0"):
    convert(pattern, out, Settings(), log=lambda _: None)
  with pytest.raises(UsageError, match="was begun with pattern="):
    convert(f"{tmp_path}/in/00000.tar", out, Settings(min_size=1000), log=lambda _: None)
  pictures.write_tar(tmp_path / "in" / "9.tar", [])
  with pytest.raises(UsageError, match="was begun with other input"):
    convert(pattern, out, Settings(min_size=1000), log=lambda _: None)


@pytest.mark.parametrize("options", [[], TWO], ids=["one", "two"])
def test_a_file_that_cannot_be_read_stops_the_work_with_a_sentence(tmp_path, options):
  pattern = write_inputs(tmp_path / "in", 6)
  path = tmp_path / "in" / "00001.tar"
  path.write_bytes(path.read_bytes()[:9000])
  with pytest.raises(UsageError, match=r"00001.tar: cut off after .*Re-download it") as caught:
    convert(pattern, str(tmp_path / "out"), Settings(), options, log=lambda _: None)
  assert "while running" not in str(caught.value) and "Traceback" not in str(caught.value)
  info, _ = prepared(pattern, tmp_path / "other", allow_truncated=True)
  assert info["input"]["records"] < 6


@pytest.mark.parametrize("pattern", ["nowhere/*.tar", "http://x/*.tar", "data.bin"])
def test_no_input(tmp_path, pattern):
  with pytest.raises(UsageError):
    convert(pattern, str(tmp_path / "out"), log=lambda _: None)
  assert not (tmp_path / "out").exists()


def test_without_beam(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(MissingExtraError, match=r"clip-jax data convert needs the package apache-beam.*pip install 'clip_jax\[beam\]'"):
    convert(write_inputs(tmp_path / "in", 6), str(tmp_path / "out"))


def test_progress_goes_to_the_log(tmp_path, capfd, monkeypatch):
  monkeypatch.setattr("clip_jax.data.preparation.launcher.PROGRESS_SECONDS", 0.05)
  lines = []
  convert(write_inputs(tmp_path / "in"), str(tmp_path / "out"), Settings(range_records=5), log=lines.append)
  text = "\n".join(lines)
  for stage in ("1/3 analysis", "2/3 deduplication", "3/3 writing 1 shards"):
    assert f"{stage} begins" in text and f"{stage} is done" in text
  assert "files are written" in text and "60 of 60 records are kept" in text
  assert capfd.readouterr().out == ""


# Buckets.


def test_from_a_bucket_to_a_bucket(tmp_path, monkeypatch):
  pytest.importorskip("moto", reason="moto is not installed")
  write_inputs(tmp_path / "in", 24)
  with buckets.s3("preparation") as bucket:
    for name, value in bucket.environment.items():
      monkeypatch.setenv(name, value)
    pattern, out = f"{bucket.put_folder(tmp_path / 'in', 'in')}/*.tar", bucket.url("out")
    info = convert(pattern, out, Settings(shard_size=30_000), log=lambda _: None)
    local, found = prepared(f"{tmp_path}/in/*.tar", tmp_path / "out", shard_size=30_000)
    assert info["shards"] == local["shards"]
    assert [r.image for r in sources.create("auto", f"{out}/{info['path']}")] == [r.image for r in found]
    with pytest.raises(UsageError, match="the data set is finished"):
      convert(pattern, out, Settings(shard_size=30_000), log=lambda _: None)
    bucket.proxy.forbid = True
    with pytest.raises(UsageError, match="cannot be read"):
      convert(pattern, bucket.url("other"), Settings(), log=lambda _: None)


def test_a_disk_that_fails_is_no_bad_record(tmp_path, monkeypatch):
  """The work fails, and goes on later with the same result."""
  pattern = write_inputs(tmp_path / "in", 12)
  source = sources.TarSource
  fetch = source.fetch

  def broken(self, indices):
    raise StorageError(f"{len(list(indices))} records: the disk does not answer.")

  monkeypatch.setattr(source, "fetch", broken)
  with pytest.raises(StorageError, match="4 records: the disk does not answer.$"):
    convert(pattern, str(tmp_path / "out"), Settings(), log=lambda _: None)
  monkeypatch.setattr(source, "fetch", fetch)
  info, _ = prepared(pattern, tmp_path / "out")
  assert info["records"] == 12
