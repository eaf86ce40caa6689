"""Runs of `main.py` in real processes, as tests start, watch and compare them."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from clip_jax import cli
from tests.conftest import COMPILED

ROOT = Path(__file__).parents[2]
# tensorboardX imports torch where it is installed: two seconds of every process, for nothing that training uses.
WITHOUT_TORCH = str(Path(__file__).parent / "without_torch")
RECIPE = "tests/end_to_end/recipe.py"
STEPS = 40  # of the recipe


def environment_of(cache, devices=1):
  """Environment variables of a process of a run.

  Args:
    cache: a folder for what the project keeps between runs.
    devices: how many it has.
  """
  path = os.pathsep.join(filter(None, (WITHOUT_TORCH, os.environ.get("PYTHONPATH"))))
  variables = {"JAX_NUM_CPU_DEVICES": str(devices), "CLIP_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
  return {**os.environ, **variables, "JAX_COMPILATION_CACHE_DIR": str(COMPILED)}


def starter(data, cache, program=("main.py",)):
  """A function that starts a run of the recipe.

  Args:
    data: what it trains on.
    cache: as `environment_of`.
    program: arguments of Python.

  Returns:
    A function from a work directory and overrides (and how many devices, and more environment variables) to the process.
  """

  def start(workdir, *overrides, devices=1, environment=()):
    command = [sys.executable, *program, f"--config={RECIPE}", f"--workdir={workdir}", f"--config.data.path={data}", *overrides]
    variables = {**environment_of(cache, devices), **dict(environment)}
    return subprocess.Popen(command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  return start


def start_together(start, count, workdir, *overrides, environment=(), of_each=(), environments=()):
  """Starts the processes of one run.

  Args:
    start: what `starter` returns.
    count: how many.
    workdir: as `start`.
    *overrides: as `start`.
    environment: as `start`.
    of_each: overrides of each process alone, in their order.
    environments: likewise, more environment variables.
  """
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  shared = {**dict(environment), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
  own, variables = ([*given, *[()] * (count - len(given))] for given in (of_each, environments))
  return [start(workdir, *overrides, *own[i], environment={**shared, **dict(variables[i]), "JAX_PROCESS_ID": str(i)}) for i in range(count)]


def finish(process, code=0):
  out, err = process.communicate(timeout=300)
  assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
  return out, err


def all_lines(workdir):
  """The whole lines of `metrics.jsonl`, also while another one is written."""
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def training_lines(workdir):
  return [line for line in all_lines(workdir) if "loss" in line]


def final_state(workdir):
  """Every array of the last checkpoint, parameters and moments, by name."""
  last = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name) if p.name.isdigit() else -1)
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  tree = checkpointer.metadata(last / "state").item_metadata.tree
  # As NumPy arrays: the devices it was saved from may not be here.
  arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  state = checkpointer.restore(last / "state", args=ocp.args.PyTreeRestore(restore_args=arguments))
  return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(state)}


def exported(workdir, folder):
  """The bytes that `clip-jax export --to open_clip` makes of a run."""
  with contextlib.redirect_stdout(io.StringIO()):
    assert cli.main(["export", str(workdir), str(folder), "--to", "open_clip"]) == 0
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def wait_until(process, condition, what):
  """Waits for something to become true of a process that must not end before."""
  deadline = time.monotonic() + 200
  while time.monotonic() < deadline:
    if condition():
      return
    if process.poll() is not None:
      pytest.fail(f"ended before {what}: {process.communicate()}")
    time.sleep(0.01)
  pytest.fail(f"{what} did not come")


def wait_for_step(process, workdir, step):
  def there():
    if not (workdir / "metrics.jsonl").exists():
      return False
    lines = training_lines(workdir)
    return bool(lines) and lines[-1]["step"] >= step

  wait_until(process, there, f"step {step}")


def assert_same_run(workdir, reference, steps=STEPS):
  """Each step once, the same losses to the last bit, the same final state to the last bit."""
  ours, theirs = training_lines(workdir), training_lines(reference)
  assert [line["step"] for line in ours] == list(range(1, steps + 1))
  assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
  got, want = final_state(workdir), final_state(reference)
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert got[name].tobytes() == value.tobytes(), name
