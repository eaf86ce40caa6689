"""How fast a machine makes training examples of a data set: the `Loader` of a run, in threads, timed by stage."""

import concurrent.futures
import itertools
import os
import time

import numpy as np

from clip_jax.data.pipeline import CHUNK, BadRecords, Loader


def default_threads():
  """1, 2, 4, ... and the number of processor cores."""
  cores = os.cpu_count()
  return sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores})


def measure(dataset, config, threads, seconds, track=iter):
  """Loads examples for some seconds with each number of threads.

  The stream of the run is read on from one number of threads to the next, so that none finds in a cache what another
  has read, unless the data set is so small that it comes round again.

  Args:
    dataset: a `dataset.Dataset`.
    config: a resolved `Config`.
    threads: the numbers of threads.
    seconds: how long each is measured; a thread finishes the examples that it has begun.
    track: passes the numbers of threads on, and shows people how far this is.

  Returns:
    For each number of threads a dict with "threads", "images_per_second", "megabytes_per_second" (of encoded images,
    substitutes included), and the shares of the threads' time: "read", "decode", "resize" (and what else is done to
    pixels), "tokenize" and "other". A share includes what a thread waits for the processor or the interpreter's lock.

  Raises:
    DataError: more records are bad than the config allows.
    StorageError: a disk or a bucket does not answer.
  """
  bad_records, starts = BadRecords(None, config.data.max_bad_share), itertools.count(0, CHUNK)
  _load(dataset, config, bad_records, starts, 0)  # the first examples bring tables and connections with them
  rows = []
  for count in track(threads):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      tasks = [pool.submit(_load, dataset, config, bad_records, starts, seconds) for _ in range(count)]
      rows.append(_summed([task.result() for task in tasks]))
  return rows


class _Clock:
  """The seconds and the bytes of the stages of one thread's `Loader`."""

  def __init__(self):
    self.seconds = dict.fromkeys(("read", "image", "decode", "tokenize"), 0.0)
    self.bytes = self.images = 0
    self.elapsed = 0.0

  def __call__(self, stage, function, *arguments):
    begin = time.perf_counter()
    try:
      result = function(*arguments)
    finally:  # what cannot be decoded takes time, too
      self.seconds[stage] += time.perf_counter() - begin
    if stage == "image":
      self.bytes += len(arguments[0].image)
    return result


def _load(dataset, config, bad_records, starts, seconds):
  clock, model = _Clock(), config.model
  load = Loader(dataset, config, bad_records, clock)
  out = {
    "images": np.empty((CHUNK, model.image_size, model.image_size, 3), np.uint8),
    "tokens": np.empty((CHUNK, model.text.context_length), np.int32),
  }
  begin = time.perf_counter()
  while not clock.images or clock.elapsed < seconds:
    load(next(starts) + np.arange(CHUNK), out)
    clock.images += CHUNK
    clock.elapsed = time.perf_counter() - begin
  return clock


def _summed(clocks):
  elapsed = sum(clock.elapsed for clock in clocks)
  read, image, decode, tokenize = (
    sum(clock.seconds[stage] for clock in clocks) / elapsed for stage in ("read", "image", "decode", "tokenize")
  )
  return {
    "threads": len(clocks),
    "images_per_second": sum(clock.images / clock.elapsed for clock in clocks),
    "megabytes_per_second": sum(clock.bytes / clock.elapsed for clock in clocks) / 1e6,
    "read": read,
    "decode": decode,
    "resize": image - decode,
    "tokenize": tokenize,
    "other": 1 - read - image - tokenize,
  }
