"""Recipes on a command line: which arguments are theirs, what they change, and what is said where they cannot be loaded."""

import sys
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.config import recipes
from clip_jax.errors import UsageError

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = """
from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.model = ConfigDict({"name": "ViT-B-32"})
  config.train = ConfigDict({"global_batch_size": 16, "steps": 4, "scan": False, "remat": "none"})
  config.optimizer = ConfigDict({"learning_rate": 1e-3})
  config.data = ConfigDict({"path": "", "crop_scale": (0.9, 1.0)})
  return config
"""
MINE = """
from {folder} import base


def get_config(stage="first"):
  config = base.get_config()
  config.train.steps = {{"first": 4, "second": 8}}[stage]
  return config
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with recipes outside of the repository; its name is nobody else's, because modules are kept by name."""
  monkeypatch.setattr(sys, "path", list(sys.path))
  found = tmp_path / f"recipes_{tmp_path.name}"
  found.mkdir()
  (found / "base.py").write_text(BASE)
  (found / "mine.py").write_text(MINE.format(folder=found.name))
  return found


@pytest.fixture
def mine(folder):
  return f"--config={folder}/mine.py"


@pytest.mark.parametrize(
  "arguments, own",
  [
    (["--config=a.py", "--workdir=x"], ["--config=a.py"]),
    (["--config", "a.py", "--workdir", "x"], ["--config", "a.py"]),
    (["-config=a.py", "-config", "b.py", "x"], ["-config=a.py", "-config", "b.py"]),
    (["--workdir", "x", "--config.train.steps=3", "--config.data.path", "a b"], ["--config.train.steps=3", "--config.data.path", "a b"]),
    (["--config.train.scan", "--workdir=x"], ["--config.train.scan"]),
    (["--config.train.scan", "--config.train.steps=3"], ["--config.train.scan", "--config.train.steps=3"]),
    (["--noconfig.train.scan", "--workdir=x"], ["--noconfig.train.scan"]),
    (["--config.data.path=a=b", "--config.data.path="], ["--config.data.path=a=b", "--config.data.path="]),
    (["--configuration=a.py", "config=b.py", "--no-config", "--workdir=--config"], []),
    ([], []),
  ],
)
def test_flags_of_the_config_are_told_from_others_with_their_values(arguments, own):
  found, others = recipes.split(arguments)
  assert found == own
  assert others == [argument for argument in arguments if argument not in own]


def test_a_recipe_is_loaded_in_either_form(folder, mine):
  for arguments in ([mine], ["--config", f"{folder}/mine.py"], [mine.removeprefix("-")]):
    found = recipes.load(arguments)
    assert (found.model.name, found.train.steps, found.train.scan) == ("ViT-B-32", 4, False)
    assert recipes.name(arguments) == f"{folder}/mine.py"


