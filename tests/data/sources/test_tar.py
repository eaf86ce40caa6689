"""Tar shards: what a record is, the index, and every way in which a shard can be damaged.

The shards are written here with `tarfile`. Nothing is expected that was not put in.
"""

import concurrent.futures
import gzip
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import sources
from clip_jax.data.sources import tar, tar_index
from clip_jax.data.sources.protocol import Options, Record
from clip_jax.data.sources.tar import TarSource
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """A cache of its own for each test, so that no index is found that the test did not cause."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder))
  return folder


def write(path, members, format=tarfile.GNU_FORMAT):
  """Writes (name, bytes) pairs, or ready `TarInfo`s; returns where each member begins and ends."""
  extents = []
  with tarfile.open(path, "w", format=format) as archive:
    for name, content in members:
      member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
      # addfile has padded the content to whole blocks.
      extents.append(archive.offset - -(-len(content) // 512) * 512 + len(content))
  return extents


def record(key, i, kinds=("jpg", "txt", "json")):
  """Members of a record, with contents of odd sizes that say which record they belong to."""
  contents = {
    "jpg": b"\xff\xd8" + f"image {i} ".encode() * (1 + 37 * i % 211),
    "txt": f"caption {i} – ünïcödé 🦊".encode(),
    "json": json.dumps({"caption": f"from json {i}", "key": key}).encode(),
    "cls": str(i).encode(),
  }
  return [(f"{key}.{kind}", contents[kind]) for kind in kinds]


def shard(path, count=5, start=0, **options):
  return write(
    path, [m for i in range(start, start + count) for m in record(f"{i:08}", i)], **options
  )


def records_of(pattern, **options):
  source = TarSource(str(pattern), Options(**options))
  return [source[i] for i in range(len(source))]


def stored(i):
  """The image and captions that `record` puts into a shard."""
  contents = dict(record("", i))
  return contents[".jpg"], [contents[".txt"].decode()]


def tar_expand(pattern):
  return tar.shards(pattern, Storage())


def images_and_captions(found):
  return [(r.image, r.captions) for r in found]


# What a record is.


@pytest.mark.parametrize("format", FORMATS)
def test_img2dataset_layout(tmp_path, format):
  shard(tmp_path / "00000.tar", 5, format=format)
  found = records_of(tmp_path / "00000.tar")
  assert images_and_captions(found) == [stored(i) for i in range(5)]
  assert [r.key for r in found] == [f"00000.tar/{i:08}.jpg" for i in range(5)]
  assert [r.label for r in found] == [None] * 5


@pytest.mark.parametrize(
  ("members", "captions"),
  [
    ({"jpg": b"i", "txt": b"text", "json": b'{"caption": "json"}'}, ["text"]),
    ({"jpg": b"i", "json": b'{"caption": "one", "url": "x"}'}, ["one"]),
    ({"jpg": b"i", "json": b'{"captions": ["one", "two"], "caption": "three"}'}, ["one", "two"]),
    ({"jpg": b"i", "json": b'{"captions": [], "caption": "three"}'}, ["three"]),
    ({"jpg": b"i", "json": '{"caption": "Füchse 🦊 \\ud83e\\udd8a"}'.encode()}, ["Füchse 🦊 🦊"]),
    ({"jpg": b"i", "txt": "日本語のキャプション\n".encode()}, ["日本語のキャプション\n"]),
    ({"jpg": b"i", "txt": b"caf\xe9"}, ["caf\ufffd"]),
  ],
)
def test_captions(tmp_path, members, captions):
  write(tmp_path / "a.tar", [(f"0.{kind}", content) for kind, content in members.items()])
  (found,) = records_of(tmp_path / "a.tar")
  assert found.captions == captions


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG", "Jpeg", "PNG", "WEBP"])
def test_image_extensions(tmp_path, extension):
  write(tmp_path / "a.tar", [(f"0.{extension}", b"pixels"), ("0.TXT", b"words"), ("0.CLS", b"7")])
  (found,) = records_of(tmp_path / "a.tar")
  assert found == Record(b"pixels", ["words"], f"a.tar/0.{extension}", 7)


def test_members_of_a_record_in_any_order(tmp_path):
  kinds = ("jpg", "txt", "json", "cls")
  for n, names in enumerate(itertools.permutations(kinds)):
    path = tmp_path / f"{n}.tar"
    write(path, record("a", 1, names) + record("b", 2, names))
    found = records_of(path)
    assert images_and_captions(found) == [stored(1), stored(2)], names
    assert [r.label for r in found] == [1, 2]


def test_members_far_from_each_other_are_no_record(tmp_path):
  """`tar cf x.tar *.jpg *.txt` sorts them by kind; webdataset cannot read that either."""
  members = [m for kind in ("jpg", "txt") for i in range(4) for m in record(f"{i}", i, [kind])]
  write(tmp_path / "a.tar", members)
  with pytest.raises(DataError, match=r"none of the first 4 records can be read; .*0.jpg: no caption \(txt, json\) follows"):
    records_of(tmp_path / "a.tar")


@pytest.mark.parametrize(
  ("captions", "found", "weights"),
  [
    ((("txt", 0.3), ("synthetic", 0.7)), ["original", "by a model"], (0.3, 0.7)),
    ((("synthetic", 1.0),), ["by a model"], (1.0,)),
    ((("short.txt", 2.0), ("txt", 1.0)), ["brief", "original"], (2.0, 1.0)),
    ((("several", 1.0), ("missing", 5.0)), ["a", "b"], (0.5, 0.5)),
  ],
)
def test_captions_by_name(tmp_path, captions, found, weights):
  about = {"synthetic": "by a model", "several": ["a", "", "b"], "width": 640}
  members = [("0.jpg", b"i"), ("0.json", json.dumps(about).encode()), ("0.txt", b"original"), ("0.short.txt", b"brief")]
  write(tmp_path / "a.tar", members)
  (record,) = records_of(tmp_path / "a.tar", captions=captions)
  assert (record.captions, record.weights) == (found, weights)


@pytest.mark.parametrize(
  ("captions", "content", "message"),
  [
    ((), b"", "none of txt holds a caption"),
    ((), b" \n", "none of txt holds a caption"),
    ((), b"word " * 20_000, "a caption of 100,000 bytes; 65,536 is the most"),
    ((("synthetic", 1.0),), b"original", "none of synthetic holds a caption"),
  ],
)
def test_a_caption_that_cannot_be_used_is_refused_by_itself(tmp_path, captions, content, message):
  write(tmp_path / "a.tar", [("0.jpg", b"i"), ("0.txt", content), ("0.json", b"{}"), *record("1", 1)])
  source = TarSource(str(tmp_path / "a.tar"), Options(captions=captions))
  found = source.fetch([0])
  assert isinstance(found[0], DataError)
  assert message in str(found[0])
  assert "a.tar/0.jpg" in str(found[0])


def test_fetch_gives_what_was_asked_for_in_that_order(tmp_path):
  for i in range(3):
    shard(tmp_path / f"{i}.tar", 7, start=7 * i)
  source = TarSource(str(tmp_path / "*.tar"))
  order = [20, 3, 3, 4, 5, 19, 0, 13]
  assert images_and_captions(source.fetch(order)) == [stored(i) for i in order]
  assert source.fetch([]) == []


def test_a_record_longer_than_its_row_can_say(tmp_path):
  long = random.Random(0).randbytes(40 << 20)
  write(tmp_path / "a.tar", [*record("0", 0), ("1.jpg", long), ("1.txt", b"long"), *record("2", 2)])
  found = records_of(tmp_path / "a.tar")
  assert images_and_captions(found) == [stored(0), (long, ["long"]), stored(2)]


def test_the_name_ends_at_its_first_dot(tmp_path):
  """As in webdataset: what follows it is the kind of member; dots in folders do not count."""
  members = [
    ("v1.0/0.jpg", b"in a folder with a dot"),
    ("v1.0/0.txt", b"first"),
    ("v1.1/0.jpg", b"same name, other folder"),
    ("v1.1/0.txt", b"second"),
    ("./deep/er/0.jpg", b"deep"),
    ("./deep/er/0.txt", b"third"),
    ("0.jpg", b"top"),
    ("0.txt", b"fourth"),
    ("0.thumb.jpg", b"another kind, not the image"),
  ]
  write(tmp_path / "a.tar", members)
  assert images_and_captions(records_of(tmp_path / "a.tar")) == [
    (b"in a folder with a dot", ["first"]),
    (b"same name, other folder", ["second"]),
    (b"deep", ["third"]),
    (b"top", ["fourth"]),
  ]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_a_header(tmp_path, format):
  """These have headers of their own before the member's; here two that differ at their ends."""
  long = "folder/" * 20 + "x" * 120
  write(tmp_path / "a.tar", record(long + "1", 1) + record(long + "2", 2), format)
  assert images_and_captions(records_of(tmp_path / "a.tar")) == [stored(1), stored(2)]


