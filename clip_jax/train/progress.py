"""One line that tells how a run is going: redrawn on a terminal, now and then in a log."""

import contextlib
import sys
import time

# Where there is no terminal to redraw, a line comes at most this often.
SECONDS_BETWEEN_LINES = 10


class Progress:
  """Shows step, loss, speed, the share of time spent waiting for data, and the time left.

  Where they are known, also model FLOPs utilisation and the most memory that was in use.
  """

  def __init__(self, config, start, file=None):
    """Prepares.

    Args:
      config: a resolved `Config`.
      start: updates done before this run.
      file: where to write; standard error if not given.
    """
    self._file = file or sys.stderr
    self._steps, self._batch, self._start = config.train.steps, config.train.global_batch_size, start
    self._rate = self._wait = self._said = None
    self._live = self._terminal_line() if self._file.isatty() else None

  def __call__(self, step, values):
    """Shows a step.

    Args:
      step: updates done.
      values: its metrics.
    """
    line = f"loss {values['loss']:.3f}  {self._speed(step, values)}"
    if self._live:
      self._live.update(self._task, completed=step, line=line)
    elif step == self._steps or self._said is None or time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
      self._said = time.monotonic()
      with contextlib.suppress(OSError):  # a log on a disk that is full
        print(f"step {step:,}/{self._steps:,}  {line}", file=self._file, flush=True)

  def _speed(self, step, values):
    if self._rate is None:  # the first step's time is that of compiling
      self._rate = self._wait = 0.0
      return "compiled"
    # Smoothed: the time of a single step says little.
    share = 0.1 if self._rate else 1.0
    self._rate += share * (values["samples_per_second"] - self._rate)
    self._wait += share * (values["data_wait"] - self._wait)
    seconds = (self._steps - step) * self._batch / self._rate
    parts = [f"{self._rate:,.0f} samples/s", f"data wait {self._wait:.0%}", f"{duration(seconds)} left"]
    if "peak_memory_gib" in values:
      parts.insert(1, f"{values['peak_memory_gib']:.1f} GiB")
    if "mfu" in values:  # smooth as the speed is, of which it is a constant part
      parts.insert(1, f"MFU {values['mfu'] / values['samples_per_second'] * self._rate:.0%}")
    return "  ".join(parts)

  def close(self):
    """Leaves the last line standing."""
    if self._live:
      self._live.stop()

  def _terminal_line(self):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"))
    live = Bar(*columns, console=Console(file=self._file), redirect_stdout=False)
    self._task = live.add_task("", total=self._steps, completed=self._start, line="compiling ...")
    live.start()
    return live


def duration(seconds):
  """Seconds as people say them: "48 s", "7 min", "3 h 12 min", "2 d 4 h"."""
  minutes, hours, days = (int(seconds // unit) for unit in (60, 3600, 86400))
  if seconds < 90:
    return f"{seconds:.0f} s"
  if seconds < 5400:
    return f"{minutes} min"
  if days < 2:
    return f"{hours} h {minutes - 60 * hours} min"
  return f"{days} d {hours - 24 * days} h"
