"""Records of a part, read ahead of who decodes them."""

import concurrent.futures
import threading
from typing import NamedTuple

import numpy as np

from clip_jax.errors import DataError

# Records that are read at a time, and how often that is done at the same time. Neighbours are one request to a bucket.
TOGETHER, AHEAD = 32, 8


class Item(NamedTuple):
  """What is known of a record."""

  index: int
  key: str
  image: bytes | None = None  # encoded
  caption: str | None = None  # the first
  label: int | None = None
  tokens: np.ndarray | None = None  # int32 [context_length], of the caption
  error: str | None = None  # why it is left out


class Records:
  """The records of a part, each asked for once, in about the order of their numbers. Safe to use from many threads."""

  def __init__(self, source, indices, tokenizer):
    """Reads nothing yet.

    Args:
      source: a `clip_jax.data.sources.Source`.
      indices: the range of records.
      tokenizer: what makes token ids of captions; None if no texts are wanted.
    """
    self._source, self._indices, self._tokenizer = source, indices, tokenizer
    self._lock, self._begun = threading.Lock(), 0
    self._blocks = {}  # number -> [future, how many of it were not asked for yet]
    self._pool = concurrent.futures.ThreadPoolExecutor(AHEAD)

  def __len__(self):
    return len(self._indices)

  def __call__(self, number):
    """The `Item` at a place in the part.

    Raises:
      StorageError: a disk or a bucket does not answer.
    """
    block, row = divmod(number, TOGETHER)
    with self._lock:
      while self._begun <= block + AHEAD and self._begun * TOGETHER < len(self):
        wanted = self._indices[self._begun * TOGETHER : (self._begun + 1) * TOGETHER]
        self._blocks[self._begun] = [self._pool.submit(self._read, wanted), len(wanted)]
        self._begun += 1
      entry = self._blocks[block]
      entry[1] -= 1
      if not entry[1]:
        del self._blocks[block]
    return entry[0].result()[row]

  def close(self):
    """Gives up what is not read yet."""
    self._pool.shutdown(cancel_futures=True)

  def _read(self, indices):
    items = [self._item(*one) for one in zip(indices, self._source.fetch(indices), strict=True)]
    good = [i for i, item in enumerate(items) if item.error is None]
    if self._tokenizer and good:
      for i, tokens in zip(good, self._tokenizer([items[i].caption for i in good]), strict=True):
        items[i] = items[i]._replace(tokens=tokens)
    return items

  def _item(self, index, record):
    if isinstance(record, DataError):
      return Item(index, self._source.key(index), error=str(record))
    caption = record.captions[0] if record.captions else None
    error = "it has a class but no caption" if self._tokenizer and caption is None else None
    return Item(index, record.key, record.image, caption, record.label, error=error)
