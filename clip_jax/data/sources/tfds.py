"""Data sets prepared by TensorFlow Datasets in the file format array_record, read without TensorFlow.

What a data set holds is read by the package tensorflow_datasets from `dataset_info.json` and `features.json`, which are
copied for it, so that the data may be in a bucket. Images stay encoded. An example holds the features of TFDS as they are
written here, by their paths: of `captions: Sequence({"text": Text()})` all texts are in `captions/text`.
"""

import contextlib
import json
import os
import posixpath
import tempfile
from pathlib import Path

import numpy as np

from clip_jax.data.locations import is_remote
from clip_jax.data.sources import opening
from clip_jax.data.sources.array_record import Features, Shards
from clip_jax.data.sources.protocol import Options, RandomAccess
from clip_jax.errors import DataError, did_you_mean

INFO, FEATURES = "dataset_info.json", "features.json"
FORMAT = "array_record"
PREFIX = "tfds:"


class TfdsSource(RandomAccess):
  """Random access to a split of a data set, in the order of its files.

  Attributes:
    classes: names of its classes, or None.
  """

  def __init__(self, path, options=None):
    """Opens a split.

    Args:
      path: the folder of a version, `DIR/NAME/CONFIG/1.0.0`, local or in a bucket, or a name as `tfds.load` takes it,
        `tfds:NAME/CONFIG`, of a data set in `$TFDS_DATA_DIR` or `~/tensorflow_datasets`; then maybe `#SPLIT` with
        a split as `tfds.load` takes it, such as `#train[:90%]`; `#train` if there is none.
      options: an `Options`, the defaults if not given; its names are paths of features, such as `captions/text`.

    Raises:
      DataError: there is no such data set or split, it is in another format, or has no image or no captions.
      StorageError: a store does not answer.
    """
    options = options or Options()
    path, _, split = path.partition("#")
    folder = _folder(path)
    builder = _builder(options.storage, folder)
    parts = _parts(builder, split or "train", folder)
    names = list(dict.fromkeys(os.path.basename(part.filename) for part in parts))
    self._shards = Shards([posixpath.join(folder, name) for name in names], options)
    self._features = _features(builder.info.features, options, folder)
    self.classes = _classes(builder.info.features)
    self._select(parts, names)
    self.fingerprint = opening.fingerprint(f"tfds {split}", self._shards.paths, self._shards.stamps, options)

  def __len__(self):
    return int(self._ends[-1])

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    places = [self._place(index) for index in indices]
    contents = self._shards.read(places)
    return [self._features.record(c, self._shards.key(i)) for c, i in zip(contents, places, strict=True)]

  def key(self, index):
    """The file of a record, and its number there."""
    return self._shards.key(self._place(index))

  def _select(self, parts, names):
    # A split is runs of records, one after the other.
    begins, counts, shards = [], [], {name: i for i, name in enumerate(names)}
    for part in parts:
      shard = shards[os.path.basename(part.filename)]
      end = int(self._shards.ends[shard])
      begin = int(self._shards.ends[shard - 1]) if shard else 0
      if end - begin != part.examples_in_shard:
        raise DataError(
          f"{self._shards.paths[shard]}: {end - begin:,} records, but {INFO} tells of {part.examples_in_shard:,}. Copy it again."
        )
      begins.append(begin + part.skip)
      counts.append(end - begin - part.skip if part.take < 0 else part.take)
    self._ends = np.cumsum(counts)
    self._shifts = np.array(begins) - (self._ends - counts)

  def _place(self, index):
    self.check_index(index)
    return index + int(self._shifts[np.searchsorted(self._ends, index, side="right")])


def _folder(path):
  # The folder of a version.
  local = os.path.expanduser(path)
  if is_remote(path) or (not path.startswith(PREFIX) and os.path.isdir(local)):
    return (path if is_remote(path) else local).rstrip("/")
  name = path.removeprefix(PREFIX)
  root = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
  if os.path.isabs(name) or name.startswith("."):
    raise DataError(f"{path}: no such folder.")
  import tensorflow_datasets as tfds

  try:
    return str(tfds.core.read_only_builder.builder_from_files(name, data_dir=root).data_dir)
  except (tfds.core.DatasetNotFoundError, OSError, ValueError) as error:
    raise DataError(
      f"{path}: no such folder, and no data set {name!r} in {root}. Prepare it with "
      f"'tfds build {name} --file_format={FORMAT}', or set TFDS_DATA_DIR."
    ) from error