def test_names_that_are_not_ascii(tmp_path):
  for n, format in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
    write(tmp_path / f"{n}.tar", record("Füchse/狐", 3), format)
    assert images_and_captions(records_of(tmp_path / f"{n}.tar")) == [stored(3)]


def special(name, kind, target=""):
  member = tarfile.TarInfo(name)
  member.type, member.linkname = kind, target
  return member, b""


def test_members_that_are_no_record_are_passed_over(tmp_path):
  members = [
    ("README.md", b"# A data set"),
    special("folder", tarfile.DIRTYPE),
    *record("folder/0", 0),
    special("folder/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    ("folder/link.txt", b"a caption without an image of its own"),
    special("pipe.jpg", tarfile.FIFOTYPE),
    ("no_caption.jpg", b"image"),
    ("no_image.txt", b"caption"),
    *record("folder/1", 1),
    ("__MACOSX/._1.jpg", b"\0\5\x16\7"),
    ("no_extension", b"?"),
  ]
  write(tmp_path / "a.tar", members)
  first, no_caption, second = TarSource(str(tmp_path / "a.tar")).fetch(range(3))
  assert images_and_captions([first, second]) == [stored(0), stored(1)]
  assert str(no_caption) == "a.tar/no_caption.jpg: no caption (txt, json) follows or precedes it."


def test_a_labelled_record_needs_no_caption(tmp_path):
  members = [("0.jpg", b"i"), ("0.cls", b"3"), ("1.jpg", b"j"), ("1.txt", b" "), ("1.cls", b"4")]
  write(tmp_path / "a.tar", members)
  found = records_of(tmp_path / "a.tar")
  assert [(r.image, r.captions, r.label) for r in found] == [(b"i", [], 3), (b"j", [], 4)]


def test_labels(tmp_path):
  members = [m for i in (0, 12, 999) for m in record(f"{i}", i, ("jpg", "txt", "cls"))]
  write(tmp_path / "a.tar", [*members, ("x.jpg", b""), ("x.txt", b"x"), ("x.cls", b" 5\n")])
  assert [r.label for r in records_of(tmp_path / "a.tar")] == [0, 12, 999, 5]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("json", b'{"url": "x"}', "neither 'caption' nor 'captions'"),
    ("json", b'["a list"]', "neither 'caption' nor 'captions'"),
    ("json", b"{cut", "neither 'caption' nor 'captions'"),
    ("json", b"[" * 100_000, "neither 'caption' nor 'captions'"),
    ("json", b'{"captions": ["one", 2]}', "neither a text nor a list of texts"),
    ("json", b'{"caption": 5}', "neither a text nor a list of texts"),
    ("json", b'{"caption": null}', "neither 'caption' nor 'captions'"),
    ("cls", b"cat", "'cat' instead of a class number"),
  ],
)
def test_a_malformed_record_is_named(tmp_path, name, content, message):
  members = record("good", 1) + [("bad.jpg", b"i"), (f"bad.{name}", content)]
  if name == "cls":
    members.append(("bad.txt", b"a caption"))
  write(tmp_path / "a.tar", members)
  source = TarSource(str(tmp_path / "a.tar"))
  assert source[0].captions == stored(1)[1]
  with pytest.raises(DataError, match=message) as caught:
    source[1]
  assert "a.tar/bad.jpg" in str(caught.value)


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/../../../escaped", "c:\\escaped", "~/escaped"])
def test_hostile_names_never_touch_the_file_system(tmp_path, name):
  """A name only says which members belong together: no file is made or opened by it."""
  room = tmp_path / "room" / "inner"
  room.mkdir(parents=True)
  path = room / "a.tar"
  target = tmp_path / "secret"
  target.write_bytes(b"secret")
  link = special(f"{name}.link.jpg", tarfile.LNKTYPE, str(target))
  write(path, [*record(name, 1), link, special("dev.jpg", tarfile.CHRTYPE), *record("good", 2)], tarfile.PAX_FORMAT)
  before = sorted(p for p in tmp_path.rglob("*"))
  source = TarSource(str(path))
  hostile, good = source.fetch([0, 1])
  assert len(source) == 2
  assert images_and_captions([good]) == [stored(2)]
  if ".." in name or name.startswith("/"):
    assert "leads out of the archive" in str(hostile)
  else:
    assert images_and_captions([hostile]) == [stored(1)]
  assert sorted(p for p in tmp_path.rglob("*")) == sorted([*before, Path(f"{path}.index.npz")])
  assert not Path("/tmp/escaped.jpg").exists()


