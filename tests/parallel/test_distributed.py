"""Joining processes: what the environment may say, and two processes that share a batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from clip_jax.parallel import clusters, distributed, roll_call
from tests.evaluate import conftest as clips
from tests.parallel import two_processes
from tests.parallel.test_rules import SHAPES

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch):
  """A function that sets variables, with none of a launcher left from outside."""
  for name in (*clusters.BY_HAND, *LAUNCHERS):
    monkeypatch.delenv(name, raising=False)

  def set_variables(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, value)

  return set_variables


def test_a_process_alone_joins_nobody(environment, monkeypatch):
  monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it joined"))
  distributed.initialize()
  environment(TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES="1", SLURM_NTASKS="1")
  distributed.initialize()


@pytest.mark.parametrize("local_count, gpu", [("1", None), ("2", 1)])
def test_jax_is_told_what_the_launcher_told_and_nothing_else(environment, monkeypatch, local_count, gpu):
  """By itself it would give a task of Slurm that has a node alone the first of its GPUs."""
  calls = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: calls.append((given, named)))
  monkeypatch.setattr(roll_call, "meet", lambda cluster, seconds: calls.append((cluster.address, seconds)))
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  environment(SLURM_NTASKS="2", SLURM_STEP_NODELIST="n1", SLURM_STEP_TASKS_PER_NODE=local_count, SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_JOB_ID="2")
  distributed.initialize(50, 7)
  seconds = {"initialization_timeout": 7, "heartbeat_timeout_seconds": 50, "shutdown_timeout_seconds": 50}
  told = {"local_device_ids": gpu, "cluster_detection_method": "deactivate", **seconds}
  assert calls == [("n1:61442", 7), (("n1:61442", 2, 1), told)]


def python(*arguments, **variables):
  """Starts Python without the variables of this process that the tests are about."""
  left_out = {*clusters.BY_HAND, *LAUNCHERS, "JAX_COMPILATION_CACHE_DIR", "CLIP_JAX_CACHE"}
  kept = {name: value for name, value in os.environ.items() if name not in left_out}
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    env=kept | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def output(process):
  out, err = process.communicate(timeout=200)
  assert process.returncode == 0, err
  return out


CACHE = """
import jax
from clip_jax.parallel import clusters, distributed, roll_call
distributed.enable_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3))).block_until_ready()
"""


def test_compiled_programs_are_kept_in_the_folder_that_is_asked_for(tmp_path):
  home, ours, theirs = (tmp_path / name for name in ("home", "ours", "theirs"))
  runs = [
    python("-c", CACHE, HOME=str(home)),
    python("-c", CACHE, HOME=str(home), CLIP_JAX_CACHE=str(ours)),
    python("-c", CACHE, CLIP_JAX_CACHE=str(ours), JAX_COMPILATION_CACHE_DIR=str(theirs)),
  ]
  folders = [home / ".cache" / "clip_jax" / "xla", ours / "xla", theirs]
  for run in runs:
    output(run)
  for folder in folders:
    assert list(folder.iterdir()), folder
  # The last two runs wrote nowhere else.
  assert len(list((ours / "xla").iterdir())) == len(list(theirs.iterdir()))
  assert [p.name for p in (*ours.iterdir(), *home.iterdir())] == ["xla", ".cache"]


def test_two_processes_share_a_batch_and_embed_a_set_as_one_does(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  script = Path(two_processes.__file__)
  files = [tmp_path / f"{i}.npz" for i in range(2)]
  processes = [python(script, files[i], **dict(zip(clusters.BY_HAND, (address, "2", str(i)), strict=True))) for i in range(2)]
  try:
    found = [json.loads(output(process).splitlines()[-1]) for process in processes]
  finally:
    for process in processes:  # one that waits for another that has failed
      process.kill()
  assert [(f["process"], f["processes"]) for f in found] == [(0, 2), (1, 2)]

  assert [f["slices"] for f in found] == [[[[0, 0], [0, 0]], [[1, 1], [1, 1]]]] * 2

  rows = two_processes.ROWS
  for i, shape in enumerate(SHAPES):
    held = [f["held"][i] for f in found]
    if shape == (1, 1, 8):  # all devices are one tensor-parallel model, and need every row
      assert held == [list(range(rows))] * 2
    else:
      assert sorted(held[0] + held[1]) == list(range(rows)) and len(held[0]) == len(held[1])
    for f in found:
      for (start, stop), values in f["arrived"][i]:
        assert values == [10 * row for row in range(start, stop)], shape

  # Batches of eight over eight devices, four a process; of the last the second has only padding.
  assert [f["loaded"] for f in found] == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7]]
  reference = clips.OneAtATime(clips.random_params())
  images = reference.images(clips.pictures(two_processes.COUNT))
  texts = reference.texts(two_processes.CAPTIONS)
  for file in files:
    with np.load(file) as saved:
      np.testing.assert_allclose(saved["images"], images, rtol=0, atol=1e-6)
      np.testing.assert_allclose(saved["texts"], texts, rtol=0, atol=1e-6)


def test_libtpu_without_a_tpu_is_left_alone():
  # A real process, since this one has chosen its platform; libtpu is installed with the tests.
  program = "from clip_jax.parallel import distributed; distributed.leave_tpu_out(); import jax; print(jax.devices()[0].platform)"
  variables = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=variables, text=True, capture_output=True)
  assert done.stdout.strip() in ("cpu", "gpu", "tpu"), done.stderr
  assert done.stdout.strip() != "cpu" or not done.stderr
