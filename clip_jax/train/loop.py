"""The training loop: what a run is made of, and the order in which it happens."""

import contextlib
import dataclasses
from pathlib import Path

import jax

from clip_jax import config as configs
from clip_jax.convert.sources import find as find_weights
from clip_jax.data import dataset, pipeline
from clip_jax.errors import DataError, StorageError
from clip_jax.evaluate import tasks
from clip_jax.evaluate.encode import Encoder
from clip_jax.files import tell
from clip_jax.losses import global_batch
from clip_jax.parallel import agreement, rules
from clip_jax.parallel import mesh as meshes
from clip_jax.train import (
  checkpoint,
  fork,
  guard,
  hooks,
  metrics,
  performance,
  program,
  step,
  stopping,
  tracking,
)
from clip_jax.train import state as states
from clip_jax.train import workdir as workdirs
from clip_jax.train.progress import Progress
from clip_jax.train.watchdog import Watchdog


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
    card: what each checkpoint says of it: `records`, its length, which the order of examples depends on (of a mixture a list of
      them), and `data`, a digest of what they are called.
    weights: the `Source` of `train.init_from`, or None.
    evaluators: as `create_evaluators` returns.
  """

  data: dataset.Dataset
  card: dict
  weights: object
  evaluators: list


def run(config, workdir, profile=None, compiled=None, force_new=False):
  """Trains, or resumes what the work directory holds.

  Args:
    config: a `ConfigDict` or a nested dict; see `clip_jax.config`.
    workdir: folder for everything the run writes; made if missing.
    profile: steps to trace into its folder `profile`, a pair of ints: the first, and the first not to trace any more.
    compiled: a file with the compiled step (`clip_jax.train.program`), used where it is of this run's config, versions and devices.
    force_new: whether to begin anew in a work directory that holds a run; that run is moved aside, not removed.

  Returns:
    A `Result`. On SIGTERM or SIGINT the step is finished, everything is saved, and the result is not
    complete: the same call goes on from there.

  Raises:
    UsageError: the config, the data, the work directory, the steps to trace or the compiled step cannot be used.
    TrainingError: the numbers of the run are bad, or the memory they are in; what is saved is not.
    StorageError: a disk or a bucket does not answer.
  """
  steps, checkpoints = configs.resolve(config).train.steps, None
  with stopping.Signals() as signals:
    try:
      config, mesh = settle(config, profile)
      agreement.require_same(lambda: workdirs.facts(config))
      workdir = Path(workdir)
      workdirs.claim(workdir, config, force_new)
      checkpoints = checkpoint.Checkpoints(workdir, config, pipeline.file_tokenizer_for(config.model))
      checkpoints.clear_leftovers()
      train_step = program.load(compiled, config, mesh) if compiled else None
      return _run(Run(config, workdir, mesh, checkpoints, profile, train_step or step.create(config, mesh), signals))
    except stopping.Stopped:
      done = checkpoints.latest_step() or 0 if checkpoints else 0
      return Result(done, steps, done)
    finally:
      if checkpoints:
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
  tracking.check(config)
  mesh = meshes.create(config)
  return performance.settled(config, mesh.devices.flat[0]), mesh


def prepare(config, workdir, mesh, card, alive=lambda: None):
  """Opens and checks all that a run needs beside its work directory.

  Args:
    config: a resolved `Config`.
    workdir: the work directory.
    mesh: the device mesh.
    card: of the checkpoint that the run goes on from; empty if it starts.
    alive: called for each batch that is evaluated.

  Returns:
    A `Prepared`.

  Raises:
    UsageError: the data, the weights to start from or an evaluation set cannot be used.
  """
  data, path = dataset.create(config), config.data.path or "config.data.mixture"
  records = list(data.lengths) if config.data.mixture else len(data)
  now = {"records": records, "data": data.digest()}
  agreement.require_same(lambda: {f"{name} of the data": value for name, value in now.items()})
  if card and card.get("records") != records:
    raise DataError(
      f"{path} has {records} records, and the run in {workdir} began with "
      f"{card.get('records')}: the order of examples would not be the same. Restore the data, or use another --workdir."
    )
  if card.get("data", now["data"]) != now["data"]:  # the first format had none
    raise DataError(
      f"{path} has other records than those that the run in {workdir} began with, or has them in "
      "another order. Restore the data, or use another --workdir."
    )
  weights = find_weights(config.train.init_from) if config.train.init_from and not card else None
  return Prepared(data, now, weights, create_evaluators(config, mesh, data, alive))


@dataclasses.dataclass
class Run:
  """A run that has its work directory.

  Attributes:
    config: a resolved `Config`.
    workdir: its path.
    mesh: the device mesh.
    checkpoints: a `Checkpoints`.
    profile: as `run`.
    train_step: what `step.create` returns.
    signals: a `stopping.Signals`.
  """

  config: configs.Config
  workdir: Path
  mesh: jax.sharding.Mesh
  checkpoints: checkpoint.Checkpoints
  profile: tuple | None
  train_step: object
  signals: stopping.Signals


def _run(run):
  config, workdir, checkpoints = run.config, run.workdir, run.checkpoints
  described = states.describe(config, run.mesh)[0]
  state, card = _restored(run, described)
  started = start = card.get("step", 0)
  if start >= config.train.steps and not hooks.evaluation_missing(last_lines(workdir, config), config, start):
    return Result(start, config.train.steps, start)
  watchdog = Watchdog(config.train.step_timeout)
  ready = prepare(config, workdir, run.mesh, card, watchdog.alive)
  if jax.process_index() == 0:  # only now: a run that cannot open its data or weights leaves no trace of its config
    workdirs.describe_run(workdir, config, described)
    how = global_batch.describe(config.loss, config.train.global_batch_size, config.model.embed_dim, meshes.batch_shards(run.mesh))
    tell(how)
  rollbacks = guard.Rollbacks(workdir)
  while True:
    if state is None:
      state = states.create(config, run.mesh)
      if ready.weights:
        state = states.start_from(state, config, ready.weights)
    try:
      return Result(_train(run, ready, watchdog, rollbacks, state, start), config.train.steps, started)
    except guard.Rollback as error:
      spike = guard.Rollback(error.step, error.reason)  # without its frames, which hold the state
    state = None
    with contextlib.suppress(StorageError):
      checkpoints.wait()
    state, card = _restored(run, described)
    start = card.get("step", 0)
    rollbacks.add(spike, start)


def _restored(run, described):
  """The state to go on from and its card: of this run's newest checkpoint, or of the one it forks from."""
  state, card = run.checkpoints.restore(described)
  if state is None and run.config.train.fork_from:
    return fork.begin(run.config, run.workdir, run.checkpoints, described)
  return state, card


