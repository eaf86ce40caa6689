"""Everything that a run does before its first step, and the plan of that step, without leaving a trace: `main.py --dry_run`."""

import contextlib
import tempfile
import time
from pathlib import Path

import numpy as np

from clip_jax.convert import native
from clip_jax.data import order, pipeline
from clip_jax.errors import UsageError
from clip_jax.losses import global_batch
from clip_jax.models import size
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.plan import planner
from clip_jax.train import checkpoint, fork, loop, program
from clip_jax.train import state as states
from clip_jax.train import workdir as workdirs
from clip_jax.train.doctor import machine

EXAMPLES = 32  # that are loaded: enough to meet what is wrong with all of them


def run(config, workdir, name="", profile=None, compiled=None, tell=lambda what, text: None):
  """Checks a run on this machine, in the order in which it would begin.

  Args:
    config: a `ConfigDict` or a nested dict.
    workdir: the run's work directory. Nothing is written there; what it holds is looked at.
    name: what the config is called in the plan.
    profile: as `train.run`.
    compiled: as `train.run`.
    tell: called with the name of each check, and what was found, once it is done.

  Returns:
    The plan: a dict as `planner.plan` returns.

  Raises:
    UsageError: the run could not begin; the message is the one it would end with.
    StorageError: a disk or a bucket does not answer.
  """
  config, mesh = loop.settle(config, profile)
  model, train = config.model, config.train
  tell("config", f"{model.name or 'a model without a name'}, {size.parameters(model) / 1e6:,.1f} M parameters, {model.compute_dtype}; "
       f"{train.steps:,} steps of {train.global_batch_size:,} pairs")  # fmt: skip
  with _opened(Path(workdir), config) as checkpoints:
    start = checkpoints.latest_step() or 0 if checkpoints else 0
    workdirs.check_same_run(workdir, config)
    goes_on = f"holds this run, {start:,} of {train.steps:,} steps" if start else "can be written, and holds no checkpoint"
    tell("workdir", f"{workdir} {goes_on}")
    card = checkpoints.card() if start else {}
    if train.fork_from and not start:
      path, start = fork.check(config)
      card = native.read_json(path, "card")
      tell("fork_from", f"{path}: goes on from step {start:,} of {train.steps:,}")
    ready = loop.prepare(config, workdir, mesh, card)
  described = states.describe(config, mesh)[0]
  tell("data", _data(ready, config))
  tell("examples", _examples(ready.data, config, mesh, start))
  for evaluator in ready.evaluators:
    tell("evaluation", f"{evaluator.set.name}: {len(evaluator.set.source):,} images")
  if ready.weights:
    states.check_start(described.params, config, ready.weights)
    tell("init_from", f"{train.init_from}: {ready.weights.layout}, {size.parameters(ready.weights.model) / 1e6:,.1f} M parameters")
  tell("mesh", f"{mesh.size} devices as {', '.join(f'{axis} {length}' for axis, length in mesh.shape.items())}; "
       f"{rules.local_bytes(described) / 2**30:.2f} GiB of state a device")  # fmt: skip
  tell("loss", global_batch.describe(config.loss, train.global_batch_size, model.embed_dim, meshes.batch_shards(mesh)).removeprefix("loss: "))
  if compiled and program.load(compiled, config, mesh):
    tell("compiled", f"{compiled} is a program of this run, and would be used")
  found, _ = planner.plan(config, planner.target(planner.HERE), name)
  return found


@contextlib.contextmanager
def _opened(workdir, config):
  """The checkpoints of a work directory, or None if it holds none; and whether a run could write there."""
  try:
    with tempfile.TemporaryFile(dir=machine.existing(workdir)):
      pass
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
  if not (workdir / "checkpoints").exists():
    yield None
    return
  checkpoints = checkpoint.Checkpoints(workdir, config, pipeline.file_tokenizer_for(config.model))
  try:
    yield checkpoints
  finally:
    checkpoints.close()


def _data(ready, config):
  records = len(ready.data)
  epochs = config.train.samples / records
  return f"{config.data.path or f'{len(ready.data.lengths)} sources'}: {records:,} records, each seen {epochs:,.2f} times"


def _examples(data, config, mesh, start):
  """Loads some of the first examples of this process, as training would, and says how that went."""
  rows = rules.local_rows(mesh, config.train.global_batch_size)[:EXAMPLES]
  shape = (len(rows), config.model.image_size, config.model.image_size, 3)
  out = {"images": np.empty(shape, np.uint8), "tokens": np.empty((len(rows), config.model.text.context_length), np.int32)}
  bad = pipeline.BadRecords(None, 1.0)
  begun = time.monotonic()
  pipeline.Loader(data, config, bad)(order.positions_of_step(start, config.train.global_batch_size, rows), out)
  wrong = f", {bad.bad} of them in place of records that cannot be read" if bad.bad else ""
  return f"{len(rows)} were read, decoded and tokenized in {time.monotonic() - begun:.1f} s{wrong}"

