"""Checkpoints: the state, the step and a card that says what model the weights are of."""

import json
import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

import clip_jax
from clip_jax import config as configs
from clip_jax.errors import UsageError

# Number of the layout of a checkpoint; a reader refuses one that it does not know.
FORMAT = 1

# Orbax logs each internal step at INFO and WARNING; what matters to a person is said by the loop.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
  """The folder `checkpoints/STEP/` of a work directory.

  Saving is asynchronous: the arrays are copied to the host, the loop goes on, and the folder takes its
  final name once everything is on disk. A folder with a final name is whole.
  """

  def __init__(self, workdir, config):
    """Opens the folder, which is made if it is missing.

    Args:
      workdir: the run's work directory.
      config: a resolved `Config`.
    """
    self._config = config
    folder = (Path(workdir) / "checkpoints").absolute()
    if jax.process_index() == 0:
      # Orbax can do this too, but in a thread that outlives a run which ends at once.
      for leftover in folder.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a save that was killed
    self._manager = ocp.CheckpointManager(
      folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.checkpoint.keep_last,
        keep_period=config.checkpoint.keep_every,
        # Whether to save is the hook's decision.
        enable_should_save_is_saving_in_progress_check=False,
      ),
    )

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
    card = {
      "format": FORMAT,
      "clip_jax": clip_jax.__version__,
      "step": step,
      "records": records,
      "model": configs.to_dict(self._config)["model"],
    }
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), card=ocp.args.JsonSave(card))
    self._manager.save(step, args=args, force=True)

  def restore(self, described):
    """The newest state, laid out as described, on any number of devices.

    Args:
      described: what `clip_jax.train.state.describe` returns: shapes with shardings.

    Returns:
      A `TrainState`.
    """
    step = self.latest_step()
    args = ocp.args.Composite(state=ocp.args.StandardRestore(described))
    return self._manager.restore(step, args=args)["state"]

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


def find(path):
  """The checkpoint that a path stands for.

  Args:
    path: a work directory, of which the newest checkpoint is taken, or one `checkpoints/STEP` folder.

  Returns:
    A `Path` of the latter kind.

  Raises:
    UsageError: there is no checkpoint at that path.
  """
  path = Path(path)
  steps = [p for p in (path / "checkpoints").glob("[0-9]*") if p.name.isdigit()]
  folder = max(steps, key=lambda p: int(p.name)) if steps else path
  if not (folder / "card").is_dir():
    raise UsageError(f"{path} holds no checkpoint: neither checkpoints/STEP/ nor card/ is in it.")
  return folder


def read_card(folder):
  """What model a checkpoint holds.

  Args:
    folder: `checkpoints/STEP`.

  Returns:
    A resolved `clip_jax.config.Model`.

  Raises:
    UsageError: there is no card, or a newer version wrote it.
  """
  path = Path(folder) / "card" / "metadata"
  try:
    card = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise UsageError(f"{folder} is not a checkpoint of clip_jax: {path} cannot be read.") from error
  if card.get("format") != FORMAT:
    raise UsageError(
      f"{folder} has checkpoint format {card.get('format')}; this version reads format {FORMAT}."
    )
  return configs.model_from_dict(card["model"])


def read_params(folder):
  """The parameters of a checkpoint, as NumPy arrays on the host.

  Args:
    folder: `checkpoints/STEP`.

  Returns:
    The nested dict that `CLIP(...).apply({"params": ...})` takes.
  """
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  path = Path(folder).absolute() / "state"
  item = {"params": checkpointer.metadata(path).item_metadata.tree["params"]}
  args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  return checkpointer.restore(path, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True))["params"]
