"""Checkpoints while training: the whole state, saved beside the card that says what model it is of."""

import dataclasses
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from clip_jax.convert import native


class Checkpoints:
  """The folder `checkpoints/STEP/` of a work directory.

  Saving is asynchronous: the arrays are copied to the host, the loop goes on, and the folder takes its
  final name once everything is on disk. A folder with a final name is whole.
  """

  def __init__(self, workdir, config, tokenizer=None):
    """Opens the folder, which is made if it is missing.

    Args:
      workdir: the run's work directory.
      config: a resolved `Config`.
      tokenizer: the model's `FileTokenizer`, which each checkpoint holds; None if it has CLIP's own.
    """
    self._config, self._tokenizer = config, tokenizer
    self._folder = (Path(workdir) / "checkpoints").absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.keep_last,
        keep_period=config.checkpoint.keep_every,
        # Whether to save is the hook's decision.
        enable_should_save_is_saving_in_progress_check=False,
      ),
    )

  def clear_leftovers(self):
    """Removes what a save left that was killed; for a run that begins, as another that is alive may be saving."""
    if jax.process_index() == 0:
      # Orbax can do this too, but in a thread that outlives a run which ends at once.
      for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)

  def latest_step(self):
    """The step of the newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, step, state, records):
    """Starts to save; the state may be changed once this returns.

    Args:
      step: updates done.
      state: a `TrainState`.
      records: length of the data set, which the order of examples depends on.
    """
    card = native.card(self._config.model, step=step, records=records)
    items = {"state": ocp.args.StandardSave(_fields(state)), "card": ocp.args.JsonSave(card)}
    if self._tokenizer is not None:
      items["tokenizer"] = ocp.args.JsonSave(self._tokenizer.to_dict())
    self._manager.save(step, args=ocp.args.Composite(**items), force=True)

  def restore(self, described):
    """The newest state, laid out as described, on any number of devices.

    Args:
      described: what `clip_jax.train.state.describe` returns: shapes with shardings.

    Returns:
      A `TrainState`.
    """
    step = self.latest_step()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_fields(described)))
    return described.replace(**self._manager.restore(step, args=args)["state"])

  def records(self):
    """The length of the data set that the newest checkpoint was trained on."""
    args = ocp.args.Composite(card=ocp.args.JsonRestore())
    return self._manager.restore(self.latest_step(), args=args)["card"]["records"]

  def wait(self):
    """Blocks until what was started is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits, and stops the threads that save."""
    self._manager.close()


def _fields(state):
  # Without the moving average where there is none: Orbax would write that, and look for it in checkpoints from before there was one.
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state) if getattr(state, field.name) is not None}
