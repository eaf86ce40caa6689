"""webdataset tar shards as img2dataset writes them, read in place through a byte-offset index.

A record is a run of members that share a name up to its first dot: an image (`.jpg`, `.png`, `.webp`),
a caption (`.txt`, or `.json` with `caption` or a list `captions`) and, in labelled sets, a class (`.cls`).
The index is built once a shard from its headers, and kept as `SHARD.index.npz` beside it, or in
`$CLIP_JAX_CACHE/index` where that folder cannot be written. It is rebuilt when the shard's size or time of
change differs.
"""

import glob
import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from clip_jax.data.sources.protocol import Record
from clip_jax.errors import DataError

INDEX_VERSION = 1
INDEX_SUFFIX = ".index.npz"
BLOCK = tarfile.BLOCKSIZE
IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")  # the first that a record has is read

# Where the parts of a record lie in the shard: bytes from its start, and bytes; size 0 where there is none.
DTYPE = np.dtype(
  [
    ("image", "<u8"),
    ("image_size", "<u4"),
    ("caption", "<u8"),
    ("caption_size", "<u4"),
    ("caption_kind", "u1"),  # index into CAPTIONS
    ("label", "<u8"),
    ("label_size", "<u4"),
  ]
)


class TarSource:
  """Random access to the records of many shards, in the order of their sorted names."""

  def __init__(self, pattern, *, allow_truncated=False, log=None):
    """Opens the shards, building the indexes that are missing.

    Args:
      pattern: a glob, with {00000..00009} and {a,b} expanded.
      allow_truncated: use the whole records of a shard that is cut off.
      log: called with a line of progress while indexes are built; standard error if not given.

    Raises:
      DataError: no shard matches, one is not a whole tar archive, or none holds a record.
    """
    self.paths = expand(pattern)
    tables = index_shards(self.paths, allow_truncated=allow_truncated, log=log)
    self._tables = tables
    self._ends = np.cumsum([len(table) for table in tables])
    if not len(self):
      raise DataError(
        f"{pattern}: no record has both an image ({', '.join(IMAGES)}) and a caption ({', '.join(CAPTIONS)})."
      )

  def __len__(self):
    return int(self._ends[-1])

  def __getitem__(self, index):
    path, row = self._locate(index)
    # Opened for each record: a descriptor kept for each of 10,000 shards would be over the usual limit.
    try:
      with open(path, "rb", buffering=0) as file:
        image, name = _read_member(file, row["image"], row["image_size"])
        caption, _ = _read_member(file, row["caption"], row["caption_size"])
        label = None
        if row["label_size"]:
          label, _ = _read_member(file, row["label"], row["label_size"])
    except FileNotFoundError:
      raise DataError(f"{path} is not there any more; it was when it was indexed.") from None
    key = f"{Path(path).name}/{name}"
    captions = _captions(caption, CAPTIONS[row["caption_kind"]], key)
    return Record(image, captions, key, None if label is None else _label(label, key))

  def key(self, index):
    """The shard and the byte of a record, for messages about one that cannot be read."""
    path, row = self._locate(index)
    return f"{Path(path).name} at byte {int(row['image']):,}"

  def _locate(self, index):
    if not 0 <= index < len(self):
      raise IndexError(f"record {index:,} of {len(self):,}")
    shard = int(np.searchsorted(self._ends, index, side="right"))
    return self.paths[shard], self._tables[shard][index - (self._ends[shard - 1] if shard else 0)]


def expand(pattern):
  """The sorted files that a glob with braces stands for.

  Raises:
    DataError: a part of the pattern matches no file.
  """
  if re.match(r"\w+://", pattern):
    raise DataError(f"{pattern}: only local paths can be read; mount the bucket or copy the shards.")
  found = set()
  for part in _expand_braces(os.path.expanduser(pattern)):
    matches = glob.glob(part)
    if not matches:
      raise DataError(f"{part}: no such file. The pattern must match tar shards, such as 'DIR/*.tar'.")
    # With 'DIR/*' an index written beside its shard would be taken for a shard the next time.
    found.update(path for path in matches if not path.endswith(INDEX_SUFFIX))
  return sorted(found)


def index_shards(paths, *, allow_truncated=False, rebuild=False, log=None):
  """Loads the index of every shard, building those that are missing or out of date.

  Args:
    paths: local tar files.
    allow_truncated: accept a shard that is cut off, with the records that are whole.
    rebuild: build all of them anew.
    log: called with a line of progress; standard error if not given.

  Returns:
    A list of structured arrays (`DTYPE`), one a shard.
  """
  log = log or (lambda line: print(line, file=sys.stderr, flush=True))
  tables, built = [], 0
  for number, path in enumerate(paths, 1):
    table = None if rebuild else _load(path, allow_truncated)
    if table is None:
      try:
        # Taken before the scan: an index of a shard that is being written must not look up to date.
        stamp = _stamp(path)
        table, cut = scan(path)
      except OSError as error:
        raise DataError(
          f"{path} cannot be read ({error.strerror}). "
          "The pattern must match tar shards, such as 'DIR/*.tar'."
        ) from error
      if cut and not allow_truncated:
        raise DataError(f"{path}: {cut} Re-download it, or set data.allow_truncated=True.")
      _save(path, table, stamp, bool(cut))
      built += 1
      if built % 100 == 0 or number == len(paths) > 20:
        log(f"index: {number:,} of {len(paths):,} shards")
    tables.append(table)
  return tables


