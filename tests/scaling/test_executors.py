"""Where runs are trained: processes with a lock each, and jobs of clusters as their own commands are asked for them."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from clip_jax.errors import UsageError
from clip_jax.scaling import executors

ROOT = Path(__file__).parents[2]


def planned(name, code, *arguments):
  """A run whose program is a line of Python."""
  command = [sys.executable, "-c", code, *arguments]
  return SimpleNamespace(run=SimpleNamespace(name=name), command=command, line=shlex.join(["python", *command[1:]]))


def wait(executor, count=1):
  found = []
  for _ in range(600):
    found += executor.ended()
    if len(found) >= count:
      return dict(found)
    time.sleep(0.05)
  raise AssertionError(found)


def test_a_process_is_started_with_its_log_and_its_code_is_told_once(tmp_path):
  local = executors.Local(tmp_path, 2)
  assert local.start(planned("a", "import sys; print('hello'); sys.exit(75)"))
  assert local.running({"a", "b"}) == {"a"}
  assert wait(local) == {"a": 75} and local.ended() == [] and local.running({"a"}) == set()
  assert local.log("a").read_text() == "hello\n"


def test_a_run_that_another_process_trains_is_left_alone_until_it_ends(tmp_path):
  first, second = executors.Local(tmp_path, 1), executors.Local(tmp_path, 1)  # the second as after the first was killed
  stop = tmp_path / "stop"
  first.start(planned("a", "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)", str(stop)))
  assert second.running({"a", "b"}) == {"a"}
  assert not second.start(planned("a", "raise SystemExit(3)"))
  stop.touch()
  assert wait(first) == {"a": 0}
  assert second.start(planned("a", "raise SystemExit(3)")) and wait(second) == {"a": 3}


def test_stopping_is_asked_for_and_waited_for(tmp_path):
  local = executors.Local(tmp_path, 1)
  code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(60)"
  local.start(planned("a", code))
  for _ in range(600):
    if local.log("a").read_text():
      break
    time.sleep(0.05)
  local.stop()
  assert local.ended() == [("a", 75)]


def test_runs_side_by_side_share_the_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,0")
  local = executors.Local(tmp_path, 2)
  code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
  for name in "ab":
    local.start(planned(name, code))
  assert wait(local, 2) == {"a": 0, "b": 0}
  assert {local.log(name).read_text() for name in "ab"} == {"4,5\n", "6,7\n"}
  local.start(planned("c", code))
  wait(local)
  assert local.log("c").read_text() == "4,5\n"  # which are free again


def test_one_run_at_a_time_has_all_gpus(tmp_path, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
  local = executors.Local(tmp_path, 1)
  local.start(planned("a", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"))
  wait(local)
  assert local.log("a").read_text() == "4,5\n"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """Commands of clusters on PATH that write down how they were called, and answer what files say."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("sbatch", "squeue", "scontrol", "kubectl"):
    script = f"""#!{sys.executable}
import json, sys
from pathlib import Path
here = Path({str(folder)!r})
given = sys.stdin.read() if {name!r} == "sbatch" or "--filename=-" in sys.argv else ""
with (here / "calls").open("a") as file:
  file.write(json.dumps([{name!r}, *sys.argv[1:], given]) + "\\n")
answer = here / ("{name}" + ("-" + sys.argv[1] if {name!r} == "kubectl" else "") + ".answer")
if (here / "refuses").exists():
  sys.exit((here / "refuses").read_text())
print(answer.read_text() if answer.exists() else "")
"""
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
  return folder


def calls(cluster):
  return [json.loads(line) for line in (cluster / "calls").read_text().splitlines()]


def test_jobs_of_slurm_are_submitted_watched_and_remembered(cluster, tmp_path):
  (cluster / "sbatch.answer").write_text("4242;cluster")
  slurm = executors.Slurm(tmp_path, 9)
  slurm.start(planned("a b", "pass", "--config.data.path={x,y}"))
  command, *flags, script = calls(cluster)[0]
  assert (command, flags) == ("sbatch", ["--parsable"])
  assert script.startswith("#!/bin/bash\n") and "#SBATCH --job-name=a b\n" in script and f"--output={tmp_path}/logs/a b.log" in script
  assert script.endswith(f"srun {sys.executable} -c pass '--config.data.path={{x,y}}'\n") and "#SBATCH --signal=TERM@120" in script
  (cluster / "squeue.answer").write_text("17\n4242\n")
  later = executors.Slurm(tmp_path, 9)  # of another call
  assert later.ended() == [] and later.running({"a b", "c"}) == {"a b"}
  (cluster / "squeue.answer").write_text("17\n")
  assert later.ended() == [("a b", None)] and later.ended() == [] and later.running({"a b"}) == set()
  assert json.loads((tmp_path / "jobs.json").read_text()) == {}
  assert [call[:-1] for call in calls(cluster)[-2:]] == [["squeue", "--me", "--noheader", "--format=%A"], ["scontrol", "--oneliner", "show", "job", "4242"]]
  for told, code in (("75:0", 75), ("0:15", -15), ("0:0", 0)):
    (cluster / "scontrol.answer").write_text(f"JobId=4242 JobState=FAILED ExitCode={told} DerivedExitCode=1:0")
    later.start(planned("a b", "pass"))
    assert later.ended() == [("a b", code)]


