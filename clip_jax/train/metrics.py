"""What a run measured, on disk: `metrics.jsonl` and TensorBoard files.

A disk that is full, or fails, ends no run. Lines of `metrics.jsonl`, the record of a run, wait in memory until they can be
written; TensorBoard's files are a view of them, and do without what they could not take.
"""

import contextlib
import itertools
import json
import math
import os
import socket
import struct
import time
from pathlib import Path

from clip_jax.config import Tracking
from clip_jax.errors import StorageError
from clip_jax.files import tell
from clip_jax.train.tracking import WandB

# Lines are kept until they are known to be on disk. Without checkpoints nobody else asks for that.
MOST_LINES_IN_DOUBT = 1_000


class MetricsWriter:
  """Appends lines to `metrics.jsonl`, and hands them to TensorBoard and to Weights & Biases."""

  def __init__(self, workdir, step, tracking=None):
    """Opens the files of a run that starts, or goes on, at a step.

    Lines of later steps are dropped: a killed run may have logged past its last checkpoint, and will
    log those steps again.

    Args:
      workdir: the run's work directory.
      step: updates done.
      tracking: a `clip_jax.config.Tracking`; None: the default one.

    Raises:
      StorageError: `metrics.jsonl` cannot be opened, or cut back to the step.
    """
    path = Path(workdir) / "metrics.jsonl"
    drop_after(path, step)
    self._lines = _Lines(path)
    tracking = tracking or Tracking()
    self._views = [_Scalars(Path(workdir) / "tensorboard", purge_step=step + 1)] if tracking.tensorboard else []
    if tracking.wandb != "off":
      self._views.append(WandB(tracking, workdir, read(path)))

  def write(self, step, samples_seen, values):
    """Writes one line; one that cannot be written waits, and is tried again with the next.

    Args:
      step: updates done.
      samples_seen: training pairs seen.
      values: a dict of name to float.
    """
    # JSON has no NaN: a reader in another language would stop at the line.
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    line = {"step": step, "samples_seen": samples_seen, "time": time.time(), **known}
    self._lines.add((json.dumps(line) + "\n").encode())
    for view in self._views:
      view.add(line, values)

  def sync(self):
    """Puts everything on disk, so that no checkpoint is ever ahead of the lines before it.

    Returns:
      Whether all lines of `metrics.jsonl` are there. If not they are kept; a later call may find space for them.
    """
    for view in self._views:
      view.sync()
    return self._lines.sync()

  def close(self):
    """Syncs and closes; of lines that still cannot be written it says how many there are."""
    self._lines.close()
    for view in self._views:
      view.close()


class NoMetrics:
  """Stands in for a `MetricsWriter` on all processes but the first."""

  def write(self, step, samples_seen, values):
    """Writes nothing."""

  def sync(self):
    """Has nothing to put on disk; returns True."""
    return True

  def close(self):
    """Does nothing."""


class _Lines:
  # Each line once, whole and in order, in a file that may take none for a while.

  def __init__(self, path):
    try:
      # Not for appending: the system would put what is written again after what is there, wherever it belongs.
      self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
      self._on_disk = self._end = os.fstat(self._file).st_size
    except OSError as error:
      raise StorageError(f"{path} cannot be opened ({_reason(error)}).") from error
    self._name = path.name
    self._lines, self._written = [], 0  # those not known to be on disk, and how many of them are in the file
    self._trouble = None  # why not all of them are there

  def add(self, line):
    self._lines.append(line)
    if self._trouble or len(self._lines) >= MOST_LINES_IN_DOUBT:
      self.sync()
    else:
      self._write()

  def sync(self):
    """Whether all lines are on disk now."""
    if not self._write():
      return False
    try:
      os.fsync(self._file)
    except OSError as error:
      # The system forgets what it could not put on disk, and the next fsync would not tell of it: all is written again, over
      # what is there, which a reader may still see.
      self._written, self._end = 0, self._on_disk
      return self._failed(error)
    self._lines, self._written, self._on_disk = [], 0, self._end
    if self._trouble:
      self._trouble = None
      tell(f"\n{self._name} can be written again; all of its lines are there.")
    return True

  def close(self):
    if not self.sync():
      missing = len(self._lines) - self._written
      tell(f"\n{self._name} still cannot be written ({self._trouble}); lines it lacks at its end: {missing:,}.")
    with contextlib.suppress(OSError):
      os.close(self._file)

  def _write(self):
    try:
      while self._written < len(self._lines):
        line = self._lines[self._written]
        _put(self._file, line, self._end)
        self._written += 1
        self._end += len(line)
      return True
    except OSError as error:
      return self._failed(error)

  def _failed(self, error):
    if not self._trouble:
      tell(f"\n{self._name} cannot be written ({_reason(error)}); its lines are kept in memory.")
    self._trouble = _reason(error)
    return False