# Many shards.


def test_shards_come_in_the_order_of_their_names(tmp_path):
  for i in (2, 0, 1):
    shard(tmp_path / f"{i:05}.tar", 3 + i, start=10 * i)
  source = TarSource(str(tmp_path / "*.tar"))
  want = [stored(10 * i + j) for i in range(3) for j in range(3 + i)]
  assert images_and_captions([source[i] for i in range(len(source))]) == want
  assert images_and_captions(source) == want  # iteration ends by itself


@pytest.mark.parametrize("index", [-1, -7, 7, 10**9])
def test_an_index_outside_is_an_error(tmp_path, index):
  """-1 would otherwise be the last record of the first shard."""
  shard(tmp_path / "0.tar", 3)
  shard(tmp_path / "1.tar", 4)
  source = TarSource(str(tmp_path / "*.tar"))
  with pytest.raises(IndexError):
    source[index]
  with pytest.raises(IndexError):
    source.key(index)


@pytest.mark.parametrize(
  ("pattern", "names"),
  [
    ("{00000..00003}.tar", ["00000", "00001", "00002", "00003"]),
    ("{00002..00000}.tar", ["00000", "00001", "00002"]),
    ("{8..11}.tar", ["10", "11", "8", "9"]),
    ("{00000,00003}.tar", ["00000", "00003"]),
    ("0000{0..1}{,x}.tar", ["00000", "00000x", "00001", "00001x"]),
    ("{0000{1..2},8}.tar", ["00001", "00002", "8"]),
    ("0000[0-2].tar", ["00000", "00001", "00002"]),
    ("0000?.tar", ["00000", "00001", "00002", "00003"]),
    ("{00000..00001,00000}.tar", None),
    ("**/in.tar", ["sub/in"]),
    ("{00000,0000*}.tar", ["00000", "00000x", "00001", "00001x", "00002", "00003"]),
  ],
)
def test_braces_and_globs(tmp_path, pattern, names):
  for name in (
    "00000",
    "00001",
    "00002",
    "00003",
    "00000x",
    "00001x",
    "8",
    "9",
    "10",
    "11",
    "sub/in",
  ):
    path = tmp_path / f"{name}.tar"
    path.parent.mkdir(exist_ok=True)
    path.touch()
  if names is None:  # not a range, so a choice between two names of which the first does not exist
    with pytest.raises(DataError, match="no such file"):
      tar_expand(f"{tmp_path}/{pattern}")
  else:
    assert tar_expand(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}.tar" for name in names]


