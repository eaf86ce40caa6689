"""What the pipelines do to one element each: plain functions, which every machine can import."""

import collections
import contextlib
import json

import numpy as np

from clip_jax.data.preparation import duplicates, hashes, manifest, reading, records, writing
from clip_jax.data.sources.protocol import TOGETHER


def split(unit, settings):
  """The ranges of a `reading.Unit`."""
  return reading.ranges(unit, settings)


def write_manifest(place, out, settings):
  """Looks at each record of a range and writes its manifest, unless it is there.

  Args:
    place: a `reading.Range`.
    out: the output folder.
    settings: `Settings`.

  Returns:
    The numbers of its first record and of the one after its last.

  Raises:
    DataError: the source cannot be opened.
    StorageError: a store does not answer; then nothing is written, and nothing counts as a bad record.
  """
  layout, name = manifest.Layout(out), manifest.name_of(place.name)
  ids = place.ids()
  if not layout.has(name):
    with contextlib.ExitStack() as stack:
      aside = None
      if place.unit.format == "parquet" and not place.unit.exclude:
        # Reading one row costs as much as reading its row group, so what passes is kept where records can be read by themselves.
        path = stack.enter_context(layout.new(writing.set_aside_name(place.name)))
        aside = stack.enter_context(contextlib.closing(writing.ArrayRecordFile(path)))
      judged = [_judge(record, place.unit, settings, aside) for record in _records(place, settings)]
    layout.write(name, manifest.encode(place, judged))
  return ids[0], ids[-1] + 1


def _records(place, settings):
  source = reading.open_unit(place.unit, settings.options())
  step = min(TOGETHER, writing.TOGETHER)
  for start in range(place.start, place.stop, step):
    yield from source.fetch(range(start, min(start + step, place.stop)))


def _judge(record, unit, settings, aside):
  if unit.exclude:
    return records.look(record, settings)
  judged = records.judge(record, settings)
  if aside and not judged.reason:
    aside.add(records.prepare(record, settings))
  return judged


def write_ranges(places, out):
  """Writes the list of ranges."""
  manifest.Layout(out).write("work/ranges.json", json.dumps(sorted(places)).encode())


def by_pixels(first, settings, parts, out):
  """Reads a manifest: its rows by what those with the same pixels share, and the counts of the others.

  Args:
    first: the number of the range's first record.
    settings: `Settings`.
    parts: how many parts rows are compared in.
    out: the output folder.
  """
  table = manifest.decode(manifest.Layout(out).read(manifest.name_of(reading.name_of(first))))
  excluded = first >= int(manifest.EXCLUDED)
  dropped = collections.Counter(reason for reason in table["reason"].to_pylist() if reason)
  untagged = collections.Counter(name for names in table["untagged"].to_pylist() for name in names)
  if excluded:
    yield _tagged("counts", {("exclude", "images"): len(table), ("exclude", "unreadable"): dropped.total()})
  else:
    counts = {("dropped", reason): count for reason, count in dropped.items()}
    counts |= {("untagged", name): count for name, count in untagged.items()}
    yield _tagged("counts", counts | {("input", "records"): len(table)})
  rows = manifest.rows(table)
  yield from _parts(rows, rows["pixels"][:, 0], parts)


def same_pixels(element, settings, parts):
  """`duplicates.same_pixels` of a part: rows by their leaders, those to look at further by their looks, and counts."""
  rows, keep_out, counts = duplicates.same_pixels(np.concatenate(list(element[1])), settings.same_image)
  yield _tagged("counts", {("dropped", reason): count for reason, count in counts.items()})
  yield from _parts(rows, rows["leader"], parts)
  if _distance(settings) is not None:
    rows = np.concatenate([rows[rows["id"] == rows["leader"]], keep_out])
    rows = rows[rows["has_looks"]]
    for part in _parts(rows, rows["looks"], parts):
      yield _tagged("looks", part)


def same_looks(element, settings, parts):
  """`duplicates.same_looks` of a part: rows by each of the masked values of their looks, and drops by their leaders."""
  rows, drops = duplicates.same_looks(np.concatenate(list(element[1])), *_distances(settings))
  for part in _parts(drops, drops["leader"], parts):
    yield _tagged("drops", part)
  for i, mask in enumerate(hashes.masks(_distance(settings))):
    for part, some in _parts(rows, rows["looks"] & mask, parts):
      yield (i, part), some


def similar(element, settings, parts):
  """`duplicates.similar` of a part: drops by their leaders."""
  (i, _), groups = element
  mask = hashes.masks(_distance(settings))[i]
  drops = duplicates.similar(np.concatenate(list(groups)), mask, *_distances(settings))
  yield from _parts(drops, drops["leader"], parts)


def without(element, settings, parts):
  """`duplicates.without` of a part: the rows that are kept, and counts."""
  groups = element[1]
  rows = np.concatenate([np.zeros(0, manifest.ROW), *groups["rows"]])
  kept, counts = duplicates.without(rows, np.concatenate([np.zeros(0, duplicates.DROP), *groups["drops"]]))
  counts = {("dropped", reason): count for reason, count in counts.items()}
  alone = kept["id"] == kept["leader"] if settings.same_image == "merge" else np.ones(len(kept), bool)
  counts |= {("dropped", "merged"): int((~alone).sum()), ("output", "records"): int(alone.sum())}
  yield _tagged("counts", counts | {("output", "size"): int(kept["size"][alone].sum())})
  yield kept


def added(counts):
  """The sums of dicts of numbers."""
  total = collections.Counter()
  for some in counts:
    total.update(some)
  return total


def shards(counts, settings):
  """How many shards there are to be."""
  return max(1, round(counts[("output", "size")] / settings.shard_size))


def every_shard(count):
  """All shards, each with no row, so that none is missing that gets none."""
  for number in range(count):
    yield number, np.zeros(0, manifest.ROW)


def by_shard(rows, count, settings):
  """Rows by the shards that they go to; captions that come together go where their leader goes."""
  order = hashes.order(rows["leader" if settings.same_image == "merge" else "id"], settings.seed)
  number = (order >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)
  for one in np.unique(number):
    yield int(one), rows[number == one]


def write_plan(element, out, settings):
  """Writes which records a shard gets."""
  number, groups = element
  plan = writing.plan(np.concatenate(list(groups)), settings)
  manifest.Layout(out).write(f"work/plan/{number:05}.npy", manifest.to_bytes(plan))


def write_counts(plans, counts, out):
  """Writes the counts, after all plans."""
  found = {"shards": plans}
  for (group, name), count in sorted(counts.items()):
    found.setdefault(group, {})[name] = count
  manifest.Layout(out).write_json("work/counts.json", found)


def _tagged(name, value):
  from apache_beam.pvalue import TaggedOutput

  return TaggedOutput(name, value)


def _parts(rows, keys, parts):
  numbers = hashes.mix(keys) % np.uint64(parts)
  for number in np.unique(numbers):
    yield int(number), rows[numbers == number]


def _distances(settings):
  return settings.near_distance, settings.exclude_distance if settings.exclude else None


def _distance(settings):
  return max((distance for distance in _distances(settings) if distance is not None), default=None)
