"""A compiled step as a file: it computes what the step computes, and is used only where it is the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax import train
from clip_jax.errors import UsageError
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.plan import compile as compiler
from clip_jax.train import program
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny


def made(path, **sections):
  """Writes the step of a tiny model over all devices; returns its config and mesh."""
  config = configs.resolve(tiny(**sections))
  mesh = meshes.create(config)
  program.save(path, _compiled(config, mesh), config, mesh)
  return config, mesh


def _compiled(config, mesh):
  return compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], steps.inputs(config, mesh), fresh=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("program") / "step"
  return path, *made(path)


def batch_of(config, mesh):
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
  tokens = random.integers(1, 100, (16, 12), dtype=np.int32)
  return rules.to_global({"images": images, "tokens": tokens}, mesh, 16)


SIGMOID = {"model": {**tiny()["model"], "logit_bias_init": -10.0}, "loss": {"name": "sigmoid"}}


@pytest.mark.parametrize("sections", [None, {"mesh": {"data": 2, "fsdp": 4}, **SIGMOID}], ids=["data", "fsdp, sigmoid"])
def test_a_loaded_step_computes_to_the_bit_what_the_step_computes(saved, sections, tmp_path):
  path, config, mesh = saved if sections is None else (tmp_path / "step", *made(tmp_path / "step", **sections))
  results = []
  for step in (steps.create(config, mesh), program.load(path, config, mesh)):
    state = states.create(config, mesh)
    for _ in range(3):
      state, metrics = step(state, batch_of(config, mesh))
    results.append(jax.tree.map(np.asarray, (state, metrics)))
  assert results[0][1].keys() == results[1][1].keys()
  for one, other in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
  "changed, said",
  [
    ({"train": {"remat": "full"}}, "it was made for config.train.remat='none', and this run has 'full'"),
    ({"train": {"steps": 5}}, "it was made for config.train.samples=64, and this run has 80"),
    ({"optimizer": {"weight_decay": 0.1}}, "it was made for config.optimizer.weight_decay=0.2, and this run has 0.1"),
    ({"mesh": {"data": 4, "fsdp": 2}}, "it was made with data 8, and here is 4"),
  ],
)
def test_a_step_of_another_run_is_not_used_and_the_difference_is_said(saved, changed, said, capsys):
  path, _, _ = saved
  config = configs.resolve(tiny(**changed))
  assert program.load(path, config, meshes.create(config)) is None
  assert f"is not used, and the step is compiled: {said}." in capsys.readouterr().err


def test_what_a_step_does_not_depend_on_may_differ(saved):
  path, _, mesh = saved
  config = configs.resolve(tiny(train={"log_every": 3, "init_from": "elsewhere"}, data={"threads": 2}, checkpoint={"every": 7}))
  assert program.load(path, config, mesh) is not None


@pytest.mark.parametrize(
  "key, value, said",
  [
    ("versions", {"jax": "0.1"}, "it was made with jax 0.1, and here is"),
    ("code", "other", "it was made from other code of clip_jax"),
    ("kind", "TPU v9", "it was made for TPU v9, and here is cpu"),
    ("devices", [[0]], "its devices have other places in the slice"),
  ],
)
def test_a_step_of_other_versions_code_or_devices_is_not_used(saved, tmp_path, key, value, said, capsys):
  path, config, mesh = saved
  magic, header, payload = path.read_bytes().split(b"\n", 2)
  (tmp_path / "other").write_bytes(magic + b"\n" + json.dumps({**json.loads(header), key: value}).encode() + b"\n" + payload)
  assert program.load(tmp_path / "other", config, mesh) is None
  assert said in capsys.readouterr().err


def test_a_file_that_is_missing_damaged_or_something_else_is_one_sentence(saved, tmp_path):
  path, config, mesh = saved
  content = path.read_bytes()
  for name, bad, said in (
    ("cut", content[:-100], "is damaged or cut off"),
    ("flipped", content[:-1] + bytes([content[-1] ^ 1]), "is damaged or cut off"),
    ("header", content[:30], "is damaged or cut off"),
    ("other", b"PK\x03\x04", "is not a program"),
    ("empty", b"", "is not a program"),
  ):
    (tmp_path / name).write_bytes(bad)
    with pytest.raises(UsageError, match=said):
      program.load(tmp_path / name, config, mesh)
  with pytest.raises(UsageError, match="cannot be read: No such file"):
    program.load(tmp_path / "missing", config, mesh)
  with pytest.raises(UsageError, match="cannot be written"):
    program.save(tmp_path / "no/folder", program.load(path, config, mesh), config, mesh)


def test_a_run_uses_it_and_ends_with_the_same_losses(saved, colors, tmp_path, monkeypatch, capsys):
  path, _, _ = saved
  sections = {"data": {"source": "tar", "path": colors}}
  train.run(tiny(**sections), tmp_path / "plain")
  with monkeypatch.context() as patch:
    patch.setattr(steps, "create", lambda *_: pytest.fail("the step was traced"))
    train.run(tiny(**sections), tmp_path / "loaded", compiled=path)
  lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("plain", "loaded")]
  losses = [[json.loads(line)["loss"] for line in one if '"loss"' in line] for one in lines]
  assert losses[0] == losses[1] and len(losses[0]) == 4
  other = tiny(**sections, train={"steps": 3})
  assert train.run(other, tmp_path / "other", compiled=path).complete
  assert "is not used, and the step is compiled" in capsys.readouterr().err


def test_a_program_for_a_tpu_keeps_the_places_of_its_chips(tmp_path):
  """It cannot run here; its header is what a pod would compare."""
  config = dataclasses.replace(configs.resolve(tiny(eval={"batch_size": 16})), mesh=configs.Mesh())
  mesh = meshes.create(config, compiler.devices("v5e:2x2"))
  program.save(tmp_path / "step", _compiled(config, mesh), config, mesh)
  header = json.loads((tmp_path / "step").read_bytes().split(b"\n", 2)[1])
  assert header["kind"] == "TPU v5 lite" and header["versions"]["libtpu"]
  assert sorted(tuple(place[1:3]) for place in header["devices"]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
