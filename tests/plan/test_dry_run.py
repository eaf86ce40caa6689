"""What a dry run finds, says and leaves alone."""

import json
import os
import shutil
from pathlib import Path

import pytest

from clip_jax import train
from clip_jax.errors import ConfigError, DataError, UsageError
from clip_jax.plan import dry_run
from tests.conftest import COLORS, tiny


def config_of(colors, **sections):
  sets = {"retrieval": {"held_out": {"path": colors, "source": "tar"}}, "zero_shot": {"names": {"path": colors, "source": "tar", "classes": tuple(COLORS)}}}
  return tiny(**{"data": {"source": "tar", "path": colors}, "eval": {"batch_size": 16, **sets}, **sections})


@pytest.fixture(scope="module")
def trained(colors, tmp_path_factory):
  """The work directory of a run."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  train.run(config_of(colors), workdir)
  return workdir


def files(folder):
  return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_it_does_all_but_train_and_leaves_no_trace(colors, tmp_path):
  said = {}
  found = dry_run.run(config_of(colors), tmp_path / "runs/new", "recipe", tell=lambda what, text: said.setdefault(what, text))
  assert list(said) == ["config", "workdir", "data", "examples", "evaluation", "mesh", "loss"]
  assert "64 records, each seen 1.00 times" in said["data"] and said["examples"].startswith("16 were read, decoded and tokenized")
  assert "8 devices as data 8, fsdp 1, tensor 1" in said["mesh"] and "can be written" in said["workdir"]
  assert found["config"] == "recipe" and found["topology"] == "here" and found["fits"] and found["flops"] > 0
  assert list(tmp_path.iterdir()) == []


def test_a_run_it_could_go_on_with_is_looked_at_and_not_touched(colors, trained, tmp_path):
  shutil.copytree(trained, tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints/4")
  (tmp_path / "run/checkpoints/4.orbax-checkpoint-tmp").mkdir()  # the run may be alive, and saving
  before, said = files(tmp_path), {}
  dry_run.run(config_of(colors), tmp_path / "run", tell=lambda what, text: said.setdefault(what, text))
  assert "holds this run, 2 of 4 steps" in said["workdir"]
  assert files(tmp_path) == before
  with pytest.raises(ConfigError, match="holds a run with config.optimizer.learning_rate"):
    dry_run.run(config_of(colors, optimizer={"learning_rate": 0.5}), tmp_path / "run")
  assert files(tmp_path) == before


@pytest.mark.parametrize(
  "sections, error, said",
  [
    ({"data": {"source": "tar", "path": "nowhere/*.tar"}}, DataError, "nowhere"),
    ({"train": {"steps": 4, "global_batch_size": 15}}, ConfigError, "cannot be split over 8 devices"),
    ({"model": {**tiny()["model"], "tokenizer": "missing.json"}}, UsageError, "missing.json"),
    ({"eval": {"batch_size": 16, "retrieval": {"gone": {"path": "gone.tar", "source": "tar"}}}}, DataError, "gone.tar"),
    ({"train": {"steps": 4, "global_batch_size": 16, "init_from": "nothing"}}, UsageError, "nothing"),
    ({"optimizer": {"freeze": "^nothing/"}}, ConfigError, "matches no parameter"),
  ],
  ids=["data", "batch", "tokenizer", "evaluation", "weights", "pattern"],
)
def test_what_a_run_would_stop_at_is_what_it_says(colors, tmp_path, sections, error, said):
  with pytest.raises(error, match=said):
    dry_run.run(config_of(colors, **sections), tmp_path / "run")
  assert list(tmp_path.iterdir()) == []


def test_weights_of_another_model_are_refused_before_anything_is_made(colors, trained, tmp_path):
  model = {**tiny()["model"], "vision": {"patch_size": 8, "width": 64, "layers": 2, "heads": 4}}
  config = config_of(colors, model=model, train={"steps": 1, "init_from": str(trained)})
  with pytest.raises(UsageError, match="they are different models"):
    dry_run.run(config, tmp_path / "second")
  said = {}
  config = config_of(colors, train={"steps": 1, "init_from": str(trained)})
  dry_run.run(config, tmp_path / "second", tell=lambda what, text: said.setdefault(what, text))
  assert said["init_from"].startswith(f"{trained}: clip_jax, ")
  assert not (tmp_path / "second").exists()


def test_records_that_cannot_be_read_are_counted(tmp_path, colors):
  damaged = bytearray(Path(colors).read_bytes())
  for start in range(512, len(damaged), 512):
    if damaged[start : start + 4] == b"\x89PNG" and start % 1024 == 0:
      damaged[start : start + 8] = b"no image"
  (tmp_path / "damaged.tar").write_bytes(damaged)
  said = {}
  config = config_of(colors, data={"source": "tar", "path": str(tmp_path / "damaged.tar"), "max_bad_share": 1.0})
  dry_run.run(config, tmp_path / "run", tell=lambda what, text: said.setdefault(what, text))
  assert "in place of records that cannot be read" in said["examples"]
  assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_said(colors, tmp_path):
  if os.geteuid() == 0:
    # Root may write anywhere; a file in the place of a folder stops it, too.
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="cannot be written"):
      dry_run.run(config_of(colors), tmp_path / "file/run")
    return
  (tmp_path / "closed").mkdir(mode=0o500)
  with pytest.raises(UsageError, match="cannot be written"):
    dry_run.run(config_of(colors), tmp_path / "closed/run")