def _builder(storage, folder):
  import tensorflow_datasets as tfds

  files = {}
  for name in (INFO, FEATURES):
    try:
      files[name] = storage.read(f"{folder}/{name}")
    except DataError as error:
      raise DataError(
        f"{folder} holds no {name}; {_versions(storage, folder) or 'give the folder of a version, such as DIR/NAME/CONFIG/1.0.0.'}"
      ) from error
  try:
    info = json.loads(files[INFO])
    formats = [info.get("fileFormat") or "tfrecord", *info.get("alternativeFileFormats", [])]
    if FORMAT not in formats:
      raise DataError(
        f"{folder} is in the format {formats[0]}, which only TensorFlow reads. Prepare it with --file_format={FORMAT}, "
        f"or convert it: tfds convert_format --dataset_dir={folder} --out_file_format={FORMAT} --out_path=DIR."
      )
    for name in opening.LABELS:  # names of classes are in a file of their own
      with contextlib.suppress(DataError):
        files[f"{name}.labels.txt"] = storage.read(f"{folder}/{name}.labels.txt")
    with tempfile.TemporaryDirectory() as copy:
      for name, content in files.items():
        Path(copy, name).write_bytes(content)
      return tfds.builder_from_directory(copy, file_format=FORMAT)
  except DataError:
    raise
  except Exception as error:  # of whatever kind the package meets
    raise DataError(f"{folder}: {INFO} or {FEATURES} cannot be read ({str(error).splitlines()[0]}).") from error


def _versions(storage, folder):
  for below in ("*", "*/*"):
    try:
      found = storage.expand(f"{folder}/{below}/{INFO}")
    except DataError:
      continue
    return f"did you mean {posixpath.dirname(found[-1])}?"
  return None


def _parts(builder, split, folder):
  splits = builder.info.splits
  try:
    parts = splits[split].file_instructions
  except (ValueError, KeyError) as error:
    near = did_you_mean(split, list(splits), f"There are: {', '.join(splits) or 'none'}.")
    raise DataError(f"{folder} has no split {split!r}. {near}") from error
  if not parts:
    raise DataError(f"{folder}: the split {split!r} is empty.")
  return parts


def _features(features, options, folder):
  # What to read of each example, from what is known about all of them.
  import tensorflow_datasets as tfds

  kinds = tfds.features
  known = dict(_flat(features, kinds))
  texts = [name for name, f in known.items() if isinstance(f, kinds.Tensor) and f.np_dtype == np.object_]
  images = [name for name, f in known.items() if isinstance(f, kinds.Image)]
  labels = [name for name in opening.LABELS if name in known and np.issubdtype(known[name].np_dtype, np.integer)]
  # Of several, the one that is nested least.
  by_depth = sorted(texts, key=lambda name: name.count("/"))
  usual = [name for last in opening.CAPTIONS for name in by_depth if name.rpartition("/")[2] == last]
  captions = opening.pick(
    texts,
    [name for name, _ in options.captions],
    usual,
    f"{folder} has no caption feature",
    f"Name a text with data.captions: {', '.join(texts) or 'there is none'}.",
    optional=bool(labels),
  )
  image = opening.pick(
    images + texts,
    [options.image] if options.image else images if len(images) == 1 else [],
    opening.IMAGES,
    f"{folder} has no image feature",
    f"Name one with data.image: {', '.join(images) or 'there is none'}.",
  )
  return Features(options, images=image, captions=captions, labels=labels)


def _classes(features):
  # Names of classes, in the order of their numbers, or None.
  import tensorflow_datasets as tfds

  for name in opening.LABELS:
    if name in features and isinstance(features[name], tfds.features.ClassLabel):
      return tuple(features[name].names)
  return None


def _flat(feature, kinds, name=""):
  # (path, feature) of all that is written.
  if isinstance(feature, kinds.Sequence):
    yield from _flat(feature.feature, kinds, name)
  elif isinstance(feature, kinds.FeaturesDict):
    for key, inner in feature.items():
      yield from _flat(inner, kinds, f"{name}/{key}" if name else key)
  else:
    yield name, feature
