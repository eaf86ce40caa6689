"""How far the runs of a sweep are, read from their work directories alone: whoever trains them, and wherever."""

import dataclasses

from clip_jax.convert import native
from clip_jax.train import hooks, metrics

LINES = 40  # of a log, to tell how fast a run is


@dataclasses.dataclass(frozen=True)
class Status:
  """How far a run is.

  Attributes:
    step: the last one in its log; 0 if there is none.
    saved: the step of its newest checkpoint; 0 if there is none.
    complete: whether there is nothing left to do.
    loss: the last one; None if there is none.
    rate: pairs a second; None if that is not known.
    seconds: until it is done, at this rate; None if that is not known.
  """

  step: int
  saved: int
  complete: bool
  loss: float | None
  rate: float | None
  seconds: float | None


def read(planned):
  """The `Status` of a run.

  Args:
    planned: a `clip_jax.scaling.sweep.Planned`.
  """
  config, steps = planned.config, planned.config.train.steps
  saved = max((int(path.name) for path in native.steps_of(planned.workdir)), default=0)
  lines = _lines(planned.workdir)
  training = [line for line in lines if "loss" in line]
  step = lines[-1]["step"] if lines else 0
  rates = sorted(line["samples_per_second"] for line in training if line.get("samples_per_second"))
  rate = rates[len(rates) // 2] if rates else None  # of the last lines; one alone may hold a pause
  seconds = (steps - step) * config.train.global_batch_size / rate if rate else None
  complete = saved == steps and not hooks.evaluation_missing(lines, config, steps)
  return Status(step, saved, complete, training[-1]["loss"] if training else None, rate, seconds)


def forkable(planned):
  """Whether a run can begin: whether the checkpoint that it forks from is there, if it does.

  Args:
    planned: a `clip_jax.scaling.sweep.Planned`.
  """
  origin = planned.config.train.fork_from
  return not origin or native.find(origin) is not None or bool(native.steps_of(planned.workdir))


def _lines(workdir):
  try:
    return metrics.read(workdir / "metrics.jsonl", LINES)
  except (OSError, ValueError):  # while it is being written again, after trouble with a disk
    return []
