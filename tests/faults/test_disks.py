"""Disks that are full, change what was written, or do not answer; and a clock that cannot be trusted."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from clip_jax import train
from clip_jax.errors import UsageError
from tests.conftest import write_colors
from tests.data import buckets
from tests.end_to_end.recipe import get_config
from tests.end_to_end.runs import (
  RECIPE,
  ROOT,
  all_lines,
  assert_same_run,
  environment_of,
  exported,
  finish,
  starter,
  training_lines,
  wait_for_step,
  wait_until,
)

SLOW = {"SLOW": "0.1"}


def limit_files(process, size):
  """The largest file that a process may write from now on, or None for any."""
  _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_safety_which_is_said_and_counted(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, environment={"SLOW": "0.1"})
  wait_until(process, (workdir / "checkpoints/5").is_dir, "the first checkpoint")
  said = []
  listener = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
  listener.start()  # before anything fails: what the libraries say of it may be more than a pipe holds, and the process would wait
  limit_files(process, 100_000)  # lines fit, a checkpoint does not
  wait_until(process, lambda: any("checkpoint_failures" in line for line in all_lines(workdir)), "a save that failed")
  limit_files(process, (workdir / "metrics.jsonl").stat().st_size + 100)  # a part of a line
  wait_until(process, lambda: any("metrics.jsonl cannot be written" in line for line in said), "a line that does not fit")
  limit_files(process, None)
  assert process.wait(200) == 0
  listener.join()
  err = "".join(said)
  assert re.search(r"step \d+: NO CHECKPOINT: \S+/checkpoints/\d+ could not be written \(File too large\). It is tried again.", err), err
  assert re.search(r"the \d+ steps since \d+ are lost", err) and "checkpoints can be written again" in err
  counted = [line["checkpoint_failures"] for line in all_lines(workdir) if "checkpoint_failures" in line]
  assert counted == sorted(counted) and counted[0] == 1
  assert_same_run(workdir, undisturbed)
  assert not list(workdir.rglob("*tmp*"))


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_with_its_last_checkpoint_and_it_goes_on_once_there_is_space(colors, undisturbed, tmp_path):
  """A real file system with 5 MB free: one checkpoint of 3.5 MB fits, and not a second one."""
  if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
    pytest.skip("this system lets nobody mount a file system of his own")
  command = f"{sys.executable} -m tests.faults.faulty_main --config={RECIPE} --workdir=DISK/run --config.data.path={colors}"
  script = f"""
    mkdir DISK && mount -t tmpfs -o size=16m tmpfs DISK && head -c 11000000 /dev/zero > DISK/filler
    {command}; echo code $?
    ls DISK/run/checkpoints
    rm DISK/filler
    {command}; echo code $?
    cp -r DISK/run OUT
  """.replace("DISK", str(tmp_path / "disk")).replace("OUT", str(tmp_path / "run"))
  done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env={**environment_of(tmp_path), "LAST": "0.5"}, capture_output=True, text=True, timeout=400)
  assert done.stdout.count("code 1") == done.stdout.count("code 0") == 1, (done.stdout, done.stderr)
  assert done.stdout.index("code 1") < done.stdout.index("\n5\n") < done.stdout.index("code 0")
  assert "No space left on device" in done.stderr
  assert "Step 40 could not be saved; the steps after 5 are lost. The last checkpoint is whole; the same command goes on from it." in done.stderr
  assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_newest_checkpoint_with_one_wrong_bit_is_set_aside_and_the_one_before_is_used(start, undisturbed, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, environment=SLOW)
  wait_for_step(process, workdir, 16)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
  newest = workdir / f"checkpoints/{steps[-1]}"
  largest = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 4
  largest.write_bytes(content)
  _, err = finish(start(workdir))
  assert f"{newest} CANNOT BE USED" in err and f"the run goes on from step {steps[-2]}" in err
  assert (workdir / f"checkpoints/{steps[-1]}.broken").is_dir()
  assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_a_disk_that_freezes_is_told_with_stacks_and_records_and_ends_the_run_which_goes_on_exactly(tmp_path):
  """Files become pipes that nobody writes to: whoever opens one waits in the kernel, as on a network disk that is gone.

  Some of them cannot be decoded: they are replaced alike, before and after.
  """
  folder = tmp_path / "images"
  folder.mkdir()
  write_colors(tmp_path / "colors.tar")
  with tarfile.open(tmp_path / "colors.tar") as tar:
    images = [member for member in tar if member.name.endswith(".png")]
    for member in images:
      (folder / member.name).write_bytes(tar.extractfile(member).read())
  bad = images[5::16]
  for member in bad:
    (folder / member.name).write_bytes(b"not an image")
  names = [member.name for member in images]
  (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},colour {i % 8}\n" for i, name in enumerate(names)))
  start = starter(folder, tmp_path, ("-m", "tests.faults.faulty_main"))
  whole, workdir, share = tmp_path / "whole", tmp_path / "run", "--config.data.max_bad_share=0.2"
  finish(start(whole, share))
  process = start(workdir, share, "--config.train.step_timeout=4", environment=SLOW)
  wait_for_step(process, workdir, 12)
  for name in names:
    (folder / name).rename(tmp_path / name)
    os.mkfifo(folder / name)
  _, err = finish(process, code=1)
  assert "No progress for 4 s in step" in err and "in _read_local" in err and "in load_chunk" in err
  assert re.search(r"The records asked for last: metadata\.csv/\d{6}\.png, ", err)
  assert "the process ends; the last checkpoint is whole" in err
  for name in names:
    (tmp_path / name).rename(folder / name)
  finish(start(workdir, share))
  assert_same_run(workdir, whole)
  listed = [sorted((path / "bad_records.jsonl").read_text().splitlines()) for path in (whole, workdir)]
  assert listed[0] == listed[1] and len(listed[0]) == len(bad) == 4


@pytest.mark.slow
def test_a_bucket_that_stops_answering_stops_the_run_which_goes_on_as_from_a_disk(start, undisturbed, colors, tmp_path):
  workdir = tmp_path / "run"
  with buckets.s3("training") as bucket:
    bucket.put("colors.tar", Path(colors).read_bytes())
    bucket.misbehave(0.1)

    def from_bucket(deadline):
      overrides = [f"--config.data.path={bucket.root}/colors.tar", f"--config.data.read_deadline={deadline}"]
      return start(workdir, *overrides, environment=bucket.environment)

    process = from_bucket(8)
    wait_for_step(process, workdir, 6)
    bucket.proxy.hang = True
    _, err = finish(process, code=1)
    assert f"{bucket.root}/colors.tar has not been read within 8 seconds." in err
    assert "The last checkpoint is whole; the same command goes on from it." in err and "Traceback" not in err
    bucket.proxy.hang = False
    finish(from_bucket(600))
    assert sum(bucket.proxy.counts[fault] for fault in buckets.FAULTS)
  assert_same_run(workdir, undisturbed)


def test_a_clock_that_jumps_an_hour_back_and_a_day_on_changes_nothing_nor_does_the_switch_for_gpus(start, undisturbed, tmp_path):
  """With the same seed and mesh the bits are the same, whether or not operations are asked for that are the same on GPUs each time."""
  workdir = tmp_path / "run"
  clock = {"CLOCK": "10:-3600,22:86400"}
  more = ("--config.checkpoint.every_minutes=5", "--config.train.step_timeout=60", "--config.train.deterministic=True")
  finish(start(workdir, *more, environment=clock))
  assert_same_run(workdir, undisturbed)
  times = [line["time"] for line in training_lines(workdir)]
  assert min(b - a for a, b in zip(times, times[1:], strict=False)) < -3000 and times[-1] - times[0] > 80_000
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["35", "40"]


def test_other_records_of_the_same_number_are_refused(undisturbed, tmp_path):
  workdir, data = tmp_path / "run", tmp_path / "other.tar"
  shutil.copytree(undisturbed, workdir)
  shutil.rmtree(workdir / "checkpoints/40")
  write_colors(tmp_path / "more.tar", copies=9)
  with tarfile.open(tmp_path / "more.tar") as old, tarfile.open(data, "w") as new:
    for member in old.getmembers()[24:]:  # without the first eight records, and so as many as before
      new.addfile(member, old.extractfile(member))
  config = (workdir / "config.json").read_text()
  path = re.search(r'"path": "([^"]+colors.tar)"', config)[1]
  (workdir / "config.json").write_text(config.replace(path, str(data)))  # as if the file had been replaced where it lay
  recipe = get_config()
  recipe.data.path = str(data)
  with pytest.raises(UsageError, match="has other records than those that the run in"):
    train.run(recipe, workdir)
  assert exported(workdir, tmp_path / "exported")


def test_a_process_that_is_killed_while_it_indexes_is_told_with_the_shard(tmp_path):
  """As the system does when memory runs out: not a hang, and not a page of errors."""
  for i in range(400):
    write_colors(tmp_path / f"{i:03}.tar", copies=1)
  command = [sys.executable, "-m", "clip_jax.cli", "data", "index", f"{tmp_path}/*.tar", "--processes=2"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "CLIP_JAX_CACHE": str(tmp_path / "cache")})
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and not list(tmp_path.glob("*.index.npz")):
    time.sleep(0.01)
  children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
  workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
  os.kill(int(workers[0]), signal.SIGKILL)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 1 and "Traceback" not in err
  assert re.search(r"A process that reads shards was killed, .* while it read \S+/\d\d\d.tar or one of those after it.", err), err