def scan(path):
  """Builds the index of one shard from its headers; the data between them is skipped.

  Args:
    path: a local tar file.

  Returns:
    The structured array, and a sentence on where the shard is cut off or None. Records without an
    image or a caption are not in it, and neither is the record that the cut goes through.

  Raises:
    DataError: not a tar archive.
  """
  records = {}
  reason, beyond = _read_headers(path, records)
  if reason:
    _drop_unfinished(records, beyond)
  rows = [row for parts in records.values() if (row := _row(parts))]
  cut = f"cut off after {len(rows):,} whole records ({reason})." if reason else None
  return np.array(rows, DTYPE), cut


def _read_headers(path, records):
  # Fills `records`; returns why the shard is cut off, and the key of the cut member's record.
  size = os.path.getsize(path)
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        base, _, extension = member.name.rpartition("/")[2].partition(".")
        key = f"{os.path.dirname(member.name)}/{base}"
        plain = member.isreg() and not member.issparse()
        whole = not plain or 0 <= member.size <= size - member.offset_data
        # An offset that goes back comes from a damaged size, and would be followed in circles.
        if not whole or tar.offset < member.offset_data:
          return f"member {member.name} at byte {member.offset_data:,}", key
        if plain:
          records.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
      # The iterator stops at the first zero block, at a damaged header, or at the end of the file.
      if _block(path, tar.offset) != bytes(BLOCK):
        return f"no end-of-archive mark at byte {tar.offset:,}", None
  except (tarfile.TarError, ValueError, IndexError, OverflowError) as error:
    first = _block(path, 0)
    if len(first) == BLOCK and first[257:262] != b"ustar":
      raise DataError(
        f"{path} is not an uncompressed tar archive ({error}). "
        "Unpack or re-download it, or leave it out."
      ) from error
    return str(error), None
  return None, None


def _drop_unfinished(records, beyond):
  if beyond is not None:
    records.pop(beyond, None)
    return
  # Nothing says whose member would have come next: the last record counts as whole if it has every
  # kind of member that the record before it has.
  kinds = [set(parts) for parts in records.values() if _row(parts)]
  last = next(reversed(records), None)
  if last is not None and _row(records[last]) and (len(kinds) < 2 or not kinds[-2] <= kinds[-1]):
    del records[last]


def _block(path, offset):
  with open(path, "rb") as file:
    file.seek(offset)
    return file.read(BLOCK)


def _row(parts):
  image = next((parts[e] for e in IMAGES if e in parts), None)
  kind = next((i for i, e in enumerate(CAPTIONS) if e in parts), None)
  if image is None or kind is None:
    return None
  return (*image, *parts[CAPTIONS[kind]], kind, *parts.get("cls", (0, 0)))


def _index_path(path, beside):
  if beside:
    return Path(path + INDEX_SUFFIX)
  cache = Path(os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax").expanduser()
  return cache / "index" / (hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32] + ".npz")


def _stamp(path):
  stat = os.stat(path)
  return np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)


def _load(path, allow_truncated):
  for beside in (True, False):
    try:
      with np.load(_index_path(path, beside), allow_pickle=False) as saved:
        usable = np.array_equal(saved["stamp"], _stamp(path)) and (allow_truncated or not saved["cut"])
        if usable and saved["records"].dtype == DTYPE:
          return saved["records"]
    except Exception:  # missing, or damaged in any of the ways that NumPy and zipfile can meet
      continue
  return None


def _save(path, table, stamp, cut):
  for beside in (True, False):
    target = _index_path(path, beside)
    temporary = None
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".index-")
      with os.fdopen(handle, "wb") as file:
        np.savez(file, records=table, stamp=stamp, cut=np.array(cut))
      os.replace(temporary, target)
      return
    except OSError:  # a read-only or full folder: the cache is next
      if temporary is not None:
        Path(temporary).unlink(missing_ok=True)


def _read_member(file, offset, size):
  start = int(offset) - BLOCK
  raw = os.pread(file.fileno(), int(size) + BLOCK, start)
  if len(raw) != int(size) + BLOCK:
    raise DataError(
      f"{file.name}: ends before byte {int(offset + size):,}; it has changed since it was indexed."
    )
  if not re.fullmatch(rb"[0 ]*%o[\0 ]*" % size, raw[124:136]):
    raise DataError(
      f"{file.name}: no member of {size:,} bytes at byte {start:,}; "
      "it has changed since it was indexed."
    )
  return raw[BLOCK:], raw[:100].rstrip(b"\0").decode("utf-8", "replace")


def _label(raw, key):
  try:
    return int(raw)
  except ValueError:
    raise DataError(f"{key}: its .cls holds {raw[:20]!r} instead of a class number.") from None


def _captions(raw, kind, key):
  text = raw.decode("utf-8", "replace")
  if kind == "txt":
    return [text]
  try:
    about = json.loads(text)
    captions = about.get("captions") or [about["caption"]]
  except (ValueError, KeyError, AttributeError, RecursionError) as error:
    raise DataError(f"{key}: its .json holds neither 'caption' nor 'captions'.") from error
  if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
    raise DataError(f"{key}: 'captions' must be a list of strings.")
  return captions


def _expand_braces(pattern):
  match = re.search(r"\{([^{}]*)\}", pattern)
  if not match:
    return [pattern]
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
  if numbers:
    low, high = sorted(map(int, numbers.groups()))
    choices = [f"{i:0{len(numbers[1])}}" for i in range(low, high + 1)]
  else:
    choices = match[1].split(",")
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [whole for c in choices for whole in _expand_braces(before + c + after)]
