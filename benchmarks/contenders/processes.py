"""Processes of contenders that take turns, each with the allocator and the threads of its own framework."""

import contextlib
import multiprocessing
import statistics
import sys
import time

from contenders import steps

from clip_jax.models import size

PAUSE = 0.3  # seconds between turns: threads of OpenMP wait actively for a while after they have worked
# Of the free memory, for all together. With less to spare Linux runs out of pages of 2 MiB, and who asks for memory at every step, as
# XLA:CPU does, gets it in pages of 4 KiB, which has cost it a third of its speed.
ROOM = 0.7


def spawn(function, *arguments):
  """Starts a function in a process that shares nothing with this one; returns the process and a pipe, its first argument there."""
  context = multiprocessing.get_context("spawn")
  pipe, theirs = context.Pipe()
  process = context.Process(target=function, args=(theirs, *arguments), daemon=True)
  process.start()
  theirs.close()  # so that the end of the process is the end of the pipe
  return process, pipe


def look():
  """What is here, as JAX sees it; in a process of its own, because JAX takes an accelerator's memory for as long as it lives."""
  process, pipe = spawn(steps.devices)
  try:
    return pipe.recv()
  except EOFError:
    raise SystemExit("JAX does not start here; the reason stands above.") from None
  finally:
    process.join()


class Contender:
  """A step in a process of its own, as this process sees it.

  Attributes:
    who, dtype: its name and the type it computes in.
    each: samples per second of each round.
    about: what its process said of it.
    error: why it is out, a sentence; None while it is not.
  """

  def __init__(self, who, config, count, here):
    self.who, self.dtype = who, config.model.compute_dtype
    self.each, self.about, self.error = [], {}, None
    batch, self._arguments, self._process = config.train.global_batch_size, (who, config, count, here), None
    self._pairs = batch * count
    self._flops = size.training_flops(config.model, batch, config.loss.name, config.optimizer.freeze)

  @property
  def row(self):
    """What was found, for JSON."""
    rate, peak = statistics.median(self.each), self.about["peak"]
    return {
      "name": self.who,
      "dtype": self.dtype,
      "samples_per_second": rate,
      "each": self.each,
      "mfu": rate * self._flops / peak if peak else None,
      "first_loss": self.about["first_loss"],
    }

  def start(self):
    """Builds and warms up, or sets `error`."""
    start = time.monotonic()
    self._process, self._pipe = spawn(steps.serve, *self._arguments)
    self.about = self._answer()
    if not self.error:
      say(f"{self.who} {self.dtype}: ready in {time.monotonic() - start:.0f} s, first loss {self.about['first_loss']:.4f}")

  def run(self):
    """One round, if nothing is wrong with it; what has no process gets one."""
    if not (self.error or self._process):
      self.start()
    if self.error:
      return
    time.sleep(PAUSE)
    self._tell(True)
    answer = self._answer()
    if not self.error:
      self.each.append(self._pairs / answer["seconds"])
      say(f"{self.who} {self.dtype}: round {len(self.each)}, {self.each[-1]:.2f} samples/s")

  def stop(self):
    """Ends its process."""
    if self._process:
      self._tell(False)
      self._process.join()
      self._process = None

  def _tell(self, go_on):
    with contextlib.suppress(OSError):  # of one that has ended, which its answer shows
      self._pipe.send(go_on)

  def _answer(self):
    try:
      answer = self._pipe.recv()
    except (EOFError, OSError):
      self._process.join()
      code = self._process.exitcode
      killed = "was ended by signal 9, as for lack of memory; --apart has one process at a time"
      answer = {"error": f"its process {killed if code == -9 else f'ended with exit code {code}'}."}
    self.error = answer.get("error")
    if self.error:
      say(f"{self.who} {self.dtype} failed: {self.error}")
    return answer


def measure(contenders, rounds, together):
  """Has contenders run in turns.

  Args:
    contenders: list of `Contender`.
    rounds: turns of each.
    together: all processes live until the end, if memory has room for as many as the first; otherwise one at a time, for its turn.

  Returns:
    Whether they were together.
  """
  free = available_memory()
  if together:
    contenders[0].start()
    needed = contenders[0].about.get("memory", 0) * len(contenders)
    together = needed <= ROOM * free
    if not together:
      say(f"one process at a time: {len(contenders)} may need {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} are free")
      contenders[0].stop()
  if together:
    for contender in contenders[1:]:
      contender.start()
  for _ in range(rounds):
    for contender in contenders:
      contender.run()
      if not together:
        contender.stop()
  for contender in contenders:
    contender.stop()
  return together


def available_memory():
  """Bytes that programs can have, by Linux's estimate."""
  with open("/proc/meminfo") as file:
    return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def say(text):
  """Prints progress, away from the result."""
  print(text, file=sys.stderr, flush=True)
