"""What a run does about bad numbers: steps that were skipped, losses that jump, and the batches they came from."""

import collections
import json
import statistics
from pathlib import Path

import jax

from clip_jax.data import order
from clip_jax.errors import TrainingError
from clip_jax.files import read_json, tell, write_json
from clip_jax.parallel import agreement
from clip_jax.train import metrics

# A jump counts only if it is also this many times as far from the median as most losses of the window are: where losses are small,
# twice as much is nothing.
USUAL_DISTANCES = 6.0
MAX_ROLLBACKS = 3  # to one checkpoint, before the run gives up


class Rollback(Exception):
  """The run shall go back to its newest checkpoint, and leave out the batches since then.

  Attributes:
    step: the last step that is undone.
    reason: for people.
  """

  def __init__(self, step, reason):
    """Says why.

    Args:
      step: the last step that is undone.
      reason: for people.
    """
    super().__init__(reason)
    self.step, self.reason = step, reason


class Guard:
  """Looks at the numbers of each step that is logged.

  All processes see the same numbers, and so come to the same conclusion at the same step. What it remembers stands in
  `metrics.jsonl`, so that a run which is resumed comes to that of a run which was not.
  """

  def __init__(self, config, lines, explain):
    """Prepares.

    Args:
      config: a resolved `Config`.
      lines: of `metrics.jsonl`, up to the step where the run goes on.
      explain: called with a range of steps and a reason; writes down what their batches were, and returns where.
    """
    self._train, self._explain = config.train, explain
    self._losses = collections.deque(maxlen=config.train.spike_window)
    for line in lines:
      if not line.get("nonfinite"):
        self._losses.extend([line["loss"]] if "loss" in line else [])

  def __call__(self, step, values):
    """Looks.

    Args:
      step: updates done.
      values: metrics of the step. `loss_spike` is added, how many times the median of losses it is, if it is one.

    Returns:
      What to raise once the values are written, or None: a `Rollback`, or a `TrainingError`.
    """
    row = int(values["skipped_in_a_row"])
    if row:
      return self._of_skipped(step, row) if row >= self._train.max_bad_steps else None
    if values.get("nonfinite"):  # of another number than the loss and the gradient: nothing to measure it by
      return None
    spike, count = self._spike(values["loss"]), len(self._losses)
    self._losses.append(values["loss"])  # a spike, too: if losses stay there, that is where they are
    if spike is None:
      return None
    values["loss_spike"] = spike
    reason = f"the loss of step {step:,} is {values['loss']:.4g}, {spike:.1f} times the median of the {count} before"
    if jax.process_index() == 0:
      tell(f"\nLOSS SPIKE: {reason}.")
    if self._train.on_spike == "rollback":
      self._explain(range(step, step + 1), reason)
      return Rollback(step, reason)
    return None

  def _of_skipped(self, step, row):
    first = step - row + 1
    reason = f"the loss or gradients of steps {first:,} to {step:,} were not finite, {row} in a row"
    where = self._explain(range(first, step + 1), reason)
    if self._train.on_spike == "rollback":
      return Rollback(step, reason)
    return TrainingError(
      f"{reason[0].upper()}{reason[1:]} (config.train.max_bad_steps={self._train.max_bad_steps}). They changed nothing, and what they were "
      f"made of is in {where}. The same command would meet them again; --config.train.on_spike=rollback leaves them out."
    )

  def _spike(self, loss):
    factor, losses = self._train.spike_factor, self._losses
    if factor is None or len(losses) < losses.maxlen:
      return None
    median = statistics.median(losses)
    usual = statistics.median(abs(each - median) for each in losses)
    if median <= 0 or loss <= factor * median or loss - median <= USUAL_DISTANCES * usual:
      return None
    return loss / median


def lines_to_know(config):
  """How many of the last lines of `metrics.jsonl` a `Guard` needs: its losses, and lines of other things between them.

  Args:
    config: a resolved `Config`.
  """
  return 4 * config.train.spike_window + 100


class Rollbacks:
  """Which batches of the stream a run leaves out, in `rollbacks.json` of its work directory.

  The batch of a step is that number of the stream, and one later for each that was left out before.
  """

  def __init__(self, workdir):
    """Reads what there is.

    Raises:
      DataError: the file is there and cannot be read.
    """
    self._path = Path(workdir) / "rollbacks.json"
    self._all = agreement.of_first(lambda: read_json(self._path)["rollbacks"] if self._path.exists() else [])

  def batch_of(self, step):
    """The number in the stream, from 0, of the batch of a step, which are counted from 1."""
    return step - 1 + sum(one["batches"] for one in self._all if one["to"] < step)

  def add(self, spike, to):
    """Leaves out the batches from a checkpoint on.

    Args:
      spike: a `Rollback`.
      to: the step of the checkpoint.

    Raises:
      TrainingError: that has been tried often enough.
    """
    if sum(one["to"] == to for one in self._all) >= MAX_ROLLBACKS:
      raise TrainingError(
        f"{spike.reason[0].upper()}{spike.reason[1:]}. The run went back to step {to:,} {MAX_ROLLBACKS} times, leaving out other batches each "
        "time, and it happens again: it is not the data. A lower learning rate needs another --workdir."
      )
    entry = {"from": spike.step, "to": to, "batches": spike.step - to, "reason": spike.reason}
    self._all.append(entry)
    if jax.process_index() == 0:
      write_json(self._path, {"rollbacks": self._all})
      tell(f"Back to step {to:,}; the {entry['batches']:,} batches since then are left out.")

  def to_write(self, step, lines):
    """What `metrics.jsonl` shall say of each time the run went back to a step, and does not yet.

    Args:
      step: of the checkpoint.
      lines: of the file.
    """
    there = [line for line in lines if line["step"] == step and "rollback_from" in line]
    back = [one for one in self._all if one["to"] == step]
    return [{"rollback_from": float(one["from"]), "rollback_batches": float(one["batches"])} for one in back[len(there) :]]


class Batches:
  """Names what the batches of steps were made of.

  Attributes:
    last: the step whose batch was asked for last.
  """

  def __init__(self, workdir, dataset, config, rollbacks):
    """Prepares.

    Args:
      workdir: `bad_batches.jsonl` is written there, a line for each step.
      dataset: a `Dataset`.
      config: a resolved `Config`.
      rollbacks: a `Rollbacks`.
    """
    self._path = Path(workdir) / "bad_batches.jsonl"
    self.last = 1
    self._dataset, self._size, self._batch_of = dataset, config.train.global_batch_size, rollbacks.batch_of

  def keys(self, step):
    """The names of the records in the batch of a step."""
    positions = order.positions_of_step(self._batch_of(step), self._size)
    components, indices = self._dataset.order.examples(positions)
    return [self._dataset.key(place) for place in zip(components.tolist(), indices.tolist(), strict=True)]

  def keys_of_last(self):
    """The names of the records that were asked for last."""
    return self.keys(self.last)

  def write(self, steps, reason):
    """Appends the batches of some steps.

    Args:
      steps: a range.
      reason: for people.

    Returns:
      The path of the file.
    """
    if jax.process_index() == 0:
      known = {(line["step"], line["batch"]) for line in metrics.read(self._path)}
      with self._path.open("a", encoding="utf-8") as file:
        for step in steps:
          line = {"step": step, "batch": self._batch_of(step), "reason": reason, "keys": self.keys(step)}
          if (line["step"], line["batch"]) not in known:  # a run that was started again meets the same
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return self._path
