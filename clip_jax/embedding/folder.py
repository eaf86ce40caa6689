"""Where embeddings are written: a folder in the layout of clip-retrieval, and the files of one part of it."""

import contextlib
import json
import os
import re
import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clip_jax.data.locations import is_remote
from clip_jax.errors import UsageError, redacted
from clip_jax.files import read_json

SETTINGS = "embed.json"
KINDS = {"image": "img_emb", "text": "text_emb"}  # what is embedded, and its folder
METADATA, BAD = "metadata", "bad_records"
ENDINGS = {METADATA: "parquet", BAD: "jsonl"}  # of what is no array
DTYPE = np.dtype("<f2")
INTEGERS = ("index", "label")  # columns of the metadata; the others are texts
# Of the settings what only tells where things were: they may have moved, and digests say whether they are the same.
TOLD = ("clip_jax", "model", "layout", "where", "source")
BESIDE = {"weights": "where", "fingerprint": "source"}  # what makes a digest mean something to a person


class Folder:
  """Names of the files of a set, and which parts of it are there.

  Attributes:
    path: where it is.
    settings: what it holds, ready for JSON: among others "records", "part_size", "parts", "embeddings", "embed_dim", "columns".
    arrays: of each kind of `KINDS` that is embedded the name of its folder.
  """

  def __init__(self, path, settings):
    """Touches nothing yet.

    Args:
      path: a local folder; it need not be there.
      settings: what it holds, or shall hold.

    Raises:
      UsageError: it is in a bucket.
    """
    if is_remote(path):
      raise UsageError(f"{path}: embeddings are written to a local folder, or one that is mounted; copy them from there.")
    self.path, self.settings = Path(path).expanduser(), settings
    self.arrays = {kind: KINDS[kind] for kind in settings["embeddings"]}

  def records(self, part):
    """The range of record numbers of a part."""
    size = self.settings["part_size"]
    return range(part * size, min((part + 1) * size, self.settings["records"]))

  def file(self, what, part):
    """The path of a part's file in the folder called `what`. Names sort as numbers do, which is how readers pair them."""
    return self.path / what / f"{what}_{part:0{len(str(self.settings['parts']))}}.{ENDINGS.get(what, 'npy')}"

  def claim(self):
    """Writes what the folder holds, or checks that it is the same that is there already.

    Raises:
      UsageError: it holds something else.
    """
    if self.path.exists() and not self.path.is_dir():
      raise UsageError(f"{self.path} is a file; --output takes a folder.")
    self.path.mkdir(parents=True, exist_ok=True)
    there = [path.name for path in self.path.iterdir() if not path.name.startswith(f".{SETTINGS}.")]
    if SETTINGS not in there:
      if there:
        raise UsageError(f"{self.path} holds other things, such as {min(there)}; give --output a folder of its own.")
      self._write_settings()
    written = read_json(self.path / SETTINGS)
    for name in (name for name in self.settings if name not in TOLD and written.get(name) != self.settings[name]):
      more = [f" ({of.get(BESIDE[name])})" if name in BESIDE else "" for of in (written, self.settings)]
      raise UsageError(
        f"{self.path} was made with {name} {written.get(name)}{more[0]}, and this command has {self.settings[name]}{more[1]}; "
        "give it the same, or --output another folder."
      )

  def _write_settings(self):
    # Of several hosts that begin at the same time, one is the first, whatever the others were told.
    temporary, target = self.path / f".{SETTINGS}.{secrets.token_hex(4)}.tmp", self.path / SETTINGS
    try:
      temporary.write_text(json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
      _sync(temporary)
      try:
        os.link(temporary, target)
      except FileExistsError:
        pass
      except OSError:  # a file system without links
        os.replace(temporary, target)
    finally:
      temporary.unlink(missing_ok=True)

  def clean(self, parts):
    """Removes what killed processes left of some parts."""
    for path in self.path.glob("*/.*.tmp"):
      number = re.match(r"\.\w+?_(\d+)\.", path.name)
      if number and int(number[1]) in parts:
        path.unlink(missing_ok=True)

  def rows(self, part):
    """How many rows a part has, or None if it is not there, or not whole."""
    try:
      rows = pq.read_metadata(self.file(METADATA, part)).num_rows
      return rows if all(self._is_array(self.file(what, part), rows) for what in self.arrays.values()) else None
    except (OSError, ValueError, pa.ArrowException):
      return None

  def _is_array(self, path, rows):
    with path.open("rb") as file:
      np.lib.format.read_magic(file)
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
      size = os.fstat(file.fileno()).st_size - file.tell()
    wanted = rows, self.settings["embed_dim"]
    return shape == wanted and dtype == DTYPE and size == DTYPE.itemsize * rows * wanted[1]


class Part:
  """The files of a part while it is made: hidden, under names that nobody else uses, and gone again if it is not finished."""

  def __init__(self, folder, number):
    """Opens nothing before the `with` block.

    Args:
      folder: a `Folder`.
      number: of the part.
    """
    self._folder, self._number, self._rows = folder, number, 0
    self._token = secrets.token_hex(4)
    columns = folder.settings["columns"]
    self._schema = pa.schema([(name, pa.int64() if name in INTEGERS else pa.string()) for name in columns])

  def __enter__(self):
    with contextlib.ExitStack() as opened:
      for what in (*self._folder.arrays.values(), METADATA, BAD):
        path = self._folder.file(what, self._number)
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # it is not of a whole part
        opened.callback(self._temporary(what).unlink, missing_ok=True)
      self._arrays = {kind: opened.enter_context(self._temporary(what).open("wb")) for kind, what in self._folder.arrays.items()}
      for file in self._arrays.values():
        file.write(self._header())
      self._bad = opened.enter_context(self._temporary(BAD).open("w", encoding="utf-8"))
      self._table = opened.enter_context(pq.ParquetWriter(str(self._temporary(METADATA)), self._schema, compression="zstd"))
      self._open = opened.pop_all()
    return self

  def __exit__(self, *_):
    self._open.close()

  def add(self, embeddings, columns, bad):
    """Adds rows.

    Args:
      embeddings: of each kind that is embedded, an array [rows, embed_dim].
      columns: of each column of the metadata a list of `rows` values.
      bad: a dict for each record that is left out, ready for JSON.
    """
    for kind, rows in embeddings.items():
      self._arrays[kind].write(np.ascontiguousarray(rows, DTYPE).tobytes())
    values = [pa.array(map(_written, columns[field.name]), field.type) for field in self._schema]
    table = pa.table(values, self._schema)
    if len(table):
      self._table.write_table(table, len(table))  # a row group
    self._bad.writelines(json.dumps(redacted(line)) + "\n" for line in bad)
    self._rows += len(table)

  def finish(self):
    """Gives all files their names, that of the metadata last.

    Returns:
      The number of rows.
    """
    for file in self._arrays.values():
      file.seek(0)
      file.write(self._header())  # now it is known how many there are
      file.close()
    self._bad.close()
    self._table.close()
    some_bad = self._temporary(BAD).stat().st_size > 0
    made = [*self._folder.arrays.values(), *[BAD] * some_bad, METADATA]
    for what in made:
      _sync(self._temporary(what))
    for what in made:
      os.replace(self._temporary(what), self._folder.file(what, self._number))
    return self._rows

  def _temporary(self, what):
    path = self._folder.file(what, self._number)
    return path.with_name(f".{path.name}.{self._token}.tmp")

  def _header(self):
    # Of the same length for any number of rows: NumPy leaves room for it to grow.
    header = _Bytes()
    shape = self._rows, self._folder.settings["embed_dim"]
    np.lib.format.write_array_header_1_0(header, {"descr": DTYPE.str, "fortran_order": False, "shape": shape})
    return header


class _Bytes(bytearray):
  write = bytearray.extend


def _written(value):
  # JSON may hold halves of surrogate pairs, which no file of texts can.
  return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _sync(path):
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
