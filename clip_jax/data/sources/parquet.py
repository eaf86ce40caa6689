"""Parquet files with the images in them, as Hugging Face datasets and img2dataset write them.

A record is a row. Row groups are what parquet can read at a time: those that were read lately are kept for a while, and
the records of one call that lie in the same group are taken from one read.
"""

import concurrent.futures

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.locations import file_name
from clip_jax.data.sources import opening
from clip_jax.data.sources.protocol import Options, RandomAccess, Record, captions_of
from clip_jax.data.sources.recent import Recent
from clip_jax.errors import DataError

DECODED_BYTES = 512 << 20  # of row groups that are kept
FOOTER_BYTES = 64 << 20  # of footers that are kept
LARGE_GROUP = 128 << 20  # bytes of images; each is read for as little as one record
GROUPS_AT_ONCE = 4  # that one call reads
LINKS = ("url", "URL", "image_url")


class ParquetSource(RandomAccess):
  """Random access to the rows of many files, in the order of their sorted names."""

  def __init__(self, pattern, options=None):
    """Opens the files: reads their footers, if they are not known yet.

    Args:
      pattern: a glob, with {00000..00009} and {a,b} expanded; local, gs:// or s3://.
      options: an `Options`, the defaults if not given; its names are columns.

    Raises:
      DataError: no file matches, one is no parquet file, has no image or captions, or there is no row.
      StorageError: a store does not answer.
    """
    options = options or Options()
    self._paths, self._options = options.storage.expand(pattern), options
    self._footers, self._groups = Recent(FOOTER_BYTES), Recent(DECODED_BYTES)
    stamps = options.storage.stamps(self._paths)
    self._columns = Columns(self._footer(self._paths[0]).schema.to_arrow_schema(), options, self._paths[0])

    def build():
      found = opening.each(self._rows, self._paths, options, "footers")
      return np.concatenate([np.array([len(rows) for rows in found]), *found]).astype(np.uint64)

    self.fingerprint = opening.fingerprint("parquet", self._paths, stamps, options)
    table = opening.kept(f"parquet 1 {options.captions!r} {options.image}", self._paths, stamps, options.storage, build)
    self._file_ends = np.cumsum(table[: len(self._paths)], dtype=np.int64)  # in row groups
    self._ends = np.cumsum(table[len(self._paths) :], dtype=np.int64)  # of row groups, in rows
    if not len(self):
      raise DataError(f"{pattern}: there is no row in these files.")
    self._warn()

  def __len__(self):
    return int(self._ends[-1]) if len(self._ends) else 0

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    wanted = {}
    for position, index in enumerate(indices):
      group, row = self._locate(index)
      wanted.setdefault(group, []).append((position, row))
    results = [None] * len(indices)

    def take(group):
      table = self._groups.get([group], self._read)[group]
      for position, row in wanted[group]:
        results[position] = self._columns.record(table, row, self.key(indices[position]))

    missing = [group for group in wanted if group not in self._groups]
    missing = missing if len(missing) > 1 else []
    with concurrent.futures.ThreadPoolExecutor(GROUPS_AT_ONCE) as executor:  # starts threads for what is missing only
      reading = executor.map(take, missing)
      for group in wanted.keys() - set(missing):
        take(group)
      list(reading)
    return results

  def key(self, index):
    """The file of a record, and its row there."""
    group, row = self._locate(index)
    path, first = self._file(group)
    before = (int(self._ends[group - 1]) if group else 0) - (int(self._ends[first - 1]) if first else 0)
    return f"{file_name(path)}/{before + row}"

  def _locate(self, index):
    self.check_index(index)
    group = int(np.searchsorted(self._ends, index, side="right"))
    return group, index - (int(self._ends[group - 1]) if group else 0)

  def _file(self, group):
    # The file of a row group, and the first row group of that file.
    file = int(np.searchsorted(self._file_ends, group, side="right"))
    return self._paths[file], int(self._file_ends[file - 1]) if file else 0

  def _footer(self, path):
    def make(paths):
      metadata = self._open(paths[0]).metadata
      return [(metadata, 4 * metadata.serialized_size)]

    return self._footers.get([path], make)[path]

  def _open(self, path, metadata=None):
    try:
      return pq.ParquetFile(pa.PythonFile(self._options.storage.open(path)), metadata=metadata, pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
      raise DataError(f"{path} is no parquet file, or is cut off ({error}).") from error

  def _rows(self, path):
    # The numbers of rows in the groups of a file, whose columns are checked.
    metadata = self._footer(path)
    here = metadata.schema.to_arrow_schema()
    if Columns(here, self._options, path).read != self._columns.read:
      raise DataError(f"{path} has other columns than {self._paths[0]}; read them as two data sets.")
    return np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], np.int64)

  def _read(self, groups):
    # One row group, as Recent wants it.
    (group,) = groups
    path, first = self._file(group)
    try:
      table = self._open(path, self._footer(path)).read_row_group(group - first, columns=self._columns.read, use_threads=False)
    except (pa.ArrowException, OSError) as error:
      return [(DataError(f"row group {group - first} cannot be read ({error})."), 0)]
    except DataError as error:
      return [(error, 0)]
    return [(table, table.nbytes)]

  def _warn(self):
    footer = self._footer(self._paths[0])
    size = max((footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)), default=0)
    if size > LARGE_GROUP:
      opening.log(self._options)(
        f"{self._paths[0]}: row groups of {size >> 20:,} MiB, and one is read for as little as one record. "
        "Write the files with row_group_size=100, or convert the data set to shards."
      )


