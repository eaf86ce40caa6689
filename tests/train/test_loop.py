"""What the loop writes about a run."""

import gzip
import json
import shutil

import jax
import pytest

import clip_jax
from clip_jax import config as configs
from clip_jax import train
from clip_jax.errors import UsageError
from clip_jax.report import page
from clip_jax.train import hooks, performance
from tests.conftest import tiny
from tests.test_security import write_tar


def test_what_signs_a_request_stands_in_no_file_and_on_no_screen(tmp_path, monkeypatch, capfd):
  """A local file with a name like a signed URL, and bad records, whose names are made of it: the run can be resumed all the same."""
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  write_tar(tmp_path / "a.tar?token=s3cret", [f"{number:03}" for number in range(20)], bad=["003", "004"])
  data = {"source": "tar", "path": f"{tmp_path}/a.tar?token=s3cret", "max_bad_share": 1.0}
  config = tiny(data=data, train={"steps": 2})
  train.run(config, tmp_path / "run")
  page.write(tmp_path / "run")
  assert train.run(config, tmp_path / "run").started == 2
  written = (tmp_path / "run/config.json").read_text()
  assert json.loads(written)["data"]["path"] == f"{tmp_path}/a.tar?token=***"
  assert (tmp_path / "run/bad_records.jsonl").read_text().count("a.tar?token=***") >= 2
  for path in (tmp_path / "run").rglob("*"):
    assert path.is_dir() or b"s3cret" not in path.read_bytes(), path
  shown = capfd.readouterr()
  assert "s3cret" not in shown.out + shown.err


def test_what_auto_stood_for_is_written_down_and_kept(colors, tmp_path):
  model = {**tiny()["model"], "compute_dtype": "auto", "residual_dtype": "float32"}
  config = tiny(data={"source": "tar", "path": colors}, model=model, train={"steps": 2})
  train.run(config, tmp_path)
  taken = json.loads((tmp_path / "config.json").read_text())["model"]["compute_dtype"]
  assert taken == performance.settled(configs.resolve(config), jax.devices()[0]).model.compute_dtype != "auto"
  assert clip_jax.load(tmp_path).config.compute_dtype == taken
  other = {"float32": "bfloat16", "bfloat16": "float32"}[taken]
  with pytest.raises(UsageError, match=f"holds a run with config.model.compute_dtype='{taken}', and this config has '{other}'"):
    train.run({**config, "model": {**model, "compute_dtype": other}}, tmp_path)


def test_how_a_step_is_computed_may_change_between_starts(colors, tmp_path):
  """Each part of a run on another mesh, with another sharding, in a loop or not, and what is computed again."""

  def run(folder, mesh=None, **change):
    config = tiny(data={"source": "tar", "path": colors}, mesh=mesh or {}, train={"steps": 6, **change}, checkpoint={"every": 2})
    return train.run(config, tmp_path / folder)

  run("plain")
  for done, change in enumerate(({}, {"mesh": {"fsdp": 8, "data": 1}, "scan": True}, {"mesh": {"sharding": "zero1"}, "remat": "full"})):
    assert run("changing", **change).started == 2 * done
    for step in range(2 * done + 4, 8, 2):  # as if it had been killed after the next checkpoint
      shutil.rmtree(tmp_path / f"changing/checkpoints/{step}")
  losses = []
  for folder in ("plain", "changing"):
    lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    losses.append([line["loss"] for line in lines if "loss" in line])
  assert len(losses[0]) == 6 and losses[0] != losses[1]
  assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_an_evaluation_that_was_cut_off_is_made_after_the_next_start(colors, tmp_path):
  """A step is saved before it is evaluated: as if the process had been killed in between."""
  evaluation = {"batch_size": 16, "every": 2, "retrieval": {"colors": {"path": colors, "source": "tar"}}}
  config = tiny(data={"source": "tar", "path": colors}, train={"steps": 4}, eval=evaluation, checkpoint={"every": 2})
  train.run(config, tmp_path)
  path = tmp_path / "metrics.jsonl"
  whole = [json.loads(line) for line in path.read_text().splitlines()]
  scores = {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in whole if "eval/colors/image_to_text_R@1" in line}
  assert sorted(scores) == [2, 4]
  for last in (2, 4):
    kept = [line for line in whole if line["step"] < last or (line["step"] == last and "loss" in line)]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    if last == 2:
      shutil.rmtree(tmp_path / "checkpoints/4")
    assert train.run(config, tmp_path).started == last
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in again if "loss" in line] == [1, 2, 3, 4]
    assert {line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")} for line in again if "loss" not in line} == scores
  before = path.read_bytes()
  assert train.run(config, tmp_path).started == 4 and path.read_bytes() == before


def traced(workdir):
  """Of each trace of a run, oldest first, the numbers of its steps, and how often its steps waited for data."""
  found = []
  for path in sorted((workdir / "profile").rglob("perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime):
    assert len(list(path.parent.glob("*.xplane.pb"))) == 1  # what XProf reads
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    numbers = [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"]
    found.append((numbers, sum(event.get("name") == "waiting for data" for event in events)))
  return found


def test_a_window_of_steps_is_traced_and_what_is_left_of_it_after_a_resume(colors, tmp_path, capsys):
  config = tiny(data={"source": "tar", "path": colors}, train={"steps": 6})
  train.run(config, tmp_path, profile=(3, 5))
  assert traced(tmp_path) == [([3, 4], 2)]
  said = capsys.readouterr().err
  assert f"profile: steps 3 to 4 are traced. Look at them with `xprof {tmp_path}/profile`" in said

  shutil.rmtree(tmp_path / "checkpoints/6")
  train.run(config, tmp_path, profile=(3, 5))  # as after a preemption, by the same command
  assert len(traced(tmp_path)) == 1
  assert "profile: nothing is traced, because step 4 was done before." in capsys.readouterr().err

  shutil.rmtree(tmp_path / "checkpoints/6")
  train.run(config, tmp_path, profile=(3, 99))
  assert traced(tmp_path)[1:] == [([5, 6], 2)]
  assert "profile: steps 5 to 6 are traced." in capsys.readouterr().err
  steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert steps == [1, 2, 3, 4, 5, 6]


def test_a_window_that_cannot_be_traced_is_said_before_anything_is_made(tmp_path):
  with pytest.raises(UsageError, match="begins after the last step"):
    train.run(tiny(), tmp_path / "run", profile=(5, 9))
  assert not (tmp_path / "run").exists()


def test_a_run_that_fails_in_the_window_writes_its_trace(colors, tmp_path, monkeypatch):
  config = tiny(data={"source": "tar", "path": colors}, train={"steps": 6})

  def fail(self, step, state):
    raise OSError("no space left")

  monkeypatch.setattr(hooks.Save, "now", fail)
  with pytest.raises(OSError, match="no space left"):
    train.run(config, tmp_path, profile=(1, 6))
  assert traced(tmp_path) == [([1, 2], 2)]
