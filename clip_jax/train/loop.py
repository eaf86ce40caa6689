"""The training loop: what a run is made of, and the order in which it happens."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax import config as configs
from clip_jax.convert.sources import find as find_weights
from clip_jax.data import dataset, pipeline, sources
from clip_jax.data.locations import redact
from clip_jax.errors import ConfigError, DataError, UsageError
from clip_jax.evaluate.encode import Encoder
from clip_jax.evaluate.retrieval import Retrieval
from clip_jax.evaluate.zero_shot import ZeroShot
from clip_jax.files import write_text
from clip_jax.losses import global_batch
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import checkpoint, environment, hooks, metrics, performance, program, step
from clip_jax.train import state as states
from clip_jax.train.progress import Progress

# What a run may change when it is resumed: none of these changes a number it computes.
FREE_TO_CHANGE = (
  *("mesh", "eval", "checkpoint", "train.log_every"),
  *("data.threads", "data.prefetch", "data.block_cache", "data.read_deadline", "data.source"),
  *("train.attention", "train.remat", "train.scan", "train.microbatches", "loss.method", "loss.chunk"),
)


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended.

  Attributes:
    step: updates done.
    steps: updates the config asks for; the run is complete when both are equal.
    started: updates that were done before.
  """

  step: int
  steps: int
  started: int

  @property
  def complete(self):
    """Whether there is nothing left to do."""
    return self.step == self.steps


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a run has opened, described and checked before its first step.

  Attributes:
    data: the `Dataset` that is trained on.
    records: its length, which the order of examples depends on; of a mixture a list of them.
    weights: the `Source` of `train.init_from`, or None.
    evaluators: as `create_evaluators` returns.
    state: shapes and shardings of the state.
  """

  data: dataset.Dataset
  records: int | list
  weights: object
  evaluators: list
  state: states.TrainState


def run(config, workdir, profile=None, compiled=None):
  """Trains, or resumes what the work directory holds.

  Args:
    config: a `ConfigDict` or a nested dict; see `clip_jax.config`.
    workdir: folder for everything the run writes; made if missing.
    profile: steps to trace into its folder `profile`, a pair of ints: the first, and the first not to trace any more.
    compiled: a file with the compiled step (`clip_jax.train.program`), used where it is of this run's config, versions and devices.

  Returns:
    A `Result`. On SIGTERM or SIGINT the step is finished, everything is saved, and the result is not
    complete: the same call goes on from there.

  Raises:
    UsageError: the config, the data, the work directory, the steps to trace or the compiled step cannot be used.
  """
  config, mesh = settle(config, profile)
  workdir = Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be made: {error.strerror}.") from error
  checkpoints = checkpoint.Checkpoints(workdir, config, pipeline.file_tokenizer_for(config.model))
  checkpoints.clear_leftovers()
  try:
    start = checkpoints.latest_step() or 0
    if start:
      check_same_run(workdir, config)
    if start >= config.train.steps:
      return Result(start, config.train.steps, start)
    train_step = program.load(compiled, config, mesh) if compiled else None
    return _train(config, workdir, mesh, checkpoints, start, profile, train_step or step.create(config, mesh))
  finally:
    checkpoints.close()


def settle(config, profile=None):
  """What a run begins with: its config as it will be run here, and the devices.

  Args:
    config: as `run`.
    profile: as `run`.

  Returns:
    A resolved `Config`, and the device mesh.

  Raises:
    UsageError: the config or the steps to trace cannot be used.
  """
  config = configs.resolve(config)
  if profile is not None:
    hooks.check_window(profile, config.train.steps)
  mesh = meshes.create(config)
  return performance.settled(config, mesh.devices.flat[0]), mesh


def check_same_run(workdir, config):
  """Checks that a work directory with checkpoints belongs to a run with this config.

  Args:
    workdir: the folder.
    config: a resolved `Config`.

  Raises:
    ConfigError: it belongs to another; the message names the first difference.
  """
  path = workdir / "config.json"
  try:
    # Resolved again: a key that is newer than the run has its default, which is what the run did.
    saved = _as_json(configs.resolve(json.loads(path.read_text())))
  except (OSError, ValueError) as error:
    raise UsageError(f"{workdir} holds checkpoints, but {path} cannot be read ({error}).") from error
  for key, old, new in differences(saved, _as_json(config)):
    if not key.startswith(FREE_TO_CHANGE):
      raise ConfigError(
        f"{workdir} holds a run with config.{key}={old!r}, and this config has {new!r}; "
        "use another --workdir, or the config of that run."
      )


def describe_run(workdir, config, described):
  """Writes `config.json`, `environment.json` and `parameters.txt`, which says what of the state lies where; prints that of parameters."""
  parts = [("parameters", described.params), ("optimizer", described.opt_state)]
  if described.ema is not None:
    parts.append(("moving average", described.ema))
  write_text(workdir / "parameters.txt", rules.table(parts) + "\n")
  print(rules.table(parts[:1]), file=sys.stderr, flush=True)
  write_text(workdir / "config.json", json.dumps(_as_json(config), indent=2) + "\n")
  write_text(workdir / "environment.json", json.dumps(environment.describe(), indent=2) + "\n")


def _as_json(config):
  # What signs a request stands in no file: the work directory is shared, and its report sent around.
  def shown(value):
    if isinstance(value, dict):
      return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list) else redact(value) if isinstance(value, str) else value

  return shown(json.loads(json.dumps(configs.to_dict(config))))


def differences(old, new, prefix=""):
  """Yields (dotted key, old value, new value) where two nested dicts differ."""
  for key in dict.fromkeys([*old, *new]):
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from differences(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}", a, b


def prepare(config, workdir, mesh, checkpoints, start):
  """Opens and checks all that a run needs beside its work directory.

  Args:
    config: a resolved `Config`.
    workdir: the work directory.
    mesh: the device mesh.
    checkpoints: the `Checkpoints` that a run goes on from; not asked if it starts.
    start: updates done.

  Returns:
    A `Prepared`.

  Raises:
    UsageError: the data, the weights to start from or an evaluation set cannot be used.
  """
  data = dataset.create(config)
  records = list(data.lengths) if config.data.mixture else len(data)
  if start and checkpoints.records() != records:
    raise DataError(
      f"{config.data.path or 'config.data.mixture'} has {records} records, and the run in {workdir} began with "
      f"{checkpoints.records()}: the order of examples would not be the same. Restore the data, or use "
      "another --workdir."
    )
  weights = find_weights(config.train.init_from) if config.train.init_from and not start else None
  evaluators = create_evaluators(config, mesh, data)
  return Prepared(data, records, weights, evaluators, states.describe(config, mesh)[0])


def _train(config, workdir, mesh, checkpoints, start, profile, train_step):
  batch = config.train.global_batch_size
  ready = prepare(config, workdir, mesh, checkpoints, start)
  main = jax.process_index() == 0
  if main:  # only now: a run that cannot open its data or weights leaves no trace of its config
    describe_run(workdir, config, ready.state)
    how = global_batch.describe(config.loss, batch, config.model.embed_dim, meshes.batch_shards(mesh))
    print(how, file=sys.stderr, flush=True)
  if start:
    state = checkpoints.restore(ready.state)
  else:
    state = states.create(config, mesh)
    if ready.weights:
      state = states.start_from(state, config, ready.weights)
  writer = metrics.MetricsWriter(workdir, start) if main else metrics.NoMetrics()
  clock, progress = hooks.Clock(), Progress(config, start) if main else None
  measure = performance.Meter(config, list(mesh.devices.flat))
  log = hooks.Log(writer, config, clock, start, measure, progress or (lambda step, values: None))
  save = hooks.Save(checkpoints, ready.records, log, writer, config, clock)
  trace = hooks.Profile(profile, start, config, clock, workdir)
  every_step = (trace, log, hooks.Evaluate(ready.evaluators, log, writer, config, clock, workdir), save)

  bad = pipeline.BadRecords(workdir / "bad_records.jsonl", config.data.max_bad_share)
  rows = rules.local_rows(mesh, batch)
  batches = pipeline.train_batches(ready.data, config, rows=rows, start=start, bad_records=bad)
  done = start
  try:
    with StopSignals(mesh) as stop, trace:
      for done in range(start + 1, config.train.steps + 1):
        with trace.step(done):
          with clock.waiting():
            local = next(batches)
          with jax.transfer_guard("disallow"):  # but for the batch nothing crosses over, and nothing waits
            state, measured = train_step(state, rules.to_global(local, mesh, batch))
        for hook in every_step:
          hook(done, state, measured)
        if stop.requested():
          save.now(done, state)
          break
      checkpoints.wait()
  finally:
    log.flush()
    writer.close()
    if progress:
      progress.close()
  return Result(done, config.train.steps, start)


def create_evaluators(config, mesh, training):
  """The evaluators a config asks for.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.
    training: the `Dataset` that is trained on.

  Returns:
    A list of functions from parameters to metrics and examples.
  """
  encoder = Encoder(config.model, mesh, config.eval.batch_size)
  found = [
    Retrieval(name, sources.create(item.source, item.path), item, encoder, training)
    for name, item in config.eval.retrieval.items()
  ]
  return found + [
    ZeroShot(name, sources.create(item.source, item.path), item, encoder)
    for name, item in config.eval.zero_shot.items()
  ]


class StopSignals:
  """Turns SIGTERM and SIGINT into a wish to stop after a step; a second SIGINT leaves at once."""

  def __init__(self, mesh):
    """Prepares; signals are caught inside the `with` block.

    Args:
      mesh: the device mesh, over which processes agree.
    """
    self._received, self._agreed, self._before = None, None, {}
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._any = jax.jit(jnp.any, out_shardings=rules.replicated(mesh))

  def __enter__(self):
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def requested(self):
    """Whether to stop now; to be asked after each step. The answer is the same on every process.

    A signal reaches hosts at different steps, or only one of them. Each step all say whether they have one;
    the answer of the step before is read, so that nobody waits for the step that is running.
    """
    if jax.process_count() == 1:
      return self._received is not None
    mine = np.full(jax.local_device_count(), self._received is not None)
    everybody = jax.make_array_from_process_local_data(self._sharding, mine)
    before, self._agreed = self._agreed, self._any(everybody)
    return before is not None and bool(before)

  def _receive(self, number, _):
    if self._received == signal.SIGINT == number:
      print("Left at once; the last checkpoint is whole.", file=sys.stderr, flush=True)
      os._exit(1)  # without waiting for the device, or for a save under way
    self._received = number
    name = signal.Signals(number).name
    print(f"\n{name}: finishing this step and saving; once more to leave at once.", file=sys.stderr, flush=True)
