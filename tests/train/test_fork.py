"""A run that begins as another one: what it would have been, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import train
from clip_jax.errors import UsageError
from clip_jax.plan import dry_run
from tests.conftest import COLORS, tiny

KEPT = 4  # the step that is forked from


def config(colors, steps, fork_from="", cooldown=0, **optimizer):
  return tiny(
    data={"source": "tar", "path": colors, "other_captions": 0.5},
    train={"steps": steps, "fork_from": str(fork_from)},
    optimizer={"schedule": "constant", "cooldown_steps": cooldown, "warmup_steps": 2, "learning_rate": 1e-3, **optimizer},
    checkpoint={"every": 100, "keep_last": 1, "keep_steps": (KEPT,)},
    eval={"batch_size": 16, "every": 3, "zero_shot": {"colors": {"source": "tar", "path": colors, "classes": tuple(COLORS), "templates": ("{}",)}}},
  )


@pytest.fixture(scope="module")
def trunk(colors, tmp_path_factory):
  """A run of ten steps at a constant rate."""
  workdir = tmp_path_factory.mktemp("trunk")
  train.run(config(colors, 10), workdir)
  return workdir


def lines_of(workdir):
  """The log without what depends on time."""
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  of_clock = ("time", "samples_per_second", "data_wait")
  return [{key: value for key, value in line.items() if key not in of_clock and "per_chip" not in key and "mfu" not in key} for line in lines]


def same(first, second):
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_cooldown_from_a_checkpoint_is_bit_for_bit_the_run_from_its_beginning(colors, trunk, tmp_path):
  train.run(config(colors, 6, cooldown=2), tmp_path / "whole")
  result = train.run(config(colors, 6, trunk / "checkpoints/4", cooldown=2), tmp_path / "fork")
  assert (result.started, result.step, result.complete) == (KEPT, 6, True)
  assert lines_of(tmp_path / "fork") == lines_of(tmp_path / "whole")
  assert lines_of(tmp_path / "fork")[:KEPT] == lines_of(trunk)[:KEPT]
  whole, fork = (clip_jax.load(tmp_path / name) for name in ("whole", "fork"))
  same(whole.params, fork.params)


def test_the_checkpoint_that_is_forked_from_is_kept(trunk):
  assert sorted(path.name for path in (trunk / "checkpoints").iterdir()) == ["10", "4"]


def test_a_fork_that_was_stopped_goes_on_from_its_own_checkpoint_or_forks_again(colors, trunk, tmp_path):
  forked = config(colors, 8, trunk / "checkpoints/4", cooldown=3)
  train.run(forked, tmp_path / "run")
  whole = lines_of(tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints")  # as if it had been killed before its first checkpoint
  assert train.run(forked, tmp_path / "run").started == KEPT
  assert lines_of(tmp_path / "run") == whole
  assert train.run(forked, tmp_path / "run").started == 8  # now there is one


def test_batches_that_the_other_run_left_out_before_are_left_out(colors, trunk, tmp_path):
  parent = tmp_path / "parent"
  shutil.copytree(trunk, parent)
  entries = [{"from": 3, "to": 2, "batches": 1, "reason": "a spike"}, {"from": 9, "to": 8, "batches": 1, "reason": "a spike"}]
  (parent / "rollbacks.json").write_text(json.dumps({"rollbacks": entries}))
  train.run(config(colors, 6, parent / "checkpoints/4"), tmp_path / "fork")
  assert json.loads((tmp_path / "fork/rollbacks.json").read_text())["rollbacks"] == entries[:1]
  # With a constant rate the run that is forked from is what would be without it.
  losses = [{line["step"]: line["loss"] for line in lines_of(folder) if "loss" in line} for folder in (trunk, tmp_path / "fork")]
  assert losses[0][4] == losses[1][4] and losses[0][6] != losses[1][6]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(fork_from="{trunk}"), "is not a checkpoint of a run; runs/mine/checkpoints/2000 is one"),
    (dict(fork_from="{trunk}/checkpoints/5"), r"checkpoints/5 is not a checkpoint of clip_jax"),
    (dict(steps=4), r"is at step 4, and this run has only 4 steps"),
    (dict(name="lion"), r"that run has config.optimizer.name='adamw', and this config has 'lion'"),
    (dict(ema_decay=0.9), r"config.optimizer.ema_decay=None, and this config has 0.9"),
    (dict(batch=32), r"config.train.global_batch_size=16, and this config has 32; a fork goes on with the same model, data and batches"),
  ],
)
def test_what_cannot_be_forked_is_said_before_anything_is_trained(colors, trunk, tmp_path, changes, message):
  changes = dict(changes)
  batch = changes.pop("batch", None)
  made = config(colors, changes.pop("steps", 6), changes.pop("fork_from", "{trunk}/checkpoints/4").format(trunk=trunk), **changes)
  made["train"] |= {"global_batch_size": batch} if batch else {}
  for attempt in (lambda: train.run(made, tmp_path), lambda: dry_run.run(made, tmp_path / "dry")):
    with pytest.raises(UsageError, match=message):
      attempt()
  assert not (tmp_path / "metrics.jsonl").exists() and not list((tmp_path / "checkpoints").glob("*"))


def test_a_damaged_checkpoint_is_not_forked_from(colors, trunk, tmp_path):
  parent = tmp_path / "parent"
  shutil.copytree(trunk, parent)
  shutil.rmtree(parent / "checkpoints/4/state/d")
  with pytest.raises(UsageError, match="checkpoints/4 cannot be used"):
    train.run(config(colors, 6, parent / "checkpoints/4"), tmp_path / "fork")


def test_a_dry_run_says_where_it_would_fork(colors, trunk, tmp_path):
  told = {}
  dry_run.run(config(colors, 6, trunk / "checkpoints/4"), tmp_path / "fork", tell=told.__setitem__)
  assert told["fork_from"].endswith("checkpoints/4: goes on from step 4 of 6")
  assert not (tmp_path / "fork").exists()
