"""Kept records, read once more and written to shards."""

import functools
import io
import json
import tarfile

import numpy as np

from clip_jax.data import sources
from clip_jax.data.preparation import hashes, manifest, reading, records
from clip_jax.data.sources.array_record import Features, Shards, example
from clip_jax.errors import DataError

TOGETHER = 64  # records that are held in memory
PLAN = np.dtype([("id", "<u8"), ("leader", "<u8"), ("place", "<u4"), ("start", "<u8")])
SCHEMAS = {
  "array_record": {
    "image": "bytes: a JPEG", "caption": "texts", "label": "number, of labelled records", "key": "text: the record it was made of",
    "width": "number: pixels", "height": "number: pixels", "json": "text: what else the source had of it, as a JSON object",
  },
  "tar": {
    "jpg": "a JPEG", "txt": "the first caption", "cls": "a number, of labelled records",
    "json": "an object: caption, captions (all of them), key (the record it was made of), width, height (pixels), and what else the source had of it",
  },
}  # fmt: skip


def set_aside_name(range_name):
  """Where the records of a range are that cannot be read one by one from their source."""
  return f"work/aside/{range_name}.array_record"


def shard_name(settings, number, total):
  """The name of an output file.

  Args:
    settings: `Settings`.
    number: from 0.
    total: how many there are.
  """
  if settings.format == "tar":
    return f"{number:05}.tar"
  return f"{settings.name}-{number:05}-of-{total:05}.array_record"


class ArrayRecordFile:
  """Writes `tf.train.Example`s, one a chunk, so that each can be read by itself."""

  def __init__(self, path, _number=0):
    """Opens a local file for writing."""
    from array_record.python.array_record_module import ArrayRecordWriter

    self._writer = ArrayRecordWriter(path, "group_size:1")

  def add(self, record):
    """Writes a `Prepared`."""
    self._writer.write(example(
      record.image, record.captions, record.label,
      key=record.key, width=record.width, height=record.height, json=json.dumps(record.more),
    ))  # fmt: skip

  def close(self):
    """Finishes the file."""
    self._writer.close()


class TarFile:
  """Writes members as img2dataset does, with nothing of this machine in them."""

  def __init__(self, path, number):
    """Opens a local file for writing; the number begins the names of its members."""
    self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
    self._number, self._count = number, 0

  def add(self, record):
    """Writes a `Prepared`."""
    about = record.more | {
      "caption": record.captions[0] if record.captions else "", "captions": record.captions, "key": record.key,
      "width": record.width, "height": record.height,
    }  # fmt: skip
    members = {"jpg": record.image, "txt": about["caption"].encode(), "json": json.dumps(about).encode()}
    if record.label is not None:
      members["cls"] = str(record.label).encode()
    for kind, content in members.items():
      member = tarfile.TarInfo(f"{self._number:05}{self._count:06}.{kind}")
      member.size = len(content)
      self._tar.addfile(member, io.BytesIO(content))
    self._count += 1

  def close(self):
    """Finishes the file."""
    self._tar.close()


