"""A run's work directory: whose it is, what it says of the run, and how another one begins there."""

import json
from pathlib import Path

import jax

from clip_jax import config as configs
from clip_jax.errors import ConfigError, UsageError, redacted
from clip_jax.files import tell, write_text
from clip_jax.parallel import agreement, rules
from clip_jax.train import environment

# What a run may change when it is resumed: none of these changes a number it computes, but for what it does about bad ones.
FREE_TO_CHANGE = (
  *("mesh", "eval", "checkpoint", "tracking", "train.log_every", "train.step_timeout", "train.host_timeout", "train.join_timeout"),
  *("train.max_bad_steps", "train.on_spike", "train.spike_factor", "train.spike_window"),
  *("data.threads", "data.prefetch", "data.block_cache", "data.read_deadline", "data.source"),
  *("train.attention", "train.remat", "train.scan", "train.microbatches", "loss.method", "loss.chunk"),
)
BEFORE = "before"  # the folder in a work directory that earlier runs are moved to


def claim(workdir, config, force_new=False):
  """Makes a work directory, or checks that the run in it is this one.

  Args:
    workdir: the folder.
    config: a resolved `Config`.
    force_new: whether to begin anew where there is a run. What there is moves to `before/1`, or the next number that is free.

  Raises:
    UsageError: it cannot be made, or holds another run; the message names the first difference.
  """
  workdir = Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if force_new and jax.process_index() == 0:
      _move_away(workdir)
  except OSError as error:
    raise UsageError(f"--workdir={workdir} cannot be made: {error.strerror}.") from error
  agreement.everyone(True)  # nobody looks before it is moved
  check_same_run(workdir, config)


def _move_away(workdir):
  there = [path for path in workdir.iterdir() if path.name != BEFORE]
  if not there:
    return
  number = 1
  while (workdir / BEFORE / str(number)).exists():
    number += 1
  aside = workdir / BEFORE / str(number)
  aside.mkdir(parents=True)
  for path in there:
    path.rename(aside / path.name)
  tell(f"The run that was in {workdir} is in {aside} now.")


def check_same_run(workdir, config):
  """Checks that what a work directory holds belongs to a run with this config; one that is empty belongs to nobody.

  Args:
    workdir: the folder.
    config: a resolved `Config`.

  Raises:
    ConfigError: it belongs to another; the message names the first difference.
  """
  path = Path(workdir) / "config.json"
  if not path.exists() and not (Path(workdir) / "checkpoints").exists():
    return
  try:
    # Resolved again: a key that is newer than the run has its default, which is what the run did.
    saved = as_json(configs.resolve(json.loads(path.read_text())))
  except (OSError, ValueError) as error:
    raise UsageError(f"{workdir} holds a run, but {path} cannot be read ({error}). Begin anew with --force_new.") from error
  for key, old, new in differences(saved, as_json(config)):
    if not key.startswith(FREE_TO_CHANGE):
      raise ConfigError(
        f"{workdir} holds a run with config.{key}={old!r}, and this config has {new!r}; "
        "use another --workdir, the config of that run, or --force_new, which moves it aside."
      )


def describe_run(workdir, config, described):
  """Writes `config.json`, `environment.json` and `parameters.txt`, which says what of the state lies where; prints that of parameters."""
  parts = [("parameters", described.params), ("optimizer", described.opt_state)]
  if described.ema is not None:
    parts.append(("moving average", described.ema))
  write_text(workdir / "parameters.txt", rules.table(parts) + "\n")
  tell(rules.table(parts[:1]))
  write_text(workdir / "config.json", json.dumps(as_json(config), indent=2) + "\n")
  write_text(workdir / "environment.json", json.dumps(environment.describe(), indent=2) + "\n")


def as_json(config):
  """A config as `config.json` has it."""
  # What signs a request stands in no file: the work directory is shared, and its report sent around.
  return redacted(json.loads(json.dumps(configs.to_dict(config))))


def differences(old, new):
  """Yields (dotted key, old value, new value) where two nested dicts differ."""
  old, new = flat(old), flat(new)
  for key in dict.fromkeys([*old, *new]):
    if old.get(key) != new.get(key):
      yield key, old.get(key), new.get(key)


def flat(nested, prefix=""):
  """A nested dict as one of dotted keys."""
  found = {}
  for key, value in nested.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return found


def facts(config):
  """What all processes of a run must agree on before it begins: each key of the config, the code, and what it runs on.

  Args:
    config: a resolved `Config`.
  """
  versions = {f"the version of {name}": environment.version(name) for name in environment.PACKAGES}
  return flat(as_json(config), "config.") | {"the code of clip_jax": environment.code()} | versions
