"""Batches of pixels and token ids, in the order of `order.py`, from threads that Grain runs.

Nothing here is state: the batch of a step is a function of the config, the data set and the step, so a
run resumes by asking for the step after its checkpoint's.
"""

import functools
import itertools
import json
import math
import os
import threading

import grain
import numpy as np

from clip_jax.data import images, order, tokenizer_folders
from clip_jax.data.tokenizer import ClipTokenizer
from clip_jax.errors import ConfigError, DataError

# Examples loaded by one call: enough to make a thread's bookkeeping and the tokenizer's cheap, few enough
# that the first batch of a small run is spread over all threads.
CHUNK = 32
# A share of bad records is judged once it means something.
MIN_RECORDS_TO_JUDGE = 200
MAX_SUBSTITUTES = 100


def tokenizer_for(model):
  """The tokenizer that a `clip_jax.config.Model` names.

  Raises:
    UsageError: its file cannot be read, or does not go with the model.
  """
  return file_tokenizer_for(model) or ClipTokenizer(model.text.context_length)


@functools.lru_cache(maxsize=4)  # a vocabulary of 256,000 takes seconds to read, and a run asks several times
def file_tokenizer_for(model):
  """The `FileTokenizer` of a `clip_jax.config.Model`, or None if it has CLIP's own.

  Raises:
    UsageError: its file cannot be read, or does not go with the model.
  """
  if model.tokenizer == "clip":
    return None
  tokenizer = tokenizer_folders.read(model.tokenizer, model.text.context_length)
  has = model.text.vocab_size
  if tokenizer.vocab_size > has:
    raise ConfigError(f"config.model.text.vocab_size={has:,} is smaller than the {tokenizer.vocab_size:,} of {model.tokenizer}.")
  if model.text.kind == "clip" and tokenizer.end_id != has - 1:
    raise ConfigError(
      f"{model.tokenizer} has the end token {tokenizer.end_id} of {has:,}; a text tower of CLIP is read at the largest id."
    )
  return tokenizer


def train_batches(source, config, *, rows, start, bad_records=None):
  """The training batches of one process.

  Args:
    source: a `Source`.
    config: a resolved `Config`.
    rows: which rows of the global batch this process loads, an int array.
    start: the first step to load.
    bad_records: a `BadRecords` that counts what cannot be read; a fresh one if not given.

  Returns:
    An iterator over the steps from `start` to the end of the run, of dicts with `images` (uint8
    [rows, size, size, 3]) and `tokens` (int32 [rows, context_length]).

  Raises:
    DataError: while iterating, more records are bad than the config allows.
  """
  data, batch = config.data, config.train.global_batch_size
  if bad_records is None:
    bad_records = BadRecords(None, data.max_bad_share)
  load = _TrainLoader(source, config, bad_records)
  chunk = math.gcd(len(rows), CHUNK)
  chunks = len(rows) // chunk

  def load_chunk(i):
    step, part = divmod(i, chunks)
    return load(order.positions_of_step(step, batch, rows[part * chunk : (part + 1) * chunk]))

  loaded = _in_threads(load_chunk, start * chunks, config.train.steps * chunks, data, chunks)
  return _joined(loaded, chunks)


def evaluation_pixels(record, size, mode):
  """The image of a held-out record with the evaluation transform.

  Args:
    record: a `Record`.
    size: pixels.
    mode: the model's `resize_mode`.

  Returns:
    uint8 [size, size, 3].

  Raises:
    DataError: it cannot be decoded. A score over some other set would not be comparable.
  """
  try:
    return images.resize_and_crop(images.decode(record.image), size, mode)
  except images.DecodeError as error:
    raise DataError(f"{record.key}: {error}; a held-out set must be whole.") from error