def test_braces_in_folders_and_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for name in ("a/x", "b/x", "c/x"):
    (tmp_path / name).parent.mkdir()
    (tmp_path / f"{name}.tar").touch()
  assert tar_expand("~/{a,c}/x.tar") == [f"{tmp_path}/a/x.tar", f"{tmp_path}/c/x.tar"]


def test_a_part_that_matches_nothing_is_named(tmp_path):
  shard(tmp_path / "00000.tar")
  with pytest.raises(DataError, match="no such file") as caught:
    TarSource(f"{tmp_path}/{{00000..00002}}.tar")
  assert f"{tmp_path}/00001.tar" in str(caught.value)
  with pytest.raises(DataError, match=r"nothing-\*\.tar"):
    TarSource(f"{tmp_path}/nothing-*.tar")


def test_a_star_does_not_take_an_index_for_a_shard(tmp_path):
  shard(tmp_path / "00000.tar")
  first = TarSource(f"{tmp_path}/*")
  assert (tmp_path / "00000.tar.index.npz").exists()
  assert TarSource(f"{tmp_path}/*").paths == first.paths


def test_a_folder_instead_of_a_glob(tmp_path):
  shard(tmp_path / "00000.tar")
  with pytest.raises(DataError, match=r"is a folder.*\*\.tar") as caught:
    TarSource(str(tmp_path))
  assert str(tmp_path) in str(caught.value)


def test_a_link_to_nowhere(tmp_path):
  (tmp_path / "00000.tar").symlink_to(tmp_path / "gone")
  with pytest.raises(DataError, match="00000.tar cannot be read"):
    TarSource(f"{tmp_path}/*.tar")


def test_create_needs_a_path(tmp_path):
  with pytest.raises(DataError, match="config.data.path is empty"):
    sources.create("tar", "")
  shard(tmp_path / "00000.tar", 2)
  assert len(sources.create("tar", f"{tmp_path}/*.tar")) == 2


def test_no_record_at_all(tmp_path):
  write(tmp_path / "a.tar", [("1.txt", b"caption only")])
  write(tmp_path / "b.tar", [])
  for name in ("a", "b", "*"):
    with pytest.raises(DataError, match="no record has an image") as caught:
      TarSource(f"{tmp_path}/{name}.tar")
    assert f"{tmp_path}/{name}.tar" in str(caught.value)


def test_a_shard_without_records_among_others(tmp_path):
  for i in (1, 4):
    write(tmp_path / f"{i}.tar", [("README", b"nothing here")])
  for i in (0, 2, 3):
    shard(tmp_path / f"{i}.tar", 2, start=i)
  assert images_and_captions(records_of(tmp_path / "*.tar")) == [
    stored(i) for i in (0, 1, 2, 3, 3, 4)
  ]


# Random access.


def test_eight_threads_read_what_one_reads(tmp_path):
  for i in range(4):
    shard(tmp_path / f"{i}.tar", 25, start=25 * i)
  source = TarSource(str(tmp_path / "*.tar"))
  order = [i for seed in range(8) for i in random.Random(seed).sample(range(100), 100)]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    found = list(threads.map(source.__getitem__, order))
  assert images_and_captions(found) == [stored(i) for i in order]


