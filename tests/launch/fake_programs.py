"""Stands in for the programs that `launch/` calls: records what it is called with, and behaves as the file cloud.json says.

Called as `fake_programs.py PROGRAM ARGUMENT ...` in an environment with FAKES, a folder. `gcloud ssh` runs its command for real, once a worker,
in a home folder of the worker's own, where programs that would change the machine are fake_machine.sh.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys

FAKES = pathlib.Path(os.environ["FAKES"])


@contextlib.contextmanager
def cloud():
  """What there is, to be read and changed."""
  with (FAKES / "lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = json.loads((FAKES / "cloud.json").read_text())
    yield state
    (FAKES / "cloud.json").write_text(json.dumps(state))


def record(words, given=None):
  """Notes a call."""
  with (FAKES / "calls.jsonl").open("a") as file:
    file.write(json.dumps({"words": words, "given": given}) + "\n")


def fail(text, code=1):
  """Ends as gcloud does."""
  print(f"ERROR: {text}", file=sys.stderr)
  sys.exit(code)


def flag(words, name, default=None):
  """The value of a flag."""
  return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), default)


def wreck():
  """The machines are gone, and all that was on them."""
  for home in FAKES.glob("home/*"):
    subprocess.run(["tmux", "kill-server"], env={**os.environ, "TMUX_TMPDIR": str(home)}, stderr=subprocess.DEVNULL, check=False)
    shutil.rmtree(home)


def gcloud(words):
  """The command of Google Cloud."""
  record(["gcloud", *words])
  if words[:2] == ["config", "get"]:
    with cloud() as state:
      print(state.get("configured", {}).get(words[2], ""))
    return
  verb = words[words.index("queued-resources") + 1]
  with cloud() as state:
    if state["outages"].get(verb, 0):
      state["outages"][verb] -= 1
      down = True
    else:
      down = False
  if down and verb == "ssh":
    fail("(gcloud.compute.tpus.queued-resources.ssh) [/usr/bin/ssh] exited with return code [255].", 255)
  if down:
    fail(f"(gcloud.compute.tpus.queued-resources.{verb}) There was a problem: Failed to establish a new connection: Network is unreachable")
  {"create": create, "describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[verb](words)


REFUSALS = {
  "quota": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone us-west4-a.",
  "permission": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied on 'projects/p/locations/us-west4-a/nodes/b16'",
  "capacity": "RESOURCE_EXHAUSTED: There is no more capacity in the zone \"us-west4-a\"; you can try in another zone",
}


def create(words):
  """Asks for the resource."""
  with cloud() as state:
    answer = state["creations"].pop(0) if state["creations"] else "ok"
    if answer == "ok":
      state["life"] = state["lives"].pop(0) if state["lives"] else ["ACTIVE"]
      state["state"] = "CREATING"
  print("WARNING: the active project does not match the quota project in your credentials file.", file=sys.stderr)
  if answer != "ok":
    fail(f"(gcloud.compute.tpus.queued-resources.create) {REFUSALS[answer]}")


def describe(words):
  """Tells the state, which goes on with its life each time it is asked for."""
  asked = flag(words, "--format")
  with cloud() as state:
    if asked != "value(state.state)":
      print(state.get("message", ""))
      return
    if state["state"] != "NONE" and state["life"]:
      state["state"] = state["life"].pop(0)
    found = state["state"]
  if found == "NONE":
    fail("(gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/b16' was not found")
  if found in ("SUSPENDING", "SUSPENDED"):
    wreck()
  print(found)


def delete(words):
  """Deletes the resource and its machines."""
  with cloud() as state:
    found, state["state"], state["life"] = state["state"], "NONE", []
  if found == "NONE":
    fail("(gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: Resource was not found")
  wreck()


def workers(words):
  """The home folders of the workers a command is for."""
  with cloud() as state:
    if state["state"] != "ACTIVE":
      fail(f"(gcloud.compute.tpus.queued-resources.ssh) The node is {state['state']}.")
    number = int((FAKES / "workers").read_text()) if flag(words, "--worker") == "all" else 1
    reached = number - (state["missing"] if number > 1 else 0)
  if reached < number:
    print(f"WARNING: Could not prepare all {number} nodes, attempting to ssh into the rest.", file=sys.stderr)
  for one in range(reached):
    home = FAKES / "home" / str(one)
    home.mkdir(parents=True, exist_ok=True)
    yield one, home


def ssh(words):
  """Runs a command on workers, at the same time."""
  started = []
  for one, home in workers(words):
    path = f"{home}/bin:{FAKES}/machine:{os.environ['SYSTEM_PATH']}"
    env = {"HOME": str(home), "PATH": path, "TMUX_TMPDIR": str(home), "WORKER": str(one), "FAKES": str(FAKES), "REAL_PYTHON": sys.executable}
    command = ["bash", "-c", flag(words, "--command")]
    started.append(subprocess.Popen(command, cwd=home, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True))
  codes = []
  for process in started:
    out, err = process.communicate()
    sys.stdout.write(out)
    sys.stderr.write(err)
    codes.append(process.returncode)
  sys.exit(next((code for code in codes if code), 0))


def scp(words):
  """Copies a file to workers."""
  source, target = [word for word in words if not word.startswith("-")][-2:]
  assert target.endswith(":"), target
  for _, home in workers(words):
    shutil.copy(source, home)


def main(program, words):
  """Does what a program would."""
  if program == "gcloud":
    gcloud(words)
  else:
    given = sys.stdin.read() if "--filename=-" in words else None
    if program == "docker" and words[-1] == "-":
      listed = subprocess.run(["tar", "-t"], stdin=sys.stdin, capture_output=True, text=True, check=True).stdout
      given = sorted(listed.split())
    record([program, *words], given)
    with cloud() as state:
      answers = [] if "--states=PENDING" in words else state.get("says", {}).get(program, [])
    print(*answers, sep="\n")


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2:])
