"""What a run measured, on disk: `metrics.jsonl` and TensorBoard files."""

import json
import math
import os
import time
from pathlib import Path


class MetricsWriter:
  """Appends lines to `metrics.jsonl` and scalars to `tensorboard/`."""

  def __init__(self, workdir, step):
    """Opens the files of a run that starts, or goes on, at a step.

    Lines of later steps are dropped: a killed run may have logged past its last checkpoint, and will
    log those steps again.

    Args:
      workdir: the run's work directory.
      step: updates done.
    """
    # Imported here: it takes half a second, which `clip-jax --help` need not wait for.
    from tensorboardX import SummaryWriter

    self._path = Path(workdir) / "metrics.jsonl"
    drop_after(self._path, step)
    self._file = self._path.open("a", encoding="utf-8")
    self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

  def write(self, step, samples_seen, values):
    """Writes one line.

    Args:
      step: updates done.
      samples_seen: training pairs seen.
      values: a dict of name to float.
    """
    # JSON has no NaN: a reader in another language would stop at the line.
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    line = {"step": step, "samples_seen": samples_seen, "time": time.time(), **known}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._tensorboard.add_scalar(name, value, step)

  def sync(self):
    """Puts everything on disk, so that no checkpoint is ever ahead of the lines before it."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._tensorboard.flush()

  def close(self):
    """Syncs and closes."""
    self.sync()
    self._file.close()
    self._tensorboard.close()


class NoMetrics:
  """Stands in for a `MetricsWriter` on all processes but the first."""

  def write(self, step, samples_seen, values):
    """Writes nothing."""

  def sync(self):
    """Does nothing."""

  def close(self):
    """Does nothing."""


def read(path):
  """The lines of a `metrics.jsonl`.

  Args:
    path: the file; one that is missing has no lines, and a last line that is cut off does not count.

  Returns:
    A list of dicts.
  """
  try:
    text = Path(path).read_text(encoding="utf-8")
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def drop_after(path, step):
  """Removes lines of steps after one, and a last line that is cut off, atomically.

  Args:
    path: a `metrics.jsonl`; nothing happens if it is missing.
    step: the last step to keep.
  """
  path = Path(path)
  if not path.exists():
    return
  temporary = path.with_suffix(".jsonl.tmp")
  with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
    for line in old:
      if line.endswith("\n") and json.loads(line)["step"] <= step:
        new.write(line)
    new.flush()
    os.fsync(new.fileno())
  os.replace(temporary, path)