def test_key_names_shard_and_byte(tmp_path):
  write(tmp_path / "0.tar", record("a", 0))
  extents = write(tmp_path / "1.tar", record("b", 1) + record("c", 2))
  source = TarSource(str(tmp_path / "*.tar"))
  begin = -(-extents[2] // 512) * 512
  assert source.key(2) == f"1.tar at byte {begin:,}"
  assert (tmp_path / "1.tar").read_bytes()[begin:].startswith(b"c.jpg")


@pytest.mark.skipif(
  not os.path.exists("/proc/self/fd"), reason="open files are listed in /proc on Linux only"
)
def test_no_file_stays_open(tmp_path):
  """A run may have more shards than a process may have files open."""
  shard(tmp_path / "a.tar", 3)
  source = TarSource(str(tmp_path / "a.tar"))
  with open(tmp_path / "a.tar", "rb"):
    for i in range(3):
      source[i]
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
  assert links.count(str(tmp_path / "a.tar")) == 1  # this test's own


# Shards that change under a run.


@pytest.mark.parametrize("how", ["shorter", "other", "empty", "gone"])
def test_a_shard_replaced_after_it_was_indexed(tmp_path, how):
  path = tmp_path / "a.tar"
  shard(path, 20)
  source = TarSource(str(path))
  assert source[19].image == stored(19)[0]
  if how == "shorter":
    shard(path, 3)
  elif how == "other":  # longer, with other members where the old ones were
    write(path, [m for i in range(40) for m in record(f"{i:08}", 3 * i + 1)])
  elif how == "empty":
    path.write_bytes(b"")
  else:
    path.unlink()
  expected = "no such file" if how == "gone" else "has changed since it was indexed"
  with pytest.raises(DataError, match=expected) as caught:
    source[19]
  assert str(path) in str(caught.value)


# The index.


def test_the_index_is_built_once(tmp_path):
  lines = []
  for i in range(25):
    shard(tmp_path / f"{i:05}.tar", 2, start=2 * i)
  pattern = str(tmp_path / "*.tar")
  first = TarSource(pattern, Options(log=lines.append))
  assert lines == ["index: 25 of 25 shards"]
  indexes = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.index.npz")}
  assert len(indexes) == 25
  second = TarSource(pattern, Options(log=lines.append))
  assert len(lines) == 1
  assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.index.npz")} == indexes
  assert images_and_captions(second) == images_and_captions(first) == [stored(i) for i in range(50)]
  assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_the_index_is_what_is_read_the_second_time(tmp_path):
  """Without the headers of the shard being looked at: these are destroyed, size and time kept."""
  path = tmp_path / "a.tar"
  extents = shard(path, 3)
  TarSource(str(path))
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  content = bytearray(path.read_bytes())
  content[extents[0] + 512 : extents[0] + 520] = b"\xff" * 8  # in the header of the caption
  path.write_bytes(content)
  os.utime(path, ns=times)
  assert len(TarSource(str(path))) == 3


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_shard_is_indexed_anew(tmp_path, change):
  path = tmp_path / "a.tar"
  shard(path, 3)
  assert len(TarSource(str(path))) == 3
  before = path.stat()
  if change == "size":
    shard(path, 30)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size != before.st_size
  else:
    write(path, [m for i in (7, 8, 9) for m in record(f"{i:08}", i)])
    content = path.read_bytes()
    path.write_bytes((content + bytes(before.st_size))[: before.st_size])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
  want = range(30) if change == "size" else (7, 8, 9)
  assert images_and_captions(records_of(path)) == [stored(i) for i in want]


def test_a_shard_that_grows_while_it_is_indexed(tmp_path, monkeypatch):
  """The index of the shorter shard must not be taken for one of the longer."""
  path = tmp_path / "a.tar"
  shard(path, 3)
  scan = tar_index.scan

  def scan_then_grow(storage, name):
    result = scan(storage, name)
    shard(path, 40)
    return result

  monkeypatch.setattr(tar_index, "scan", scan_then_grow)
  TarSource(str(path))
  monkeypatch.undo()
  assert len(TarSource(str(path))) == 40


@settings(
  max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_index_is_built_anew(tmp_path, cache, data):
  path, index = tmp_path / "a.tar", tmp_path / "a.tar.index.npz"
  if not path.exists():
    shard(path, 4)
  index.unlink(missing_ok=True)
  shutil.rmtree(cache / "index", ignore_errors=True)
  TarSource(str(path))
  shutil.rmtree(cache / "index")  # where what was made of it is kept
  content = bytearray(index.read_bytes())
  if data.draw(st.booleans(), label="cut"):
    content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
  else:
    for at in data.draw(
      st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=40), label="bytes"
    ):
      content[at] ^= data.draw(st.integers(1, 255), label="flip")
  index.write_bytes(content)
  assert images_and_captions(records_of(path)) == [stored(i) for i in range(4)]


@pytest.mark.parametrize(
  "content", [b"", b"garbage", b"PK\x03\x04 and no more", b"\x80\x04\x95pickle"]
)
def test_an_index_that_is_none(tmp_path, content):
  shard(tmp_path / "a.tar", 4)
  index = tmp_path / "a.tar.index.npz"
  index.write_bytes(content)
  assert len(TarSource(str(tmp_path / "a.tar"))) == 4
  assert index.read_bytes().startswith(b"PK")
  assert len(index.read_bytes()) > len(content)


def test_the_joined_index_is_mapped_and_survives_damage(tmp_path, cache):
  for i in range(3):
    shard(tmp_path / f"{i}.tar", 4, start=4 * i)
  first = TarSource(str(tmp_path / "*.tar"))
  assert isinstance(first.index.rows.base, np.memmap)
  assert first.index.rows.itemsize == 12
  (joined,) = (cache / "index").glob("*.joined")
  content = joined.read_bytes()
  for damaged in (b"", content[:-1], content[12:], content[:-40] + content[-28:], b"x" * len(content)):
    joined.unlink()
    joined.write_bytes(damaged)
    assert images_and_captions(records_of(tmp_path / "*.tar")) == [stored(i) for i in range(12)]
    assert joined.read_bytes() == content


def test_only_new_shards_are_read(tmp_path, monkeypatch):
  scanned, scan = [], tar_index.scan
  monkeypatch.setattr(tar_index, "scan", lambda storage, path: scanned.append(Path(path).name) or scan(storage, path))
  for i in range(3):
    shard(tmp_path / f"{i}.tar", 2, start=2 * i)
  TarSource(str(tmp_path / "*.tar"))
  shard(tmp_path / "3.tar", 2, start=6)
  assert images_and_captions(records_of(tmp_path / "*.tar")) == [stored(i) for i in range(8)]
  assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_processes_index_what_one_does(tmp_path):
  for i in range(5):
    shard(tmp_path / f"{i}.tar", 3 + i, start=10 * i)
  paths = [str(tmp_path / f"{i}.tar") for i in range(5)]
  one = tar_index.Index(paths)
  several = tar_index.Index(paths, rebuild=True, processes=2)
  assert several.rows.tolist() == one.rows.tolist()
  assert several.ends.tolist() == one.ends.tolist() == [3, 7, 12, 18, 25]


def test_the_row_of_a_record_tells_its_pixels_and_characters(tmp_path):
  def jpeg(width, height, before=b""):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "jpeg", exif=before)
    return buffer.getvalue()

  exif = b"Exif\0\0" + bytes(60_000)  # the size is behind it
  members = [
    ("0.jpg", jpeg(640, 480)), ("0.txt", "fünf".encode()),
    ("1.jpg", jpeg(80, 1200, exif)), ("1.json", b'{"caption": "from json"}'),
    ("2.jpg", b"no image"), ("2.txt", b"x" * 70_000),
  ]  # fmt: skip
  write(tmp_path / "a.tar", members)
  rows = tar_index.Index([str(tmp_path / "a.tar")]).rows
  assert rows[["width", "height", "characters"]].tolist() == [(640, 480, 4), (80, 1200, 9), (0, 0, 65_535)]


