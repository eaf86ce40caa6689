"""Weights & Biases: a view of `metrics.jsonl` on its server, or in files for later."""

import importlib.util
import uuid
from pathlib import Path

from clip_jax.errors import MissingExtraError
from clip_jax.files import read_json, tell, write_json

FILE = "wandb.json"  # in a work directory: the run's id there, so that a resumed run goes on with its curves
INIT_SECONDS = 60.0  # until it is logged offline instead


def check(config):
  """Checks that what a config asks for is installed.

  Args:
    config: a resolved `Config`.

  Raises:
    MissingExtraError: it is not.
  """
  if config.tracking.wandb != "off" and importlib.util.find_spec("wandb") is None:
    raise MissingExtraError(f"config.tracking.wandb={config.tracking.wandb!r}", "wandb", "wandb")


class WandB:
  """A run of Weights & Biases that has every line of a `metrics.jsonl`.

  Nothing that goes wrong there ends or delays training by more than `INIT_SECONDS`.
  """

  def __init__(self, options, workdir, history):
    """Starts it, or goes on with it, and hands over what it lacks.

    Its steps only go up. What a run does again after a kill is there already, and the same to the bit; what it does anew after it went
    back (`train.on_spike`) is in `metrics.jsonl` alone. A run that is logged offline cannot go on with its earlier files, so each start
    writes all that was logged before into the new ones, which replace the earlier ones when they are uploaded.

    Args:
      options: a `clip_jax.config.Tracking`.
      workdir: the run's work directory.
      history: the lines of its `metrics.jsonl`.
    """
    self._options, self._workdir, self._run, self._next = options, Path(workdir), None, 0
    self._guarded(lambda: self._start(history))

  def add(self, line, _=None):
    """Logs a line of `metrics.jsonl`: what is a number in it, at its step and its time."""
    if self._run is not None and line["step"] >= self._next:
      self._next = line["step"]  # which has several lines: of training, and of evaluations
      values = {name: value for name, value in line.items() if name not in ("step", "time") and isinstance(value, int | float)}
      self._guarded(lambda: self._run.log({**values, "_timestamp": line["time"]}, step=line["step"]))

  def sync(self):
    """Does nothing: another process sends what it is given."""

  def close(self):
    """Hands over the rest, and waits for it."""
    if self._run is not None:
      self._guarded(self._run.finish)

  def _start(self, history):
    import wandb

    path = self._workdir / FILE
    kept = read_json(path) if path.exists() else {"id": uuid.uuid4().hex[:8]}
    config = self._workdir / "config.json"
    options = {
      "id": kept["id"],
      "project": self._options.project,
      "entity": self._options.entity or None,
      "name": self._options.name or self._workdir.resolve().name,
      "group": self._options.group or None,
      "tags": list(self._options.tags) or None,
      "dir": str(self._workdir),
      "config": read_json(config) if config.exists() else None,
      # What is printed stays as it is, and is not uploaded.
      "settings": wandb.Settings(console="off", silent=True, init_timeout=INIT_SECONDS),
    }
    if self._options.wandb == "online":
      try:
        self._run = wandb.init(**options, resume="allow")
      except wandb.Error as error:  # no key, no network, no such project
        tell(f"\nWeights & Biases: {_first_line(error)}. This run is logged offline.")
        wandb.teardown()  # its own process still tries to start the run, under its id
    self._run = self._run or wandb.init(**options, mode="offline")
    url = "" if self._run.offline else self._run.url
    write_json(path, {**kept, "project": self._options.project, "url": url})
    tell(f"Weights & Biases: {url or f'offline; `wandb sync {self._workdir}/wandb/latest-run` uploads it'}")
    self._next = self._run.step
    for line in history:
      self.add(line)

  def _guarded(self, action):
    try:
      action()
    except Exception as error:  # a view of the run must not end it
      tell(f"\nWeights & Biases: {type(error).__name__} {_first_line(error)}. It gets no more of this run until the next start.")
      self._run = None


def _first_line(error):
  return (str(error).strip().splitlines() or [""])[0].rstrip(".")
