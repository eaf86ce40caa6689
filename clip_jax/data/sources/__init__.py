"""Where records come from: random access by index, one file a format."""

import importlib
import re

from clip_jax.data import emoji
from clip_jax.data.sources.protocol import Options, Record, Source
from clip_jax.data.sources.tar import TarSource
from clip_jax.errors import DataError

__all__ = ["FORMATS", "Options", "Record", "Source", "TarSource", "create", "format_of"]

# Name -> module and class, and what a path of that format looks like. Imported when they are needed: libraries for
# Parquet and TFDS take a second to load.
FORMATS = {
  "tar": ("tar", "TarSource", r"\.tar$"),
  "array_record": ("array_record", "ArrayRecordSource", r"\.array_?record"),
  "parquet": ("parquet", "ParquetSource", r"\.parquet$"),
  "tfds": ("tfds", "TfdsSource", r"#\w+$|/\d+\.\d+\.\d+/?$"),
  "folder": ("folder", "FolderSource", r"\.(csv|tsv|jsonl)$|/$|(^|/)[^./*{}\[\]?]+$"),
  "classes": ("class_folders", "ClassFolderSource", None),
  "emoji": ("tar", "TarSource", None),
}


def create(name, path, options=None):
  """Opens a source.

  Args:
    name: a format of `FORMATS`; "auto" for what the path says or looks like. "emoji" is the set of the quickstart, and its
      path is a glob inside the folder that is written on first use.
    path: a glob of files (a folder, for "tfds", "folder" and "classes"); with "auto" it may begin with a format, as in "tar:DIR/*".
    options: an `Options`; the defaults if not given.

  Returns:
    A `Source`.

  Raises:
    DataError: no file, one that cannot be read, or no record at all.
  """
  if not path:
    raise DataError("config.data.path is empty; give a glob of shards, such as 'shards/*.tar'.")
  if name == "auto":
    name, path = format_of(path)
  if name == "emoji":
    path = str(emoji.prepare() / path)
  module, cls, _ = FORMATS[name]
  return getattr(importlib.import_module(f"clip_jax.data.sources.{module}"), cls)(path, options)


def format_of(path):
  """The format that a path says ("tar:DIR/*") or looks like, and the path without it.

  Raises:
    DataError: it looks like none.
  """
  said = re.match(rf"({'|'.join(FORMATS)}):(?!//)(.*)", path)
  if said:
    return said[1], said[2]
  for name, (_, _, looks) in FORMATS.items():
    if looks and re.search(looks, path):
      return name, path
  raise DataError(f"{path} does not look like a data set of a known format; say which, as in tar:{path} ({', '.join(FORMATS)}).")