class Kept:
  """Reads records by their places in the plan."""

  def __init__(self, layout, settings, pattern):
    """Opens the source.

    Args:
      layout: the `Layout` of the output.
      settings: `Settings`.
      pattern: what is read; the files of the layout hold no secret that may be in it.
    """
    self._layout, self._settings = layout, settings
    given = layout.read_json("work/input.json")
    places = [place for place in layout.read_json("work/ranges.json") if place[0] < int(manifest.EXCLUDED)]
    options = settings.options()
    self._features = None
    if given["units"][0][1] == "parquet":
      names = [reading.name_of(first) for first, _ in places]
      self._shards = Shards([layout.path(set_aside_name(name)) for name in names], options)
      self._features = Features(options)
      begins = [0, *self._shards.ends[:-1].tolist()]
      self._begins = {first: begin for (first, _), begin in zip(places, begins, strict=True)}
    else:
      self._source = sources.create(*sources.format_of(pattern), options)
      lengths = dict.fromkeys((unit[0] for unit in given["units"]), 0)
      for first, stop in places:
        lengths[reading.locate(first)[0]] += stop - first
      self._begins = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist(), strict=False))

  def fetch(self, heads):
    """The records at `PLAN` rows, in that order.

    Raises:
      DataError: one cannot be read (any more).
    """
    if self._features:
      places = zip(heads["start"].tolist(), heads["place"].tolist(), strict=True)
      indices = [self._begins[start] + place for start, place in places]
      contents = zip(self._shards.read(indices), map(self._shards.key, indices), strict=True)
      found = [self._features.record(*content) for content in contents]
      found = [record if isinstance(record, DataError) else record._replace(key=record.extra["key"]) for record in found]
    else:
      places = [reading.locate(number) for number in heads["id"].tolist()]
      found = self._source.fetch([self._begins[unit] + row for unit, row in places])
    for record in found:
      if isinstance(record, DataError):
        raise DataError(f"{record} It could be read before; was the input changed?") from record
    return found

  def captions(self, rows):
    """The captions of records as their manifests have them.

    Args:
      rows: `PLAN` rows.
    """
    found = []
    for number, start in zip(rows["id"].tolist(), rows["start"].tolist(), strict=True):
      found += _captions(self._layout.out, reading.name_of(start))[number - start].as_py()
    return found


@functools.lru_cache(maxsize=16)
def _captions(out, name):
  return manifest.decode(manifest.Layout(out).read(manifest.name_of(name)), ["captions"])["captions"]


@functools.lru_cache(maxsize=2)
def _open(out, settings, pattern):
  return Kept(manifest.Layout(out), settings, pattern)


def forget():
  """Closes what this process keeps open, which may have changed since."""
  for kept in (_captions, _open, reading.open_unit):
    kept.cache_clear()


def plan(rows, settings):
  """Puts the rows of a shard in its order.

  Args:
    rows: `manifest.ROW`s.
    settings: `Settings`.

  Returns:
    `PLAN` rows. One that is not its own leader comes after it where the captions of the same image come together.
  """
  found = np.zeros(len(rows), PLAN)
  for name in PLAN.names:
    found[name] = rows[name] if settings.same_image == "merge" or name != "leader" else rows["id"]
  return found[np.lexsort((found["id"], hashes.order(found["leader"], settings.seed)))]


def write_shard(number, total, out, settings, pattern):
  """Writes a shard, unless it is there, and then what is in it to `OUT/work`.

  Args:
    number: from 0.
    total: how many there are.
    out: the output folder.
    settings: `Settings`.
    pattern: what is read.

  Raises:
    DataError: a record cannot be read any more.
    StorageError: a store does not answer.
  """
  layout = manifest.Layout(out)
  about = f"work/shards/{number:05}.json"
  if layout.has(about):
    return
  kept = _open(out, settings, pattern)
  rows = manifest.from_bytes(layout.read(f"work/plan/{number:05}.npy"))
  begins = np.append(np.flatnonzero(rows["id"] == rows["leader"]), len(rows))
  name = shard_name(settings, number, total)
  with layout.new(name) as path:
    file = (TarFile if settings.format == "tar" else ArrayRecordFile)(path, number)
    for first in range(0, len(begins) - 1, TOGETHER):
      edges = begins[first : first + TOGETHER + 1]
      for record, begin, end in zip(kept.fetch(rows[edges[:-1]]), edges[:-1], edges[1:], strict=True):
        prepared = records.prepare(record, settings)
        captions = prepared.captions + kept.captions(rows[begin + 1 : end])
        file.add(prepared._replace(captions=list(dict.fromkeys(captions))))
    file.close()
  size = layout.storage.size(layout.path(name))
  layout.write(about, json.dumps({"name": name, "records": len(begins) - 1, "bytes": size}).encode())
