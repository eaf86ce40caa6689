"""webdataset tar shards as img2dataset writes them, read in place through a byte-offset index.

A record is a run of members that share a name up to its first dot: an image (`.jpg`, `.png`, `.webp`), a caption (`.txt`, or
`.json` with `caption` or a list `captions`) and, in labelled sets, a class (`.cls`). All of it is read with one request.
"""

import contextlib
import io
import json

import numpy as np

from clip_jax.data.locations import file_name
from clip_jax.data.sources.protocol import Options, RandomAccess, Record, captions_of
from clip_jax.data.sources.tar_index import CAPTIONS, IMAGES, MOST, SUFFIX, Index, is_caption
from clip_jax.data.sources.tar_members import BLOCK, Damaged, members
from clip_jax.errors import DataError

FIRST = 100  # records
LONGEST = 1 << 30  # bytes of a record; an image is never as long


class TarSource(RandomAccess):
  """Random access to the records of many shards, in the order of their sorted names."""

  def __init__(self, pattern, options=None):
    """Opens the shards, building the indexes that are missing.

    Args:
      pattern: a glob of local files or of objects in a bucket, with {00000..00009} and {a,b} expanded.
      options: an `Options`; the defaults if not given.

    Raises:
      DataError: no shard matches, one is not a whole tar archive, or none holds a record.
    """
    self._options = options = options or Options()
    self.paths = shards(pattern, options.storage)
    self.index = Index(
      self.paths, allow_truncated=options.allow_truncated, storage=options.storage, log=options.log
    )
    self.fingerprint = f"tar {self.index.key} {options.captions}"
    if not len(self):
      raise DataError(f"{pattern}: no record has an image ({', '.join(IMAGES)}).")
    # A set of which nothing can be read is told now, and not after a thousand substitutes.
    first = self.fetch(range(min(len(self), FIRST))) if not self.index.rows["characters"][:FIRST].any() else [None]
    if all(isinstance(record, DataError) for record in first):
      raise DataError(f"{pattern}: none of the first {len(first)} records can be read; {first[0]}")

  def __len__(self):
    return len(self.index.rows)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, the `DataError` that says why."""
    places = [self._locate(index) for index in indices]
    ranges = [(path, begin, begin + BLOCK * int(row["blocks"])) for path, begin, row in places]
    if self._options.multilabel:
      ranges = [(path, begin, self._next(index, path)) for index, (path, begin, _) in zip(indices, places, strict=True)]
    raw = self._options.storage.read_many(ranges)
    return [self._record(*one) for one in zip(ranges, raw, strict=True)]

  def facts(self, start, stop):
    """Widths, heights and characters of captions, as the index has them, of records from `start` to before `stop`."""
    rows = self.index.rows[start:stop]
    return rows["width"], rows["height"], rows["characters"]

  def key(self, index):
    """The shard and the byte of a record, for messages about one that cannot be read."""
    path, begin, _ = self._locate(index)
    return f"{file_name(path)} at byte {begin:,}"

  def _locate(self, index):
    self.check_index(index)
    shard = int(np.searchsorted(self.index.ends, index, side="right"))
    row = self.index.rows[index]
    return self.paths[shard], BLOCK * int(row["block"]), row

  def _next(self, index, path):
    # Where the record after this one begins: a `.npy` is no part of what the index takes for a record.
    if index + 1 < len(self):
      following, begin, _ = self._locate(index + 1)
      if following == path:
        return begin
    return self._options.storage.size(path)

  def _record(self, place, raw):
    path, begin, stop = place
    if isinstance(raw, DataError):
      return DataError(f"{raw} It has changed since it was indexed.")
    try:
      if stop - begin == BLOCK * MOST:
        raw = self._whole(path, begin, raw)
      return self._parse(path, begin, raw)
    except DataError as error:
      return error

  def _whole(self, path, begin, raw):
    # A record that is longer than its row can say.
    size = self._options.storage.size(path)

    def read(at, count):
      if at + count <= len(raw):
        return raw[at : at + count]
      stop = min(begin + at + count, size)
      return self._options.storage.read(path, begin + at, stop) if stop > begin + at else b""

    end, key = 0, None
    try:
      for member in members(read, 0, size - begin):
        if member.plain and not member.hidden:
          key = key or member.key
          if member.key != key:
            break
          end = member.end
    except Damaged:
      pass  # what there is of it is parsed next, and says what is wrong
    if end > LONGEST:
      raise DataError(f"{path}: a record of {end:,} bytes at byte {begin:,}; {LONGEST:,} is the most.")
    return read(0, end) if end <= len(raw) else self._options.storage.read(path, begin, min(begin + end, size))

  def _parse(self, path, begin, raw):
    parts, first, changed = {}, None, False
    try:
      for member in members(lambda at, count: raw[at : at + count], 0, len(raw)):
        if member.plain and not member.hidden:
          first = first or member
          if member.key != first.key:
            break
          parts.setdefault(member.extension, member)
        if member.end == len(raw):
          break
    except Damaged:
      changed = True
    image = next((parts[kind] for kind in IMAGES if kind in parts), None)
    if changed or image is None:
      raise DataError(f"{path}: no record of {len(raw):,} bytes at byte {begin:,}; it has changed since it was indexed.")
    key = f"{file_name(path)}/{image.name}"
    if image.name.startswith("/") or ".." in image.name.split("/"):
      raise DataError(f"{key}: a name that leads out of the archive; such records are not read.")

    def content(member):
      return raw[member.data : member.data + member.size]

    fields = {kind: content(parts[kind]).decode("utf-8", "replace") for kind in parts if is_caption(kind)}
    label = _label(content(parts["cls"]), key) if "cls" in parts else None
    if self._options.multilabel and "npy" in parts:
      label = _labels(content(parts["npy"]), key)
    if not fields and label is None:
      raise DataError(f"{key}: no caption ({', '.join(CAPTIONS)}) follows or precedes it.")
    captions, weights = self._captions(fields, key, label)
    extra = _extra(fields, key) if self._options.extra else None
    return Record(content(image), captions, key, label, weights, extra)

  def _captions(self, fields, key, label):
    wanted = self._options.captions
    if not wanted and "txt" in fields:
      return captions_of(fields, wanted, ("txt",), key, label)
    # By the name of a member, or by a key of a .json among them.
    for kind in [kind for kind in fields if kind.endswith("json")]:
      fields |= {name: value for name, value in _json(fields[kind], key).items() if name not in fields}
    if not wanted and label is None and not (fields.get("captions") or fields.get("caption")):
      raise DataError(f"{key}: its .json holds neither 'caption' nor 'captions'.")
    return captions_of(fields, wanted, ("captions", "caption"), key, label)


def shards(pattern, storage):
  """The sorted shards that a glob stands for.

  Raises:
    DataError: a part of it matches no file.
  """
  # With 'DIR/*' an index written beside its shard would be taken for a shard the next time.
  return [path for path in storage.expand(pattern) if not path.endswith(SUFFIX)]


def _extra(fields, key):
  found = {}
  for kind in fields:
    if kind.endswith("json"):
      with contextlib.suppress(DataError):  # nothing in it is needed, or its captions would have been
        found |= _json(fields[kind], key)
  return found


def _label(raw, key):
  try:
    return int(raw)
  except ValueError:
    raise DataError(f"{key}: its .cls holds {raw[:20]!r} instead of a class number.") from None


def _labels(raw, key):
  try:
    given = np.load(io.BytesIO(raw), allow_pickle=False)
    if given.ndim == 1 and given.dtype.kind in "biuf":
      return tuple(np.flatnonzero(given > 0).tolist())
  except (ValueError, OSError, EOFError):
    pass
  raise DataError(f"{key}: its .npy is not a list of numbers, one for each class.")


def _json(text, key):
  try:
    about = json.loads(text)
    if isinstance(about, dict):
      return about
  except (ValueError, RecursionError):
    pass
  raise DataError(f"{key}: its .json holds neither 'caption' nor 'captions'.")
