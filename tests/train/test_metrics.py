"""metrics.jsonl: whole lines, each step once, also after a crash, and whatever the disk does. TensorBoard's files, too.

The limits are real: of the size of a process's files (Python ignores the signal, and a soft limit can be raised again), and of
a tiny file system. They are those of processes of their own; what such a one prints as JSON is what a test looks at.
"""

import json
import os
import struct
import subprocess
import sys
import textwrap

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from clip_jax.train import metrics

NOT_WRITTEN = "metrics.jsonl cannot be written ({}); its lines are kept in memory."
WRITTEN_AGAIN = "metrics.jsonl can be written again; all of its lines are there."
LACKS = "TensorBoard's file cannot be written ({}); it will lack values that metrics.jsonl has."

# What the programs below begin with.
BEGIN = """
import json, os, random, resource, sys
from clip_jax.errors import StorageError
from clip_jax.train import metrics

workdir, path = sys.argv[1], sys.argv[1] + "/metrics.jsonl"

def limit(size):  # of every file that is written
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def steps():
  return [line["step"] for line in metrics.read(path)]

def write(writer, *all_steps):
  for step in all_steps:
    writer.write(step, 8 * step, {name: step / 4 for name in ("loss", "learning_rate", "gradient_norm", "data_wait")})
"""


def steps_in(path):
  return [line["step"] for line in metrics.read(path)]


def write(workdir, start, steps):
  writer = metrics.MetricsWriter(workdir, start)
  for step in steps:
    writer.write(step, 8 * step, {"loss": 1 / step})
  writer.close()


def run(program, *arguments, before=(), **options):
  """Runs a program; returns what it printed as JSON, and the lines of its standard error."""
  command = [*before, sys.executable, "-c", BEGIN + textwrap.dedent(program), *map(str, arguments)]
  options = {"stderr": subprocess.PIPE} | options
  # A writer that blocked for ever would be killed here.
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False, **options)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout), [line for line in (done.stderr or "").splitlines() if line]


def on_tiny_disk(program, folder, size="64k"):
  """Runs a program with a file system of its own, of that size, at a folder."""
  before = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o "size=$0" tmpfs "$1" && shift && exec "$@"', size, str(folder)]
  try:
    probe = subprocess.run([*before, "true"], capture_output=True, text=True, check=False)
    refused = probe.returncode and probe.stderr.strip()
  except FileNotFoundError as error:
    refused = str(error)
  if refused:
    pytest.skip(f"this system gives no file system to a process of its own: {refused}")
  return run(program, folder, before=before)


def events(workdir):
  """TensorBoard's events in a work directory: those of each file, in the order of names; each file is whole records."""
  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    assert path.name.startswith("events.out.tfevents.")
    content, here = path.read_bytes(), []
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      size, body, check = content[8:12], content[12 : 12 + length], content[12 + length : 16 + length]
      assert struct.unpack("<I", size)[0] == masked_crc32c(content[:8])
      assert struct.unpack("<I", check)[0] == masked_crc32c(body)
      here.append(event_pb2.Event.FromString(body))
      content = content[16 + length :]
    assert here[0].file_version == "brain.Event:2"
    found.append(here)
  return found


def scalars(file):
  return [(event.step, value.tag, value.simple_value) for event in file for value in event.summary.value]


def test_lines_hold_step_samples_and_time(tmp_path):
  write(tmp_path, 0, [1, 2])
  lines = metrics.read(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["samples_seen"], line["loss"]) for line in lines] == [(1, 8, 1.0), (2, 16, 0.5)]
  assert all(line["time"] > 1.7e9 for line in lines)


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1}'])
def test_a_resumed_run_drops_later_lines_and_a_torn_one(tmp_path, torn):
  write(tmp_path, 0, [1, 2, 3, 4, 5])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + torn)
  assert steps_in(path) == [1, 2, 3, 4, 5]
  write(tmp_path, 3, [4, 5, 6])
  assert steps_in(path) == [1, 2, 3, 4, 5, 6]
  assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_values_that_are_not_finite_are_null(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, 8, {"loss": float("nan"), "gradient_norm": float("inf")})
  writer.close()
  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda x: pytest.fail(x))
  assert line["loss"] is None and line["gradient_norm"] is None


def test_a_missing_file_has_no_lines(tmp_path):
  assert metrics.read(tmp_path / "metrics.jsonl") == []


# TensorBoard.


