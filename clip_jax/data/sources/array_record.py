"""ArrayRecord files whose records are `tf.train.Example`s, as TensorFlow Datasets and most of the field write them."""


import numpy as np
from google.protobuf.message import DecodeError

from clip_jax.data.locations import file_name
from clip_jax.data.sources import opening, riegeli
from clip_jax.data.sources.protocol import Options, RandomAccess, Record, captions_of
from clip_jax.data.sources.recent import Recent
from clip_jax.errors import DataError, did_you_mean

DECODED_BYTES = 64 << 20  # of chunks with several records, which are kept for a while


class ArrayRecordSource(RandomAccess):
  """Random access to the records of many shards, in the order of their sorted names."""

  def __init__(self, pattern, options=None):
    """Opens the shards, reading where their records lie if that is not known yet.

    Args:
      pattern: a glob, with {00000..00009} and {a,b} expanded; local, gs:// or s3://.
      options: an `Options`, the defaults if not given; its names are features of the examples.

    Raises:
      DataError: no file matches, one is no ArrayRecord file, or there is no record.
      StorageError: a store does not answer.
    """
    options = options or Options()
    paths = options.storage.expand(pattern)
    self._shards, self._features = Shards(paths, options), Features(options)
    self.fingerprint = opening.fingerprint("array_record", paths, self._shards.stamps, options)
    if not len(self):
      raise DataError(f"{pattern}: there is no record in these files.")

  def __len__(self):
    return len(self._shards)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    for index in indices:
      self.check_index(index)
    contents = self._shards.read(indices)
    return [self._features.record(content, self.key(i)) for i, content in zip(indices, contents, strict=True)]

  def key(self, index):
    """The shard of a record, and its number there."""
    self.check_index(index)
    return self._shards.key(index)


class Shards:
  """The records of ArrayRecord files as bytes, with 8 bytes of memory a chunk, mapped from a file.

  Attributes:
    paths: the files.
    stamps: of each a string that changes when it does.
    ends: int64 [files], the number of records up to the end of each.
  """

  def __init__(self, paths, options):
    """Opens the files.

    Args:
      paths: ArrayRecord files.
      options: `Options`.

    Raises:
      DataError: one is no ArrayRecord file.
    """
    self.paths, self._storage = paths, options.storage
    self.stamps = options.storage.stamps(paths)

    def build():
      found = opening.each(lambda path: riegeli.chunks(options.storage, path), paths, options, "index")
      head = [number for chunks in found for number in (chunks.records, chunks.group, len(chunks.offsets))]
      return np.concatenate([np.array(head, np.uint64), *(chunks.offsets for chunks in found)])

    table = opening.kept("array_record 1", paths, self.stamps, options.storage, build)
    head = table[: 3 * len(paths)].reshape(-1, 3).astype(np.int64)
    self._offsets = table[3 * len(paths) :]
    self.ends, self._groups = np.cumsum(head[:, 0]), head[:, 1]
    self._begins = np.cumsum(head[:, 2]) - head[:, 2]  # of each file among the offsets
    self._decoded = Recent(DECODED_BYTES)

  def __len__(self):
    return int(self.ends[-1])

  def key(self, index):
    """Names a record in messages."""
    shard, number = self._locate(index)
    return f"{file_name(self.paths[shard])}/{number}"

  def read(self, indices):
    """Reads records.

    Returns:
      A list of bytes, or of a `DataError` where a record cannot be read.
    """
    places = []  # (shard, chunk among all offsets), number in the chunk
    for index in indices:
      shard, number = self._locate(index)
      chunk, row = divmod(number, int(self._groups[shard]))
      places.append(((shard, int(self._begins[shard]) + chunk), row))
    several = {place for place, _ in places if self._groups[place[0]] > 1}
    single = list({place for place, _ in places} - several)
    # A chunk of one record is hardly wanted again soon.
    found = dict(zip(single, (records for records, _ in self._chunks(single)), strict=True))
    found |= self._decoded.get(several, self._chunks)
    return [self._row(found[place], row) for place, row in places]

  def _locate(self, index):
    shard = int(np.searchsorted(self.ends, index, side="right"))
    return shard, index - (int(self.ends[shard - 1]) if shard else 0)

  def _chunks(self, places):
    # The records of chunks, or a DataError, and their bytes.
    ranges = [(self.paths[shard], int(self._offsets[chunk]), int(self._offsets[chunk + 1])) for shard, chunk in places]
    results = []
    for (path, begin, end), content in zip(ranges, self._storage.read_many(ranges), strict=True):
      try:
        if isinstance(content, DataError):
          raise content
        results.append((riegeli.decode(content, begin), end - begin))
      except DataError as error:
        results.append((DataError(f"{file_name(path)} at byte {begin:,}: {error}"), 0))
    return results

  def _row(self, records, row):
    if isinstance(records, DataError):
      return records
    return records[row] if row < len(records) else DataError(f"a chunk has only {len(records)} records.")


