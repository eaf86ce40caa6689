"""The files that a preparation keeps: what became of each record, which records go where, and what is done.

Of each range of records there is a Parquet file in `OUT/manifest`, which may be of use later. `OUT/work` is needed until
the data set is finished only.
"""

import io
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.locations import is_remote
from clip_jax.data.preparation.reading import ROW_BITS, UNIT_BITS
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError

EXCLUDED = np.uint64(1 << UNIT_BITS + ROW_BITS)  # from here on, numbers are of images to keep out

SCHEMA = pa.schema({
  "id": pa.uint64(),
  "reason": pa.string(),
  "message": pa.string(),
  "pixels": pa.binary(16),
  "looks": pa.uint64(),
  "texts": pa.uint64(),
  "width": pa.uint32(),
  "height": pa.uint32(),
  "size": pa.uint32(),
  "untagged": pa.list_(pa.string()),
  "captions": pa.list_(pa.string()),
})  # fmt: skip

# A record while it is compared. `leader` is the first with the same pixels; `place` its number among those of its range that
# passed; `start` the id of that range's first.
ROW = np.dtype([
  ("id", "<u8"), ("pixels", "<u8", 2), ("looks", "<u8"), ("has_looks", "?"), ("texts", "<u8"), ("area", "<u4"),
  ("size", "<u4"), ("leader", "<u8"), ("place", "<u4"), ("start", "<u8"),
])  # fmt: skip


class Layout:
  """Reads and writes files below the output folder, each whole or not at all."""

  def __init__(self, out):
    """Prepares.

    Args:
      out: the folder, local, gs:// or s3://.
    """
    self.out = (out if is_remote(out) else os.path.expanduser(out)).rstrip("/")
    self.storage = Storage()

  def path(self, name):
    """Where a file is."""
    return f"{self.out}/{name}"

  def has(self, name):
    """Whether a file is there."""
    try:
      self.storage.stamps([self.path(name)])
      return True
    except DataError:
      return False

  def read(self, name):
    """The bytes of a file."""
    return self.storage.read(self.path(name))

  def read_json(self, name):
    """The content of a JSON file."""
    return json.loads(self.read(name))

  def write(self, name, content):
    """Writes a file.

    Args:
      name: below the output folder.
      content: bytes.
    """
    with self.new(name) as temporary:
      Path(temporary).write_bytes(content)

  def write_json(self, name, content):
    """Writes a JSON file that people read, too."""
    self.write(name, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

  def new(self, name):
    """A context with a local path to write to; the file is put where it belongs at its end."""
    return _New(self, name)

  def clean(self):
    """Removes `OUT/work`; in a bucket it stays."""
    if not is_remote(self.out):
      shutil.rmtree(self.path("work"), ignore_errors=True)

  def names(self, pattern):
    """The sorted names of files that a glob matches."""
    try:
      return [path[len(self.out) + 1 :] for path in self.storage.expand(self.path(pattern))]
    except DataError:
      return []


class _New:
  def __init__(self, layout, name):
    self._storage, self._target = layout.storage, layout.path(name)
    self._folder = Path(layout.path("work/writing"))
    self._remote = is_remote(self._target)

  def __enter__(self):
    if self._remote:
      handle, self._temporary = tempfile.mkstemp(prefix="clip-jax-")
      os.close(handle)
    else:
      Path(self._target).parent.mkdir(parents=True, exist_ok=True)
      # What a kill leaves there goes with the folder. A name of its own: an engine may run a piece of work twice at the same time.
      self._folder.mkdir(parents=True, exist_ok=True)
      self._temporary = str(self._folder / uuid.uuid4().hex)
    return self._temporary

  def __exit__(self, kind, *_):
    try:
      if kind is None and self._remote:
        self._storage.write(self._target, Path(self._temporary).read_bytes())
      elif kind is None:
        with open(self._temporary, "rb") as file:
          os.fsync(file.fileno())
        os.replace(self._temporary, self._target)
    finally:
      Path(self._temporary).unlink(missing_ok=True)


def name_of(range_name):
  """The name of a range's manifest."""
  return f"manifest/{range_name}.parquet"


def encode(place, judged):
  """A range's manifest as bytes, the same for the same records.

  Args:
    place: the `Range`.
    judged: `Judged` of each record.
  """
  columns = {name: [getattr(one, name) for one in judged] for name in SCHEMA.names if name != "id"}
  columns["pixels"] = [pixels or None for pixels in columns["pixels"]]
  table = pa.table({"id": np.array(place.ids(), np.uint64)} | columns, SCHEMA)
  content = io.BytesIO()
  pq.write_table(table, content, compression="zstd")
  return content.getvalue()


def decode(content, columns=None):
  """The table in a manifest."""
  return pq.read_table(pa.BufferReader(content), columns=columns)


def rows(table):
  """The records of a manifest that passed, as `ROW`s.

  Args:
    table: as `decode` returns it.
  """
  start = table["id"][0].as_py()
  table = table.filter(pa.compute.equal(table["reason"], ""))
  found = np.zeros(len(table), ROW)
  for name in ("id", "texts", "size"):
    found[name] = table[name].to_numpy()
  found["pixels"] = np.frombuffer(b"".join(table["pixels"].to_pylist()), "<u8").reshape(-1, 2)
  found["has_looks"] = table["looks"].is_valid().to_numpy()
  found["looks"] = table["looks"].fill_null(0).to_numpy()
  area = table["width"].to_numpy().astype(np.uint64) * table["height"].to_numpy()
  found["area"] = np.minimum(area, np.iinfo(np.uint32).max)
  found["place"], found["start"] = np.arange(len(table)), start
  return found


def to_bytes(array):
  """An array as bytes."""
  content = io.BytesIO()
  np.save(content, array, allow_pickle=False)
  return content.getvalue()


def from_bytes(content):
  """The array in bytes."""
  return np.load(io.BytesIO(content), allow_pickle=False)
