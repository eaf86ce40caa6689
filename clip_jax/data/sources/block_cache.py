"""Reads whole blocks of neighbouring records, and keeps those that are not used yet.

With `data.order="blocks"` the records of a block are used within a short time of each other. For an object store one
read of a block costs about as much as one of a single record.
"""

import collections
import concurrent.futures
import threading

from clip_jax.data.sources.protocol import RandomAccess
from clip_jax.errors import DataError
from clip_jax.files import tell


class BlockCache(RandomAccess):
  """A source whose records are read a block at a time. Safe to use from many threads."""

  def __init__(self, source, block, limit):
    """Prepares.

    Args:
      source: a `Source`.
      block: number of records that are read together.
      limit: bytes of images to keep at most; past it the blocks that were read first are dropped.
    """
    self._source, self._block, self._limit = source, block, limit
    self.fingerprint = source.fingerprint
    self._lock = threading.Lock()
    self._blocks = collections.OrderedDict()  # block -> a future of its records by index, taken out when used
    self._bytes, self._told = 0, False

  def __len__(self):
    return len(self._source)

  def key(self, index):
    """What names the record in messages."""
    return self._source.key(index)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, the `DataError` that says why."""
    for index in indices:
      self.check_index(index)
    wanted = sorted({index // self._block for index in indices})
    with self._lock:
      missing = [block for block in wanted if block not in self._blocks]
      for block in missing:
        self._blocks[block] = concurrent.futures.Future()
      futures = {block: self._blocks[block] for block in wanted}
    self._load(missing, futures)
    found = [self._take(futures[index // self._block], index) for index in indices]
    # Once taken, or dropped in between: a substitute, or a record that two epochs want at the same time.
    again = [i for i, record in enumerate(found) if record is None]
    for i, record in zip(again, self._source.fetch([indices[i] for i in again]), strict=True):
      found[i] = record
    return found

  def _load(self, blocks, futures):
    starts = [block * self._block for block in blocks]
    indices = [i for start in starts for i in range(start, min(start + self._block, len(self)))]
    try:
      records = dict(zip(indices, self._source.fetch(indices), strict=True))
    except BaseException as error:
      with self._lock:
        for block in blocks:
          self._blocks.pop(block, None)
          futures[block].set_exception(error)  # for those who wait for it
      raise
    with self._lock:
      self._bytes += sum(map(_size, records.values()))
      for block in blocks:
        futures[block].set_result({})
      for index, record in records.items():
        futures[index // self._block].result()[index] = record
      self._drop()

  def _take(self, future, index):
    records = future.result()
    with self._lock:
      record = records.pop(index, None)
      if record is not None:
        self._bytes -= _size(record)
      block = index // self._block
      if not records and self._blocks.get(block) is future:
        del self._blocks[block]
    return record

  def _drop(self):
    while self._bytes > self._limit:
      block = next((block for block, future in self._blocks.items() if future.done()), None)
      if block is None or len(self._blocks) == 1:
        return
      records = self._blocks.pop(block).result()
      self._bytes -= sum(map(_size, records.values()))
      if len(records) > self._block // 2 and not self._told:
        self._told = True
        tell(
          f"Blocks are dropped before their records are used, and read again: data.block_cache={self._limit / 2**30:g} GiB "
          "is too small for data.block * data.window * data.lanes records."
        )
      records.clear()


def _size(record):
  return 0 if isinstance(record, DataError) else len(record.image)
