"""Whose a work directory is, and what is never overwritten."""

import json

import pytest

from clip_jax import config as configs
from clip_jax.errors import ConfigError, UsageError
from clip_jax.train import workdir as workdirs
from tests.conftest import tiny


def resolved(**sections):
  return configs.resolve(tiny(**sections))


def hold(workdir, config):
  workdir.mkdir()
  (workdir / "config.json").write_text(json.dumps(workdirs.as_json(config)))
  (workdir / "metrics.jsonl").write_text("lines\n")
  return workdir


def test_another_runs_work_directory_is_refused_with_the_difference_even_before_its_first_checkpoint(tmp_path):
  workdir = hold(tmp_path / "run", resolved())
  workdirs.claim(workdir, resolved())
  with pytest.raises(ConfigError) as error:
    workdirs.claim(workdir, resolved(train={"global_batch_size": 16, "steps": 5}))
  assert "config.train.samples=64, and this config has 80" in str(error.value) and "--force_new" in str(error.value)
  assert (workdir / "metrics.jsonl").read_text() == "lines\n"


@pytest.mark.parametrize("key", workdirs.FREE_TO_CHANGE)
def test_what_changes_no_number_may_change(tmp_path, key):
  section, _, name = key.partition(".")
  new = {"mesh": {"fsdp": 2}, "eval": {"every": 3}, "checkpoint": {"every": 9}, "tracking": {"wandb": "offline"}}.get(key) or {name: OTHER[name]}
  workdir = hold(tmp_path / "run", resolved())
  workdirs.check_same_run(workdir, resolved(**{section: new}))


OTHER = dict(log_every=3, step_timeout=9.0, host_timeout=20, join_timeout=30, max_bad_steps=3, on_spike="rollback", spike_factor=3.0, spike_window=9)
OTHER |= dict(threads=3, prefetch=2, block_cache=1.0, read_deadline=5.0, source="tar", attention="xla", remat="full", scan=True)
OTHER |= dict(microbatches=2, method="gather", chunk=8)


def test_force_new_moves_what_there_is_aside_and_removes_nothing(tmp_path, capsys):
  workdir, other = hold(tmp_path / "run", resolved()), resolved(train={"global_batch_size": 16, "steps": 5})
  workdirs.claim(workdir, other, force_new=True)
  assert [path.name for path in workdir.iterdir()] == ["before"]
  assert f"is in {workdir}/before/1 now" in capsys.readouterr().err
  (workdir / "metrics.jsonl").write_text("others\n")
  workdirs.claim(workdir, other, force_new=True)
  assert [(workdir / f"before/{i}/metrics.jsonl").read_text() for i in (1, 2)] == ["lines\n", "others\n"]
  workdirs.claim(workdir, other, force_new=True)  # nothing is there any more
  assert sorted(path.name for path in (workdir / "before").iterdir()) == ["1", "2"]


def test_a_work_directory_that_cannot_be_or_cannot_be_read_is_said(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UsageError, match="cannot be made"):
    workdirs.claim(tmp_path / "file/run", resolved())
  (tmp_path / "run/checkpoints").mkdir(parents=True)
  with pytest.raises(UsageError, match="config.json cannot be read"):
    workdirs.claim(tmp_path / "run", resolved())


def test_differences_are_by_dotted_key():
  old, new = {"a": {"b": 1, "c": {}}, "d": 2}, {"a": {"b": 1, "c": {"e": 3}}, "d": 4}
  assert list(workdirs.differences(old, new)) == [("d", 2, 4), ("a.c.e", None, 3)]


def test_the_facts_of_a_run_are_each_key_its_code_and_the_versions():
  facts = workdirs.facts(resolved())
  assert facts["config.train.steps"] == 4 and facts["config.eval.every"] == 0
  assert len(facts["the code of clip_jax"]) == 16 and facts["the version of jax"]
  assert facts == workdirs.facts(resolved())
