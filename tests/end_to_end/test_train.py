"""`python main.py` as people run it: in real processes, killed, stopped, resumed, on several hosts."""

import gzip
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

from clip_jax import train
from clip_jax.errors import UsageError
from tests.conftest import write_colors
from tests.end_to_end.recipe import get_config
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


@pytest.mark.slow
def test_stopped_by_a_signal_it_saves_says_so_and_goes_on(start, undisturbed, tmp_path):
  """Twice, once by each signal."""
  workdir, first = tmp_path / "run", 7
  for number, profile in ((signal.SIGINT, ["--profile=5:1000"]), (signal.SIGTERM, [])):
    process = start(workdir, *profile)
    wait_for_step(process, workdir, first)
    process.send_signal(number)
    out, err = finish(process, code=75)
    step = int(re.search(r"Stopped after step (\d+) of 40, all saved", out)[1])
    assert step >= first and (workdir / "checkpoints" / str(step)).is_dir()
    assert f"{number.name}: finishing this step and saving" in err
    if profile:
      assert f"profile: steps 5 to {step} are traced." in err
      (trace,) = (workdir / "profile").rglob("perfetto_trace.json.gz")
      events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
      assert [int(event["args"]["step_num"]) for event in events if event.get("name") == "train"] == list(range(5, step + 1))
    first = step + 3
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


def of_recipe(path):
  """The recipe on some data, for runs in this process."""
  config = get_config()
  config.data.path = str(path)
  return config


def test_a_run_of_a_version_that_had_fewer_keys_is_resumed(colors, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  config = json.loads((workdir / "config.json").read_text())
  del config["loss"]["method"], config["train"]["microbatches"], config["model"]["logit_scale_init"]
  (workdir / "config.json").write_text(json.dumps(config))
  result = train.run(of_recipe(colors), workdir)
  assert result.complete and result.started == result.steps


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first_on_larger_images(start, undisturbed, tmp_path):
  workdir = tmp_path / "tuned"
  larger = ("--config.model.image_size=32", "--config.train.steps=5", "--config.model.vision.patch_drop=0.25")
  _, err = finish(start(workdir, f"--config.train.init_from={undisturbed}", "--config.train.microbatches=2", *larger))
  assert "loss: softmax over 16 pairs, gather" in err
  # Not as good on images of another size as on its own, and far from the ln 16 = 2.77 of a new model.
  assert training_lines(workdir)[0]["loss"] < 2.2


def test_weights_that_are_not_there_are_refused_before_anything_is_written(colors, tmp_path):
  config = of_recipe(colors)
  config.train.init_from = f"{tmp_path}/nowhere"
  with pytest.raises(UsageError, match="nowhere does not exist"):
    train.run(config, tmp_path / "nothing")
  assert not (tmp_path / "nothing/config.json").exists()


def test_a_resume_on_other_data_is_refused(undisturbed, tmp_path):
  write_colors(tmp_path / "more.tar", copies=9)
  workdir = tmp_path / "run"
  shutil.copytree(undisturbed, workdir)
  shutil.rmtree(workdir / "checkpoints/40")
  config = json.loads((workdir / "config.json").read_text())
  config["data"]["path"] = str(tmp_path / "more.tar")  # as if a shard had been replaced where it lay
  (workdir / "config.json").write_text(json.dumps(config))
  with pytest.raises(UsageError, match="has 72 records, and the run in .* began with 64"):
    train.run(of_recipe(tmp_path / "more.tar"), workdir)


@pytest.mark.slow
def test_on_two_then_three_then_one_process_it_trains_as_undisturbed_and_they_stop_together(tmp_path):
  """A mixture of two sets, one with records that cannot be read: every example in its place, and the same substitutes.

  As many devices as processes, at first with the state in shards.
  """
  for name in ("a", "b"):
    write_colors(tmp_path / f"{name}.tar", copies=4)
  damage(tmp_path / "b.tar", every=11)
  mixture = f"(('{tmp_path}/a.tar', 0.75), ('{tmp_path}/b.tar', 0.25))"
  overrides = ["--config.train.global_batch_size=12", "--config.train.steps=30", f"--config.data.mixture={mixture}"]
  overrides += ["--config.data.order=blocks", "--config.data.block=4", "--config.data.window=2", "--config.data.lanes=6"]
  overrides += ["--config.checkpoint.every=4", "--config.eval.batch_size=12", "--config.data.max_bad_share=1.0"]
  observed = starter("", tmp_path, ("-m", "tests.end_to_end.observed_main"))

  def start(workdir, processes, steps):
    logs = [{"EXAMPLES_LOG": str(tmp_path / f"{workdir.name}-{processes}-{i}.jsonl")} for i in range(processes)]
    if processes == 1:
      started = [observed(workdir, *overrides, environment=logs[0])]
    else:
      mesh = ["--config.mesh.fsdp=2"] if processes == 2 else []
      started = start_together(observed, processes, workdir, *overrides, *mesh, environments=logs)
    if steps:
      wait_for_step(started[0], workdir, steps)
      started[-1].send_signal(signal.SIGTERM)  # only one host is told to go
    for process in started:
      finish(process, code=75 if steps else 0)
    last = training_lines(workdir)[-1]["step"]
    assert (workdir / "checkpoints" / str(last)).is_dir()
    return last

  def examples(workdir, processes, first, last):
    lines = {}
    for i in range(processes):
      for line in (tmp_path / f"{workdir.name}-{processes}-{i}.jsonl").read_text().splitlines():
        position, *what = json.loads(line)
        assert lines.setdefault(position, what) == what
    return [lines[position] for position in range(12 * first, 12 * last)]

  whole, workdir, first, consumed = tmp_path / "whole", tmp_path / "moved", 0, []
  start(whole, 1, None)
  want = examples(whole, 1, 0, 30)
  for processes, more in ((2, 7), (3, 3), (1, None)):  # a step of three processes takes many times as long as one of two
    last = start(workdir, processes, more and first + more)
    assert last >= first + more if more else last == 30
    assert (last < 30) == (processes > 1)
    consumed += examples(workdir, processes, first, last)
    first = last
  assert consumed == want
  listed = [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]
  assert len({line["index"] for line in listed}) == 3 and {line["source"] for line in listed} == {f"{tmp_path}/b.tar"}

  ours, theirs = training_lines(workdir), training_lines(whole)
  assert [line["step"] for line in ours] == list(range(1, 31))
  np.testing.assert_allclose([x["loss"] for x in ours], [x["loss"] for x in theirs], rtol=2e-4)
  got, want = final_state(workdir), final_state(whole)
  for name, value in want.items():
    # Running means of gradients: Adam makes whole updates of rounding where the true gradient is zero.
    if "'mu'" in name:
      np.testing.assert_allclose(got[name], value, atol=5e-3 * np.abs(value).max(), err_msg=name)


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
    *("--config.model.vision.layers=2", "--config.model.text.layers=2"),  # all else is the recipe's; blocks are alike
  ]
  subprocess.run(command, cwd=ROOT, env=environment_of(tmp_path), check=True, capture_output=True, timeout=500)
  lines = training_lines(workdir)
  # At initialisation every pair is as likely as any other: ln 8 = 2.08, and the paper's warm-up is slow.
  assert [line["step"] for line in lines] == [1, 2] and all(1.5 < line["loss"] < 3.5 for line in lines)
  left_out = 10 * sum(12 * width**2 + 13 * width for width in (768, 512))
  assert f"parameters: {149_620_737 - left_out:,} numbers" in (workdir / "parameters.txt").read_text()
  shutil.rmtree(workdir)  # 0.6 GB


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
