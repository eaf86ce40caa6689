"""Where the runs of a sweep are trained: processes of this machine, jobs of Slurm, jobs of Kubernetes."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import string
import subprocess
from pathlib import Path

from clip_jax.errors import UsageError
from clip_jax.files import read_json, tell, write_json
from clip_jax.parallel import clusters

SLURM = """#!/bin/bash
#SBATCH --job-name=$name
#SBATCH --output=$log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
srun $command
"""


class Local:
  """Processes of this machine, which also go on when this one is killed."""

  pause = 1.0  # seconds between looks

  def __init__(self, folder, most):
    """Prepares.

    Args:
      folder: of the sweep; logs are written into its folder `logs`.
      most: how many runs may be trained at a time.
    """
    self._logs, self.most = Path(folder) / "logs", most
    self._logs.mkdir(parents=True, exist_ok=True)
    self._processes, self._places = {}, {}
    self._devices = _shares_of_gpus(most)

  def start(self, planned):
    """Starts a run.

    Args:
      planned: a `clip_jax.scaling.sweep.Planned`.

    Returns:
      Whether it was started: nothing is while another process, of an earlier call or another one, trains it.
    """
    name = planned.run.name
    lock = self._lock(name)
    if lock is None:
      return False
    environment, place = dict(os.environ), None
    if self._devices:
      place = min(set(range(len(self._devices))) - set(self._places.values()))
      environment["CUDA_VISIBLE_DEVICES"] = self._devices[place]
    with lock, (self._logs / f"{name}.log").open("ab") as log:
      # In a session of its own, so that Ctrl-C reaches it once, through us. It keeps the lock for as long as it lives.
      self._processes[name] = subprocess.Popen(
        planned.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True, pass_fds=[lock.fileno()]
      )
    if place is not None:
      self._places[name] = place
    return True

  def _lock(self, name):
    lock = (self._logs / f"{name}.lock").open("wb")
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      lock.close()
      return None
    return lock

  def running(self, names):
    """Which of some runs are being trained, here or by a process of an earlier call."""
    found = set(self._processes) & set(names)  # until `ended` tells of it
    for name in set(names) - found:
      lock = self._lock(name)
      if lock is None:
        found.add(name)
      else:
        lock.close()
    return found

  def ended(self):
    """Those that ended since the last time, as pairs of a name and an exit code."""
    over = [(name, code) for name, process in self._processes.items() if (code := process.poll()) is not None]
    for name, _ in over:
      del self._processes[name]
      self._places.pop(name, None)
    return over

  def stop(self):
    """Has all runs that were started here save and end."""
    for process in self._processes.values():
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    for process in self._processes.values():
      process.wait()

  def log(self, name):
    """Where a run's output is."""
    return self._logs / f"{name}.log"


class _Jobs:
  """Jobs of a cluster, which are there after this process is gone; `jobs.json` remembers them."""

  template, pause = None, 10.0

  def __init__(self, folder, most, template=None):
    """Prepares.

    Args:
      folder: of the sweep, which the jobs must see under the same name.
      most: how many jobs may be there at a time.
      template: a file with $name, $command and $log, or $shell_command, the same as a JSON list; see docs/scaling.md.

    Raises:
      UsageError: the template is missing or cannot be used, or there is no cluster.
    """
    self._folder, self.most, self._silent = Path(folder), most, False
    (self._folder / "logs").mkdir(parents=True, exist_ok=True)
    self._known = self._folder / "jobs.json"
    self._jobs = read_json(self._known) if self._known.exists() else {}
    try:
      text = Path(template).read_text(encoding="utf-8") if template else self.template
    except (OSError, ValueError) as error:
      raise UsageError(f"--template={template} cannot be read ({error}).") from error
    if text is None:
      raise UsageError(f"--executor {self.name} needs a --template, such as launch/gke/job.yaml.")
    if "$command" not in text and "$shell_command" not in text:
      raise UsageError(f"--template={template} has no $command, which is where the run goes.")
    self._template = string.Template(text)

  def start(self, planned):
    """Submits a run. Returns True.

    Args:
      planned: a `clip_jax.scaling.sweep.Planned`.

    Raises:
      UsageError: the cluster refuses it; the message is the cluster's.
    """
    run, command = planned.run, self.command_of(planned)
    try:
      text = self._template.substitute(
        name=self.name_of(run.name), log=self.log(run.name), command=shlex.join(command), shell_command=json.dumps(command)
      )
    except (KeyError, ValueError) as error:
      raise UsageError(f"The template has a $ that stands for nothing ({error}); $name, $command, $shell_command and $log do, and $$ is a $.") from error
    self._jobs[run.name] = self.submit(text)
    write_json(self._known, self._jobs)
    return True

  def running(self, names):
    """Which of some runs had a job that waits or runs, when `ended` was called."""
    return set(self._jobs) & set(names)

  def ended(self):
    """Those whose jobs ended since the last time, as pairs of a name and an exit code; None where the cluster does not tell."""
    try:
      alive = self.alive(list(self._jobs.values())) if self._jobs else set()
    except UsageError as error:  # clusters do not always answer, and runs take days
      if not self._silent:
        tell(f"{error} Its jobs are taken to go on until it answers.")
      self._silent = True
      return []
    self._silent = False
    gone = {name: job for name, job in sorted(self._jobs.items()) if job not in alive}
    for name in gone:
      del self._jobs[name]
    if gone:
      write_json(self._known, self._jobs)
    return [(name, self.code_of(job)) for name, job in gone.items()]

  def stop(self):
    """Leaves all jobs as they are."""

  def log(self, name):
    """Where a run's output is."""
    return self._folder.absolute() / "logs" / f"{name}.log"