def test_jobs_of_kubernetes_come_from_the_manifest_that_is_given(cluster, tmp_path):
  template = ROOT / "launch/gke/job.yaml"
  (cluster / "kubectl-create.answer").write_text("service/vit-b-32-x\njob.batch/vit-b-32-x\n")
  gke = executors.Gke(tmp_path, 9, template)
  gke.start(planned("ViT-B-32_x", "pass", "--config.data.path={x,y}"))
  (_, *delete, manifest), (_, *create, again) = calls(cluster)
  assert (delete, create) == (["delete", "--ignore-not-found", "--filename=-"], ["create", "--output=name", "--filename=-"])
  assert manifest == again
  parts = list(yaml.safe_load_all(manifest))
  job = next(part for part in parts if part["kind"] == "Job")
  container = job["spec"]["template"]["spec"]["containers"][0]
  assert job["metadata"]["name"] == "vit-b-32-x" and container["command"] == ["python", "-c", "pass", "--config.data.path={x,y}"]
  assert job["spec"]["completions"] == job["spec"]["parallelism"]  # one pod a host
  running = {"kind": "Job", "metadata": {"name": "vit-b-32-x"}, "status": {"active": 1}}
  (cluster / "kubectl-get.answer").write_text(json.dumps(running))
  assert gke.ended() == [] and gke.running({"ViT-B-32_x"}) == {"ViT-B-32_x"}
  assert calls(cluster)[-1][:4] == ["kubectl", "get", "--output=json", "job.batch/vit-b-32-x"]
  for over in (running | {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}, {}):
    (cluster / "kubectl-get.answer").write_text(json.dumps(over) if over else "")
    gke.start(planned("ViT-B-32_x", "pass"))
    assert gke.ended() == [("ViT-B-32_x", None)]


def test_what_a_cluster_says_is_passed_on(cluster, tmp_path):
  (cluster / "refuses").write_text("sbatch: error: invalid account\nor partition")
  with pytest.raises(UsageError, match="sbatch --parsable failed: sbatch: error: invalid account or partition"):
    executors.Slurm(tmp_path, 9).start(planned("a", "pass"))
  assert not (tmp_path / "jobs.json").exists()


def test_templates_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
  with pytest.raises(UsageError, match=r"--executor gke needs a --template, such as launch/gke/job.yaml"):
    executors.Gke(tmp_path, 1)
  with pytest.raises(UsageError, match="nowhere cannot be read"):
    executors.Slurm(tmp_path, 1, tmp_path / "nowhere")
  path = tmp_path / "template"
  path.write_text("srun something\n")
  with pytest.raises(UsageError, match=r"has no \$command, which is where the run goes"):
    executors.Slurm(tmp_path, 1, path)
  path.write_text("echo $HOME; $command\n")
  with pytest.raises(UsageError, match=r"has a \$ that stands for nothing \('HOME'\).*\$\$ is a \$"):
    executors.Slurm(tmp_path, 1, path).start(planned("a", "pass"))
  monkeypatch.setenv("PATH", str(tmp_path))
  path.write_text("$command\n")
  with pytest.raises(UsageError, match="sbatch is not on this machine"):
    executors.Slurm(tmp_path, 1, path).start(planned("a", "pass"))


def test_a_cluster_that_does_not_answer_for_a_while_is_waited_for(cluster, tmp_path, capsys):
  (cluster / "sbatch.answer").write_text("7")
  slurm = executors.Slurm(tmp_path, 9)
  slurm.start(planned("a", "pass"))
  (cluster / "refuses").write_text("slurm_load_jobs error: Unable to contact slurm controller")
  assert slurm.ended() == slurm.ended() == [] and slurm.running({"a"}) == {"a"}
  told = capsys.readouterr().err
  assert told.count("Unable to contact slurm controller. Its jobs are taken to go on until it answers.") == 1
  (cluster / "refuses").unlink()
  assert slurm.ended() == [("a", None)]
