"""What is read, and in which pieces: files of records, and ranges of them."""

import functools
import glob
import itertools
import os
from typing import NamedTuple

from clip_jax.data import sources
from clip_jax.data.locations import cache_key, is_remote
from clip_jax.data.sources import tar, tar_index
from clip_jax.data.sources.folder import ENDINGS, METADATA
from clip_jax.data.sources.protocol import RandomAccess, Record
from clip_jax.errors import DataError, redact

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
FILES = "images"  # the format of image files without records
UNIT_BITS, ROW_BITS = 22, 40  # of the number of a record; the bit above is that of an image to keep out. Beam's integers have a sign


class Unit(NamedTuple):
  """What is opened at a time: mostly a file."""

  number: int
  format: str  # of `sources.FORMATS`, or `FILES`
  path: str
  exclude: bool  # whether it holds images to keep out


class Range(NamedTuple):
  """A piece of work."""

  unit: Unit
  start: int
  stop: int

  @property
  def name(self):
    """Names the range in names of files, whose order is that of the ranges."""
    return name_of(self.ids()[0])

  def ids(self):
    """The numbers of the records, whatever the ranges are."""
    first = self.unit.exclude << UNIT_BITS + ROW_BITS | self.unit.number << ROW_BITS
    return range(first + self.start, first + self.stop)


def locate(number):
  """The number of the unit, and the record there, of the number of a record."""
  return number >> ROW_BITS, number & (1 << ROW_BITS) - 1


def name_of(first):
  """Names a range by the number of its first record."""
  unit, start = locate(first)
  excluded, unit = divmod(unit, 1 << UNIT_BITS)
  return f"{'exclude' if excluded else 'records'}-{unit:07}-{start:013}"


class ImageFiles(RandomAccess):
  """Image files as records without captions."""

  def __init__(self, pattern, options):
    """Lists them.

    Args:
      pattern: a glob, or a local folder, of which all images are taken.
      options: `Options`.

    Raises:
      DataError: there is no image.
    """
    if os.path.isdir(pattern):
      pattern = f"{glob.escape(pattern.rstrip('/'))}/**/*"
    self._storage = options.storage
    self._paths = [path for path in self._storage.expand(pattern) if path.lower().endswith(IMAGES)]
    if not self._paths:
      raise DataError(f"{pattern}: none of these files is an image ({', '.join(IMAGES)}).")
    self.fingerprint = cache_key(*self._paths, *self._storage.stamps(self._paths))

  def __len__(self):
    return len(self._paths)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    contents = self._storage.read_many([(self._paths[i], 0, None) for i in indices])
    return [c if isinstance(c, DataError) else Record(c, [], self.key(i)) for i, c in zip(indices, contents, strict=True)]

  def key(self, index):
    """The path."""
    return redact(self._paths[index])


def units(pattern, options, exclude=False, first=0):
  """The files that a pattern stands for.

  Args:
    pattern: as `sources.create` takes it, or with `exclude` image files, too.
    options: `Options`.
    exclude: whether these are images to keep out.
    first: the number of the first.

  Raises:
    DataError: there are none.
  """
  if exclude and _is_images(pattern, options.storage):
    return [Unit(first, FILES, pattern, True)]
  name, path = sources.format_of(pattern)
  if name == "tar":
    paths = tar.shards(path, options.storage)
  else:
    paths = options.storage.expand(path) if name in ("array_record", "parquet") else [path]
  single = paths == [path]
  return [Unit(first + i, name, one if single else glob.escape(one), exclude) for i, one in enumerate(paths)]


def _is_images(pattern, storage):
  if pattern.lower().endswith(IMAGES):
    return True
  try:
    name, path = sources.format_of(pattern)
  except DataError:
    return True
  if name != "folder" or path.lower().endswith(ENDINGS):
    return False
  for metadata in METADATA:
    try:
      storage.stamps([f"{path.rstrip('/')}/{metadata}"])
      return False
    except DataError:
      continue
  return True


def stamp(some, options):
  """A string that is another one when the content of units is.

  Args:
    some: units.
    options: `Options`.
  """
  files = [unit.path for unit in some if unit.format in ("tar", "array_record", "parquet")]
  paths = [options.storage.expand(path)[0] if glob.has_magic(path) else path for path in files]
  others = [open_unit(unit, options).fingerprint for unit in some if unit.path not in files]
  return cache_key(*paths, *options.storage.stamps(paths), *others)


@functools.lru_cache(maxsize=4)
def open_unit(unit, options):
  """The source of a unit.

  Args:
    unit: a `Unit`.
    options: `Options`.

  Raises:
    DataError: it cannot be read, or there is no record.
  """
  return ImageFiles(unit.path, options) if unit.format == FILES else sources.create(unit.format, unit.path, options)


def ranges(unit, settings):
  """Splits a unit into pieces of work.

  Args:
    unit: a `Unit`.
    settings: `Settings`.

  Returns:
    A list of `Range`, empty for a file without records.

  Raises:
    DataError: it is no file of its format, or is cut off.
  """
  options = settings.options()
  if unit.format == "parquet":
    # Whole row groups: that is what is read for one record.
    groups, edges = _row_groups(options.storage.expand(unit.path)[0], options.storage), [0]
    for i, stop in enumerate(groups):
      if stop - edges[-1] >= settings.range_records or i == len(groups) - 1:
        edges.append(stop)
  else:
    edges = [*range(0, _count(unit, options), settings.range_records), _count(unit, options)]
  return [Range(unit, start, stop) for start, stop in itertools.pairwise(edges) if stop > start]


def _count(unit, options):
  if unit.format == "tar":
    paths = tar.shards(unit.path, options.storage)
    # Left beside it in a bucket, too, where the bucket may be written: other machines need not read all headers again.
    index = tar_index.Index(
      paths, allow_truncated=options.allow_truncated, storage=options.storage, beside=is_remote(paths[0]) or None
    )
    return len(index.rows)
  if unit.format == "array_record":
    from clip_jax.data.sources.array_record import Shards

    return len(Shards(options.storage.expand(unit.path), options))
  return len(open_unit(unit, options))


def _row_groups(path, storage):
  # The row after the last of each.
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    metadata = pq.ParquetFile(pa.PythonFile(storage.open(path))).metadata
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path} is no parquet file, or is cut off ({error}).") from error
  return list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