class Features:
  """What is read of a `tf.train.Example`."""

  def __init__(self, options, images=opening.IMAGES, captions=opening.CAPTIONS, labels=opening.LABELS):
    """Chooses the features by name.

    Args:
      options: `Options`; those it names come first.
      images: names of features that may hold the image.
      captions: names of features that may hold captions.
      labels: names of features that may hold a class number.
    """
    from tensorflow_datasets.proto import tf_example_pb2  # slow, and without TensorFlow

    self._parse = tf_example_pb2.Example.FromString
    self._images = (options.image,) if options.image else tuple(images)
    self._wanted, self._usual, self._labels = options.captions, tuple(captions), tuple(labels)
    self._captions = [name for name, _ in options.captions] or self._usual
    self._more = options.extra

  def record(self, content, key):
    """The record in an example, or a `DataError`.

    Args:
      content: a serialized example, or a `DataError`.
      key: names it in messages.
    """
    if isinstance(content, DataError):
      return DataError(f"{key}: {content}")
    try:
      features = self._parse(content).features.feature
    except DecodeError:
      return DataError(f"{key} is no tf.train.Example; write records with clip_jax.data.sources.array_record.example.")
    try:
      return self._record(features, key)
    except DataError as error:
      return error

  def _record(self, features, key):
    if "key" in features:
      name = _values(features["key"])
      if name:
        key = f"{key.rpartition('/')[0]}/{_text(name[0])}"
    image = next((name for name in self._images if name in features and features[name].bytes_list.value), None)
    if image is None:
      there = f"There are: {', '.join(sorted(features)) or 'none'}."
      raise DataError(
        f"{key}: no feature {' or '.join(self._images)} holds an image. {did_you_mean(self._images[0], sorted(features), there)}"
      )
    texts = {name: list(map(_text, _values(features[name]))) for name in self._captions if name in features}
    label = next((features[name].int64_list.value for name in self._labels if name in features), None)
    label = int(label[0]) if label else None
    captions, weights = captions_of(texts, self._wanted, self._usual, key, label)
    extra = {name: _extra(features[name]) for name in features if name != image} if self._more else None
    return Record(features[image].bytes_list.value[0], captions, key, label, weights, extra)


def example(image, captions, /, label=None, **more):
  """Serializes a record as `ArrayRecordSource` reads it.

  Args:
    image: bytes of an encoded image.
    captions: texts.
    label: a class number.
    **more: other features: text, bytes, a number, or a list of one of them. `key` names the record in messages.

  Returns:
    bytes; the same for the same arguments.
  """
  from tensorflow_datasets.proto import tf_example_pb2

  message = tf_example_pb2.Example()
  for name, values in {"image": image, "caption": captions, "label": label, **more}.items():
    values = values if isinstance(values, list | tuple) else [] if values is None else [values]
    feature = message.features.feature[name] if values else None
    for value in values:
      if isinstance(value, str | bytes):
        feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
      elif isinstance(value, int | np.integer):
        feature.int64_list.value.append(value)
      else:
        feature.float_list.value.append(value)
  return message.SerializeToString(deterministic=True)


def _values(feature):
  kind = feature.WhichOneof("kind")
  return getattr(feature, kind).value if kind else ()


def _extra(feature):
  values = list(map(_text, _values(feature)))
  return values[0] if len(values) == 1 else values


def _text(value):
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
