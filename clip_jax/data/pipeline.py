"""Batches of pixels and token ids, in the order of `order.py`, from threads that Grain runs.

Nothing here is state: the batch of a step is a function of the config, the data set and the step, so a
run resumes by asking for the step after its checkpoint's.
"""

import contextlib
import functools
import json
import math
import os
import threading

import grain
import numpy as np

from clip_jax.data import images, order, tokenizer_folders
from clip_jax.data.tokenizer import ClipTokenizer
from clip_jax.errors import ConfigError, DataError, redacted
from clip_jax.files import tell

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


def train_batches(dataset, config, *, rows, start, bad_records=None, batch_of=lambda step: step - 1):
  """The training batches of one process.

  Args:
    dataset: a `dataset.Dataset`.
    config: a resolved `Config`.
    rows: which rows of the global batch this process loads, an int array.
    start: the first step to load.
    bad_records: a `BadRecords` that counts what cannot be read; a fresh one if not given.
    batch_of: a function from a step, counted from 1, to the number of its batch in the stream, from 0.

  Returns:
    An iterator over the steps from `start` to the end of the run, of dicts with `images` (uint8
    [rows, size, size, 3]) and `tokens` (int32 [rows, context_length]).

  Raises:
    DataError: while iterating, more records are bad than the config allows.
    StorageError: while iterating, a disk or a bucket does not answer.
  """
  data, batch = config.data, config.train.global_batch_size
  if bad_records is None:
    bad_records = BadRecords(None, data.max_bad_share)
  load = Loader(dataset, config, bad_records)
  chunk = math.gcd(len(rows), CHUNK)
  chunks = len(rows) // chunk
  batches = _Batches(len(rows), config, chunks)

  def load_chunk(i):
    step, part = divmod(i, chunks)
    here = slice(part * chunk, (part + 1) * chunk)
    whole = batches.of(step)
    load(order.positions_of_step(batch_of(step + 1), batch, rows[here]), {key: array[here] for key, array in whole.items()})
    return whole if part == chunks - 1 else None

  options = grain.ReadOptions(
    num_threads=data.threads or os.cpu_count(), prefetch_buffer_size=max(data.prefetch * chunks, 1)
  )
  loaded = grain.MapDataset.range(start * chunks, config.train.steps * chunks).map(load_chunk).to_iter_dataset(options)
  return _joined(iter(loaded))


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

  The run stops when more than the allowed share of the records it has tried are bad. It does not where they cannot be
  written down, as on a full disk: their lines wait for the next bad record.
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
    self._written = {_name_of(line) for line in lines}
    # A killed run may have left part of a line, which must not be glued to the next one.
    self._torn = bool(lines) and not lines[-1].endswith(b"\n")
    self._waiting, self._trouble = [], False

  def count(self, tried):
    """Counts records that were tried, bad ones included."""
    with self._lock:
      self.tried += tried

  def report(self, place, key, error, substitute):
    """Writes down a record that cannot be read.

    Args:
      place: a dict with its "index" in the data set, and of a mixture the "source".
      key: its name.
      error: why it cannot be read.
      substitute: the record that takes its place, if that can be read.

    Raises:
      DataError: too many are bad.
    """
    # Names are made of paths, which may hold what signs a request; the list goes into the report.
    place, key, error = redacted([place, key, str(error)])
    with self._lock:
      self.bad += 1
      name = place.get("source"), place["index"]
      if self._path is not None and name not in self._written:
        self._written.add(name)
        line = place | {"key": key, "error": error, "substitute": substitute}
        self._waiting.append(json.dumps(line, ensure_ascii=False) + "\n")
      if self._waiting:
        self._write_waiting()
      if self.tried >= MIN_RECORDS_TO_JUDGE and self.bad > self._max_share * self.tried:
        where = f" They are listed in {self._path}." if self._path is not None and not self._waiting else ""
        raise DataError(
          f"{self.bad:,} of {self.tried:,} records could not be read, more than "
          f"data.max_bad_share={self._max_share:g} allows; the last was {key} ({error}).{where}"
        )

  def _write_waiting(self):
    try:
      with open(self._path, "ab", buffering=0) as file:
        while self._waiting:
          self._append(file, ("\n" * self._torn + self._waiting[0]).encode("utf-8", "backslashreplace"))
          self._torn = False
          del self._waiting[0]
      self._trouble = False
    except OSError as error:
      if not self._trouble:
        tell(f"{self._path} cannot be written ({error.strerror or error}); what it lacks is kept in memory.")
      self._trouble = True

  def _append(self, file, content):
    begin, done = file.tell(), 0
    try:
      while done < len(content):
        done += file.write(content[done:])
    except OSError:
      with contextlib.suppress(OSError):
        if os.fstat(file.fileno()).st_size == begin + done:  # otherwise another host has written since
          file.truncate(begin)
          done = 0
      self._torn |= done > 0
      raise