def test_tensorboard_gets_every_value_and_hides_what_a_resumed_run_does_again(tmp_path):
  """Two runs within a second: none writes over the other's file."""
  for start, steps in ((0, (1, 2, 3, 4, 5)), (3, (4, 5, 6)), (6, ())):
    write(tmp_path, start, steps)
  first, second, third = events(tmp_path)
  assert scalars(first) == [(step, "loss", pytest.approx(1 / step)) for step in (1, 2, 3, 4, 5)]
  assert scalars(second) == [(step, "loss", pytest.approx(1 / step)) for step in (4, 5, 6)]
  assert scalars(third) == []
  start = event_pb2.SessionLog.START
  purged = [[event.step for event in file if event.session_log.status == start] for file in (first, second, third)]
  assert purged == [[1], [4], [7]]
  times = {line["step"]: line["time"] for line in metrics.read(tmp_path / "metrics.jsonl")}
  assert [event.wall_time for event in second if event.summary.value] == [times[step] for step in (4, 5, 6)]


# Disks that take no more.


@pytest.mark.parametrize("room", [0, 1, 100, 300])
def test_lines_that_find_no_space_wait_for_it(tmp_path, room):
  """The disk takes nothing more, a part of a line, or two lines and a part; TensorBoard's dozens of values do not block."""
  found, said = run(
    """
    writer = metrics.MetricsWriter(workdir, 0)
    write(writer, 1, 2, 3)
    found = {"before": writer.sync()}
    limit(os.path.getsize(path) + int(sys.argv[2]))
    write(writer, *range(4, 40))
    found |= {"full": writer.sync(), "full steps": steps(), "whole": open(path, "rb").read().endswith(b"}\\n")}
    limit(resource.RLIM_INFINITY)
    write(writer, 40)
    found |= {"at the next": steps(), "after": writer.sync()}
    write(writer, 41)
    writer.close()
    print(json.dumps(found))
    """,
    tmp_path,
    room,
  )
  assert found == {
    "before": True,
    "full": False,
    "full steps": list(range(1, 6 if room == 300 else 4)),
    "whole": True,
    "at the next": list(range(1, 41)),
    "after": True,
  }
  assert steps_in(tmp_path / "metrics.jsonl") == list(range(1, 42))
  # The lines are said to be missing before TensorBoard's values are, or after, as whichever file is longer.
  assert sorted(said) == sorted([NOT_WRITTEN.format("File too large"), LACKS.format("File too large"), WRITTEN_AGAIN])
  (file,) = events(tmp_path)
  shown = [step for step, tag, _ in scalars(file) if tag == "loss"]
  assert shown == sorted(set(shown)) and set(shown) < set(range(1, 42)) and {40, 41} <= set(shown)
  assert len(scalars(file)) == 4 * len(shown)  # of a step all values or none


def test_whatever_the_disk_takes_when_a_reader_sees_whole_lines_in_order(tmp_path):
  """Limits go up and down at random, and writers are left as a kill would leave them."""
  found, _ = run(
    """
    found = []
    for seed in range(25):
      dice, folder = random.Random(seed), f"{workdir}/{seed}"
      path = f"{folder}/metrics.jsonl"
      os.mkdir(folder)
      writer, synced = metrics.MetricsWriter(folder, 0), 0
      for step in range(1, 80):
        limit(os.path.getsize(path) + dice.choice([0, 1, 50, 150, 151, 1000]) if dice.random() < 0.4 else resource.RLIM_INFINITY)
        write(writer, step)
        if dice.random() < 0.2 and writer.sync():
          synced = step
        assert steps() == list(range(1, len(steps()) + 1)) and synced <= len(steps()) <= step
      limit(resource.RLIM_INFINITY)
      found.append([synced, writer.sync(), steps() == list(range(1, 80))])
    print(json.dumps(found))
    """,
    tmp_path,
  )
  assert len(found) == 25 and all(synced > 0 and last and whole for synced, last, whole in found)


def test_a_full_file_system_that_is_emptied_has_every_line(tmp_path):
  """A new run finds it full, so that TensorBoard's file cannot even begin; then there is space."""
  found, said = on_tiny_disk(
    """
    writer = metrics.MetricsWriter(workdir, 0)
    with open(workdir + "/other", "wb", buffering=0) as other:
      try:
        while other.write(b"x" * 4096): pass
      except OSError as error:
        assert error.errno == 28
    write(writer, *range(1, 100))
    found = {"full": writer.sync(), "steps": steps()}
    os.remove(workdir + "/other")
    found |= {"empty": writer.sync(), "then": steps(), "files": sorted(os.listdir(workdir))}
    write(writer, 100)
    writer.close()
    found |= {"end": steps(), "events": len(os.listdir(workdir + "/tensorboard"))}
    print(json.dumps(found))
    """,
    tmp_path,
  )
  assert found["full"] is False and len(found["steps"]) < 99
  assert found["empty"] is True and found["then"] == list(range(1, 100))
  assert found["files"] == ["metrics.jsonl", "tensorboard"]
  assert found["end"] == list(range(1, 101)) and found["events"] == 1
  assert said.count(NOT_WRITTEN.format("No space left on device")) == said.count(WRITTEN_AGAIN) == 1
  assert said.count(LACKS.format("No space left on device")) == 1 and len(said) == 3


