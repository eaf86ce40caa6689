"""How far the runs of a sweep are, read from their work directories alone: whoever trains them, and wherever."""

import dataclasses
import json
import os


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
  saved = max((step for step in _saved(planned.workdir)), default=0)
  lines = last_lines(planned.workdir / "metrics.jsonl")
  training = [line for line in lines if "loss" in line]
  step = lines[-1]["step"] if lines else 0
  evaluated = any(name.startswith("eval/") for line in lines if line["step"] == steps for name in line)
  wanted = bool(config.eval.retrieval or config.eval.zero_shot or config.eval.datasets)
  rates = sorted(line["samples_per_second"] for line in training if line.get("samples_per_second"))
  rate = rates[len(rates) // 2] if rates else None  # of the last lines; one alone may hold a pause
  seconds = (steps - step) * config.train.global_batch_size / rate if rate else None
  return Status(step, saved, saved == steps and (evaluated or not wanted), training[-1]["loss"] if training else None, rate, seconds)


def forkable(planned):
  """Whether a run can begin: whether the checkpoint that it forks from is there, if it does.

  Args:
    planned: a `clip_jax.scaling.sweep.Planned`.
  """
  origin = planned.config.train.fork_from
  return not origin or os.path.isdir(os.path.join(origin, "card")) or bool(_saved(planned.workdir))


def last_lines(path, size=16_384):
  """The whole lines at the end of a log, as dicts; none if it is not there.

  Args:
    path: of `metrics.jsonl`.
    size: bytes to read; more, until there are two lines, as that of an evaluation may be long.
  """
  while True:
    try:
      with open(path, "rb") as file:
        before = max(0, os.fstat(file.fileno()).st_size - size)
        file.seek(before)
        text = file.read().decode(errors="replace")
    except OSError:
      return []
    found = list(_whole(text))
    if len(found) > 1 or not before:
      return found
    size *= 4


def _whole(text):
  for line in text.splitlines():
    try:
      one = json.loads(line)
    except ValueError:  # the part of a line that the file was entered in, or that is just being written
      continue
    if isinstance(one, dict) and "step" in one:
      yield one


def _saved(workdir):
  try:
    return [int(name) for name in os.listdir(workdir / "checkpoints") if name.isdigit()]
  except OSError:
    return []