class BadRecords:
  """Counts records that cannot be read, and writes each down once.

  The run stops when more than the allowed share of the records it has tried are bad.
  """

  def __init__(self, path, max_share):
    """Starts counting.

    Args:
      path: a JSON-lines file to append to, or None. Records already in it are not written again.
      max_share: of the records tried, between 0 and 1.
    """
    self._path, self._max_share = path, max_share
    self._lock = threading.Lock()
    self.tried = self.bad = 0
    lines = []
    if path is not None and os.path.exists(path):
      with open(path, "rb") as file:
        lines = file.readlines()
    self._written = {_index_of(line) for line in lines}
    # A killed run may have left part of a line, which must not be glued to the next one.
    self._before = "\n" if lines and not lines[-1].endswith(b"\n") else ""

  def count(self, tried):
    """Counts records that were tried, bad ones included."""
    with self._lock:
      self.tried += tried

  def report(self, index, key, error, substitute):
    """Writes down a record that cannot be read.

    Args:
      index: its number in the data set.
      key: its name.
      error: why it cannot be read.
      substitute: the record that takes its place, if that can be read.

    Raises:
      DataError: too many are bad.
    """
    with self._lock:
      self.bad += 1
      if self._path is not None and index not in self._written:
        self._written.add(index)
        line = {"index": int(index), "key": key, "error": str(error), "substitute": int(substitute)}
        with open(self._path, "a", encoding="utf-8") as file:
          file.write(self._before + json.dumps(line, ensure_ascii=False) + "\n")
        self._before = ""
      if self.tried >= MIN_RECORDS_TO_JUDGE and self.bad > self._max_share * self.tried:
        where = f" They are listed in {self._path}." if self._path is not None else ""
        raise DataError(
          f"{self.bad:,} of {self.tried:,} records could not be read, more than "
          f"data.max_bad_share={self._max_share:g} allows; the last was {key} ({error}).{where}"
        )


def _index_of(line):
  try:
    return json.loads(line)["index"]
  except (ValueError, KeyError, TypeError):
    return None  # part of a line


class _TrainLoader:
  """Loads the examples at given positions of the stream."""

  def __init__(self, source, config, bad_records):
    self._source, self._bad_records = source, bad_records
    self._data, self._size = config.data, config.model.image_size
    self._tokenizer = tokenizer_for(config.model)

  def __call__(self, positions):
    seed = self._data.seed
    indices = order.examples(seed, len(self._source), positions)
    pixels = np.empty((len(positions), self._size, self._size, 3), np.uint8)
    captions = []
    self._bad_records.count(len(positions))
    for row, (position, index) in enumerate(zip(positions, indices, strict=True)):
      record, image = self._read(int(index))
      # Keyed by the position in the stream: the same on any host count, and after a resume.
      random = np.random.Generator(np.random.Philox(key=[seed, position]))
      pixels[row] = images.augment(
        image,
        self._size,
        random,
        crop_scale=self._data.crop_scale,
        color_jitter=self._data.color_jitter,
        flip=self._data.flip,
        rotation=self._data.rotation,
      )
      captions.append(self._choose(record.captions, random))
    return {"images": pixels, "tokens": self._tokenizer(captions)}

  def _read(self, index):
    wanted = index
    for attempt in range(1, MAX_SUBSTITUTES + 2):
      try:
        record = self._source[index]
        return record, images.decode(record.image)
      except (DataError, images.DecodeError) as error:
        # Its own first substitute is written down, also where it was met as that of another record.
        first = self._substitute(index, 1)
        self._bad_records.report(index, self._source.key(index), error, first)
        index = self._substitute(wanted, attempt)
    raise DataError(
      f"{self._source.key(wanted)}: neither it nor {MAX_SUBSTITUTES} substitutes could be read."
    )

  def _substitute(self, index, attempt):
    return order.substitute(self._data.seed, len(self._source), index, attempt)

  def _choose(self, captions, random):
    if len(captions) > 1 and random.random() < self._data.other_captions:
      return captions[random.integers(1, len(captions))]
    return captions[0]


def _in_threads(load, start, stop, data, chunks):
  options = grain.ReadOptions(
    num_threads=data.threads or os.cpu_count(), prefetch_buffer_size=max(data.prefetch * chunks, 1)
  )
  return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def _joined(loaded, chunks):
  try:
    while parts := list(itertools.islice(loaded, chunks)):
      yield {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
  finally:
    loaded.close()  # or a process that stops early would first load all that is queued
