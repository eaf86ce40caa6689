"""Where the records of tar shards begin: 12 bytes each, built from headers and kept in files.

Each shard has an index of its own, `SHARD.index.npz`, beside it or in `$CLIP_JAX_CACHE/index` where that folder cannot be
written, so that a shard that is added or changed is the only one that is read. The indexes of a whole set are then joined
in one file of the cache that is mapped into memory: opening it does not depend on the number of records.
"""

import concurrent.futures
import concurrent.futures.process
import io
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np

from clip_jax.data import images
from clip_jax.data.locations import cache_folder, cache_key, is_remote
from clip_jax.data.sources.protocol import MAX_CAPTION
from clip_jax.data.sources.tar_members import BLOCK, Damaged, members
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError
from clip_jax.files import tell

VERSION = 2
SUFFIX = ".index.npz"
MAGIC = b"clip_jax index 2"
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
LABEL = "cls"

MOST = np.iinfo(np.uint16).max
# Numbers of pixels and characters are cut to what fits; 0 is "not known". A record of `MOST` blocks may be longer.
ROW = np.dtype([("block", "<u4"), ("blocks", "<u2"), ("width", "<u2"), ("height", "<u2"), ("characters", "<u2")])

# What is read at a time, from a header on: with what is shorter the next headers come along. In a bucket a request takes about
# as long as a mebibyte, so only longer members are passed over.
WINDOW = {False: 4 << 10, True: 1 << 20}  # local, in a bucket
WORKERS = 64  # shards of a bucket that are read at the same time


class Index:
  """The rows of all shards, one after the other.

  Attributes:
    ends: int64 [shards], the number of records up to the end of each shard.
    rows: `ROW` [records].
    key: a string that is another one when the shards are others.
  """

  def __init__(self, paths, *, allow_truncated=False, storage=None, rebuild=False, beside=None, processes=0, log=None):
    """Opens the index, building what is missing or out of date.

    Args:
      paths: tar files, local or in buckets.
      allow_truncated: accept a shard that is cut off, with the records that are whole.
      storage: a `Storage`.
      rebuild: build all of it anew.
      beside: whether to keep a shard's index beside it; for local files only, if not given.
      processes: how many read local shards at the same time; 0: this one alone.
      log: called with a line of progress; standard error if not given.

    Raises:
      DataError: a shard is cut off, or is no tar archive.
      StorageError: a store does not answer, or a process that reads shards was killed.
    """
    self._storage = storage or Storage()
    self._allow_truncated, self._rebuild, self._beside = allow_truncated, rebuild, beside
    self._log = log or tell
    stamps = self._storage.stamps(paths)
    self.key = cache_key(str(VERSION), str(allow_truncated), *paths, *stamps)
    joined = cache_folder("index") / f"{self.key}.joined"
    found = None if rebuild else _mapped(joined)
    if found is None and _join(joined, self._tables(paths, stamps, processes)):
      found = _mapped(joined)
    if found is None:  # nowhere to keep it
      tables = list(self._tables(paths, stamps, processes))
      found = np.cumsum([len(table) for table in tables]), np.concatenate(tables)
    self.ends, self.rows = found

  def _tables(self, paths, stamps, processes):
    remote = sum(map(is_remote, paths))
    if processes > 1 and not remote:
      executor = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    else:
      executor = concurrent.futures.ThreadPoolExecutor(WORKERS if remote else 1)
    built = 0
    with executor:
      waiting = [executor.submit(self._load_or_scan, *one) for one in zip(paths, stamps, strict=True)]
      waiting.reverse()
      try:
        for number in range(1, len(paths) + 1):
          try:
            table, new = waiting.pop().result()
          except concurrent.futures.process.BrokenProcessPool as error:
            raise StorageError(
              f"A process that reads shards was killed, as the system does when memory runs out, while it read {paths[number - 1]} or one of "
              "those after it. What is indexed is kept; try again with fewer processes."
            ) from error
          built += new
          if new and (built % 100 == 0 or number == len(paths) > 20):
            self._log(f"index: {number:,} of {len(paths):,} shards")
          yield table
      finally:
        executor.shutdown(cancel_futures=True)

  def _load_or_scan(self, path, stamp):
    # The stamp was taken before: an index of a shard that is being written must not look up to date.
    stamp = f"{VERSION} {stamp}"
    if not self._rebuild:
      for place in (path + SUFFIX, _in_cache(path)):
        table, cut = _load(self._storage, place, stamp)
        if table is not None and (self._allow_truncated or not cut):
          return table, 0
    table, cut = scan(self._storage, path)
    if cut and not self._allow_truncated:
      raise DataError(f"{path}: {cut} Re-download it, or set data.allow_truncated=True.")
    beside = not is_remote(path) if self._beside is None else self._beside
    _save(self._storage, ([path + SUFFIX] if beside else []) + [_in_cache(path)], table, stamp, bool(cut))
    return table, 1

  def __getstate__(self):
    return {key: value for key, value in vars(self).items() if key != "_log"}  # for the processes that read shards


