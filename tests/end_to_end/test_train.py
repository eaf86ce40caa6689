"""`python main.py` as people run it: in real processes, killed, stopped, resumed, on several hosts."""

import gzip
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

from tests.conftest import write_colors
from tests.end_to_end.runs import (
  RECIPE,
  ROOT,
  assert_same_run,
  environment_of,
  final_state,
  finish,
  start_together,
  starter,
  training_lines,
  wait_for_step,
)


@pytest.fixture(scope="module")
def start(colors, tmp_path_factory):
  """A function that starts main.py: workdir, overrides, devices, environment -> a running process."""
  return starter(colors, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
  """The work directory of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  finish(start(workdir))
  return workdir


def test_training_learns_and_leaves_what_the_contract_says(undisturbed):
  lines = training_lines(undisturbed)
  # Sixteen pairs of eight colours: half of the batch are duplicates, so ln 2 is about the best.
  assert lines[0]["loss"] > 2.6 and np.mean([line["loss"] for line in lines[-5:]]) < 1.6
  for key in ("step", "samples_seen", "time", "learning_rate", "gradient_norm", "samples_per_second"):
    assert all(np.isfinite(line[key]) for line in lines), key
  assert lines[-1]["samples_seen"] == 40 * 16
  config = json.loads((undisturbed / "config.json").read_text())
  assert config["train"]["steps"] == 40 and config["model"]["vision"]["mlp_width"] == 128
  assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["35", "40"]
  assert list((undisturbed / "tensorboard").iterdir())
  assert "<html" in (undisturbed / "report.html").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_stopped_by_a_signal_it_saves_says_so_and_goes_on(start, undisturbed, tmp_path, number):
  workdir = tmp_path / "run"
  process = start(workdir, "--profile=5:1000")
  wait_for_step(process, workdir, 7)
  process.send_signal(number)
  out, err = finish(process, code=75)
  step = int(re.search(r"Stopped after step (\d+) of 40, all saved", out)[1])
  assert step >= 7 and (workdir / "checkpoints" / str(step)).is_dir()
  assert f"{number.name}: finishing this step and saving" in err
  assert f"profile: steps 5 to {step} are traced." in err
  (trace,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"] == list(range(5, step + 1))
  finish(start(workdir))
  assert_same_run(workdir, undisturbed)


def test_a_complete_run_says_so_and_does_nothing(start, undisturbed):
  before = (undisturbed / "metrics.jsonl").read_bytes()
  out, _ = finish(start(undisturbed))
  assert "is complete: all 40 steps are done" in out
  assert (undisturbed / "metrics.jsonl").read_bytes() == before


def test_a_resume_with_another_config_is_refused(start, undisturbed):
  _, err = finish(start(undisturbed, "--config.optimizer.learning_rate=0.5"), code=2)
  assert "holds a run with config.optimizer.learning_rate=0.001, and this config has 0.5" in err
  assert "Traceback" not in err


def test_a_run_of_a_version_that_had_fewer_keys_is_resumed(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  config = json.loads((workdir / "config.json").read_text())
  del config["loss"]["method"], config["train"]["microbatches"], config["model"]["logit_scale_init"]
  (workdir / "config.json").write_text(json.dumps(config))
  out, _ = finish(start(workdir))
  assert "is complete" in out


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_on_larger_images(start, undisturbed, tmp_path):
  workdir = tmp_path / "tuned"
  larger = ("--config.model.image_size=32", "--config.train.steps=5", "--config.model.vision.patch_drop=0.25")
  _, err = finish(start(workdir, f"--config.train.init_from={undisturbed}", "--config.train.microbatches=2", *larger))
  assert "loss: softmax over 16 pairs, gather" in err
  # Not as good on images of another size as on its own, and far from the ln 16 = 2.77 of a new model.
  assert training_lines(workdir)[0]["loss"] < 2.2
  _, err = finish(start(tmp_path / "nothing", f"--config.train.init_from={tmp_path}/nowhere", *larger), code=2)
  assert "nowhere does not exist" in err and "Traceback" not in err
  assert not (tmp_path / "nothing/config.json").exists()


def test_a_resume_on_other_data_is_refused(start, undisturbed, tmp_path):
  write_colors(tmp_path / "more.tar", copies=9)
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  shutil.rmtree(workdir / "checkpoints/40")
  config = json.loads((workdir / "config.json").read_text())
  config["data"]["path"] = str(tmp_path / "more.tar")  # as if a shard had been replaced where it lay
  (workdir / "config.json").write_text(json.dumps(config))
  _, err = finish(start(workdir, f"--config.data.path={tmp_path}/more.tar"), code=2)
  assert "has 72 records, and the run in" in err and "began with 64" in err
  assert "Traceback" not in err


@pytest.mark.slow
def test_another_device_count_resumes_with_the_same_examples(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, "--config.mesh.fsdp=2", devices=4)
  wait_for_step(process, workdir, 12)
  process.send_signal(signal.SIGTERM)
  finish(process, code=75)
  finish(start(workdir, devices=2))
  ours, theirs = training_lines(workdir), training_lines(undisturbed)
  assert [line["step"] for line in ours] == list(range(1, 41))
  # Other devices add in another order; other examples would be off by far more.
  np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=2e-4)


@pytest.mark.slow
def test_two_processes_fork_like_one_from_a_run_of_one(start, undisturbed, tmp_path):
  overrides = [f"--config.train.fork_from={undisturbed}/checkpoints/35", "--config.train.steps=42"]
  finish(start(tmp_path / "one", *overrides))
  for process in start_together(start, 2, tmp_path / "two", *overrides):
    finish(process)
  one, two = training_lines(tmp_path / "one"), training_lines(tmp_path / "two")
  assert [line["step"] for line in two] == list(range(1, 43)) and two[:35] == training_lines(undisturbed)[:35]
  np.testing.assert_allclose([x["loss"] for x in two], [x["loss"] for x in one], rtol=2e-4)
  overrides[0] = f"--config.train.fork_from={undisturbed}/checkpoints/36"
  for process in start_together(start, 2, tmp_path / "none", *overrides):
    assert "checkpoints/36 is not a checkpoint" in finish(process, code=2)[1]


@pytest.mark.slow
def test_two_processes_train_like_one_and_stop_together(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"

  processes = start_together(start, 2, workdir)
  wait_for_step(processes[0], workdir, 8)
  processes[1].send_signal(signal.SIGTERM)  # only one host is told to go
  for process in processes:
    finish(process, code=75)
  stopped = training_lines(workdir)[-1]["step"]
  assert 8 <= stopped < 40 and (workdir / "checkpoints" / str(stopped)).is_dir()
  for process in start_together(start, 2, workdir):
    finish(process)

  ours, theirs = training_lines(workdir), training_lines(undisturbed)
  assert [line["step"] for line in ours] == list(range(1, 41))
  np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=2e-4)
  got, want = final_state(workdir), final_state(undisturbed)
  for name, value in want.items():
    # Running means of gradients: Adam makes whole updates of rounding where the true gradient is zero.
    if "'mu'" in name:
      np.testing.assert_allclose(got[name], value, atol=5e-3 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
def test_on_two_then_three_then_one_process_the_examples_are_those_of_an_undisturbed_run(tmp_path):
  """A mixture of two sets, one with records that cannot be read: every example in its place, and the same substitutes."""
  for name in ("a", "b"):
    write_colors(tmp_path / f"{name}.tar", copies=4)
  damage(tmp_path / "b.tar", every=11)
  mixture = f"(('{tmp_path}/a.tar', 0.75), ('{tmp_path}/b.tar', 0.25))"
  overrides = ["--config.train.global_batch_size=12", "--config.train.steps=30", f"--config.data.mixture={mixture}"]
  overrides += ["--config.data.order=blocks", "--config.data.block=4", "--config.data.window=2", "--config.data.lanes=6"]
  overrides += ["--config.checkpoint.every=4", "--config.eval.batch_size=12", "--config.data.max_bad_share=1.0"]

  def start(workdir, processes, steps):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes)} if processes > 1 else {}
    command = [sys.executable, "-m", "tests.end_to_end.observed_main", f"--config={RECIPE}", f"--workdir={workdir}", *overrides]
    started = []
    for i in range(processes):
      log = {"EXAMPLES_LOG": str(tmp_path / f"{workdir.name}-{processes}-{i}.jsonl")}
      variables = {**environment_of(tmp_path), **shared, **log}
      variables |= {"JAX_PROCESS_ID": str(i)} if shared else {}
      started.append(subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    if steps:
      wait_for_step(started[0], workdir, steps)
      for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
      finish(process, code=75 if steps else 0)
    return training_lines(workdir)[-1]["step"]

  def examples(workdir, processes, first, last):
    lines = {}
    for i in range(processes):
      for line in (tmp_path / f"{workdir.name}-{processes}-{i}.jsonl").read_text().splitlines():
        position, *what = json.loads(line)
        assert lines.setdefault(position, what) == what
    return [lines[position] for position in range(12 * first, 12 * last)]

  start(tmp_path / "whole", 1, None)
  want = examples(tmp_path / "whole", 1, 0, 30)
  workdir, first, consumed = tmp_path / "moved", 0, []
  for processes, steps in ((2, 6), (3, 14), (1, None)):
    last = start(workdir, processes, steps)
    consumed += examples(workdir, processes, first, last)
    first = last
  assert first == 30 and consumed == want
  listed = [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]
  assert len({line["index"] for line in listed}) == 3 and {line["source"] for line in listed} == {f"{tmp_path}/b.tar"}


def damage(path, every):
  """Writes a text over some of the images of a shard."""
  with tarfile.open(path) as tar:
    places = [(m.offset_data, m.size) for m in tar if m.name.endswith(".png")]
  with open(path, "r+b") as file:
    for offset, size in places[5::every]:
      file.seek(offset)
      file.write(b"not an image"[:size])


@pytest.mark.slow
def test_a_real_vit_b_16_trains_from_an_img2dataset_folder(tmp_path):
  random = np.random.default_rng(0)
  folder = tmp_path / "shards"
  folder.mkdir()
  for shard in range(2):
    with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
      for i in range(6):
        pixels = cv2.resize(random.integers(0, 256, (9, 12, 3), np.uint8), (320, 240))
        about = {"caption": f"blobs {i}", "key": f"{shard:05}{i:04}", "status": "success"}
        members = {"jpg": cv2.imencode(".jpg", pixels)[1].tobytes(), "txt": b"coloured blobs"}
        for extension, content in {**members, "json": json.dumps(about).encode()}.items():
          member = tarfile.TarInfo(f"{shard:05}{i:04}.{extension}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
  workdir = tmp_path / "run"
  command = [
    *(sys.executable, "main.py", "--config=configs/vitb16.py", f"--workdir={workdir}"),
    *("--config.data.source=tar", f"--config.data.path={folder}/*.tar"),
    *("--config.train.global_batch_size=8", "--config.train.steps=2"),
  ]
  variables = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
  subprocess.run(command, cwd=ROOT, env=variables, check=True, capture_output=True, timeout=500)
  lines = training_lines(workdir)
  # At initialisation every pair is as likely as any other: ln 8 = 2.08, and the paper's warm-up is slow.
  assert [line["step"] for line in lines] == [1, 2] and all(1.5 < line["loss"] < 3.5 for line in lines)
  assert "parameters: 149,620,737 numbers" in (workdir / "parameters.txt").read_text()
  shutil.rmtree(workdir)  # 1.8 GB


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=nowhere.py", "--workdir=x"], "No such file"),
    (["--config=configs/quickstart.py:third", "--workdir=x"], "quickstart.py:third cannot be loaded: KeyError 'third'"),
    (["--workdir=x"], "--config is missing"),
    ([f"--config={RECIPE}"], "--workdir is missing"),
    ([f"--config={RECIPE}", "--workdir=x", "--config.train.stepz=1"], "Did you mean steps?"),
    ([f"--config={RECIPE}", "--workdir=x", "--config.train.steps=soon"], "train.steps=soon"),
    ([f"--config={RECIPE}", "--workdir=x", "--profile=soon"], "--profile=soon is not START:END; 10:15 traces steps 10 to 14."),
    ([f"--config={RECIPE}", "--workdir=WORK", "--profile=41:45"], "--profile=41:45 begins after the last step of the run, which is 40."),
    ([f"--config={RECIPE}", "--workdir=x", "--speed=1"], "Unknown command line flag 'speed'"),
    ([f"--config={RECIPE}", "--workdir=x", "train"], "'train' is not a flag"),
    ([f"--config={RECIPE}", "--workdir=/proc/x", "--config.data.path=x"], "--workdir=/proc/x cannot be made"),
    ([f"--config={RECIPE}", "--workdir=WORK", "--config.data.path=none/*.tar"], "none/*.tar: no such file"),
    ([f"--config={RECIPE}", "--workdir=WORK", "--config.model.vision.heads=5"], "does not divide"),
  ],
  ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(arguments, message, tmp_path):
  arguments = [a.replace("WORK", str(tmp_path / "run")) for a in arguments]
  done = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 2, done.stderr
  assert message in done.stderr
  assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
