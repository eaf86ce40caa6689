"""Sweeps: Python files whose `get_sweep()` returns named runs, each a recipe with changes."""

import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from clip_jax import config as configs
from clip_jax.config import recipes
from clip_jax.errors import ConfigError, UsageError, did_you_mean
from clip_jax.files import read_json
from clip_jax.models import size
from clip_jax.train import workdir as workdirs

ROOT = Path(__file__).parents[2]  # where main.py is, and the recipes that come with it
SWEEPS = "configs/scaling"
COOLDOWN = 0.2  # of a run; enough to end where a cosine would (Hägele et al. 2024, arXiv 2405.18392, section 4)
RUNS = "runs"  # the folder of work directories
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    name: of its work directory; letters, digits and ._+- .
    recipe: as --config takes it, such as "configs/vitb16.py".
    overrides: changes of it: dotted key ("train.samples") to value.
    arch: what tables and plots call its model.
    data: what they call the data it is trained on.
    parent: the run of the same sweep that it forks from; none if empty.
    fork_step: the step of the parent that it forks from.
  """

  name: str
  recipe: str
  overrides: Mapping[str, object]
  arch: str = ""
  data: str = ""
  parent: str = ""
  fork_step: int = 0


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run with its config, in a folder.

  Attributes:
    run: a `Run`.
    config: its resolved `Config`.
    workdir: its work directory.
    flags: of the config, for main.py.
    recipe: the `ConfigDict` that they stand for.
  """

  run: Run
  config: configs.Config
  workdir: Path
  flags: tuple[str, ...]
  recipe: ml_collections.ConfigDict

  @property
  def gmacs(self):
    """Multiply-accumulates, in units of 1e9, of one image and one text, forward."""
    return sum(size.forward_macs(self.config.model)) / 1e9

  @property
  def own_samples(self):
    """Pairs that it trains on itself, without those of the run it forks from."""
    return (self.config.train.steps - self.run.fork_step) * self.config.train.global_batch_size

  @property
  def training_flops(self):
    """FLOPs of all the steps that it makes itself."""
    train = self.config.train
    each = size.training_flops(self.config.model, train.global_batch_size, self.config.loss.name, self.config.optimizer.freeze)
    return each * self.own_samples

  @property
  def command(self):
    """What starts it, or goes on with it, as a list of arguments."""
    return [sys.executable, str(ROOT / "main.py"), *self.flags, f"--workdir={self.workdir}"]

  @property
  def line(self):
    """The same for a shell anywhere."""
    return shlex.join(["python", "main.py", *self.flags, f"--workdir={self.workdir}"])

  def described(self):
    """What `sweep.json` says of it."""
    return {
      **dataclasses.asdict(self.run),
      "overrides": {key: list(value) if isinstance(value, tuple) else value for key, value in self.run.overrides.items()},
      "gmacs": self.gmacs,
      "parameters": size.parameters(self.config.model),
      "samples": self.config.train.samples,
      "own_samples": self.own_samples,
      "steps": self.config.train.steps,
      "global_batch_size": self.config.train.global_batch_size,
      "learning_rate": self.config.optimizer.learning_rate,
      "width": self.config.model.vision.width,
      "command": self.line,
    }


def grid(recipe, models, data, samples, schedule="constant", cooldown=COOLDOWN, common=None, each=None):
  """Every model on all data for all durations.

  Args:
    recipe: of all runs, or a dict from model to recipe.
    models: a dict from what a model is called to changes of the recipe, each a dict from dotted key to value.
    data: a dict from what data is called to changes.
    samples: a dict from what a duration is called to pairs seen.
    schedule: "cosine", each run by itself, as Cherti et al. 2022 (arXiv 2212.07143); or "constant": the longest run of a model on
      some data at a constant rate with a cooldown at its end, and the shorter ones as cooldowns that fork from it (Zhai et al.
      2022, arXiv 2106.04560, section 3.5; Hägele et al. 2024, arXiv 2405.18392). Then all durations have the same batch size,
      which must be among the changes, as "train.global_batch_size".
    cooldown: share of a run.
    common: changes for all runs.
    each: a function from (model, data, duration), as they are called, to more changes; with "constant" it is that of the
      longest duration that counts.

  Returns:
    A list of `Run`s.

  Raises:
    UsageError: the schedule is not known, or there is no batch size.
  """
  if schedule not in ("cosine", "constant"):
    raise UsageError(f"{schedule!r} is not a schedule of a grid; cosine and constant are.")
  longest = max(samples, key=samples.get)
  runs = []
  for arch, of_model in models.items():
    for where, of_data in data.items():
      for label in sorted(samples, key=samples.get, reverse=True):
        changes = {**(common or {}), **of_model, **of_data}
        if each:
          changes |= each(arch, where, longest if schedule == "constant" else label)
        name = f"{arch}_{where}_{label}"
        run = Run(name, recipe if isinstance(recipe, str) else recipe[arch], changes, arch, where)
        if schedule == "constant":
          run = _with_cooldown(run, samples, label, longest, cooldown)
        else:
          run = dataclasses.replace(run, overrides={**changes, "optimizer.schedule": "cosine", "train.samples": samples[label]})
        runs.append(run)
  return runs


