"""A thread that looks whether a run still moves."""

import faulthandler
import os
import sys
import threading
import time

from clip_jax.files import tell

KEYS = 8  # that are named
SECONDS_FOR_KEYS = 5.0


class Watchdog:
  """Says where a run hangs, and ends it, so that whoever started it can start it again.

  After `seconds` without a sign of life the stacks of all threads are printed, and what was last asked of the data; after twice as
  long the process ends with exit code 1. It also ends if the thread itself cannot run, because some library holds Python's lock.

  Attributes:
    keys: a function that returns the names of the records that were asked for last; it may hang, too.
  """

  def __init__(self, seconds):
    """Prepares; the thread runs inside the `with` block.

    Args:
      seconds: None if nobody is to watch.
    """
    self._seconds, self.keys = seconds, list
    self._what, self._since, self._over = "starting", time.monotonic(), threading.Event()

  def __enter__(self):
    self.alive("the first step")
    self._over.clear()
    if self._seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_):
    self._over.set()
    if self._seconds:
      faulthandler.cancel_dump_traceback_later()

  def alive(self, what=None):
    """A sign of life.

    Args:
      what: is done from now on, as it shall stand after "no progress for ... in"; what was done before if not given.
    """
    self._what, self._since = what or self._what, time.monotonic()

  def _watch(self):
    told = None
    while not self._over.wait(min(self._seconds / 20, 10)):
      # The C library's thread ends the process if this one is not there in time to put it off again.
      faulthandler.dump_traceback_later(2 * self._seconds + 1, exit=True, file=sys.__stderr__)
      since = self._since
      still = time.monotonic() - since
      if still > self._seconds and told != since:
        told = since
        self._tell(still)
      if still > 2 * self._seconds:
        tell(f"No progress for {still:,.0f} s in {self._what}: the process ends; the last checkpoint is whole.")
        os._exit(1)

  def _tell(self, still):
    tell(f"\nNo progress for {still:,.0f} s in {self._what}. All threads:")
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)  # notebooks replace the other by one without a file
    found = []
    asking = threading.Thread(target=lambda: found.extend(self.keys()), daemon=True)
    asking.start()
    asking.join(min(SECONDS_FOR_KEYS, self._seconds / 2))  # what hangs may be what would tell
    names = f"{', '.join(found[:KEYS])}, and {max(len(found) - KEYS, 0):,} more" if found else "they cannot be named"
    tell(f"The records asked for last: {names}.")
    tell(f"The process ends after {2 * self._seconds:,.0f} s without progress (config.train.step_timeout).")
