"""A run that begins as another one, at a checkpoint of it: cooldowns from one run at a constant learning rate, and other second halves.

Where the learning rates of both are the same until then, the fork is, bit for bit, the run that it would have been from its own beginning.
"""

import contextlib
import shutil
from pathlib import Path

from clip_jax import config as configs
from clip_jax.convert import native
from clip_jax.errors import ConfigError, DataError, UsageError
from clip_jax.files import read_json, write_json
from clip_jax.parallel import agreement
from clip_jax.train import metrics
from clip_jax.train import workdir as workdirs

# What may be different after it, beside what may change whenever a run is resumed; but for keys that say what the optimizer keeps.
MAY_DIFFER = ("train.steps", "train.samples", "train.fork_from", "optimizer.")
MAY_NOT = ("optimizer.name", "optimizer.mu_dtype", "optimizer.ema_decay", "optimizer.freeze")


def begin(config, workdir, checkpoints, described):
  """The state that a run forks from, after what belongs to the past of it was copied: its log, and which batches it left out.

  Args:
    config: a resolved `Config`; `train.fork_from` names the checkpoint.
    workdir: the work directory of the new run.
    checkpoints: its `Checkpoints`.
    described: what `clip_jax.train.state.describe` returns.

  Returns:
    A `TrainState` and the card of the checkpoint.

  Raises:
    UsageError: there is no such checkpoint, it is of another kind of run, or it is damaged.
  """
  path, step = check(config)
  state, card = checkpoints.restore_from(path, described)
  _first_does(lambda: _copy_past(path.parents[1], Path(workdir), step))
  return state, card


def check(config):
  """Checks that a run can begin where its config says, as far as that can be told without reading arrays.

  Args:
    config: a resolved `Config` with `train.fork_from`.

  Returns:
    The checkpoint's folder, and its step.

  Raises:
    UsageError: as `begin`.
  """
  _first_does(lambda: _check(config))
  path = Path(config.train.fork_from).absolute()
  return path, int(path.name)


def _first_does(something):
  # Its errors as text, for all: what one process raises alone leaves the others waiting.
  def said():
    try:
      something()
    except UsageError as error:
      return str(error)
    return None

  found = agreement.of_first(said)
  if found:
    raise UsageError(found)


def _check(config):
  given = config.train.fork_from
  path = Path(given).absolute()
  if not path.name.isdigit() or path.parent.name != "checkpoints":
    raise UsageError(f"config.train.fork_from={given!r} is not a checkpoint of a run; runs/mine/checkpoints/2000 is one.")
  native.read_json(path, "card")
  if int(path.name) >= config.train.steps:
    raise ConfigError(f"config.train.fork_from={given!r} is at step {int(path.name):,}, and this run has only {config.train.steps:,} steps.")
  parent = path.parents[1]
  saved = workdirs.as_json(configs.resolve(read_json(parent / "config.json")))
  for key, old, new in workdirs.differences(saved, workdirs.as_json(config)):
    free = key.startswith((*workdirs.FREE_TO_CHANGE, *MAY_DIFFER)) and not key.startswith(MAY_NOT)
    if not free:
      raise ConfigError(
        f"config.train.fork_from={given!r}: that run has config.{key}={old!r}, and this config has {new!r}; a fork goes on with the "
        "same model, data and batches. To start from its weights alone, use config.train.init_from."
      )


def _copy_past(parent, workdir, step):
  log = workdir / "metrics.jsonl"
  try:
    with contextlib.suppress(FileNotFoundError):  # of a checkpoint that somebody copied alone
      shutil.copyfile(parent / "metrics.jsonl", log)
    metrics.drop_after(log, step)  # the other run may be alive, and further
  except (OSError, ValueError, KeyError) as error:
    raise DataError(f"{parent / 'metrics.jsonl'} cannot be read ({error}).") from error
  left_out = parent / "rollbacks.json"
  if left_out.exists():
    entries = [one for one in read_json(left_out)["rollbacks"] if one["to"] <= step]
    write_json(workdir / "rollbacks.json", {"rollbacks": entries})