def _with_cooldown(run, samples, label, longest, share):
  batch = run.overrides.get("train.global_batch_size")
  if not batch:
    raise UsageError(f"{run.name}: a grid with cooldowns needs train.global_batch_size among its changes, to tell at which step to fork.")

  def steps_of(one):
    steps = samples[one] // batch
    return steps, max(round(share * steps), 1)

  steps, down = steps_of(label)
  changes = {**run.overrides, "optimizer.schedule": "constant", "train.steps": steps, "optimizer.cooldown_steps": down}
  if label == longest:
    kept = sorted(steps_of(one)[0] - steps_of(one)[1] for one in samples if one != longest)
    if kept and kept[-1] > steps - down:
      raise UsageError(f"{run.name}: its cooldown begins at step {steps - down:,}, before that of a shorter run at {kept[-1]:,}.")
    return dataclasses.replace(run, overrides={**changes, "checkpoint.keep_steps": tuple(kept)})
  parent = run.name.removesuffix(label) + longest
  return dataclasses.replace(run, overrides=changes, parent=parent, fork_step=steps - down)


def load(given, workdir, overrides=()):
  """Reads a sweep and checks every run of it.

  Args:
    given: FILE[:ARGUMENT], or the name of a file in configs/scaling without its ending.
    workdir: the folder that the runs are, or will be, in.
    overrides: flags, --config.a.b=value, for all runs.

  Returns:
    A list of `Planned`, parents first.

  Raises:
    UsageError: the file is not there or no sweep, or a run cannot be run; the message names it.
  """
  path, _, argument = given.partition(":")
  if str(ROOT) not in sys.path:  # as for main.py, whose recipes start from configs/base.py
    sys.path.append(str(ROOT))
  runs = _call(_find(path), argument)
  by_name = {run.name: run for run in runs}
  if len(by_name) < len(runs):
    twice = next(run.name for run in runs if [one.name for one in runs].count(run.name) > 1)
    raise UsageError(f"{given}: two runs are called {twice}.")
  for run in runs:
    if not _NAME.fullmatch(run.name):
      raise UsageError(f"{given}: {run.name!r} cannot be the name of a run; letters, digits and . _ + - can be in it.")
    if run.parent and run.parent not in by_name:
      raise UsageError(f"{given}: {run.name} forks from {run.parent}, which is not in the sweep. {did_you_mean(run.parent, by_name, '')}".strip())
    if run.parent and by_name[run.parent].parent:
      raise UsageError(f"{given}: {run.name} forks from {run.parent}, which is a fork itself.")
  folder = Path(workdir).absolute() / RUNS
  return [plan(run, folder, overrides) for run in sorted(runs, key=lambda run: bool(run.parent))]


def check_unchanged(plans):
  """Checks that what is in work directories already are the runs of a sweep: what is done would be taken for them.

  Args:
    plans: a list of `Planned`.

  Raises:
    UsageError: a run was begun with another config; the message names the first difference.
  """
  for one in plans:
    path = one.workdir / "config.json"
    if path.exists():
      config = one.config
      if config.model.compute_dtype == "auto":  # the run has written what that was
        there = read_json(path).get("model", {}).get("compute_dtype", "auto")
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=there))
      workdirs.check_same_run(one.workdir, config)


def plan(run, folder, overrides=()):
  """A run with its config.

  Args:
    run: a `Run`.
    folder: of the work directories of the sweep.
    overrides: flags for all runs.

  Returns:
    A `Planned`.

  Raises:
    UsageError: it cannot be run.
  """
  recipe, _, argument = run.recipe.partition(":")
  if not Path(recipe).exists() and (ROOT / recipe).exists():
    recipe = str(ROOT / recipe)
  changes = dict(run.overrides)
  if run.parent:
    changes["train.fork_from"] = str(folder / run.parent / "checkpoints" / str(run.fork_step))
  flags = [f"--config={recipe}{':' if argument else ''}{argument}", *(f"--config.{key}={_text(value)}" for key, value in changes.items()), *overrides]
  try:
    loaded = recipes.load(flags)
    config = configs.resolve(loaded)
    if run.parent and not 0 < run.fork_step < config.train.steps:
      raise ConfigError(f"it would fork at step {run.fork_step:,}, and has {config.train.steps:,} steps.")
  except UsageError as error:
    raise UsageError(f"{run.name}: {error}") from error
  return Planned(run, config, folder / run.name, tuple(flags), loaded)


def _text(value, inside=False):
  # In double quotes, which a shell's single quotes can go around.
  if isinstance(value, (tuple, list)):
    return f"({', '.join(_text(one, True) for one in value)}{',' if len(value) == 1 else ''})"
  return json.dumps(value) if inside and isinstance(value, str) else str(value)


def _find(path):
  found = [one for one in (Path(path), Path(SWEEPS) / f"{path}.py", ROOT / path, ROOT / SWEEPS / f"{path}.py") if one.is_file()]
  if found:
    return found[0]
  known = sorted(one.stem for one in (ROOT / SWEEPS).glob("*.py"))
  raise UsageError(f"{path} is no sweep. {did_you_mean(path, known, 'Those that come with it: ' + ', '.join(known) + '.')}")


def _call(path, argument):
  spec = importlib.util.spec_from_file_location(f"clip_jax_sweep_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    make = getattr(module, "get_sweep", None)
    if not callable(make):
      raise UsageError("it has no function get_sweep()")
    if argument and not inspect.signature(make).parameters:
      raise UsageError(f"its get_sweep() takes no argument, and {argument!r} is given")
    runs = make(argument) if argument else make()
  except Exception as error:  # whatever a sweep may raise, or that it is no Python
    said = " ".join(str(error).split()).rstrip(".")
    kind = "" if isinstance(error, UsageError) else f"{type(error).__name__} "
    raise UsageError(f"{path} cannot be used as a sweep: {kind}{said}.") from error
  if not isinstance(runs, list) or not runs or not all(isinstance(run, Run) for run in runs):
    raise UsageError(f"{path} cannot be used as a sweep: its get_sweep() must return a list of clip_jax.scaling.sweep.Run.")
  return runs
