"""From records in any format to a data set, on whatever engine Beam runs on; goes on where it was stopped."""

import contextlib
import dataclasses
import importlib.metadata
import json
import re
import threading

from clip_jax import errors
from clip_jax.data import locations
from clip_jax.data.preparation import manifest, pipeline, reading, writing
from clip_jax.data.preparation.settings import Settings
from clip_jax.errors import MissingExtraError, UsageError, redact, redacted
from clip_jax.files import tell

INFO = "dataset_info.json"
# What comes out may depend on them.
PACKAGES = ("clip_jax", "apache-beam", "array_record", "numpy", "opencv-python-headless", "pillow", "pyarrow")
PROGRESS_SECONDS = 30
INDIFFERENT = ("range_records",)  # settings on which the result does not depend


def convert(pattern, out, settings=None, beam_options=(), log=None):
  """Prepares a data set.

  Args:
    pattern: what to read, as `sources.create("auto", pattern)` takes it.
    out: the folder to write: local, gs:// or s3://, where every worker can reach it. The same call goes on with what an
      earlier one left there.
    settings: `Settings`; the defaults if not given.
    beam_options: options of Beam and its runner, as on a command line: `["--runner=DirectRunner"]`.
    log: called with lines of progress; standard error if not given.

  Returns:
    A dict: what `OUT/dataset_info.json` holds.

  Raises:
    MissingExtraError: Beam is not installed.
    UsageError: `out` holds something else, or a set that is finished; or the input cannot be read.
    StorageError: a store does not answer.
  """
  settings = settings or Settings()
  log = log or tell
  for path in (pattern, out):
    locations.check(path)
  new_graph = _beam(beam_options)
  layout = manifest.Layout(out)
  if layout.has(INFO):
    layout.clean()  # where the end was cut off
    raise UsageError(f"{layout.path(INFO)} is there: the data set is finished. Remove {out}, or choose another folder.")

  @contextlib.contextmanager
  def stage(name, files):
    log(f"{name} begins")
    with _explained(), _progress(layout, name, files, log), new_graph() as graph:
      yield graph
    log(f"{name} is done")

  writing.forget()
  units = _begin(layout, pattern, settings)
  if not layout.has("work/ranges.json"):
    with stage("1/3 analysis", "manifest/*.parquet") as graph:
      pipeline.analyse(graph, units, layout.out, settings)
  places = layout.read_json("work/ranges.json")
  if not places:
    raise UsageError(f"{pattern}: there is no record in these files.")
  if not layout.has("work/counts.json"):
    with stage("2/3 deduplication", "work/plan/*.npy") as graph:
      pipeline.decide(graph, places, layout.out, settings)
  counts = layout.read_json("work/counts.json")
  if not counts.get("output", {}).get("records"):
    raise UsageError(f"No record is left; dropped: {_listed(counts) or 'none, there was none'}.")
  log(f"{counts['output']['records']:,} of {counts['input']['records']:,} records are kept; dropped: {_listed(counts)}")
  with stage(f"3/3 writing {counts['shards']:,} shards", "work/shards/*.json") as graph:
    pipeline.write(graph, counts["shards"], layout.out, settings, pattern)
  return _finish(layout, pattern, settings, counts)


def _beam(options):
  # A function that makes a new graph of Beam.
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise MissingExtraError("clip-jax data convert", "beam", "apache-beam") from error

  def new_graph():
    return beam.Pipeline(options=PipelineOptions(list(options)))

  try:
    new_graph()
  except ValueError as error:  # there is no such runner, or it lacks an option
    raise UsageError(f"Beam cannot run with {' '.join(options)}: {error}") from error
  return new_graph


def _listed(counts):
  return ", ".join(f"{name} {count:,}" for name, count in counts.get("dropped", {}).items() if count)


def _begin(layout, pattern, settings):
  # The units, if this is the beginning, or goes on with the same.
  options = settings.options()
  units = reading.units(pattern, options)
  for one in settings.exclude:
    units += reading.units(one, options, exclude=True, first=len(units))
  given = {"pattern": pattern} | dataclasses.asdict(settings)
  # The digest is of all as it was given; what people read, and copy elsewhere, opens no bucket.
  digest = locations.cache_key(json.dumps([given, units]), reading.stamp(units, options))
  now = redacted({"settings": given, "units": units, "digest": digest})
  if not layout.has("work/input.json"):
    if layout.names("**/*" if not locations.is_remote(layout.out) else "*"):
      raise UsageError(f"{layout.out} holds something already; choose a folder that is empty or not there.")
    layout.write_json("work/input.json", now)
    return units
  before = layout.read_json("work/input.json")
  for name, value in now["settings"].items():
    if before["settings"].get(name) != value:
      raise UsageError(
        f"{layout.out} was begun with {name}={before['settings'].get(name)!r}, and now it is {value!r}. "
        "Go on with the same settings, or choose another folder."
      )
  if before != now:
    raise UsageError(f"{layout.out} was begun with other input: files of {pattern} or of exclude, or what signs them, have changed.")
  return units


def _finish(layout, pattern, settings, counts):
  names = [f"work/shards/{number:05}.json" for number in range(counts["shards"])]
  shards = [layout.read_json(name) for name in names]
  kept = {name: value for name, value in dataclasses.asdict(settings).items() if name not in INDIFFERENT}
  info = {
    "format": settings.format,
    "path": "*.tar" if settings.format == "tar" else f"{settings.name}-*.array_record",
    "records": sum(shard["records"] for shard in shards),
    "bytes": sum(shard["bytes"] for shard in shards),
    "record": writing.SCHEMAS[settings.format],
    "input": {"path": redact(pattern), "records": counts["input"]["records"]},
    "dropped": {name: count for name, count in counts["dropped"].items() if count},
    "untagged": counts.get("untagged", {}),
    "excluded_images": counts.get("exclude", {}),
    "settings": redacted(kept),
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    "shards": shards,
  }
  layout.write_json(INFO, info)
  layout.clean()
  return layout.read_json(INFO)


@contextlib.contextmanager
def _explained():
  # Runners wrap what a worker raises, other processes even to text.
  try:
    yield
  except Exception as error:
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    found = re.findall(r"clip_jax\.errors\.(\w+): (.*)", text)
    if not found:
      raise
    name, message = found[-1]
    raise getattr(errors, name)(re.sub(r" \[while running .*", "", message)) from error


@contextlib.contextmanager
def _progress(layout, name, files, log):
  done = threading.Event()

  def watch():
    while not done.wait(PROGRESS_SECONDS):
      with contextlib.suppress(Exception):  # it is no more than a line
        log(f"{name}: {len(layout.names(files)):,} files are written")

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()
