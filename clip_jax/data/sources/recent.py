"""Parts of files that were decoded lately."""

import collections
import concurrent.futures
import threading

from clip_jax.errors import DataError


class Recent:
  """Keeps what was made lately, up to a number of bytes. What several threads want at the same time is made once."""

  def __init__(self, limit):
    """Starts empty.

    Args:
      limit: bytes; a single value may be larger.
    """
    self._limit, self._held = limit, 0
    self._lock = threading.Lock()
    self._values = collections.OrderedDict()  # key: (value, bytes), the one used last at the end
    self._pending = {}  # key: a future of the value

  def __contains__(self, key):
    return key in self._values

  def get(self, keys, make):
    """Values by key.

    Args:
      keys: hashable, each once.
      make: called with a list of the keys whose values are not there; returns (value, bytes) for each. A value
        that is a `DataError` is handed on, but not kept.

    Returns:
      A dict from key to value.
    """
    found, mine, others = {}, {}, {}
    with self._lock:
      for key in keys:
        if key in self._values:
          self._values.move_to_end(key)
          found[key] = self._values[key][0]
        elif key in self._pending:
          others[key] = self._pending[key]
        else:
          mine[key] = self._pending[key] = concurrent.futures.Future()
    if mine:
      found |= self._make(mine, make)
    # Only now: nobody waits for another thread while others wait for it.
    return found | {key: future.result() for key, future in others.items()}

  def _make(self, futures, make):
    try:
      made = dict(zip(futures, make(list(futures)), strict=True))
    except BaseException as error:
      with self._lock:
        for key in futures:
          del self._pending[key]
      for future in futures.values():
        future.set_exception(error)
      raise
    with self._lock:
      for key, (value, size) in made.items():
        del self._pending[key]
        if not isinstance(value, DataError):
          self._values[key] = value, size
          self._held += size
      while self._held > self._limit and len(self._values) > 1:
        self._held -= self._values.popitem(last=False)[1][1]
    for key, future in futures.items():
      future.set_result(made[key][0])
    return {key: value for key, (value, _) in made.items()}