def _name_of(line):
  try:
    place = json.loads(line)
    return place.get("source"), place["index"]
  except (ValueError, KeyError, TypeError, AttributeError):
    return None  # part of a line


class Loader:
  """Loads the examples at given positions of the stream."""

  def __init__(self, dataset, config, bad_records, clock=None):
    """Prepares.

    Args:
      dataset: a `dataset.Dataset`.
      config: a resolved `Config`.
      bad_records: a `BadRecords`.
      clock: called with the name of a stage, a function and its arguments, where time is measured; it returns what the
        function does. Stages are "read", "image", inside of it "decode", and "tokenize".
    """
    self._dataset, self._bad_records = dataset, bad_records
    self._data, self._size = config.data, config.model.image_size
    self._tokenizer = tokenizer_for(config.model)
    self._timed = clock or (lambda stage, function, *arguments: function(*arguments))

  def __call__(self, positions, out):
    """Loads.

    Args:
      positions: int64 [n] positions of the stream.
      out: where to write: "images", uint8 [n, size, size, 3], and "tokens", int32 [n, context_length].

    Raises:
      DataError: more records are bad than the config allows.
      StorageError: a disk or a bucket does not answer.
    """
    captions = []
    self._bad_records.count(len(positions))
    found = self._timed("read", self._dataset.at, positions)
    for row, (position, (place, record)) in enumerate(zip(positions, found, strict=True)):
      captions.append(self._fill(out["images"][row], position, place, record))
    out["tokens"][...] = self._timed("tokenize", self._tokenizer, captions)

  def _fill(self, pixels, position, wanted, record):
    place = wanted
    for attempt in range(MAX_SUBSTITUTES + 1):
      if attempt:
        place = self._dataset.substitute(wanted, attempt)
        record = self._timed("read", self._dataset.read, place)
      # Keyed by the position in the stream: the same on any host count, and after a resume.
      random = np.random.Generator(np.random.Philox(key=[self._data.seed, position]))
      try:
        if isinstance(record, DataError):
          raise record
        if not record.captions:
          raise DataError(f"{record.key}: it has a class but no caption.")
        self._timed("image", self._image, record, random, pixels)
        return self._choose(record, random)
      except (DataError, images.DecodeError) as error:
        reason = error
      # Its own first substitute is written down, also where it was met as that of another record.
      first = self._dataset.describe(self._dataset.substitute(place, 1))["index"]
      name = self._dataset.key(place) if isinstance(record, DataError) else record.key
      self._bad_records.report(self._dataset.describe(place), name, reason, first)
    raise DataError(
      f"{self._dataset.key(wanted)}: neither it nor {MAX_SUBSTITUTES} substitutes could be read."
    )

  def _image(self, record, random, out):
    data = self._data
    images.training_image(
      record.image, self._size, random, out=out, max_pixels=data.max_pixels, crop_scale=data.crop_scale,
      color_jitter=data.color_jitter, flip=data.flip, rotation=data.rotation, timed=self._timed,
    )  # fmt: skip

  def _choose(self, record, random):
    captions, weights = record.captions, record.weights
    if weights is not None:
      ends = np.cumsum(weights)
      return captions[int(np.searchsorted(ends, random.random() * ends[-1], side="right"))]
    if len(captions) > 1 and random.random() < self._data.other_captions:
      return captions[random.integers(1, len(captions))]
    return captions[0]


class _Batches:
  """The arrays of batches that are being filled, each by several threads, a part each."""

  def __init__(self, rows, config, parts):
    size, length = config.model.image_size, config.model.text.context_length
    self._shapes = {"images": ((rows, size, size, 3), np.uint8), "tokens": ((rows, length), np.int32)}
    self._parts, self._lock, self._open = parts, threading.Lock(), {}

  def of(self, step):
    with self._lock:
      if step not in self._open:
        self._open[step] = [{key: np.empty(*shape) for key, shape in self._shapes.items()}, 0]
      entry = self._open[step]
      entry[1] += 1
      if entry[1] == self._parts:  # the last part has it; nobody will ask again
        del self._open[step]
      return entry[0]


def _joined(loaded):
  # The parts of a batch come in order: with its last one the whole of it is there.
  try:
    for whole in loaded:
      if whole is not None:
        yield whole
  finally:
    loaded.close()  # or a process that stops early would first load all that is queued