def scan(storage, path):
  """Builds the index of one shard from its headers; most of the data between them is skipped.

  Args:
    storage: a `Storage`.
    path: a tar file.

  Returns:
    `ROW` [records], and a sentence on where the shard is cut off or None. What has no image is no
    record; one without a caption is, and cannot be read. Not in it is neither is the record that the cut goes through.

  Raises:
    DataError: not a tar archive.
  """
  size = storage.size(path)
  window = _Window(storage, path, size)
  rows, kinds, run, reason, beyond = [], [set(), set()], None, None, None
  try:
    for member in members(window.read, 0, size):
      if member.plain and not member.hidden:
        if run is None or member.key != run.key:
          _close(run, rows, kinds)
          run = _Run(member.key)
        run.add(member, window)
  except Damaged as error:
    if window.read(0, BLOCK)[257:262] != b"ustar" and size >= BLOCK:
      raise DataError(
        f"{path} is not an uncompressed tar archive ({error}). Unpack or re-download it, or leave it out."
      ) from error
    reason, beyond = str(error), error.key
  # The record of the member that is cut is not whole. Where nothing says whose member would have come next, the last
  # record counts as whole if it has every kind of member that the record before it has.
  if run and not (reason and beyond == run.key) and _close(run, rows, kinds):
    sure = not reason or beyond is not None or (kinds[0] and kinds[0] <= kinds[1])
    rows = rows if sure else rows[:-1]
  cut = f"cut off after {len(rows):,} whole records ({reason})." if reason else None
  return np.array(rows, ROW), cut


def is_caption(extension):
  """Whether a member holds a caption: `.txt`, `.json`, or one of them with a name before it, as in `.synthetic.txt`."""
  return extension.rpartition(".")[2] in CAPTIONS


class _Run:
  """The members of one record. What their contents tell is read while they are at hand."""

  def __init__(self, key):
    self.key, self.kinds, self._wanted = key, set(), []
    self._pixels, self._characters = None, {}

  def add(self, member, window):
    kind = member.extension
    if kind in self.kinds:
      return
    self.kinds.add(kind)
    if kind in IMAGES:
      # Of two images the one whose kind comes first is read.
      order = IMAGES.index(kind)
      if self._pixels is None or order < self._pixels[0]:
        self._pixels = order, _pixels(member, window)
    elif is_caption(kind):
      self._characters[kind] = _characters(member, window)
    elif kind != LABEL:
      return
    self._wanted.append(member)

  def row(self):
    if self._pixels is None:
      return None
    begin, end = self._wanted[0].begin, self._wanted[-1].end
    if begin // BLOCK > np.iinfo(np.uint32).max:
      return None  # past 2 TiB
    first = next((self._characters[kind] for kind in CAPTIONS if kind in self._characters), None)
    characters = max(self._characters.values(), default=0) if first is None else first
    sizes = (min(number, MOST) for number in (*self._pixels[1], characters))
    return begin // BLOCK, min((end - begin) // BLOCK, MOST), *sizes


def _close(run, rows, kinds):
  # Whether the run is a record; if so it is added.
  row = run.row() if run else None
  if row:
    rows.append(row)
    kinds.append(run.kinds)
    del kinds[0]
  return row is not None


class _Window:
  """Reads of one file that mostly find what they want in the bytes of the one before."""

  def __init__(self, storage, path, size):
    self._storage, self._path, self._size = storage, path, size
    self._begin, self._bytes = 0, b""
    self._most = WINDOW[is_remote(path)]

  def read(self, begin, count):
    at = begin - self._begin
    if at < 0 or at + count > len(self._bytes):
      stop = min(begin + max(count, self._most), self._size)
      self._bytes = self._storage.read(self._path, begin, stop) if stop > begin else b""
      self._begin, at = begin, 0
    return self._bytes[at : at + count]


def _pixels(image, window):
  size = images.header_size(window.read(image.data, min(image.size, 1 << 10)))
  if size is None and image.size > 1 << 10:  # behind a thumbnail or a colour profile
    size = images.header_size(window.read(image.data, min(image.size, 128 << 10)))
  return size or (0, 0)


def _characters(caption, window):
  if caption.size > MAX_CAPTION:
    return MOST
  text = window.read(caption.data, caption.size).decode("utf-8", "replace")
  if caption.extension.endswith("json"):
    try:
      about = json.loads(text)
      text = (about.get("captions") or [about.get("caption")])[0] or ""
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
      return 0
  return len(text.strip()) if isinstance(text, str) else 0


def _in_cache(path):
  return str(cache_folder("index") / f"{cache_key(path if is_remote(path) else os.path.abspath(path))}.npz")


def _load(storage, place, stamp):
  try:
    with np.load(io.BytesIO(storage.read(place)), allow_pickle=False) as saved:
      if str(saved["stamp"]) == stamp and saved["records"].dtype == ROW:
        return saved["records"], bool(saved["cut"])
  except StorageError:
    raise
  except Exception:  # missing, or damaged in any of the ways that NumPy and zipfile can meet
    pass
  return None, None


def _save(storage, places, table, stamp, cut):
  content = io.BytesIO()
  np.savez(content, records=table, stamp=np.array(stamp), cut=np.array(cut))
  for place in places:
    try:
      if not is_remote(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
      storage.write(place, content.getvalue())
      return
    except OSError:  # a read-only or full folder: the cache is next
      continue


def _join(path, tables):
  # Rows, then the ends of the shards, then how many there are of both: written as they come, in little memory.
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  ends = []
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
      for table in tables:
        file.write(table.tobytes())
        ends.append(len(table) + (ends[-1] if ends else 0))
      file.write(np.array([*ends, len(ends), ends[-1]], "<i8").tobytes() + MAGIC)
    os.replace(temporary, path)
  except OSError:
    return False
  finally:
    temporary.unlink(missing_ok=True)
  return True


def _mapped(path):
  try:
    content = np.memmap(path, np.uint8, "r")
  except (OSError, ValueError):  # it is not there, or empty
    return None
  tail = len(content) - len(MAGIC)
  if tail < 16 or bytes(content[tail:]) != MAGIC:
    return None
  shards, records = content[tail - 16 : tail].view("<i8").tolist()
  if shards < 1 or records < 0 or records * ROW.itemsize + shards * 8 + 16 != tail:
    return None
  size = records * ROW.itemsize
  return np.array(content[size : size + 8 * shards].view("<i8")), content[:size].view(ROW)
