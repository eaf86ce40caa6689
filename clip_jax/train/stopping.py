"""How a run is stopped from outside, and how its processes agree on what they do together."""

import contextlib
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from clip_jax.files import tell
from clip_jax.parallel import rules


class Stopped(BaseException):
  """A signal came before the first step: there is nothing to finish, and nothing that is not saved."""


@contextlib.contextmanager
def handled(receive):
  """Has a function, as `signal.signal` takes it, called for SIGTERM and SIGINT inside the `with` block."""
  before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not one of Python's


class Signals:
  """Turns SIGTERM and SIGINT into a wish to stop after a step; a second SIGINT leaves at once.

  SIGTERM is also how a preemption is announced: by Kubernetes, Slurm, and the shutdown of a virtual machine.
  """

  def __init__(self):
    """Prepares; signals are caught inside the `with` block."""
    self.received, self._training, self._handled = None, False, handled(self._receive)

  def __enter__(self):
    self._handled.__enter__()
    return self

  def __exit__(self, *reason):
    self._handled.__exit__(*reason)

  def training(self):
    """Says that from now on there is something to save.

    Raises:
      Stopped: a signal has come, and what it raised was lost.
    """
    if self.received is not None:
      raise Stopped
    self._training = True

  def _receive(self, number, _):
    if self.received == signal.SIGINT == number:
      tell("Left at once; the last checkpoint is whole.")
      os._exit(1)  # without waiting for the device, or for a save under way
    self.received = number
    name = signal.Signals(number).name
    if not self._training:
      tell(f"\n{name}: stopping before the first step.")
      raise Stopped
    tell(f"\n{name}: finishing this step and saving; the same command goes on. Ctrl-C twice leaves at once.")


class Votes:
  """What any process wishes, all do, after the same step: "stop" and "save".

  A signal reaches hosts at different steps, or only one of them; so does the time of a save, or what went wrong with one. After each
  step all say what they wish; the answer of the step before is read, so that nobody waits for the step that is running.
  """

  def __init__(self, mesh):
    """Prepares.

    Args:
      mesh: the device mesh, over which processes agree.
    """
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._any = jax.jit(lambda wishes: jnp.any(wishes, axis=0), out_shardings=rules.replicated(mesh))
    self._asked, self._saved = None, False

  def cast(self, *, stop, save, busy):
    """What is to be done now; to be asked after each step.

    Args:
      stop: whether this process wishes to stop.
      save: whether this process wishes to save.
      busy: whether it cannot yet, as its last save is still under way. Then nobody does.

    Returns:
      A set of "stop" and "save", the same on every process.
    """
    answer = (stop, save, busy)
    if jax.process_count() > 1:
      everybody = jax.make_array_from_process_local_data(self._sharding, np.tile(answer, (jax.local_device_count(), 1)))
      before, self._asked = self._asked, self._any(everybody)
      answer = (False, False, False) if before is None else np.asarray(before).tolist()
    stop, save, busy = answer
    # The wish that was fulfilled just now was still a wish when this answer was asked for.
    self._saved = save = save and not busy and not (self._saved and jax.process_count() > 1)
    return {name for name, agreed in (("stop", stop), ("save", save)) if agreed}
