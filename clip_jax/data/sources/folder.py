"""Lists of image files with captions: Hugging Face's imagefolder, and the CSV files of open_clip.

An imagefolder has a file `metadata.csv`, `.jsonl` or `.parquet` that names images of that folder only. Any other list of
that kind may name files anywhere; paths that are not absolute begin at the folder of the list.
"""

import csv
import os
import posixpath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clip_jax.data import locations
from clip_jax.data.sources import opening
from clip_jax.data.sources.parquet import is_text
from clip_jax.data.sources.protocol import Options, RandomAccess, Record, captions_of
from clip_jax.errors import DataError, redact

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
FILES = ("file_name", "filepath", "file_path", "filename", "image", "image_path", "image_file_name", "path", "file")
CAPTIONS = (*opening.CAPTIONS, "title")
BLOCK = 64 << 20  # bytes of a list that are parsed at a time; no row may be longer


class FolderSource(RandomAccess):
  """Random access to the images that a list names, in its order. A row takes the memory of its texts, and a few bytes."""

  def __init__(self, path, options=None):
    """Reads the list; no image is opened.

    Args:
      path: a folder with a metadata file, or a list: `.csv` or `.tsv` with tabs or commas, `.jsonl`, `.parquet`;
        local, gs:// or s3://.
      options: an `Options`, the defaults if not given; its names are columns, `image` the one with
        the paths.

    Raises:
      DataError: there is no list, it cannot be parsed, it has no paths or no captions, or there is no row.
      StorageError: a store does not answer.
    """
    options = options or Options()
    path = path if locations.is_remote(path) else os.path.expanduser(path)
    self._storage, self._wanted = options.storage, options.captions
    self._path, content = _find(options.storage, path)
    self._folder = posixpath.dirname(self._path)
    # In what others have packed together, a path to elsewhere is a mistake, or an attack.
    self._confined = os.path.basename(self._path) in METADATA
    table = _parse(self._path, content)
    texts = [name for name in table.column_names if is_text(table[name].type)]
    given = [options.image] if options.image else []
    file = opening.pick(texts, given, FILES, f"{self._path} has no column of paths", "Name it with data.image.")[0]
    self._labels = _labels(table)
    self._captions = opening.pick(
      [name for name in texts if name != file],
      [name for name, _ in options.captions],
      CAPTIONS,
      f"{self._path} has no caption column",
      f"Name one with data.captions: {', '.join(name for name in texts if name != file) or 'there is none'}.",
      optional=self._labels is not None,
    )
    self._files, self._texts = table[file], {name: table[name] for name in self._captions}
    stamps = options.storage.stamps([self._path])
    self.fingerprint = opening.fingerprint("folder", [self._path], stamps, options)
    if not len(self):
      raise DataError(f"{self._path}: there is no row in it.")

  def __len__(self):
    return len(self._files)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    results = [self._about(index) for index in indices]
    there = [i for i, record in enumerate(results) if isinstance(record, Record)]
    images = self._storage.read_many([(results[i].image, 0, None) for i in there])
    for i, image in zip(there, images, strict=True):
      if isinstance(image, DataError):
        results[i] = DataError(f"{results[i].key}: {image}")
      else:
        results[i] = results[i]._replace(image=image)
    return results

  def key(self, index):
    """The list, and the path in it."""
    self.check_index(index)
    return f"{locations.file_name(self._path)}/{redact(self._files[index].as_py() or f'row {index}')}"

  def _about(self, index):
    # The record with the path of its image in the place of the image, or a DataError.
    key = self.key(index)
    try:
      path = self._locate(self._files[index].as_py(), key)
      texts = {name: column[index].as_py() for name, column in self._texts.items()}
      label = self._labels[index].as_py() if self._labels else None
      captions, weights = captions_of(texts, self._wanted, self._captions, key, label)
    except DataError as error:
      return error
    return Record(path, captions, key, label, weights)

  def _locate(self, name, key):
    if not name or "\0" in name:
      raise DataError(f"{key}: it names no file.")
    absolute = name.startswith("/") or locations.is_remote(name)
    if self._confined and (absolute or _leaves(name)):
      raise DataError(f"{key}: it is outside of {self._folder or '.'}; {os.path.basename(self._path)} may name files in it only.")
    if absolute or not locations.is_remote(self._folder):
      locations.check(name)
      return name if absolute else os.path.join(self._folder, name)
    scheme, _, rest = self._folder.partition("://")
    bucket, _, prefix = rest.partition("/")
    name = posixpath.normpath(posixpath.join(prefix, name))
    if _leaves(name):
      raise DataError(f"{key}: it is outside of {scheme}://{bucket}.")
    return f"{scheme}://{bucket}/{name}"


def _find(storage, path):
  # The list that a path stands for, and its bytes.
  if path.lower().endswith(ENDINGS):
    return path, storage.read(path)
  folder = path.rstrip("/")
  for name in METADATA:
    try:
      return f"{folder}/{name}", storage.read(f"{folder}/{name}")
    except DataError:
      continue
  below = []
  for name in METADATA:
    try:
      below += storage.expand(f"{folder}/*/{name}")
    except DataError:
      continue
  hint = f"Did you mean {posixpath.dirname(below[0])}?" if below else "Give such a folder, or a .csv file."
  raise DataError(f"{path} is no folder with {', '.join(METADATA[:-1])} or {METADATA[-1]}. {hint}")


def _leaves(name):
  # Whether a relative path leads out of its folder.
  return posixpath.normpath(name).split("/")[0] == ".."


def _parse(path, content):
  ending = os.path.splitext(path)[1].lower()
  try:
    if ending == ".parquet":
      return pyarrow.parquet.read_table(pa.BufferReader(content))
    if ending == ".jsonl":
      return pyarrow.json.read_json(pa.BufferReader(content), pyarrow.json.ReadOptions(block_size=BLOCK))
    return _parse_csv(content)
  except (pa.ArrowException, UnicodeDecodeError) as error:
    raise DataError(f"{path} cannot be parsed: {error}") from error


def _parse_csv(content):
  # Separated by tabs, as open_clip writes it, if there is one in the first line; all as texts.
  first = content.split(b"\n", 1)[0].decode("utf-8-sig")
  separator = "\t" if "\t" in first else ","
  names = next(csv.reader([first], delimiter=separator), [])
  return pyarrow.csv.read_csv(
    pa.BufferReader(content),
    pyarrow.csv.ReadOptions(block_size=BLOCK),
    pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
    pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False),
  )


def _labels(table):
  # A column of class numbers, or None.
  for name in opening.LABELS:
    if name in table.column_names:
      try:
        return pc.cast(table[name], pa.int64())
      except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # names, or a list
        continue
  return None