class _Scalars:
  # A file of TensorBoard's. tensorboardX makes the records, but does not write them: its writer is a thread that dies with the
  # first error, and after ten more values whoever hands it one waits for ever.

  def __init__(self, folder, purge_step):
    # Imported here: it takes half a second, which `clip-jax --help` need not wait for.
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    self._checksum, self._scalar, self._proto = record_writer.masked_crc32c, summary.scalar, event_pb2
    self._folder, self._purge_step = Path(folder), purge_step
    self._file, self._end, self._trouble = None, 0, False
    self._attempt(self._open)

  def add(self, line, values):
    """Writes the values of a line, all or none."""
    events = (self._event(line["time"], step=line["step"], summary=self._scalar(name, value)) for name, value in values.items())
    self._attempt(lambda: self._append(b"".join(events)))

  def sync(self):
    if self._file is not None:
      self._attempt(lambda: os.fsync(self._file))

  def close(self):
    self.sync()
    if self._file is not None:
      with contextlib.suppress(OSError):
        os.close(self._file)

  def _attempt(self, action):
    try:
      action()
      self._trouble = False
    except OSError as error:
      if not self._trouble:
        tell(f"\nTensorBoard's file cannot be written ({_reason(error)}); it will lack values that metrics.jsonl has.")
      self._trouble = True

  def _append(self, records):
    if self._file is None:
      self._open()
    _put(self._file, records, self._end)
    self._end += len(records)

  def _open(self):
    # With what a file has to begin with: without that it is none.
    self._folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}"
    for number in itertools.count():
      path = self._folder / (f"{name}.{number}" if number else name)
      with contextlib.suppress(FileExistsError):  # of a run that was stopped in this very second
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        break
    now, started = time.time(), self._proto.SessionLog(status=self._proto.SessionLog.START)
    begin = self._event(now, file_version="brain.Event:2")
    begin += self._event(now, step=self._purge_step, session_log=started)  # hides what an earlier run logged of these steps
    try:
      _put(file, begin, 0)
    except OSError:
      os.close(file)
      path.unlink()
      raise
    self._file, self._end = file, len(begin)

  def _event(self, seconds, **content):
    # The framing of TFRecord: length and content, each with its checksum.
    event = self._proto.Event(wall_time=seconds, **content).SerializeToString()
    length = struct.pack("<Q", len(event))
    return length + struct.pack("<I", self._checksum(length)) + event + struct.pack("<I", self._checksum(event))


def _put(file, content, place):
  # All of it, or an OSError and nothing: what a full disk took of it is cut off again.
  before = os.fstat(file).st_size
  try:
    done = 0
    while done < len(content):
      done += os.pwrite(file, content[done:], place + done)
  except OSError:
    with contextlib.suppress(OSError):  # where even that fails, the next attempt writes over it
      os.ftruncate(file, before)
    raise


def _reason(error):
  return error.strerror or str(error)


def read(path, last=0):
  """The lines of a `metrics.jsonl`.

  Args:
    path: the file; one that is missing has no lines, and a last line that is cut off does not count.
    last: how many of the last ones to read; 0: all.

  Returns:
    A list of dicts.
  """
  try:
    with open(path, "rb") as file:
      lines = _end(file, last) if last else file.readlines()
  except FileNotFoundError:
    return []
  return [json.loads(line) for line in lines[-last:] if line.endswith(b"\n")]


def _end(file, count, size=16_384):
  """At least that many lines at the end of a file, the last of which may be cut off; fewer if there are no more."""
  length = file.seek(0, os.SEEK_END)
  while True:
    start = max(length - size, 0)
    file.seek(start)
    lines = file.read(length - start).splitlines(keepends=True)
    if not start:
      return lines
    if len(lines) > count:
      return lines[1:]  # the first one may have begun before
    size *= 4


def drop_after(path, step):
  """Removes lines of steps after one, and a last line that is cut off, atomically.

  Args:
    path: a `metrics.jsonl`; nothing happens if it is missing.
    step: the last step to keep.

  Raises:
    StorageError: there is no space for the lines that are kept, which stay where they are.
  """
  path = Path(path)
  if not path.exists():
    return
  temporary = path.with_suffix(".jsonl.tmp")
  try:
    with path.open(encoding="utf-8") as old, temporary.open("w", encoding="utf-8") as new:
      for line in old:
        if line.endswith("\n") and json.loads(line)["step"] <= step:
          new.write(line)
      new.flush()
      os.fsync(new.fileno())
    os.replace(temporary, path)
  except OSError as error:
    raise StorageError(f"{path} cannot be cut back to step {step:,} ({_reason(error)}).") from error
  finally:
    temporary.unlink(missing_ok=True)
