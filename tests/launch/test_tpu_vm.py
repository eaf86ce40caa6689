"""launch/tpu_vm: each script by itself, its dry run, and what workers do."""

import os
import signal
import time

import pytest

from tests.launch.conftest import lines

ZONE = "--zone=us-west4-a"
GCLOUD = "gcloud compute tpus queued-resources"
TYPE = "--accelerator-type=v5litepod-16"


def ready(world, *more):
  """Machines that are there, and set up."""
  world.cloud(state="ACTIVE")
  done = world.run("tpu_vm/setup.sh", "b16", *(more or ("/nfs/b16",)), ZONE)
  assert done.returncode == 0, done.stderr
  return done


SCRIPTS = {
  "create": ("create.sh", "b16", ZONE, TYPE, "--spot", "--labels=team=a,run=b"),
  "create slices": ("create.sh", "b16", ZONE, TYPE, "--node-count=2", "--reserved", "--internal-ips"),
  "create flex-start": ("create.sh", "b16", ZONE, TYPE, "--provisioning-model=flex-start", "--max-run-duration=7d"),
  "setup": ("setup.sh", "b16", "gs://my-bucket/runs/b16", ZONE, "--extras=tpu,wandb", "--tunnel-through-iap"),
  "run": ("run.sh", "b16", "configs/vitb16.py", "{folder}/runs/b16", ZONE, "--", "--config.data.path=it's {0..9} $HOME.tar"),
  "logs": ("logs.sh", "b16", ZONE, "--lines=5"),
  "stop": ("stop.sh", "b16", ZONE),
  "babysit": ("babysit.sh", "b16", "configs/vitb16.py", "{folder}/runs/b16", ZONE, TYPE, "--spot", "--", "--config.data.path=it's {0..9} $HOME.tar"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_dry_run_changes_nothing_and_prints_what_is_then_done(world, name):
  script, *words = [word.replace("{folder}", str(world.folder)) for word in SCRIPTS[name]]

  def calls_of(run):
    world.cloud()
    if not name.startswith(("create", "babysit")):
      ready(world)
    if name == "logs":
      assert world.run("tpu_vm/run.sh", "b16", "configs/vitb16.py", str(world.folder / "runs/b16"), ZONE).returncode == 0
    for archive in world.folder.glob("clip_jax*"):
      archive.unlink()
    world.forget()
    done = run()
    return done, list(dict.fromkeys(map(tuple, world.calls())))

  dry, calls = calls_of(lambda: world.run(f"tpu_vm/{script}", words[0], "--dry-run", *words[1:]))
  assert dry.returncode == 0, dry.stderr
  assert calls == [] and not list(world.folder.glob("clip_jax*"))
  _, printed = calls_of(lambda: world.shell(["bash", "-c", dry.stdout]))
  done, real = calls_of(lambda: world.run(f"tpu_vm/{script}", *words))
  assert done.returncode == 0, done.stderr
  assert printed == real != []


def test_what_is_unset_is_gclouds_default(world):
  world.cloud(configured={"compute/zone": "us-east5-b"})
  done = world.run("tpu_vm/create.sh", "b16", TYPE, "--dry-run", "--no-wait")
  expected = f"{GCLOUD} create b16 --zone=us-east5-b --quiet {TYPE} --runtime-version=v2-alpha-tpuv5-lite --node-id=b16"
  assert lines(done.stdout) == [expected.split()]
  world.cloud()
  done = world.run("tpu_vm/create.sh", "b16", TYPE)
  assert done.returncode == 2
  assert "--zone is missing" in done.stderr


@pytest.mark.parametrize(
  ("kind", "runtime"),
  [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_an_accelerator_gets_its_runtime(world, kind, runtime):
  done = world.run("tpu_vm/create.sh", "b16", f"--accelerator-type={kind}", ZONE, "--dry-run")
  assert f"--runtime-version={runtime}" in lines(done.stdout)[0]
  done = world.run("tpu_vm/create.sh", "b16", f"--accelerator-type={kind}", ZONE, "--runtime-version=mine", "--dry-run")
  assert "--runtime-version=mine" in lines(done.stdout)[0]


def test_create_tells_of_each_state_and_of_what_ends_it(world):
  world.cloud(lives=[["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  done = world.run("tpu_vm/create.sh", "b16", TYPE, ZONE)
  assert done.returncode == 0
  assert [line.split(" ", 1)[1] for line in done.stderr.splitlines() if " is " in line] == [
    f"b16 is {state}." for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
  ]
  world.cloud(lives=[["PROVISIONING", "SUSPENDED"]], message="SERVICE stopped for maintenance")
  done = world.run("tpu_vm/create.sh", "b16", TYPE, ZONE)
  assert done.returncode == 1
  assert "b16 is SUSPENDED" in done.stderr and "stopped for maintenance" in done.stderr


def test_quota_and_a_network_that_is_away_are_told_apart(world):
  world.cloud(creations=["quota"])
  done = world.run("tpu_vm/create.sh", "b16", TYPE, ZONE)
  assert done.returncode == 2 and "for want of quota" in done.stderr
  world.cloud(outages={"create": 1})
  done = world.run("tpu_vm/create.sh", "b16", TYPE, ZONE)
  assert done.returncode == 1 and "Network is unreachable" in done.stderr and "quota:" not in done.stderr


def test_setup_gives_workers_the_last_commit_and_a_bucket(world):
  ready(world, "gs://my-bucket/runs/b16", "--extras=tpu,wandb")
  for worker in ("0", "1"):
    home = world.folder / "home" / worker
    assert (home / "clip_jax/main.py").read_text() == (world.root / "main.py").read_text()
    done = [line for line in world.done() if line.startswith(worker)]
    assert any("uv pip install --python .venv/bin/python -c constraints.txt -e .[tpu,wandb]" in line for line in done)
    mount = next(line for line in done if " gcsfuse " in line)
    assert mount.endswith(f" my-bucket {home}/clip_jax_buckets/my-bucket")
    # Without the last three a run loses what it has synced, does not see what other hosts wrote, or cannot name a checkpoint.
    assert {"--enable-streaming-writes=false", "--metadata-cache-ttl-secs=0", "--rename-dir-limit=200000"} < set(mount.split())
  # Again, with a file that is not of this commit: it goes, the packages stay, and the bucket is not mounted twice.
  (home / "clip_jax/old.py").touch()
  (home / "clip_jax/.venv/kept").touch()
  ready(world, "gs://my-bucket/runs/b16")
  assert not (home / "clip_jax/old.py").exists() and (home / "clip_jax/.venv/kept").exists()
  assert sum(" gcsfuse " in line for line in world.done()) == 2


def test_setup_refuses_what_workers_would_not_get(world):
  changed = world.root / "setup.py"
  before = changed.read_text()
  try:
    changed.write_text(before + "# changed\n")
    done = world.run("tpu_vm/setup.sh", "b16", "/nfs/b16", ZONE)
  finally:
    changed.write_text(before)
  assert done.returncode == 2 and "setup.py" in done.stderr and "not committed" in done.stderr
  (world.root / "configs/mine.py").touch()
  done = world.run("tpu_vm/babysit.sh", "b16", "configs/mine.py", "/nfs/b16", ZONE, TYPE)
  (world.root / "configs/mine.py").unlink()
  assert done.returncode == 2 and "configs/mine.py is not in the last commit" in done.stderr
  assert world.calls() == []


def test_a_run_starts_once_on_all_workers_and_in_the_bucket(world):
  ready(world, "gs://my-bucket/runs/b16")
  world.plan({"code": 0, "seconds": 20})
  words = ("b16", "configs/vitb16.py", "gs://my-bucket/runs/b16", ZONE, "--", "--config.data.path=it's $HOME {1..2}.tar")
  done = world.run("tpu_vm/run.sh", *words)
  assert done.returncode == 0, done.stderr
  done = world.run("tpu_vm/run.sh", *words)
  assert done.returncode == 2 and "a run is going on already on b16" in done.stderr
  done = world.run("tpu_vm/setup.sh", "b16", "gs://my-bucket/runs/b16", ZONE)
  assert done.returncode == 1 and "a run is going on there" in done.stderr
  done = world.run("tpu_vm/logs.sh", "b16", ZONE)
  home = world.folder / "home/0"
  said = f"main.py 0 --config=configs/vitb16.py --workdir={home}/clip_jax_buckets/my-bucket/runs/b16 --config.data.path=it's $HOME {{1..2}}.tar"
  assert said in done.stdout.splitlines()
  done = world.run("tpu_vm/stop.sh", "b16", ZONE, "--keep")
  assert done.stdout.splitlines() == ["worker-0 stopped 75", "worker-1 stopped 75"], done.stderr
  assert [world.starts(0), world.starts(1)] == [1, 1]
  assert world.calls(f"{GCLOUD} delete") == []
  assert "saved" in world.run("tpu_vm/logs.sh", "b16", ZONE).stdout


def test_a_worker_that_missed_the_code_is_told_of(world):
  ready(world)
  (world.folder / "home/1/clip_jax/.commit").write_text("older\n")
  ours = world.folder / "home/1/clip_jax/launch/tpu_vm/worker.sh"
  env = {"HOME": str(world.folder / "home/1"), "WORKER": "1", "PATH": f"{world.folder}/machine:{world.env['SYSTEM_PATH']}"}
  done = world.shell(["bash", str(ours), "setup", "newer", "tpu"], **env)
  assert done.returncode == 1
  assert done.stderr == "worker-1: the code here is not that of commit newer.\n"


def test_a_machine_that_goes_down_lets_the_run_save(world):
  # systemd ends tmux, whose end hangs up on what runs in it, and tells processes to end.
  ready(world)
  world.plan({"code": 0, "seconds": 20})
  assert world.run("tpu_vm/run.sh", "b16", "configs/vitb16.py", str(world.folder / "runs/b16"), ZONE).returncode == 0
  home = world.folder / "home/0"
  world.shell(["tmux", "kill-server"], TMUX_TMPDIR=str(home))
  time.sleep(0.3)
  os.kill(int((home / "clip_jax_run/pid").read_text()), signal.SIGTERM)
  until = time.monotonic() + 20
  while not (home / "clip_jax_run/exit").exists():
    assert time.monotonic() < until
    time.sleep(0.05)
  assert (home / "clip_jax_run/exit").read_text() == "75\n"
  assert "saved" in (home / "clip_jax_run/log").read_text()


def test_what_was_not_set_up_is_said_to_be(world):
  world.cloud(state="ACTIVE")
  done = world.run("tpu_vm/run.sh", "b16", "configs/vitb16.py", "/nfs/b16", ZONE)
  assert done.returncode == 127
  assert "b16 is not set up; launch/tpu_vm/setup.sh does it." in done.stderr


def test_only_a_slice_of_one_host_may_have_a_disk_of_its_own(world):
  for workers, code in ((1, 0), (2, 2)):
    world.cloud(state="ACTIVE", workers=workers, filesystem="ext4")
    assert world.run("tpu_vm/setup.sh", "b16", "/home/me/b16", ZONE).returncode == 0
    done = world.run("tpu_vm/run.sh", "b16", "configs/vitb16.py", "/home/me/b16", ZONE)
    assert done.returncode == code, done.stderr
    world.run("tpu_vm/stop.sh", "b16", ZONE)
  assert "own disk (ext4)" in done.stderr


def test_stop_deletes_only_what_could_be_told_to_save(world):
  ready(world)
  world.cloud(state="ACTIVE", outages={"ssh": 1})
  done = world.run("tpu_vm/stop.sh", "b16", ZONE)
  assert done.returncode == 1 and "nothing was deleted" in done.stderr
  assert world.state["state"] == "ACTIVE"
  world.cloud(state="ACTIVE", outages={"ssh": 1})
  done = world.run("tpu_vm/stop.sh", "b16", ZONE, "--force")
  assert done.returncode == 0 and world.state["state"] == "NONE"


def test_stop_ends_a_request_that_still_waits_and_says_what_is_not_there(world):
  world.cloud(state="WAITING_FOR_RESOURCES")
  done = world.run("tpu_vm/stop.sh", "b16", ZONE)
  assert done.returncode == 0 and world.state["state"] == "NONE"
  done = world.run("tpu_vm/stop.sh", "b16", ZONE)
  assert done.returncode == 2
  assert "there is no queued resource b16 there" in done.stderr


def test_a_machine_that_was_never_set_up_can_be_stopped(world):
  world.cloud(state="ACTIVE")
  done = world.run("tpu_vm/stop.sh", "b16", ZONE)
  assert done.returncode == 0 and world.state["state"] == "NONE"
