"""Checkpoints while training: the whole state, saved beside the card that says what model it is of, and checked when it is read."""

import concurrent.futures
import contextlib
import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from clip_jax.convert import native
from clip_jax.errors import StorageError, UsageError
from clip_jax.files import tell
from clip_jax.parallel import agreement, digest

# What is newer than the first format, in which it was not written. A run that goes on from there has skipped nothing yet.
SINCE_FORMAT_2 = ("skipped", "skipped_in_a_row")
# What a store says that may know better later; a checkpoint behind it is not broken.
LATER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "Connection refused", "timed out")
# TensorStore's messages go on for lines; this is what is in them.
SYSTEM = ("No space left on device", "File too large", "Disk quota exceeded")
# Its name has no digit alone, so nothing takes it for a checkpoint; for people to look at, and to remove.
BROKEN = ".broken"


class Checkpoints:
  """The folder `checkpoints/STEP/` of a work directory.

  Saving is asynchronous: the arrays are copied to the host, the loop goes on, and the folder takes its
  final name once everything is on disk. A folder with a final name is whole, unless something happened to it since.

  Attributes:
    failures: how many saves did not succeed.
    whole: the step that was saved, or restored, last; None if there is none.
  """

  def __init__(self, workdir, config, tokenizer=None):
    """Looks at the folder, which a save makes if it is missing.

    Args:
      workdir: the run's work directory.
      config: a resolved `Config`.
      tokenizer: the model's `FileTokenizer`, which each checkpoint holds; None if it has CLIP's own.
    """
    self._config, self._tokenizer = config, tokenizer
    self._folder = (Path(workdir) / "checkpoints").absolute()
    self._saver = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._saving = self._step = self.whole = None
    self.failures = 0

  def clear_leftovers(self):
    """Removes what a save left that was killed; for a run that begins, as another that is alive may be saving."""
    if jax.process_index() == 0:
      for leftover in self._folder.glob("*tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)

  def steps(self):
    """The steps of whole checkpoints, the newest last."""
    return sorted(int(path.name) for path in self._folder.glob("[0-9]*") if path.name.isdigit())

  def latest_step(self):
    """The step of the newest whole checkpoint, or None."""
    return max(self.steps(), default=None)

  @property
  def saving(self):
    """Whether a save is under way, or nobody has asked yet how it went."""
    return self._saving is not None

  def has(self, step):
    """Whether a step is saved by this process, or is being saved."""
    return step == self.whole or (self.saving and step == self._step)

  def save(self, step, state, **values):
    """Starts to save; the state may be changed once this returns.

    Args:
      step: updates done.
      state: a `TrainState`.
      **values: what else the card shall say, ready for JSON: `records`, the length of the data set, and what it is made of.

    Raises:
      TrainingError: devices have different copies of the same numbers; nothing is saved.
      StorageError: it cannot be written, or the save before could not.
    """
    self.wait()
    arrays = fields(state)
    card = native.card(self._config.model, step=step, **values, digests=digest.Digests(arrays)(arrays))
    items = {"state": ocp.args.StandardSave(arrays), "card": ocp.args.JsonSave(card)}
    if self._tokenizer is not None:
      items["tokenizer"] = ocp.args.JsonSave(self._tokenizer.to_dict())
    path = self._folder / str(step)
    try:
      self._saver.save(path, args=ocp.args.Composite(**items), force=True)
    except Exception as error:  # Orbax and TensorStore raise what they like
      self._failed(path, error)
    self._step, self._saving = step, self._thread.submit(self._finish, path)

  def _finish(self, path):
    try:
      self._saver.wait_until_finished()
      if jax.process_index() == 0 and not path.is_dir():
        raise OSError("it did not get its name")
    except Exception as error:
      self._failed(path, error)
    self.whole = int(path.name)
    self._retire()

  def _failed(self, path, error):
    self.failures += 1
    self.clear_leftovers()
    raise StorageError(f"{path} could not be written ({reason(error)}).") from error

  def _retire(self):
    # Only after a newer one is whole. What is removed loses its name first: nobody shall find a part of it.
    if jax.process_index() > 0:
      return
    self.clear_leftovers()  # of saves that failed while some of their threads still wrote
    keep = self._config.checkpoint
    for step in self.steps()[: -keep.keep_last]:
      if not (step in keep.keep_steps or (keep.keep_every and step % keep.keep_every == 0)):
        leaving = self._folder / f"{step}.tmp"
        with contextlib.suppress(OSError):  # or else the next time
          (self._folder / str(step)).rename(leaving)
          shutil.rmtree(leaving)

  def written(self):
    """Whether what was started is on disk, or could not be written."""
    return not self.saving or self._saving.done()

  def check(self):
    """Raises what `wait` would, without waiting: for each step."""
    if self.written():
      self.wait()

  def wait(self):
    """Blocks until what was started is on disk.

    Raises:
      StorageError: it could not be written.
    """
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def restore(self, described):
    """The newest state that is what was saved, laid out as described, on any number of devices.

    Checkpoints that are not, and are newer, are told of on standard error, and get a name that nothing takes for a checkpoint.

    Args:
      described: what `clip_jax.train.state.describe` returns: shapes with shardings.

    Returns:
      A `TrainState` and the card of its checkpoint; or None and an empty card if there is no checkpoint.

    Raises:
      UsageError: there are checkpoints, and none can be used.
      StorageError: a disk does not answer.
    """
    wrong = {}
    for step in reversed(agreement.of_first(self.steps)):
      state, card, problem = self._read(self._folder / str(step), described)
      if not problem:
        self._set_aside(wrong, step)
        self.whole = step
        return state, card
      wrong[step] = problem
    if wrong:
      all_of_them = "; ".join(f"{step}: {problem}" for step, problem in wrong.items())
      raise UsageError(f"{self._folder} has no checkpoint that can be used ({all_of_them}). Restore one, or begin anew with --force_new.")
    return None, {}

  def restore_from(self, path, described):
    """The state in a checkpoint of another run, laid out as described.

    Args:
      path: its folder.
      described: as `restore`.

    Returns:
      A `TrainState` and the card of the checkpoint.

    Raises:
      UsageError: it is not what was saved, or does not fit.
      StorageError: a disk does not answer.
    """
    state, card, problem = self._read(path, described)
    if problem:
      raise UsageError(f"{path} cannot be used: {problem}.")
    return state, card

  def _read(self, path, described):
    """A state, its card, and what is wrong with it; the same on all processes, each of which reads its part."""
    state, card, problem = None, {}, None
    try:
      card = native.read_json(path, "card")
      state = described.replace(**self._arrays(path / "state", described, card))
    except Exception as error:  # of any kind: Orbax, TensorStore, JSON, a file that is not there
      if any(word in str(error) for word in LATER):
        raise StorageError(f"{path} cannot be read ({reason(error)}).") from error
      problem = reason(error)
    if not agreement.everyone(problem is None):
      return None, None, problem or "another process cannot read its part"
    arrays, written = fields(state), card.get("digests")
    if written is not None:  # the first format had none
      found = digest.Digests(arrays)(arrays)
      differing = [name for name in found if found[name] != written.get(name)]
      if differing:
        return None, None, f"{differing[0]} is not what was written, and neither are {len(differing) - 1} others of {len(found)} arrays"
    return state, card, None

  def _arrays(self, path, described, card):
    wanted = fields(described)
    missing = [name for name in SINCE_FORMAT_2 if card.get("format") == 1]
    items = {name: value for name, value in wanted.items() if name not in missing}
    args = ocp.args.StandardRestore(items)
    # The handler alone: a checkpointer waits for the other processes, which one that cannot read would leave waiting.
    found = ocp.StandardCheckpointHandler().restore(path, args=args)
    for name in missing:
      found[name] = jax.device_put(jnp.zeros(wanted[name].shape, wanted[name].dtype), wanted[name].sharding)
    return found

  def _set_aside(self, wrong, used):
    if jax.process_index() > 0:
      return
    for step, problem in wrong.items():
      aside = self._folder / f"{step}{BROKEN}"
      shutil.rmtree(aside, ignore_errors=True)  # of the same step, from before
      (self._folder / str(step)).rename(aside)
      tell(
        f"{self._folder / str(step)} CANNOT BE USED: {problem}. It is now called {aside.name}; the run goes on from step {used:,}."
      )

  def card(self):
    """The card of the newest checkpoint, without its arrays.

    Raises:
      UsageError: it cannot be read.
    """
    return native.read_json(self._folder / str(self.latest_step()), "card")

  def close(self):
    """Waits, and stops the threads that save; a failure that nobody waited for is not raised any more."""
    self._thread.shutdown()
    self._saver.close()


def reason(error):
  """What an error of Orbax, TensorStore or the system says, as part of a sentence."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
  return next((known for known in SYSTEM if known in str(error)), text if len(text) < 300 else f"{text[:300]} ...")


def fields(state):
  """What of a state is saved, by name; without the moving average where there is none, for which Orbax would look."""
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if getattr(state, field.name) is not None}
