"""launch/slurm's commands, launch/docker and launch/skypilot."""

import json
import re
import shlex

import pytest
import yaml

from tests.launch.conftest import ROOT, lines

RUN = ("b16", "configs/vitb16.py")
ODD = "--config.data.path=it's {0..9}, $HOME.tar"


def test_sbatch_gets_flags_of_its_own_and_the_script_the_overrides(world, tmp_path):
  done = world.run("slurm/submit.sh", *RUN, str(tmp_path / "runs/b16"), "--nodes=4", "--partition=gpu", "--time=1-00:00:00", "--", ODD)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "runs/b16").is_dir()  # where Slurm writes the log, and does not make folders for it
  (words,) = world.calls()
  script = words.index(str(world.root / "launch/slurm/train.sbatch"))
  assert words[script + 1 :] == [ODD]
  expected = {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--mem=0", "--export=ALL", f"--chdir={world.root}"}
  assert expected < set(words[:script])


def test_processors_alone_and_parts_of_nodes_can_be_had(world):
  done = world.run("slurm/submit.sh", *RUN, "runs/b16", "--gpus-per-node=0", "--cpus-per-task=2", "--mem=4G", "--dry-run")
  words = lines(done.stdout)[-1]
  assert not any(word.startswith(("--gpus", "--exclusive")) for word in words)
  assert f"WORKDIR={world.root}/runs/b16" in words
  assert {"--cpus-per-task=2", "--mem=4G"} < set(words)


def test_what_a_dry_run_of_slurm_prints_is_what_is_done(world, tmp_path):
  words = ("slurm/submit.sh", *RUN, str(tmp_path / "b16"), "--nodes=2")
  printed = world.run(*words, "--dry-run", "--", ODD).stdout
  world.shell(["bash", "-c", printed])
  world.run(*words, "--", ODD)
  printed_call, real_call = world.calls()
  assert printed_call == real_call


def test_stopping_takes_the_way_back_into_the_queue_first(world):
  world.cloud(says={"squeue": ["7", "8"]})
  done = world.run("slurm/stop.sh", "b16")
  assert done.returncode == 0, done.stderr
  assert [" ".join(words) for words in world.calls("scontrol", "scancel")] == [
    line for job in (7, 8) for line in (f"scontrol update JobId={job} Requeue=0", f"scancel --signal=TERM {job}", f"scancel --state=PENDING {job}")
  ]
  world.cloud()
  done = world.run("slurm/stop.sh", "b16")
  assert done.returncode == 2 and "you have no job of the name b16" in done.stderr


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_an_image_is_of_the_last_commit_and_named_by_it(world, kind):
  (world.root / "secret.txt").write_text("not in the commit")
  done = world.run("docker/build.sh", kind, "us-west4-docker.pkg.dev/my-project/clip")
  (world.root / "secret.txt").unlink()
  assert done.returncode == 0, done.stderr
  commit = world.shell(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
  image = f"us-west4-docker.pkg.dev/my-project/clip/{kind}:{commit}"
  assert done.stdout.splitlines()[-1] == image
  build, push = world.records()
  assert f"--file=launch/docker/Dockerfile.{kind}" in build["words"] and f"--tag={image}" in build["words"]
  assert "main.py" in build["given"] and "secret.txt" not in build["given"]
  assert push["words"] == ["docker", "push", image]


def test_what_a_dry_run_of_docker_prints_is_what_is_done(world):
  words = ("docker/build.sh", "tpu", "us-west4-docker.pkg.dev/my-project/clip")
  printed = world.run(*words, "--dry-run").stdout
  world.shell(["bash", "-c", printed])
  printed_calls = world.records()
  world.forget()
  world.run(*words)
  assert printed_calls == world.records()
  world.forget()
  world.run(*words, "--no-push", "--user=0")
  (build,) = world.calls()
  assert "--build-arg=RUN_AS=0" in build and any(word.startswith("--tag=") and word.endswith("-user0") for word in build)


@pytest.mark.parametrize("kind", ["tpu", "cuda"])
def test_an_image_copies_what_there_is_and_dependencies_first(kind):
  text = (ROOT / f"launch/docker/Dockerfile.{kind}").read_text()
  copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
  assert all((ROOT / source).exists() for sources in copies for source in sources)
  assert copies[0] == ["setup.py", "pyproject.toml", "constraints.txt"]
  assert f"'.[{kind}]'" in text and re.search(rf'^  "{kind}": ', (ROOT / "setup.py").read_text(), re.M)
  assert text.index("-c constraints.txt") < text.index("COPY clip_jax")
  assert text.rindex("ARG RUN_AS=1000\nUSER $RUN_AS") > text.rindex("\nRUN")
  assert json.loads(re.search(r"^ENTRYPOINT (.*)", text, re.M)[1]) == ["python"]


def test_skypilot_gets_the_run_by_its_environment(world):
  done = world.run("skypilot/launch.sh", *RUN, "gs://my-bucket/runs/b16", "--accelerator-type=v6e-16", "--zone=us-east5-b", "--on-demand", "--", ODD)
  assert done.returncode == 0, done.stderr
  (words,) = world.calls()
  assert words[3] == str(world.root / "launch/skypilot/train.yaml")
  assert {"--gpus=tpu-v6e-16", "--infra=gcp/us-east5/us-east5-b", "--no-use-spot", "--env=BUCKET=my-bucket", "--env=NAME=b16"} < set(words)
  overrides = next(word for word in words if word.startswith("--env=OVERRIDES="))
  assert shlex.split(overrides.removeprefix("--env=OVERRIDES=")) == [ODD]
  world.forget()
  assert lines(world.run("skypilot/launch.sh", *RUN, "gs://my-bucket/runs/b16", "--dry-run", "--", ODD).stdout)[0][:3] == ["sky", "jobs", "launch"]
  assert world.calls() == []


def test_the_task_of_skypilot_trains_in_the_bucket_and_goes_on_after_75_alone(world, tmp_path):
  task = yaml.safe_load((ROOT / "launch/skypilot/train.yaml").read_text())
  recovery = task["resources"]["job_recovery"]
  assert 75 in recovery["recover_on_exit_codes"] and 2 not in recovery["recover_on_exit_codes"]
  assert recovery["max_restarts_on_errors"] == 0
  assert task["file_mounts"] == {"/buckets/${BUCKET}": {"source": "gs://${BUCKET}", "mode": "MOUNT"}}
  worker = (ROOT / "launch/tpu_vm/worker.sh").read_text()  # the same tools as there
  python_version, uv = re.search(r"PYTHON_VERSION=(\S+) UV=(\S+)", worker).groups()
  assert f"astral.sh/uv/{uv}/install.sh" in task["setup"] and f"--python {python_version} .venv" in task["setup"]
  python = tmp_path / ".venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  env = {"NAME": "b16", "CONFIG": "configs/vitb16.py", "WORKDIR": "gs://my-bucket/runs/b16", "OVERRIDES": shlex.join([ODD, "--x=1"])}
  assert set(env) | {"BUCKET"} == set(task["envs"])
  done = world.shell(["bash", "-c", f"cd {tmp_path}\n{task['run']}"], **env)
  assert done.stdout.splitlines() == ["main.py", "--config=configs/vitb16.py", "--workdir=/buckets/my-bucket/runs/b16", ODD, "--x=1"], done.stderr
