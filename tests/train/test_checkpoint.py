"""Checkpoints: exact, atomic, readable on other meshes, and complete about the model."""

import hashlib
import json
import os
import resource
import shutil
import tarfile
from pathlib import Path

import flax
import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.convert import native, sources
from clip_jax.errors import StorageError, TrainingError, UsageError
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.train import checkpoint
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.convert.models import small_tokenizer
from tests.models.test_clip import inputs

SIGLIP_TEXT = dict(kind="siglip", context_length=9, width=16, layers=1, heads=2)


def made(shape, **sections):
  mesh_sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
  config = configs.resolve(tiny(mesh=mesh_sizes, **sections))
  return config, meshes.create(config, jax.devices()[: int(np.prod(shape))])


def named(state):
  """The arrays of a state by their names in a card."""
  fields = {field: getattr(state, field) for field in state.__dataclass_fields__ if getattr(state, field) is not None}
  return {jax.tree_util.keystr(path, simple=True, separator="/"): array for path, array in jax.tree_util.tree_leaves_with_path(fields)}


def assert_same(got, want):
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A work directory with one checkpoint, made on a 2 x 2 x 2 mesh, and its state."""
  workdir = tmp_path_factory.mktemp("saved")
  config, mesh = made((2, 2, 2))
  state = states.create(config, mesh)
  checkpoints = checkpoint.Checkpoints(workdir, config)
  checkpoints.save(3, state, records=77)
  checkpoints.close()
  return workdir, config, jax.device_get(state)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 1), (8, 1, 1), (1, 4, 1)], ids=str)
def test_restores_bit_for_bit_on_any_mesh(saved, shape):
  workdir, _, want = saved
  config, mesh = made(shape)
  checkpoints = checkpoint.Checkpoints(workdir, config)
  assert checkpoints.latest_step() == 3 and checkpoints.card()["records"] == 77
  described = states.describe(config, mesh)[0]
  got, card = checkpoints.restore(described)
  checkpoints.close()
  assert card["step"] == 3 and card["records"] == 77
  assert_same(got, want)
  for array, shape_ in zip(jax.tree.leaves(got), jax.tree.leaves(described), strict=True):
    assert array.sharding == shape_.sharding


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_run_with_a_moving_average_goes_on_bit_for_bit(tmp_path, name):
  optimizer = {**tiny()["optimizer"], "name": name, "mu_dtype": "bfloat16", "ema_decay": 0.9}
  config, mesh = made((1, 2, 1), optimizer=optimizer)
  step = steps.create(config, mesh)

  def train(state, seed):
    images, tokens = inputs(config.model, rows=16, seed=seed)
    return step(state, rules.to_global({"images": images, "tokens": tokens}, mesh, 16))[0]

  state = train(train(states.create(config, mesh), 0), 1)
  before = jax.device_get(state)
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  checkpoints.save(2, state, records=77)
  checkpoints.wait()
  restored, _ = checkpoints.restore(states.describe(config, mesh)[0])
  checkpoints.close()
  assert_same(restored, before)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  later = train(restored, 2)
  assert_same(later, train(state, 2))

  # The weights themselves can be had, too, and the mean of checkpoints of either.
  assert_same(sources.find(tmp_path, ema=False).params(), before.params)
  assert_same(sources.find(tmp_path, ema=True).params(), before.ema)
  again = checkpoint.Checkpoints(tmp_path, config)
  again.save(3, later, records=77)
  again.wait()
  again.close()
  for ema, kept in ((None, "ema"), (False, "params")):
    source = sources.find(tmp_path, ema=ema, average=2)
    assert "mean of the 2 checkpoints 2 to 3" in source.where
    halves = [np.float64(getattr(one, kept)["image"]["projection"]) for one in (before, later)]
    np.testing.assert_array_equal(source.params()["image"]["projection"], np.float32(np.add(*halves) / 2))
  shutil.rmtree(tmp_path / "checkpoints/3")

  # What the model is used with, and what another run starts from, is the average.
  source, fresh = sources.find(tmp_path), states.create(config, mesh)
  started = states.start_from(fresh, config, source)
  for weights in (source.params(), started.params, started.ema):
    assert_same(weights, before.ema)
  assert np.any(before.ema["image"]["projection"] != before.params["image"]["projection"])


@pytest.fixture(scope="module", params=[1, 2])
def kept(request, tmp_path_factory):
  """A work directory that a version wrote when its format was the newest, and the SHA-256 of each array that was saved."""
  workdir = tmp_path_factory.mktemp("kept")
  with tarfile.open(Path(__file__).parent / f"checkpoints/format_{request.param}.tar.gz") as tar:
    tar.extractall(workdir, filter="data")
  return request.param, workdir, json.loads((workdir / "sha256.json").read_text())


def test_checkpoints_of_each_format_are_read_bit_for_bit(kept):
  number, workdir, want = kept
  source = sources.find(workdir)
  config, mesh = made((1, 4, 1), model=configs.to_dict(source.model), optimizer={**tiny()["optimizer"], "ema_decay": 0.9})
  checkpoints = checkpoint.Checkpoints(workdir, config)
  state, card = checkpoints.restore(states.describe(config, mesh)[0])
  checkpoints.close()
  assert card["format"] == number and card["step"] == 1 and card["records"] == 64
  got = {name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest() for name, array in named(state).items()}
  for new in ("skipped", "skipped_in_a_row"):
    assert not np.asarray(getattr(state, new)) and got.pop(new)
  assert got == want
  exported = flax.traverse_util.flatten_dict(source.params(), sep="/")  # the moving average
  for name, array in exported.items():
    assert hashlib.sha256(np.asarray(array).tobytes()).hexdigest() == want[f"ema/{name}"], name


def test_the_card_names_the_model_completely(saved):
  workdir, config, want = saved
  source = sources.find(workdir)
  assert source.model == config.model and source.tokenizer is None
  assert_same(source.params(), want.params)  # whole, though it was saved in shards


def test_a_tokenizer_that_is_a_file_is_in_the_checkpoint(tmp_path):
  tokenizer = small_tokenizer(tmp_path)
  model = {**tiny()["model"], "tokenizer": str(tmp_path / "tokenizer.json"), "text": {**SIGLIP_TEXT, "vocab_size": 300}}
  config, mesh = made((1, 1, 1), model=model)
  checkpoints = checkpoint.Checkpoints(tmp_path / "run", config, tokenizer)
  checkpoints.save(1, states.create(config, mesh), records=1)
  checkpoints.close()
  (tmp_path / "tokenizer.json").unlink()
  source = sources.find(tmp_path / "run")
  assert source.tokenizer == tokenizer
  np.testing.assert_array_equal(source.tokenizer(["a cat"]), tokenizer(["a cat"]))


def test_keeps_the_last_and_every_multiple(tmp_path):
  config, mesh = made((1, 1, 1), checkpoint={"keep_last": 2, "keep_every": 4})
  state = states.create(config, mesh)
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  for step in range(1, 8):
    checkpoints.save(step, state, records=1)
  checkpoints.close()
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


def largest(folder):
  return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_a_bit(folder, other):
  content = bytearray(largest(folder).read_bytes())
  content[len(content) // 2] ^= 1
  largest(folder).write_bytes(content)


def truncate(folder, other):
  os.truncate(largest(folder), 100)


def remove_a_file(folder, other):
  largest(folder).unlink()


def remove_the_card(folder, other):
  shutil.rmtree(folder / "card")


def empty(folder, other):
  shutil.rmtree(folder)
  folder.mkdir()


def take_anothers_arrays(folder, other):
  """All of it can be read, and none of it is what the card says."""
  shutil.rmtree(folder / "state")
  shutil.copytree(other / "state", folder / "state")


WRONG = [flip_a_bit, truncate, remove_a_file, remove_the_card, empty, take_anothers_arrays]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A work directory with the checkpoints 3 and 5, which differ, and their states."""
  workdir = tmp_path_factory.mktemp("two")
  config, mesh = made((1, 2, 1))
  first = states.create(config, mesh)
  second = first.replace(params=jax.tree.map(lambda x: x + 1, first.params))
  checkpoints = checkpoint.Checkpoints(workdir, config)
  for step, state in ((3, first), (5, second)):
    checkpoints.save(step, state, records=77)
  checkpoints.close()
  return workdir, config, mesh, jax.device_get(first)


