"""Models on the benchmarks they are known by: scores, their errors, comparisons, and the files that hold them."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import math
from pathlib import Path

import jax
import numpy as np

from clip_jax.convert import sources
from clip_jax.data.locations import cache_folder, cache_key
from clip_jax.errors import UsageError
from clip_jax.evaluate import datasets, tasks, uncertainty
from clip_jax.evaluate.encode import Encoder
from clip_jax.evaluate.result import column
from clip_jax.files import read_json, write_bytes, write_text
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules

FORMAT = 1  # of results.json
KEYS = ("model", "pretrained", "dataset", "task", "language", "split")  # what a row is about
SHOWN = 12  # pictures of a kind on the page


@dataclasses.dataclass(frozen=True)
class Request:
  """What to evaluate on.

  Attributes:
    names: data sets.
    root: where they are.
    tasks: "auto" for what a set is made for, or of `tasks.PROBES`.
    split: the held-out part.
    languages: of prompts.
    templates: instead of the known ones.
    skip_missing: whether to go on without sets that are not there.
    batch_size: images that a device takes at a time.
  """

  names: tuple[str, ...]
  root: str
  tasks: tuple[str, ...] = ("auto",)
  split: str = "test"
  languages: tuple[str, ...] = ("en",)
  templates: tuple[str, ...] = ()
  skip_missing: bool = False
  batch_size: int = 64


class Loaded:
  """A model on all devices, to be evaluated.

  Attributes:
    name: the name that stands for its sizes, or that of its folder.
    where: what it was read from.
    encoder: an `Encoder` that normalises, and `features` one that does not.
    params: its parameters, whole on every device.
    kept: a place for text classifiers.
  """

  def __init__(self, source, batch_size, progress=lambda done, count: None):
    """Reads the weights.

    Args:
      source: a `clip_jax.convert.sources.Source`.
      batch_size: rows that a device takes at a time.
      progress: as `Encoder` takes it.
    """
    mesh = everywhere()
    rows = batch_size * len(mesh.devices.ravel())
    self.where, self.name = source.where, source.model.name or run_name(source.where)
    self.encoder = Encoder(source.model, mesh, rows, progress, tokenizer=source.tokenizer)
    self.features = Encoder(source.model, mesh, rows, progress, normalize=False, tokenizer=self.encoder.tokenizer)
    host = source.params()
    self.params = on_all(host, mesh)
    self.kept = {}
    if jax.process_count() == 1:  # others might find another file there
      self.kept = Classifiers(source.digest(host))


def run_name(where):
  """What a model without a name is called, by where it lies: of a run, its folder."""
  path = Path(where.partition(" (")[0])
  return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def everywhere(devices=None):
  """A mesh with all devices along the batch; `devices` instead, if given."""
  devices = np.array(jax.devices() if devices is None else devices)
  return jax.sharding.Mesh(devices.reshape(-1, 1, 1), meshes.AXES, axis_types=meshes.AUTO)


def on_all(params, mesh):
  """Parameters, in float32, whole on every device of a mesh; each process has them as arrays of its own."""
  sharding = rules.replicated(mesh)

  def put(array):
    array = np.asarray(array, np.float32)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(put, params)


class Classifiers:
  """Text classifiers of one set of weights, in memory and, for the next time, in the cache folder."""

  def __init__(self, weights):
    """Keeps them under a name that stands for the weights."""
    self._weights, self._known = weights, {}

  def __contains__(self, key):
    if key not in self._known:
      try:
        self._known[key] = np.load(self._path(key), allow_pickle=False)
      except (OSError, ValueError, EOFError):
        return False
    return True

  def __getitem__(self, key):
    return self._known[key]

  def __setitem__(self, key, value):
    self._known[key] = value
    content = io.BytesIO()
    np.save(content, value)
    path = self._path(key)
    with contextlib.suppress(OSError):  # it is made again the next time
      path.parent.mkdir(parents=True, exist_ok=True)
      write_bytes(path, content.getvalue())

  def _path(self, key):
    return cache_folder("classifiers") / f"{cache_key(self._weights, json.dumps(key))}.npy"


def open_sets(request):
  """Opens everything before a model is loaded.

  Args:
    request: a `Request`.

  Returns:
    A list of `datasets.EvaluationSet`, and of (name, why it is left out).

  Raises:
    UsageError: a set is not there, or cannot be used.
  """
  found, missing = [], []
  for name, language in itertools.product(request.names, request.languages):
    try:
      alone = len(request.names) == 1
      found.append(datasets.open_set(name, request.root, request.split, language, alone, request.templates))
    except UsageError as error:
      if not request.skip_missing:
        raise
      missing.append((name, str(error)))
  if not found:
    raise UsageError(f"None of {', '.join(request.names)} is in {request.root}: {missing[0][1]}")
  return found, missing


def evaluate(model, held_out, names, track=None):
  """Scores a model on a set.

  Args:
    model: a `Loaded`.
    held_out: a `datasets.EvaluationSet`.
    names: tasks, as `Request` has them.
    track: wraps what takes long, to show how far it is.

  Yields:
    (task, `Result`).
  """
  probes = None
  for name in names:
    if name == "auto":
      yield held_out.task, tasks.evaluator(held_out, model.encoder, model.kept, SHOWN)(model.params)
    else:
      probes = probes or tasks.Probes(held_out, model.features, model.params)
      yield name, probes(name, track)


class Quiet:
  """Stands in for who says how far it is."""

  def begin(self, what):
    """Says nothing."""

  def progress(self, done, count):
    """Says nothing."""


def run(models, request, output=None, track=None, told=None):
  """Scores models on sets; what is done is on disk before the next one begins.

  Args:
    models: `clip_jax.convert.sources.Source`s.
    request: a `Request`.
    output: a path of a CSV file with CLIP_benchmark's columns. Beside it a `.json` holds everything; rows of others that are
      there already are kept.
    track: as in `evaluate`.
    told: an object as `Quiet`, which it is if not given: `begin` is called when a set begins, and `progress` as it goes on.

  Returns:
    A dict of "rows", "comparisons", "details" (results.json, docs/evaluation.md) and "missing".

  Raises:
    UsageError: a set or the file cannot be used.
  """
  results, told = Results(output), told or Quiet()
  sets, missing = open_sets(request)
  outcomes = {}
  for source in models:
    model = Loaded(source, request.batch_size, told.progress)
    for held_out in sets:
      told.begin(f"{model.name}: {held_out.name}")
      for task, result in evaluate(model, held_out, request.tasks, track):
        subject = dict(zip(KEYS, (model.name, model.where, held_out.name, task, held_out.language, held_out.split), strict=True))
        results.add(subject, result)
        seen = outcomes.setdefault((held_out.name, task, held_out.language), [])
        for first, earlier in seen:
          results.compare(first, subject, earlier, result)
        seen.append((subject, result))
        results.write()
  return results.content | {"missing": missing}


class Results:
  """What is in results.json, and the same as a table."""

  def __init__(self, path):
    """Begins, with what is there already.

    Args:
      path: of the CSV file; None: nothing is written.

    Raises:
      UsageError: it cannot be written, or what is beside it was not written by us.
    """
    self.content = {"format": FORMAT, "rows": [], "comparisons": [], "details": []}
    self._path = None if path is None else Path(path)
    if path is None:
      return
    if self._path.suffix != ".csv":
      raise UsageError(f"{path}: results are written as a .csv file, such as results.csv.")
    if not self._path.parent.is_dir():
      raise UsageError(f"{path}: the folder {self._path.parent} does not exist.")
    beside = self._path.with_suffix(".json")
    if beside.exists():
      self.content = read_json(beside)
      if not isinstance(self.content, dict) or self.content.get("format") != FORMAT:
        raise UsageError(f"{beside} is not of this command; give --output another name.")
    elif self._path.exists():
      raise UsageError(f"{path} exists, and {beside.name} is not beside it; give --output another name.")

  def add(self, subject, result):
    """Adds a `Result`, in the place of an earlier one about the same."""
    row = subject | {"items": result.items, "metrics": {}, "standard_errors": {}, "chance": {}}
    for metric, score in result.scores.items():
      for kind, value in zip(("metrics", "standard_errors", "chance"), score, strict=True):
        known = value is not None and not math.isnan(value)
        if known or kind == "metrics":
          row[kind][column(metric)] = value if known else None
    self._replace("rows", row, KEYS)
    details = {key: result.details[key] for key in ("confusions", "classes", "reliability") if key in result.details}
    if "retrieval" in result.details:
      details["gallery"] = result.details["retrieval"]
    if details:
      self._replace("details", subject | details, KEYS)

  def compare(self, first, second, earlier, later):
    """Adds a paired test of each metric of two `Result`s.

    Args:
      first: what the earlier one is about, a dict with `KEYS`.
      second: what the later one is about: another model, on the same set.
      earlier: a `Result`.
      later: a `Result`.
    """
    about = {key: [first[key], second[key]] if key in ("model", "pretrained") else first[key] for key in KEYS}
    about["models"] = about.pop("model")
    for metric, (values, groups) in earlier.outcomes.items():
      other, _ = later.outcomes[metric]
      both = [found.scores[metric].value for found in (earlier, later)]
      entry = about | {"metric": column(metric), "values": both}
      self._replace("comparisons", entry | uncertainty.paired(values, other, groups), (*about, "metric"))

  def _replace(self, kind, entry, keys):
    about = [entry[key] for key in keys]
    rest = [one for one in self.content[kind] if [one.get(key) for key in keys] != about]
    self.content[kind] = [*rest, entry]

  def write(self):
    """Writes both files, each whole; of several processes the first one does."""
    if self._path is None or jax.process_index():
      return
    write_text(self._path.with_suffix(".json"), json.dumps(self.content, ensure_ascii=False))
    write_text(self._path, self.table())

  def table(self):
    """The rows as CSV: what they are about, metrics, and their standard errors."""
    rows = self.content["rows"]
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    errors = [f"{name}_standard_error" for name in metrics if any(name in row["standard_errors"] for row in rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*KEYS, "items", "model_fullname", *metrics, *errors], lineterminator="\n")
    writer.writeheader()
    for row in rows:
      found = {key: row[key] for key in (*KEYS, "items")} | {"model_fullname": f"{row['model']} {row['pretrained']}"}
      found |= row["metrics"] | {f"{name}_standard_error": value for name, value in row["standard_errors"].items()}
      writer.writerow(found)
    return text.getvalue()


def open_models(paths, name=None, ema=None, average=1):
  """Opens the models to evaluate; arguments as `clip_jax.convert.sources.find` takes them.

  Raises:
    UsageError: one is not there, or two are the same.
  """
  if len(set(paths)) < len(paths):
    raise UsageError("The same model is given twice.")
  return [sources.find(path, name, ema=ema, average=average) for path in paths]