def _train(run, ready, watchdog, rollbacks, state, start):
  """Trains from a state on, and returns the updates that are done when the run is over, or is to be stopped."""
  config, workdir, mesh = run.config, run.workdir, run.mesh
  batch, main = config.train.global_batch_size, jax.process_index() == 0
  writer = metrics.MetricsWriter(workdir, start, config.tracking) if main else metrics.NoMetrics()
  clock, progress = hooks.Clock(), Progress(config, start) if main else None
  measure = performance.Meter(config, list(mesh.devices.flat))
  named = guard.Batches(workdir, ready.data, config, rollbacks)
  before = last_lines(workdir, config)
  watch = guard.Guard(config, before, named.write)
  log = hooks.Log(writer, config, clock, start, measure, progress or (lambda step, values: None), watch)
  save = hooks.Save(run.checkpoints, ready.card, log, writer, config, clock)
  evaluate = hooks.Evaluate(ready.evaluators, log, writer, config, clock, workdir, watchdog.alive)
  trace = hooks.Profile(run.profile, start, config, clock, workdir)
  # Saved before it is evaluated: an evaluation takes longer than many machines grant one that they take away.
  every_step = (trace, log, save, evaluate, hooks.SlowData(clock))
  votes = stopping.Votes(mesh)

  bad = pipeline.BadRecords(workdir / "bad_records.jsonl", config.data.max_bad_share)
  rows = rules.local_rows(mesh, batch)
  batches = pipeline.train_batches(ready.data, config, rows=rows, start=start, bad_records=bad, batch_of=rollbacks.batch_of)
  watchdog.keys = named.keys_of_last
  done = start
  try:
    with watchdog, trace:
      run.signals.training()
      for values in rollbacks.to_write(start, before):
        writer.write(start, start * batch, values)
      if hooks.evaluation_missing(before, config, start):
        evaluate(start, state, None)
      for done in range(start + 1, config.train.steps + 1):
        named.last = done
        with trace.step(done):
          with clock.waiting():
            local = next(batches)
          with jax.transfer_guard("disallow"):  # but for the batch nothing crosses over, and nothing waits
            state, measured = run.train_step(state, rules.to_global(local, mesh, batch))
        for hook in every_step:
          hook(done, state, measured)
        watchdog.alive(f"step {done + 1:,}")
        agreed = votes.cast(stop=run.signals.received is not None, save=save.wished(), busy=not run.checkpoints.written())
        if "save" in agreed:
          save.now(done, state)
        if "stop" in agreed:
          break
      save.last(done, state)
  finally:
    log.flush()
    writer.close()
    if progress:
      progress.close()
  return done


def last_lines(workdir, config):
  """The end of a run's `metrics.jsonl`, the same on all processes: what its next lines depend on.

  Args:
    workdir: the work directory.
    config: a resolved `Config`.
  """
  return agreement.of_first(lambda: metrics.read(Path(workdir) / "metrics.jsonl", guard.lines_to_know(config)))


def create_evaluators(config, mesh, training, alive=lambda: None):
  """The evaluators a config asks for.

  Args:
    config: a resolved `Config`.
    mesh: the device mesh.
    training: the `Dataset` that is trained on.
    alive: called for each batch that is encoded.

  Returns:
    A list of functions from parameters to a `clip_jax.evaluate.result.Result`.
  """
  return tasks.of_config(config, Encoder(config.model, mesh, config.eval.batch_size, lambda *_: alive()), training)