@pytest.mark.parametrize("harm", WRONG, ids=lambda harm: harm.__name__)
def test_a_newest_checkpoint_that_is_not_what_was_saved_is_told_of_and_the_one_before_is_used(two, tmp_path, capsys, harm):
  original, config, mesh, want = two
  shutil.copytree(original, tmp_path, dirs_exist_ok=True)
  newest = tmp_path / "checkpoints/5"
  harm(newest, tmp_path / "checkpoints/3")
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  state, card = checkpoints.restore(states.describe(config, mesh)[0])
  assert_same(state, want)
  assert card["step"] == 3 and checkpoints.steps() == [3] and (tmp_path / "checkpoints/5.broken").is_dir()
  said = capsys.readouterr().err
  assert f"{newest} CANNOT BE USED: " in said and "It is now called 5.broken; the run goes on from step 3." in said
  assert sources.find(tmp_path) is not None  # exports take the same one
  checkpoints.save(5, state, records=77)
  checkpoints.close()
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "5", "5.broken"]


def test_if_none_can_be_used_all_are_named_and_none_is_moved(two, tmp_path):
  original, config, mesh, _ = two
  shutil.copytree(original, tmp_path, dirs_exist_ok=True)
  empty(tmp_path / "checkpoints/3", None)
  flip_a_bit(tmp_path / "checkpoints/5", None)
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  with pytest.raises(UsageError, match=r"no checkpoint that can be used \(5: .*; 3: .*--force_new"):
    checkpoints.restore(states.describe(config, mesh)[0])
  assert checkpoints.steps() == [3, 5]
  checkpoints.close()