@pytest.mark.parametrize(
  "flags, key, value",
  [
    (["--config.train.steps=9"], "train.steps", 9),
    (["--config.train.steps", "9"], "train.steps", 9),
    (["--config.train.steps=7", "--config.train.steps=9"], "train.steps", 9),
    (["--config.train.scan"], "train.scan", True),
    (["--config.train.scan=true"], "train.scan", True),
    (["--config.train.scan", "--noconfig.train.scan"], "train.scan", False),
    (["--config.train.remat=full"], "train.remat", "full"),
    (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["--config.data.crop_scale=(0.5, 1.0)"], "data.crop_scale", (0.5, 1.0)),
    (["--config.data.path=gs://a/b=c:d e"], "data.path", "gs://a/b=c:d e"),
    (["--config.data.path="], "data.path", ""),
  ],
  ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_changes_its_key_and_no_other(mine, flags, key, value):
  found, before = recipes.load([mine, *flags]).to_dict(), recipes.load([mine]).to_dict()
  group, name = key.split(".")
  assert found[group][name] == value and type(found[group][name]) is type(value)
  before[group][name] = value
  assert found == before


def test_a_recipe_may_take_an_argument(folder, mine):
  assert recipes.load([f"{mine}:second"]).train.steps == 8
  assert recipes.name([f"{mine}:second"]) == f"{folder}/mine.py:second"
  pretraining, tuning = (configs.resolve(recipes.load([f"--config={CONFIGS}/flip_vitl16.py{stage}"])) for stage in ("", ":tune"))
  assert pretraining.model.vision.patch_drop == 0.5 and tuning.model.vision.patch_drop == 0.0
  assert tuning.train.samples < pretraining.train.samples


def test_recipes_of_two_folders_import_each_its_own_base(folder, mine, tmp_path):
  other = tmp_path / f"others_{tmp_path.name}"
  other.mkdir()
  (other / "base.py").write_text(BASE.replace("ViT-B-32", "ViT-L-14"))
  (other / "mine.py").write_text(MINE.format(folder=other.name))
  assert recipes.load([mine]).model.name == "ViT-B-32"
  assert recipes.load([f"--config={other}/mine.py"]).model.name == "ViT-L-14"


def test_a_recipe_is_found_from_the_folder_that_one_is_in(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert recipes.load(["--config=mine.py"]).model.name == "ViT-B-32"
  monkeypatch.chdir(folder.parent)
  assert recipes.load([f"--config={folder.name}/mine.py"]).model.name == "ViT-B-32"


def test_a_path_may_have_an_equals_sign_in_it(folder, tmp_path):
  there = tmp_path / "lr=0.1"
  folder.rename(there)
  (there / "mine.py").write_text(BASE)
  assert recipes.load([f"--config={there}/mine.py", "--config.train.steps=5"]).train.steps == 5
  assert recipes.name([f"--config={there}/mine.py"]) == f"{there}/mine.py"


def test_no_recipe_is_none():
  assert recipes.load([]) is None and recipes.name([]) == ""


def test_every_recipe_of_the_repository_can_be_loaded_and_resolved():
  found = [path for path in CONFIGS.glob("*.py") if path.stem not in ("__init__", "base")]
  assert len(found) > 10
  for path in found:
    assert configs.resolve(recipes.load([f"--config={path}", "--config.train.steps=3"])).train.steps == 3, path


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.train.stps=1", "config.train.stps is not a key of train. Did you mean steps?"),
    ("--config.trian.steps=1", "Did you mean train?"),
    ("--noconfig.train.scna", "Did you mean scan?"),
    ("--config.train.steps=many", "--config.train.steps=many"),
    ("--config.train.steps=1.5", "--config.train.steps=1.5"),
    ("--config.train.steps", "--config.train.steps"),
    ("--config.train.scan=maybe", "--config.train.scan=maybe"),
    ("--config.train=3", "--config.train=3"),
    ("--config.train.microbatches=2", "the recipe must have the key, as those that start from configs/base.py do"),
  ],
)
def test_a_change_that_cannot_be_made_is_one_message_that_names_it(mine, flag, message):
  with pytest.raises(UsageError) as error:
    recipes.load([mine, flag])
  assert message in str(error.value)
  assert "Traceback" not in str(error.value) and "\n" not in str(error.value)


def assert_cannot_be_loaded(recipe, reason):
  with pytest.raises(UsageError) as error:
    recipes.load([f"--config={recipe}"])
  message = str(error.value)
  assert f"--config={recipe} cannot be loaded" in message and reason in message
  assert "Traceback" not in message and "\n" not in message


WRONG = {
  "syntax": ("def get_config(:", "SyntaxError"),
  "an import": ("import nowhere_at_all", "nowhere_at_all"),
  "a value": ("def get_config():\n  raise ValueError('the moon is full')", "the moon is full"),
  "a key": ("def get_config():\n  return {}['moon']", "moon"),
  "anything": ("def get_config():\n  raise RuntimeError('the moon is full')", "the moon is full"),
  "at the top": ("1 / 0", "ZeroDivisionError"),
  "no function": ("x = 1", "get_config"),
  "no answer": ("def get_config():\n  pass", "get_config() returns no ConfigDict"),
  "a dict": ("def get_config():\n  return {'train': {}}", "get_config() returns no ConfigDict"),
  "a file": ("def get_config():\n  return open('/nowhere/at/all')", "/nowhere/at/all"),
}


@pytest.mark.parametrize("content, reason", WRONG.values(), ids=WRONG)
def test_a_recipe_that_does_not_work_is_one_message_with_the_reason(folder, mine, content, reason):
  recipes.load([mine])  # one that does was there before
  path = folder / "wrong.py"
  path.write_text(content)
  assert_cannot_be_loaded(path, reason)


@pytest.mark.parametrize(
  "named, reason",
  [
    ("nowhere.py", "No such file"),
    (".", "directory"),
    ("", "empty"),
    ("mine.py:third", "KeyError 'third'"),
    ("base.py:argument", "1 was given"),
  ],
)
def test_a_recipe_that_is_not_there_is_one_message_with_its_name(folder, monkeypatch, named, reason):
  monkeypatch.chdir(folder)
  assert_cannot_be_loaded(named, reason)