def test_rebuild(tmp_path):
  path = tmp_path / "a.tar"
  shard(path, 4)
  index = tar_index.Index([str(path)])
  first = (tmp_path / "a.tar.index.npz").stat().st_mtime_ns
  again = tar_index.Index([str(path)], rebuild=True)
  assert again.rows.tolist() == index.rows.tolist()
  assert (tmp_path / "a.tar.index.npz").stat().st_mtime_ns > first


@pytest.fixture
def read_only(tmp_path):
  """Makes a folder read-only for root as well, by the file system's own attribute."""
  locked = []

  def lock(folder):
    tool = shutil.which("chattr")
    if os.geteuid() != 0:
      folder.chmod(0o555)
    elif tool is None or subprocess.run([tool, "+i", folder], capture_output=True).returncode:
      pytest.skip(
        "running as root, and chattr +i does not work here: no folder can be made read-only"
      )
    locked.append(folder)

  yield lock
  for folder in locked:
    if os.geteuid() == 0:
      subprocess.run(["chattr", "-i", folder], check=True)
    else:
      folder.chmod(0o755)


def test_the_index_of_a_read_only_folder_goes_to_the_cache(tmp_path, cache, read_only):
  folder = tmp_path / "shards"
  folder.mkdir()
  shard(folder / "a.tar", 4)
  shard(folder / "b.tar", 4, start=4)
  read_only(folder)
  assert images_and_captions(records_of(folder / "*.tar")) == [stored(i) for i in range(8)]
  assert sorted(os.listdir(folder)) == ["a.tar", "b.tar"]
  indexes = {p: p.stat().st_mtime_ns for p in (cache / "index").iterdir()}
  assert sorted(p.suffix for p in indexes) == [".joined", ".npz", ".npz"]
  assert images_and_captions(records_of(folder / "*.tar")) == [stored(i) for i in range(8)]
  assert {p: p.stat().st_mtime_ns for p in (cache / "index").iterdir()} == indexes