def test_a_damaged_checkpoint_is_not_exported(two, tmp_path):
  original, *_ = two
  shutil.copytree(original, tmp_path, dirs_exist_ok=True)
  take_anothers_arrays(tmp_path / "checkpoints/5", tmp_path / "checkpoints/3")
  with pytest.raises(UsageError, match="is not what was written: the checkpoint is damaged"):
    sources.find(tmp_path).params()


# Orbax leaves what it had begun to whoever collects garbage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_the_last_good_one_stays_until_a_newer_is_whole(two, tmp_path):
  """A save that cannot be written says so, leaves nothing, and removes nothing, however few are kept."""
  original, _, mesh, want = two
  shutil.copytree(original, tmp_path, dirs_exist_ok=True)
  config = made((1, 2, 1), checkpoint={"keep_last": 1})[0]
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  state, _ = checkpoints.restore(states.describe(config, mesh)[0])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    for step in (7, 8):
      with pytest.raises(StorageError, match=f"checkpoints/{step} could not be written .File too large"):
        checkpoints.save(step, state, records=77)
        checkpoints.wait()
      assert not checkpoints.has(step)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoints.steps() == [3, 5] and checkpoints.failures == 2
  checkpoints.save(9, state, records=77)
  assert checkpoints.has(9)
  checkpoints.wait()
  checkpoints.close()
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["9"]


def test_copies_that_differ_are_not_saved(two, tmp_path):
  """One device's memory has another bit than the others'."""
  config, mesh = made((2, 1, 1))
  state = states.create(config, mesh)
  scale = state.params["logit_scale"]
  parts = [jax.device_put(np.float32(value), shard.device) for value, shard in zip((1.0, 1.0000001), scale.addressable_shards, strict=True)]
  bad = state.replace(params={**state.params, "logit_scale": jax.make_array_from_single_device_arrays((), scale.sharding, parts)})
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  with pytest.raises(TrainingError, match="copies of params/logit_scale differ between devices"):
    checkpoints.save(1, bad, records=1)
  checkpoints.close()
  assert checkpoints.latest_step() is None


def test_a_save_that_was_killed_is_no_checkpoint_and_is_cleared_away(saved, tmp_path):
  config, mesh = made((1, 1, 1))
  half = tmp_path / "checkpoints/9.orbax-checkpoint-tmp"
  half.mkdir(parents=True)
  (half / "part").write_text("half")
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  assert checkpoints.latest_step() is None and half.exists()  # only a run that begins may: another may be alive, and saving
  checkpoints.clear_leftovers()
  checkpoints.close()
  assert not half.exists()


@pytest.mark.parametrize("card", [None, "{", '{"format": 99}'])
def test_a_card_that_cannot_be_read_is_one_sentence(tmp_path, card):
  if card is not None:
    (tmp_path / "card").mkdir()
    (tmp_path / "card/metadata").write_text(card)
  with pytest.raises(UsageError) as error:
    native.read_card(tmp_path)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_card_is_plain_json(saved):
  card = json.loads((saved[0] / "checkpoints/3/card/metadata").read_text())
  assert card["step"] == 3 and card["records"] == 77 and card["format"] == native.FORMAT
