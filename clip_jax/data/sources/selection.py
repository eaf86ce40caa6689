"""The records of a source that pass filters of size, shape and caption length, chosen once when it is opened."""

import dataclasses
import os

import numpy as np

from clip_jax.data import images
from clip_jax.data.locations import cache_folder, cache_key
from clip_jax.data.sources.protocol import RandomAccess
from clip_jax.errors import DataError
from clip_jax.files import tell

CHUNK = 1 << 20  # rows looked at together


@dataclasses.dataclass(frozen=True)
class Filters:
  """What a record must be like. What cannot be told from its header passes.

  Attributes:
    min_size: pixels of the shorter side, at least.
    max_aspect: longer side over shorter side, at most; any if None.
    min_caption: characters of the caption, at least.
    max_caption: characters of the caption, at most; any if None.
  """

  min_size: int = 0
  max_aspect: float | None = None
  min_caption: int = 0
  max_caption: int | None = None

  def __bool__(self):
    return self != Filters()

  def failed(self, width, height, characters):
    """Which filters records fail.

    Args:
      width: int array of pixels, 0 where not known.
      height: as width.
      characters: int array, of the caption that is read by default.

    Returns:
      A dict of bool arrays by the name of the filter.
    """
    short, long = np.minimum(width, height).astype(np.int64), np.maximum(width, height).astype(np.int64)
    known = short > 0
    found = {}
    if self.min_size:
      found["min_size"] = known & (short < self.min_size)
    if self.max_aspect is not None:
      found["max_aspect"] = known & (long > self.max_aspect * short)
    if self.min_caption:
      found["min_caption"] = characters < self.min_caption
    if self.max_caption is not None:
      found["max_caption"] = characters > self.max_caption
    return found


class Selection(RandomAccess):
  """A source without the records that fail the filters, in the same order."""

  def __init__(self, source, filters, log=None):
    """Chooses; the choice is kept in `$CLIP_JAX_CACHE/selection`, so that it is made once.

    Args:
      source: a `Source`. One with `facts(start, stop)`, which gives widths, heights and characters, is asked for them;
        of any other each record is read.
      filters: a `Filters`.
      log: called with a line that says how many passed; standard error if not given.

    Raises:
      DataError: no record passes.
    """
    self._source = source
    log = log or tell
    self.fingerprint = f"{source.fingerprint} {filters}"
    path = cache_folder("selection") / cache_key(self.fingerprint, str(len(source)))
    kind = np.dtype("<u4" if len(source) < 2**32 else "<u8")
    try:
      self._kept = np.memmap(path, kind, "r")
      return
    except (OSError, ValueError):  # it is not there yet
      pass
    kept, dropped = _choose(source, filters, kind, log)
    if not len(kept):
      raise DataError(f"None of {len(source):,} records passes {filters}: {_listed(dropped)}.")
    log(f"{len(kept):,} of {len(source):,} records pass the filters; failed: {_listed(dropped)}")
    self._kept = kept
    _keep(path, kept)

  def __len__(self):
    return len(self._kept)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, the `DataError` that says why."""
    for index in indices:
      self.check_index(index)
    return self._source.fetch([int(self._kept[index]) for index in indices])

  def key(self, index):
    """What names the record in messages."""
    self.check_index(index)
    return self._source.key(int(self._kept[index]))


def _choose(source, filters, kind, log):
  chosen, dropped = [], {}
  asked = hasattr(source, "facts")
  step = CHUNK if asked else 256
  for start in range(0, len(source), step):
    stop = min(start + step, len(source))
    facts = source.facts(start, stop) if asked else _read_facts(source.fetch(range(start, stop)))
    failed = filters.failed(*facts)
    for name, mask in failed.items():
      dropped[name] = dropped.get(name, 0) + int(mask.sum())
    passed = ~np.any(list(failed.values()), axis=0)
    chosen.append((np.flatnonzero(passed) + start).astype(kind))
    if not asked and stop % (step * 400) == 0:
      log(f"filters: {stop:,} of {len(source):,} records read")
  return np.concatenate(chosen), dropped


def _read_facts(records):
  # A record that cannot be read passes: it is replaced, and listed, when its turn comes.
  rows = []
  for record in records:
    if isinstance(record, DataError):
      rows.append((0, 0, 1 << 30))
    else:
      rows.append((*(images.header_size(record.image) or (0, 0)), len(record.captions[0].strip()) if record.captions else 0))
  return np.array(rows, np.int64).T


def _listed(dropped):
  return ", ".join(f"{name} {count:,}" for name, count in dropped.items())


def _keep(path, kept):
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept.tofile(temporary)
    os.replace(temporary, path)
  except OSError:  # a full disk: it is made again the next time
    temporary.unlink(missing_ok=True)