def test_where_no_index_can_be_kept_shards_are_read_all_the_same(tmp_path, read_only, monkeypatch):
  folder = tmp_path / "shards"
  folder.mkdir()
  shard(folder / "a.tar", 4)
  read_only(folder)
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder / "cache"))
  assert images_and_captions(records_of(folder / "a.tar")) == [stored(i) for i in range(4)]
  assert os.listdir(folder) == ["a.tar"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_does_not_stop_a_run(tmp_path, cache, monkeypatch):
  shard(tmp_path / "a.tar", 4)

  def full(*_, **__):
    Path("/dev/full").write_bytes(b"x")  # the operating system's own "no space left on device"

  monkeypatch.setattr(Storage, "write", full)
  monkeypatch.setattr(tar_index.os, "replace", full)
  assert images_and_captions(records_of(tmp_path / "a.tar")) == [stored(i) for i in range(4)]
  assert os.listdir(tmp_path) == ["a.tar"]
  assert os.listdir(cache / "index") == []


# Shards that are cut off.

CUT_RECORDS = 6
LAYOUTS = {
  "jpg txt json": ("jpg", "txt", "json"),
  "jpg json txt": ("jpg", "json", "txt"),
  "cls jpg txt": ("cls", "jpg", "txt"),
  "jpg txt cls": ("jpg", "txt", "cls"),
}


def forget(path):
  """Removes the index of the example before, which may be of the same size and the same tick."""
  Path(f"{path}.index.npz").unlink(missing_ok=True)


def cut_case(path, layout, format, long):
  """Writes a shard; returns where the last member of each record ends."""
  kinds = LAYOUTS[layout]
  prefix = "p" * 130 if long else ""
  members = [m for i in range(CUT_RECORDS) for m in record(f"{prefix}{i:08}", i, kinds)]
  extents = write(path, members, format)
  return extents[len(kinds) - 1 :: len(kinds)]


@settings(
  max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  layout=st.sampled_from(sorted(LAYOUTS)),
  format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
  long=st.booleans(),
  share=st.floats(0, 1, exclude_max=True),
  on_block=st.booleans(),
)
def test_cut_anywhere(tmp_path, layout, format, long, share, on_block):
  """Every cut before the end-of-archive mark is found, and only whole records are used."""
  path, other = tmp_path / "cut.tar", tmp_path / "whole.tar"
  forget(path)
  ends = cut_case(path, layout, format, long)
  if not other.exists():
    shard(other, 2)
  padded = [-(-end // 512) * 512 for end in ends]
  at = int(share * (padded[-1] + 512))
  at = at // 512 * 512 if on_block else at
  with open(path, "r+b") as file:
    file.truncate(at)

  with pytest.raises(DataError) as caught:
    TarSource(f"{tmp_path}/*.tar")
  message = str(caught.value)
  assert str(path) in message
  assert "cut off after" in message
  assert "Re-download it, or set data.allow_truncated=True." in message

  found = records_of(f"{tmp_path}/*.tar", allow_truncated=True)
  got = images_and_captions(found[: len(found) - 2])
  whole = sum(end <= at for end in padded)
  want = [stored(i) for i in range(whole)]
  # Where nothing is left of what came after the first record, nobody can know that it was whole.
  if whole == 1 and at < padded[0] + header_bytes(format, long):
    assert got == []
  else:
    assert got == want
  if "cls" in layout:
    assert [r.label for r in found[: len(got)]] == list(range(len(got)))
  assert images_and_captions(found[len(got) :]) == [stored(0), stored(1)]
  # And the index that has been kept does not let the shard pass as whole afterwards.
  with pytest.raises(DataError, match="cut off after"):
    TarSource(f"{tmp_path}/*.tar")


def header_bytes(format, long):
  """Bytes up to the end of a member's header; a long name has a header and a block before it."""
  return 512 if not long else 512 + 1024


def test_a_cut_between_the_members_of_the_first_record(tmp_path):
  """It has an image and, in its .json, a caption; but its .txt would have come first."""
  extents = write(tmp_path / "a.tar", record("0", 0, ("jpg", "json", "txt")))
  os.truncate(tmp_path / "a.tar", -(-extents[1] // 512) * 512)
  with pytest.raises(DataError, match="no record has an image"):
    TarSource(str(tmp_path / "a.tar"), Options(allow_truncated=True))


def test_a_cut_through_a_member_that_ends_in_zeros(tmp_path):
  """These are not the zeros that mark the end of an archive."""
  zeros = ("1.bin", b"x" * 512 + bytes(1024))
  extents = write(tmp_path / "a.tar", [*record("0", 0), *record("1", 1), zeros])
  for end in (extents[-1], extents[-1] - 1, extents[-1] - 512):
    os.truncate(tmp_path / "a.tar", end)
    with pytest.raises(DataError, match="cut off after"):
      TarSource(str(tmp_path / "a.tar"))


def test_the_message_says_how_far_the_shard_goes(tmp_path):
  extents = write(tmp_path / "a.tar", [m for i in range(5) for m in record(f"{i:08}", i)])
  begin = extents[9] - len(stored(3)[0])  # the image of the fourth record
  os.truncate(tmp_path / "a.tar", extents[9] - 1)
  with pytest.raises(DataError) as caught:
    TarSource(str(tmp_path / "a.tar"))
  assert f"cut off after 3 whole records (member 00000003.jpg at byte {begin:,})." in str(
    caught.value
  )


@pytest.mark.parametrize("zeros", [1, 2, 20])
def test_any_number_of_closing_blocks_is_an_end(tmp_path, zeros):
  """Two by the standard, twenty by tar's habit; one is enough to know that nothing is missing."""
  extents = shard(tmp_path / "a.tar", 3)
  os.truncate(tmp_path / "a.tar", -(-extents[-1] // 512) * 512 + zeros * 512)
  assert len(TarSource(str(tmp_path / "a.tar"))) == 3


def test_allow_truncated_leaves_whole_shards_alone(tmp_path):
  shard(tmp_path / "a.tar", 4)
  assert images_and_captions(records_of(tmp_path / "a.tar", allow_truncated=True)) == [
    stored(i) for i in range(4)
  ]


# Files that are no shards.


def not_a_tar(name):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
    archive.addfile(tarfile.TarInfo("0.jpg"))
  return {
    "text": b"This is not a tar archive. " * 100,
    "html": b"<!DOCTYPE html><html>404 Not Found</html>" * 30,
    "gz": gzip.compress(random.Random(0).randbytes(20_000)),
    "tar.gz": buffer.getvalue() + bytes(512),
    "parquet": b"PAR1" + bytes(2_000) + b"PAR1",
    "noise": random.Random(1).randbytes(5_000),
  }[name]


@pytest.mark.parametrize("allow_truncated", [False, True])
@pytest.mark.parametrize("name", ["text", "html", "gz", "tar.gz", "parquet", "noise"])
def test_not_a_tar(tmp_path, name, allow_truncated):
  (tmp_path / "a.tar").write_bytes(not_a_tar(name))
  with pytest.raises(DataError, match="is not an uncompressed tar archive") as caught:
    TarSource(str(tmp_path / "a.tar"), Options(allow_truncated=allow_truncated))
  assert str(tmp_path / "a.tar") in str(caught.value)


def test_an_empty_file_is_a_shard_cut_off_at_once(tmp_path):
  (tmp_path / "a.tar").touch()
  shard(tmp_path / "b.tar", 3)
  with pytest.raises(DataError, match="a.tar: cut off after 0 whole records"):
    TarSource(f"{tmp_path}/*.tar")
  assert len(records_of(f"{tmp_path}/*.tar", allow_truncated=True)) == 3


@settings(
  max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), format=st.sampled_from(FORMATS))
def test_a_damaged_header_is_found_or_does_no_harm(tmp_path, data, format):
  """Bytes of headers are overwritten: the answer is a DataError or records, never another error."""
  path = tmp_path / "a.tar"
  name = "n" * 40 if format == tarfile.USTAR_FORMAT else "n" * 140
  forget(path)
  write(path, [m for i in range(4) for m in record(f"{name}{i}", i)], format)
  content = bytearray(path.read_bytes())
  headers = [i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"]
  header = data.draw(st.sampled_from(headers), label="header")
  field = data.draw(st.sampled_from([(0, 100), (124, 136), (148, 156), (156, 157), (257, 265)]))
  for at in range(*field):
    if data.draw(st.booleans()):
      content[header + at] = data.draw(st.sampled_from(b"\0\x01 07aLxgKS5\x80\xff"))
  if data.draw(st.booleans(), label="sign"):
    sign(content, header)
  path.write_bytes(content)
  for allow_truncated in (False, True):
    try:
      found = records_of(path, allow_truncated=allow_truncated)
    except DataError as error:
      assert "a.tar" in str(error)
    else:
      assert 1 <= len(found) <= 4


@pytest.mark.parametrize(
  ("kind", "size"),
  [
    (tarfile.REGTYPE, -512),
    (tarfile.REGTYPE, -1024),
    (tarfile.REGTYPE, -100),
    (b"Z", -512),
    (b"Z", -1024),
  ],
)
def test_a_negative_size_is_not_followed_back(tmp_path, kind, size):
  """In the notation for sizes above 8 GiB; it would lead to the same header again, for ever."""
  extents = write(tmp_path / "a.tar", [*record("0", 0), *record("1", 1)])
  content = bytearray((tmp_path / "a.tar").read_bytes())
  header = -(-extents[2] // 512) * 512
  content[header + 124 : header + 136] = size.to_bytes(12, "big", signed=True)
  content[header + 156 : header + 157] = kind
  sign(content, header)
  (tmp_path / "a.tar").write_bytes(content)
  with pytest.raises(DataError, match=r"cut off after 1 whole records \(member 1.jpg"):
    TarSource(str(tmp_path / "a.tar"))
  assert images_and_captions(records_of(tmp_path / "a.tar", allow_truncated=True)) == [stored(0)]


def sign(content, header):
  """Writes the header's checksum anew, so that only its fields are wrong."""
  content[header + 148 : header + 156] = b" " * 8
  total = sum(content[header : header + 512])
  content[header + 148 : header + 156] = b"%06o\0 " % total
