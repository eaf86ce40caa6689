"""The three Beam pipelines of a preparation. What they do is in `steps`.

What moves between machines is arrays of hashes, some hundred records together; images never do.
"""

import functools

from clip_jax.data.preparation import steps

PART = 1_000_000  # rows that are compared on one machine, about


def analyse(pipeline, units, out, settings):
  """Adds the steps that write a manifest of each range of records, and a list of the ranges.

  Args:
    pipeline: a `beam.Pipeline`.
    units: a list of `reading.Unit`.
    out: the output folder.
    settings: `Settings`.
  """
  import apache_beam as beam

  _ = (
    pipeline
    | "files" >> beam.Create(units)
    | "spread files" >> beam.Reshuffle()
    | "split" >> beam.FlatMap(functools.partial(steps.split, settings=settings))
    | "spread ranges" >> beam.Reshuffle()
    | "look at records" >> beam.Map(functools.partial(steps.write_manifest, out=out, settings=settings))
    | "together" >> beam.combiners.ToList()
    | "write ranges" >> beam.Map(functools.partial(steps.write_ranges, out=out))
  )


def decide(pipeline, places, out, settings):
  """Adds the steps that find copies, write which records go to which shard, and count what is dropped.

  Args:
    pipeline: a `beam.Pipeline`.
    places: of each range the numbers of its first record and of the one after its last.
    out: the output folder.
    settings: `Settings`.
  """
  import apache_beam as beam

  parts = -(-sum(stop - start for start, stop in places) // PART)

  def step(name, function, *outputs, **more):
    return name >> beam.FlatMap(functools.partial(function, settings=settings, parts=parts, **more)).with_outputs(*outputs, main="rows")

  read = (
    pipeline
    | "manifests" >> beam.Create([start for start, _ in places])
    | "spread manifests" >> beam.Reshuffle()
    | step("read", steps.by_pixels, "counts", out=out)
  )
  unique = read.rows | beam.GroupByKey() | step("same pixels", steps.same_pixels, "counts", "looks")
  alike = unique.looks | "by looks" >> beam.GroupByKey() | step("same looks", steps.same_looks, "drops")
  similar = alike.rows | "by part of looks" >> beam.GroupByKey() | step("similar", steps.similar)
  drops = (alike.drops, similar.rows) | "drops" >> beam.Flatten()
  kept = {"rows": unique.rows, "drops": drops} | beam.CoGroupByKey() | step("without copies", steps.without, "counts")
  counts = (read.counts, unique.counts, kept.counts) | "counts" >> beam.Flatten() | beam.CombineGlobally(steps.added)
  shards = counts | "shards" >> beam.Map(functools.partial(steps.shards, settings=settings))
  placed = kept.rows | "by shard" >> beam.FlatMap(steps.by_shard, beam.pvalue.AsSingleton(shards), settings)
  _ = (
    (shards | "every shard" >> beam.FlatMap(steps.every_shard), placed)
    | "of shards" >> beam.Flatten()
    | "by shards" >> beam.GroupByKey()
    | "write plans" >> beam.Map(functools.partial(steps.write_plan, out=out, settings=settings))
    | "plans" >> beam.combiners.Count.Globally()
    | "write counts" >> beam.Map(steps.write_counts, beam.pvalue.AsSingleton(counts), out)
  )


def write(pipeline, total, out, settings, pattern):
  """Adds the steps that write the shards.

  Args:
    pipeline: a `beam.Pipeline`.
    total: how many there are.
    out: the output folder.
    settings: `Settings`.
    pattern: what is read.
  """
  import apache_beam as beam

  from clip_jax.data.preparation import writing

  _ = (
    pipeline
    | "shards" >> beam.Create(range(total))
    | "spread shards" >> beam.Reshuffle()
    | "write" >> beam.Map(functools.partial(writing.write_shard, total=total, out=out, settings=settings, pattern=pattern))
  )