class Slurm(_Jobs):
  """Jobs of Slurm, by sbatch and squeue."""

  name, template = "slurm", SLURM

  def name_of(self, run):
    """What the job of a run is called."""
    return run

  def command_of(self, planned):
    """What a job of a run does: the nodes have the same files as this machine."""
    return planned.command

  def submit(self, script):
    """Submits a script and returns the number of its job."""
    return _ask(["sbatch", "--parsable"], script).strip().partition(";")[0]

  def alive(self, jobs):
    """Those of some jobs that wait or run."""
    # All of the user's: squeue fails when it is asked for a number that it has forgotten.
    return set(jobs) & set(_ask(["squeue", "--me", "--noheader", "--format=%A"]).split())

  def code_of(self, job):
    """The exit code of a job that is over, negative for a signal, as long as Slurm remembers it (MinJobAge, five minutes)."""
    with contextlib.suppress(UsageError):
      found = re.search(r"\bExitCode=(\d+):(\d+)", _ask(["scontrol", "--oneliner", "show", "job", job]))
      return (-int(found[2]) or int(found[1])) if found else None
    return None


class Gke(_Jobs):
  """Jobs of Kubernetes, by kubectl; the manifest is a template."""

  name = "gke"

  def name_of(self, run):
    """What the job of a run is called: Kubernetes takes small letters, digits and -."""
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")[:52]

  def command_of(self, planned):
    """What a job of a run does, in the folder of the project in a container."""
    return shlex.split(planned.line)

  def submit(self, manifest):
    """Creates what a manifest says, in the place of an earlier one, and returns its name, such as job.batch/b-32."""
    _ask(["kubectl", "delete", "--ignore-not-found", "--filename=-"], manifest)
    made = _ask(["kubectl", "create", "--output=name", "--filename=-"], manifest).split()
    return next((one for one in made if "job" in one.partition("/")[0]), made[0])  # there may be a service beside it

  def alive(self, jobs):
    """Those of some jobs that are neither complete nor failed."""
    found = json.loads(_ask(["kubectl", "get", "--output=json", *jobs, "--ignore-not-found"]).strip() or "{}")
    items = found.get("items", [found] if found else [])
    over = {"Complete", "Completed", "Failed"}
    alive = set()
    for item in items:
      conditions = item.get("status", {}).get("conditions") or []
      if not any(one["type"] in over and one["status"] == "True" for one in conditions):
        alive.add(item["metadata"]["name"])
    return {job for job in jobs if job.rpartition("/")[2] in alive}

  def code_of(self, job):
    """None: a job has made new pods for those that were stopped early before it counts as failed."""


def _ask(command, given=None):
  try:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
  except FileNotFoundError as error:
    raise UsageError(f"{command[0]} is not on this machine; run this where jobs are submitted, or take --executor local or print.") from error
  if done.returncode:
    raise UsageError(f"{' '.join(command[:3])} failed: {' '.join(done.stderr.split()).rstrip('.') or f'exit code {done.returncode}'}.")
  return done.stdout


def _shares_of_gpus(parts):
  """The GPUs of this machine in equal parts, each as CUDA_VISIBLE_DEVICES; none if there are none, or fewer than parts."""
  gpus = clusters.visible_gpus()
  each = len(gpus) // parts
  return [",".join(gpus[i * each : (i + 1) * each]) for i in range(parts)] if each and parts > 1 else []