class Columns:
  """What is read of each row.

  Attributes:
    read: the columns to read, as parquet names them.
  """

  def __init__(self, schema, options, path):
    """Chooses the columns by name and type.

    Args:
      schema: the Arrow schema of a file.
      options: `Options`; those it names come first.
      path: names the file in messages.

    Raises:
      DataError: there is no image or no caption.
    """
    kinds = {field.name: field.type for field in schema}
    images = [name for name, kind in kinds.items() if _is_image(kind)]
    texts = [name for name, kind in kinds.items() if is_text(kind)]
    links = next((name for name in LINKS if name in kinds), None)
    needed = "An image column is binary, or a struct with 'bytes'; name it with data.image."
    if links and not images:
      needed = f"It holds links ({links}) in place of images: download them with img2dataset first, and read what it writes."
    given = [options.image] if options.image else []
    self._image = opening.pick(images, given, opening.IMAGES, f"{path} has no image column", needed)[0]
    self._label = next((name for name in opening.LABELS if name in kinds and pa.types.is_integer(kinds[name])), None)
    self._captions = opening.pick(
      texts,
      [name for name, _ in options.captions],
      opening.CAPTIONS,
      f"{path} has no caption column",
      f"Name one with data.captions: {', '.join(texts) or 'there is none of texts, or of lists of texts'}.",
      optional=self._label is not None,
    )
    self._wanted = options.captions
    nested = pa.types.is_struct(kinds[self._image])
    needed = {self._image, self._label, *self._captions}
    self._extra = [name for name in kinds if options.extra and name not in needed and not _is_image(kinds[name])]
    self.read = [f"{self._image}.bytes" if nested else self._image, *self._captions, *([self._label] if self._label else [])]
    self.read += self._extra

  def record(self, table, row, key):
    """The record in a row, or a `DataError`.

    Args:
      table: the columns `read`, or a `DataError`.
      row: a number.
      key: names the record in messages.
    """
    if isinstance(table, DataError):
      return DataError(f"{key}: {table}")
    try:
      image = table[self._image][row].as_py()
      image = image["bytes"] if isinstance(image, dict) else image
      if not image:
        raise DataError(f"{key}: its image, in column {self._image!r}, is missing.")
      texts = {name: table[name][row].as_py() for name in self._captions}
      label = table[self._label][row].as_py() if self._label else None
      captions, weights = captions_of(texts, self._wanted, self._captions, key, label)
      extra = {name: table[name][row].as_py() for name in self._extra} if self._extra else None
      return Record(image, captions, key, label, weights, extra)
    except UnicodeDecodeError:
      return DataError(f"{key}: a caption is not UTF-8.")
    except DataError as error:
      return error


def is_text(kind):
  """Whether an Arrow type is text, or a list of texts."""
  if pa.types.is_list(kind) or pa.types.is_large_list(kind):
    kind = kind.value_type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind):
  if pa.types.is_struct(kind):
    return any(field.name == "bytes" and _is_image(field.type) for field in kind)
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
