"""A project whose training takes no time, programs that only seem to do something, and what they were called with."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.launch import documented

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ("gcloud", "kubectl", "sbatch", "squeue", "scontrol", "scancel", "docker", "sky")
OF_MACHINES = ("curl", "uv", "sudo", "mountpoint", "findmnt", "hostname", "lsb_release")

# Instead of the project's: what a start does is said by plan.json, a list with one entry a start.
MAIN = '''
import json, os, pathlib, signal, sys, time

fakes, worker = pathlib.Path(os.environ["FAKES"]), os.environ["WORKER"]
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
starts = fakes / f"starts.{worker}"
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("x" * (number + 1))
plan = json.loads((fakes / "plan.json").read_text())
what = plan[min(number, len(plan) - 1)]
print("main.py", number, *sys.argv[1:], flush=True)
if "life" in what and worker == "0":  # of the resource that this runs on
  import fcntl

  with (fakes / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = json.loads((fakes / "cloud.json").read_text())
    state["life"] = what["life"]
    (fakes / "cloud.json").write_text(json.dumps(state))
until = time.monotonic() + what.get("seconds", 0)
while time.monotonic() < until and not stopped:
  time.sleep(0.02)
if stopped:
  print("saved", flush=True)
sys.exit(75 if stopped else what["code"])
'''


@pytest.fixture(scope="session")
def committed(tmp_path_factory):
  """A project as one commit: the scripts as they are, a recipe, and a main.py that does what it is told."""
  for needed in ("git", "tmux"):
    if not shutil.which(needed):
      pytest.skip(f"{needed} is not installed")
  root = tmp_path_factory.mktemp("project")
  shutil.copytree(ROOT / "launch", root / "launch")
  for name in ("setup.py", "constraints.txt", "pyproject.toml", "README.md"):
    shutil.copy(ROOT / name, root)
  for name, text in (("main.py", MAIN), ("clip_jax/__init__.py", ""), ("jax.py", ""), ("configs/vitb16.py", "")):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(text)
  git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@example.com"]
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=all"]):
    subprocess.run([*git, *words], check=True)
  return root


class World:
  """A project, programs, and a cloud."""

  def __init__(self, root, folder):
    """Prepares.

    Args:
      root: of the project.
      folder: for programs and what they note; short, as the sockets of tmux are in it.
    """
    self.root, self.folder = root, folder
    for place, names in (("bin", PROGRAMS), ("machine", OF_MACHINES), ("hidden", ("gcsfuse",))):
      (folder / place).mkdir()
      for name in names:
        path = folder / place / name
        if place == "bin":
          path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {ROOT}/tests/launch/fake_programs.py {name} "$@"\n')
        else:
          shutil.copy(ROOT / "tests/launch/fake_machine.sh", path)
        path.chmod(0o755)
    self.cloud()
    self.plan({"code": 0})
    system = ":".join([os.defpath, *(os.path.dirname(shutil.which(program)) for program in ("git", "tmux"))])
    self.env = {"PATH": f"{folder}/bin:{system}", "SYSTEM_PATH": system, "POLL_SECONDS": "0.05", **dict.fromkeys(("HOME", "FAKES", "TMPDIR"), str(folder))}

  def cloud(self, workers=2, slices=1, filesystem="nfs4", broken=0, **changes):
    """What there is in the cloud, and will be; how many workers and slices, and what their machines are like."""
    for name, value in (("workers", workers), ("slices", slices), ("filesystem", filesystem), ("broken", broken)):
      (self.folder / name).write_text(f"{value}\n")
    state = {"state": "NONE", "life": [], "lives": [], "creations": [], "outages": {}, "missing": 0, "configured": {}, "message": ""}
    (self.folder / "cloud.json").write_text(json.dumps({**state, **changes}))

  @property
  def state(self):
    """What there is in the cloud now."""
    return json.loads((self.folder / "cloud.json").read_text())

  def plan(self, *starts):
    """What main.py does at each of its starts."""
    (self.folder / "plan.json").write_text(json.dumps(starts))

  def command(self, script, *words):
    """The words of a script's command line."""
    return ["bash", str(self.root / "launch" / script), *words]

  def run(self, script, *words, **env):
    """Runs a script to its end, and returns what it did."""
    return self.shell(self.command(script, *words), **env)

  def shell(self, command, **env):
    """Runs a command line to its end, and returns what it did."""
    env = {**self.env, **env}
    return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)

  def records(self):
    """All calls so far, as dicts with `words` and `given`."""
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def calls(self, *starts):
    """The words of the calls so far, of those that begin with some words if any are given."""
    words = [record["words"] for record in self.records()]
    return [one for one in words if not starts or " ".join(one).startswith(starts)]

  def done(self):
    """What was done on the machines, one line each: the worker, the program, its arguments."""
    return (self.folder / "machine.log").read_text().splitlines()

  def forget(self):
    """Forgets the calls."""
    (self.folder / "calls.jsonl").unlink(missing_ok=True)

  def starts(self, worker=0):
    """How often main.py was started on a worker."""
    path = self.folder / f"starts.{worker}"
    return len(path.read_text()) if path.exists() else 0

  def close(self):
    """Ends what still runs, and checks that all calls are documented."""
    for home in self.folder.glob("home/*"):
      subprocess.run(["tmux", "kill-server"], env={**self.env, "TMUX_TMPDIR": str(home)}, stderr=subprocess.DEVNULL, check=False)
    for words in self.calls():
      documented.check(words)


@pytest.fixture
def world(committed):
  """A `World`; in the end each call must be one that the programs' reference pages allow."""
  with tempfile.TemporaryDirectory(prefix="w", dir="/tmp") as folder:
    made = World(committed, pathlib.Path(folder))
    yield made
    made.close()


def lines(text):
  """The command lines of a dry run, as words."""
  return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]
