"""Weights & Biases, offline: real runs of its library, whose files are read byte by byte."""

import builtins
import json
import struct
import time

import pytest

from clip_jax import config as configs
from clip_jax import train
from clip_jax.errors import ConfigError, MissingExtraError
from clip_jax.train import metrics, tracking
from tests.conftest import tiny

wandb = pytest.importorskip("wandb", reason="wandb is not installed")
BLOCK, HEADER = 32_768, 7  # of LevelDB's log format, which its files have after seven bytes of their own


def records(path):
  """The records of a `.wandb` file: https://github.com/google/leveldb/blob/main/doc/log_format.md."""
  from wandb.proto import wandb_internal_pb2

  content, place, whole = path.read_bytes(), HEADER, b""
  assert content[:4] == b":W&B"
  while place + HEADER <= len(content):
    left = BLOCK - place % BLOCK
    if left < HEADER:
      place += left
      continue
    _, length, kind = struct.unpack_from("<IHB", content, place)
    whole += content[place + HEADER : place + HEADER + length]
    place += HEADER + length
    if kind in (1, 4):  # whole, or the last part
      record = wandb_internal_pb2.Record()
      record.ParseFromString(whole)
      whole = b""
      yield record


def files(workdir):
  """The files of each start, the earliest first, without the link to the latest."""
  return sorted((path for path in workdir.glob("wandb/offline-run-*/*.wandb")), key=lambda path: path.stat().st_mtime_ns)


def logged(path):
  """The run's record, and its rows of history as dicts, once its writer, another process, is done."""
  deadline = time.monotonic() + 60
  while not any(record.WhichOneof("record_type") == "exit" for record in records(path)):
    assert time.monotonic() < deadline, "the file has no end"
    time.sleep(0.05)
  run, rows = None, []
  for record in records(path):
    if record.WhichOneof("record_type") == "run":
      run = record.run
    elif record.WhichOneof("record_type") == "history":
      rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
  return run, rows


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """A config that logs to Weights & Biases, with none of this machine's settings of it."""
  for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  return configs.Tracking(wandb="offline", project="clips", name="mine", group="all", tags=("a", "b"))


def lines_of(workdir):
  kept = metrics.read(workdir / "metrics.jsonl")
  return [{name: value for name, value in line.items() if name != "time"} for line in kept]


def test_a_run_that_is_killed_and_resumed_is_one_run_with_all_of_its_lines(offline, tmp_path):
  def start(step, steps):
    writer = metrics.MetricsWriter(tmp_path, step, offline)
    for number in steps:
      writer.write(number, number * 8, {"loss": 1 / number})
      if number % 2 == 0:
        writer.write(number, number * 8, {"eval/colors/acc1": number / 10})
    return writer

  start(0, (1, 2, 3, 4, 5)).close()
  time.sleep(1.1)  # its folders are named by the second
  start(3, (4, 5, 6)).close()  # from the checkpoint of step 3
  first, second = files(tmp_path)
  (run, rows), (again, all_rows) = logged(first), logged(second)
  assert run.run_id == again.run_id == json.loads((tmp_path / "wandb.json").read_text())["id"]
  assert (run.project, run.display_name, run.run_group, list(run.tags)) == ("clips", "mine", "all", ["a", "b"])
  assert [row["_step"] for row in rows] == [1, 2, 3, 4, 5]
  assert [row["_step"] for row in all_rows] == [1, 2, 3, 4, 5, 6]
  assert [row["loss"] for row in all_rows] == [1 / number for number in range(1, 7)]
  assert [row.get("eval/colors/acc1") for row in all_rows] == [None, 0.2, None, 0.4, None, 0.6]
  assert [row["samples_seen"] for row in all_rows] == [8 * number for number in range(1, 7)]
  times = {line["step"]: line["time"] for line in metrics.read(tmp_path / "metrics.jsonl")}
  assert [row["_timestamp"] for row in all_rows] == pytest.approx([times[number] for number in range(1, 7)], abs=1e-3)


def test_training_logs_its_config_and_what_metrics_jsonl_has(offline, colors, tmp_path, capsys):
  options = {"wandb": "offline", "project": "clips", "tensorboard": False}
  config = tiny(data={"source": "tar", "path": colors}, tracking=options, train={"steps": 3})
  train.run(config, tmp_path / "mine")
  assert "Weights & Biases: offline; `wandb sync" in capsys.readouterr().err
  assert not (tmp_path / "mine/tensorboard").exists()
  run, rows = logged(files(tmp_path / "mine")[0])
  assert run.display_name == "mine"
  sent = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in run.config.update}
  assert sent["train"] == json.loads((tmp_path / "mine/config.json").read_text())["train"]
  keys = ("_step", "_timestamp", "_runtime", "_wandb")
  assert [{name: value for name, value in row.items() if name not in keys} for row in rows] == [
    {name: value for name, value in line.items() if name != "step"} for line in lines_of(tmp_path / "mine")
  ]
  # Another start may log elsewhere, or not at all.
  assert train.run({**config, "tracking": {}}, tmp_path / "mine").started == 3


def test_where_its_server_cannot_be_reached_it_is_logged_offline(offline, monkeypatch, tmp_path, capsys):
  """There is no server at this address, and no key."""
  monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
  monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
  monkeypatch.setattr(tracking, "INIT_SECONDS", 2.0)
  online = configs.Tracking(wandb="online")
  writer = metrics.MetricsWriter(tmp_path, 0, online)
  writer.write(1, 8, {"loss": 0.5})
  writer.close()
  assert "This run is logged offline." in capsys.readouterr().err
  assert [row["loss"] for row in logged(files(tmp_path)[0])[1]] == [0.5]


def test_its_failures_end_nothing_and_are_told_once(offline, monkeypatch, tmp_path, capsys):
  writer = metrics.MetricsWriter(tmp_path, 0, offline)
  monkeypatch.setattr(wandb.Run, "log", lambda *_, **__: 1 / 0)
  for step in (1, 2, 3):
    writer.write(step, step, {"loss": 0.5})
  writer.close()
  assert capsys.readouterr().err.count("ZeroDivisionError division by zero. It gets no more of this run until the next start.") == 1
  assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_without_the_package_its_extra_is_named_before_anything_is_made(monkeypatch, colors, tmp_path):
  monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "wandb" else builtins.object())
  config = tiny(data={"source": "tar", "path": colors}, tracking={"wandb": "online"})
  with pytest.raises(MissingExtraError, match=r"config.tracking.wandb='online' needs the package wandb, which is not installed: pip install 'clip_jax\[wandb\]'"):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_another_word_is_refused():
  with pytest.raises(ConfigError, match="config.tracking.wandb"):
    configs.resolve(tiny(tracking={"wandb": "yes"}))
