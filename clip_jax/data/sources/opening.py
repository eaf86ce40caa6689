"""What the opening of a data set of many files takes: names of its columns, reading all files, an index that is kept."""

import concurrent.futures
import time

import numpy as np

from clip_jax.data.locations import cache_folder, cache_key
from clip_jax.errors import DataError, did_you_mean
from clip_jax.files import tell

# What columns and features are called; the first that is there is read.
IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image/encoded")
CAPTIONS = ("caption", "captions", "text", "txt")
LABELS = ("label", "cls")

WORKERS = 32  # files that are read at the same time: most of it is waiting for a bucket
LOG_SECONDS = 10


def each(function, paths, options, what):
  """Calls a function for each of many files, several at the same time.

  Args:
    function: called with a path.
    paths: the files.
    options: `Options`; its `log` is told how far it is, if that takes long.
    what: what is read of them, for that line.

  Returns:
    A list of what it returns.
  """
  results, due = [], time.monotonic() + LOG_SECONDS
  executor = concurrent.futures.ThreadPoolExecutor(min(WORKERS, len(paths)))
  try:
    for result in executor.map(function, paths):
      results.append(result)
      if time.monotonic() >= due:
        log(options)(f"{what}: {len(results):,} of {len(paths):,} files")
        due = time.monotonic() + LOG_SECONDS
  finally:
    executor.shutdown(cancel_futures=True)
  return results


def log(options):
  """Where lines of progress go."""
  return options.log or tell


def kept(kind, paths, stamps, storage, build):
  """An index of files that is made once, and then mapped into memory.

  Args:
    kind: names the layout of the index and all that it depends on beside the files.
    paths: the files.
    stamps: of each, as `Storage.stamps` gives them.
    storage: a `Storage`.
    build: makes the index, uint64 [at least one].
  """
  target = cache_folder("index") / f"{cache_key(kind, *paths, *stamps)}.u64"
  try:
    return np.asarray(np.memmap(target, np.uint64, "r"))
  except (OSError, ValueError):
    table = build()
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write(str(target), table.data)
    return np.asarray(np.memmap(target, np.uint64, "r"))
  except OSError:  # a folder that cannot be written, or is full: it is made again the next time
    return table


def fingerprint(kind, paths, stamps, options):
  """A string that is another one when the files, or what is read of them, are others."""
  return cache_key(kind, *paths, *stamps, repr(options.captions), options.image)


def pick(known, given, usual, missing, needed, optional=False):
  """Names of columns, or of features, to read.

  Args:
    known: names of those that are of the right type.
    given: names that were asked for.
    usual: names to look for if none were.
    missing: how the message begins if one is not there: which file has none of which kind.
    needed: how it ends if none of the usual ones is.
    optional: whether there may be none of the usual ones.

  Returns:
    The names asked for, or those of `usual` that are there, in that order.

  Raises:
    DataError: there is no such column.
  """
  for name in given:
    if name not in known:
      there = f"There are: {', '.join(known) or 'none'}."
      raise DataError(f"{missing} {name!r}. {did_you_mean(name, known, there)}")
  names = list(given) or [name for name in usual if name in known]
  if not names and not optional:
    raise DataError(f"{missing}: {' or '.join(usual) or 'none with a usual name'} is not there. {needed}")
  return names