def test_tensorboards_file_begins_once_there_is_space(tmp_path):
  found, said = run(
    """
    limit(20)  # less than what such a file begins with
    writer = metrics.MetricsWriter(workdir, 0)
    write(writer, 1, 2, 3)
    found = {"none": os.listdir(workdir + "/tensorboard")}
    limit(resource.RLIM_INFINITY)
    write(writer, 4, 5)
    writer.close()
    print(json.dumps(found | {"steps": steps()}))
    """,
    tmp_path,
  )
  assert found == {"none": [], "steps": [1, 2, 3, 4, 5]}
  assert said.count(LACKS.format("File too large")) == 1
  (file,) = events(tmp_path)
  assert [step for step, tag, _ in scalars(file) if tag == "loss"] == [4, 5]


def test_a_folder_that_cannot_be_made_costs_tensorboard_only(tmp_path, capsys):
  (tmp_path / "tensorboard").write_text("a file")
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in (1, 2):
    writer.write(step, step, {"loss": 1.0})
  assert writer.sync()
  (tmp_path / "tensorboard").unlink()
  writer.write(3, 3, {"loss": 1.0})
  writer.close()
  assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
  assert [step for step, _, _ in scalars(events(tmp_path)[0])] == [3]
  assert capsys.readouterr().err.count("TensorBoard") == 1


def test_a_run_that_ends_on_a_full_disk_says_how_many_lines_are_missing(tmp_path):
  found, said = run(
    """
    writer = metrics.MetricsWriter(workdir, 0)
    write(writer, 1, 2)
    limit(os.path.getsize(path) + 7)
    write(writer, *range(3, 1203))
    writer.close()
    print(json.dumps(steps()))
    """,
    tmp_path,
  )
  assert found == [1, 2]
  assert said[-1] == "metrics.jsonl still cannot be written (File too large); lines it lacks at its end: 1,200."


def test_standard_error_may_be_full_as_well(tmp_path):
  """A log of the run that is on the same disk."""
  with open("/dev/full", "w") as full:
    found, _ = run(
      """
      writer = metrics.MetricsWriter(workdir, 0)
      limit(1)
      write(writer, 1, 2)
      found = [writer.sync()]
      limit(resource.RLIM_INFINITY)
      print(json.dumps([*found, writer.sync(), steps()]))
      """,
      tmp_path,
      stderr=full,
    )
  assert found == [False, True, [1, 2]]


def test_lines_that_were_written_but_not_put_on_disk_are_written_again(tmp_path, capsys):
  """After an fsync that failed the next one would succeed, without what the first had lost. A null device refuses it."""
  lines = metrics._Lines(tmp_path / "metrics.jsonl")
  os.dup2(os.open("/dev/null", os.O_WRONLY), lines._file)
  for step in (1, 2):
    lines.add(b'{"step": %d}\n' % step)
  assert not lines.sync() and not lines.sync()
  os.dup2(os.open(tmp_path / "metrics.jsonl", os.O_WRONLY), lines._file)
  lines.add(b'{"step": 3}\n')
  assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]
  assert [line for line in capsys.readouterr().err.splitlines() if line] == [NOT_WRITTEN.format("Invalid argument"), WRITTEN_AGAIN]
  assert lines.sync()
  lines.close()
  assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3]


def test_lines_in_memory_do_not_grow_without_checkpoints(tmp_path):
  lines = metrics._Lines(tmp_path / "metrics.jsonl")
  for step in range(2 * metrics.MOST_LINES_IN_DOUBT):
    lines.add(b'{"step": %d}\n' % step)
    assert len(lines._lines) <= metrics.MOST_LINES_IN_DOUBT
  lines.close()
  assert steps_in(tmp_path / "metrics.jsonl") == list(range(2 * metrics.MOST_LINES_IN_DOUBT))


def test_a_log_that_cannot_be_cut_back_stays_as_it_is(tmp_path):
  write(tmp_path, 0, range(1, 100))
  before = (tmp_path / "metrics.jsonl").read_bytes()
  found, said = run(
    """
    limit(500)
    try:
      metrics.MetricsWriter(workdir, 50)
    except StorageError as error:
      print(json.dumps(str(error)))
    """,
    tmp_path,
  )
  assert found == f"{tmp_path}/metrics.jsonl cannot be cut back to step 50 (File too large)." and not said
  assert (tmp_path / "metrics.jsonl").read_bytes() == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_log_that_cannot_be_opened_is_said_in_a_sentence(tmp_path):
  (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "nowhere" / "metrics.jsonl")
  with pytest.raises(metrics.StorageError, match=r"metrics.jsonl cannot be opened \(No such file or directory\)\."):
    metrics.MetricsWriter(tmp_path, 0)


def test_other_processes_have_nothing_to_put_on_disk():
  assert metrics.NoMetrics().sync() is True
