"""launch/tpu_vm/babysit.sh against a cloud that takes machines away, does not answer, and refuses; training and tmux are real processes."""

import signal
import subprocess
import time

import pytest

RUN = ("b16", "configs/vitb16.py", "/nfs/b16", "--zone=us-west4-a", "--accelerator-type=v5litepod-16", "--spot")
GCLOUD = "gcloud compute tpus queued-resources"


@pytest.fixture
def babysit(world, tmp_path):
  """Runs the script with a work directory on a disk that all workers see."""

  def run(*more, **env):
    return world.run("tpu_vm/babysit.sh", RUN[0], RUN[1], str(tmp_path / "runs/b16"), *RUN[3:], *more, **env)

  return run


def test_a_run_that_nothing_happens_to_is_set_up_watched_and_given_back(world, babysit):
  world.cloud(lives=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  world.plan({"code": 0, "seconds": 0.5})
  done = babysit("--", "--config.train.steps=10")
  assert done.returncode == 0, done.stderr
  assert [world.starts(0), world.starts(1)] == [1, 1]
  assert world.state["state"] == "NONE"  # nothing is left that costs
  for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
    assert f"b16 is {state}." in done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == len(world.calls(f"{GCLOUD} scp")) == len(world.calls(f"{GCLOUD} delete")) == 1


def test_a_run_that_was_stopped_early_goes_on_on_the_same_machines(world, babysit):
  world.plan({"code": 75}, {"code": 75}, {"code": 0})
  done = babysit()
  assert done.returncode == 0, done.stderr
  assert world.starts() == 3
  assert len(world.calls(f"{GCLOUD} create")) == 1


def test_machines_that_are_taken_away_while_it_trains_are_asked_for_again(world, babysit):
  # Twice, and once the workers have no time to say 75.
  world.plan({"code": 75, "life": ["SUSPENDING", "SUSPENDED"]}, {"code": 0, "seconds": 9, "life": ["SUSPENDED"]}, {"code": 0})
  done = babysit("--max-failures=0")
  assert done.returncode == 0, done.stderr
  assert world.starts() == 3
  assert len(world.calls(f"{GCLOUD} create")) == 3
  assert len(world.calls(f"{GCLOUD} delete")) == 3  # a suspended resource keeps its name until it is deleted


def test_machines_that_are_taken_away_before_they_come_are_asked_for_again(world, babysit):
  world.cloud(lives=[["PROVISIONING", "SUSPENDING", "SUSPENDED"], ["PROVISIONING", "FAILED"], ["ACTIVE"]])
  done = babysit()
  assert done.returncode == 0, done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == 3
  assert "failure 1 of 5" in done.stderr  # FAILED counts: it may fail in the same way for ever


def test_a_request_that_always_fails_is_given_up(world, babysit):
  world.cloud(lives=[["FAILED"]] * 9, message="SERVICE the network default does not exist")
  done = babysit("--max-failures=2")
  assert done.returncode == 1
  assert "the network default does not exist" in done.stderr
  assert "Given up after 3 failures in a row" in done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == 3


def test_a_network_that_is_away_for_a_while_ends_nothing(world, babysit):
  world.cloud(outages={"describe": 3, "create": 2, "scp": 1, "ssh": 2, "delete": 2})
  world.plan({"code": 0, "seconds": 0.3})
  done = babysit()
  assert done.returncode == 0, done.stderr
  assert world.state["state"] == "NONE"
  assert "Network is unreachable" in done.stderr


def test_quota_that_is_refused_is_told_and_not_asked_for_again(world, babysit):
  world.cloud(creations=["quota"])
  done = babysit()
  assert done.returncode == 2
  assert "for want of quota" in done.stderr and "Limit: 0 in zone us-west4-a" in done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == 1


def test_quota_that_is_refused_later_is_told_too(world, babysit):
  world.cloud(lives=[["PROVISIONING", "FAILED"]], message="SERVICE\tQuota limit 'TPUS_PER_TPU_FAMILY' has been exceeded.")
  done = babysit()
  assert done.returncode == 2
  assert "for want of quota" in done.stderr
  assert world.state["state"] == "NONE"


def test_what_google_cloud_forbids_ends_it_and_a_full_zone_does_not(world, babysit):
  world.cloud(creations=["capacity", "permission"])
  done = babysit()
  assert done.returncode == 2
  assert "no more capacity" in done.stderr and "PERMISSION_DENIED" in done.stderr
  assert "quota: " not in done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == 2


def test_wrong_usage_ends_it_at_once_with_the_words_of_main(world, babysit):
  world.plan({"code": 2})
  done = babysit()
  assert done.returncode == 2
  assert "main.py 0 --config=configs/vitb16.py" in done.stderr  # the end of the log
  assert world.starts() == 1
  assert world.state["state"] == "NONE"


def test_failures_are_tried_again_so_often_and_no_more(world, babysit):
  world.plan({"code": 1})
  done = babysit("--max-failures=2", "--keep")
  assert done.returncode == 1
  assert world.starts() == 3
  assert world.state["state"] == "ACTIVE"  # --keep
  assert "is kept, and goes on costing" in done.stderr


def test_a_run_that_lasted_begins_a_new_row_of_failures(world, babysit):
  world.plan(*[{"code": 1, "seconds": 1.5}] * 2, {"code": 0})
  done = babysit("--max-failures=1", LONG_SECONDS="1")
  assert done.returncode == 0, done.stderr


def test_a_slice_that_ssh_passes_over_is_not_taken_for_started(world, babysit):
  world.cloud(missing=1)
  done = babysit("--max-failures=1", SILENT_SECONDS="1")
  assert done.returncode == 1
  assert "1 of 2 workers have answered" in done.stderr
  assert world.starts() == 0


def test_workers_of_all_slices_are_counted(world, babysit):
  world.cloud(workers=4, slices=2)
  done = babysit("--node-count=2")
  assert done.returncode == 0, done.stderr
  assert [world.starts(one) for one in range(4)] == [1, 1, 1, 1]
  assert {"--node-count=2", "--node-prefix=b16"} < set(world.calls(f"{GCLOUD} create")[0])


def test_machines_that_do_not_answer_are_given_back_after_a_while(world, babysit):
  world.plan({"code": 0, "seconds": 30})
  command = world.command("tpu_vm/babysit.sh", *RUN, "--max-failures=0")
  script = subprocess.Popen(command, cwd=world.root, env={**world.env, "SILENT_SECONDS": "1"}, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: world.starts(1))
  world.cloud(state="ACTIVE", outages={"ssh": 999})
  _, said = script.communicate(timeout=30)
  assert script.returncode == 1, said
  assert "giving the machines back" in said
  assert world.state["state"] == "NONE"


def test_packages_that_cannot_be_installed_are_told_of(world, babysit):
  world.cloud(broken=2)
  done = babysit("--max-failures=0")
  assert done.returncode == 1
  assert "No solution found" in done.stderr
  assert world.state["state"] == "NONE"


def test_a_disk_that_goes_with_the_machine_is_refused(world, babysit):
  world.cloud(filesystem="ext4")
  done = babysit()
  assert done.returncode == 2
  assert "is on this machine's own disk (ext4)" in done.stderr
  assert world.starts() == 0


def test_machines_that_go_while_they_are_set_up_are_no_failure(world, babysit):
  world.cloud(lives=[["ACTIVE", "SUSPENDED"], ["ACTIVE"]], outages={"scp": 1})
  done = babysit("--max-failures=0")
  assert done.returncode == 0, done.stderr
  assert "Setting up failed." in done.stderr
  assert len(world.calls(f"{GCLOUD} create")) == 2


def test_a_machine_that_was_started_anew_has_forgotten_the_run_and_is_not_taken_for_done(world):
  world.plan({"code": 0, "seconds": 60}, {"code": 0})
  script = subprocess.Popen(world.command("tpu_vm/babysit.sh", *RUN), cwd=world.root, env=world.env, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: world.starts(0) and world.starts(1))
  for worker in (0, 1):
    home = world.folder / f"home/{worker}"
    wait_until(lambda home=home: (home / "clip_jax_run/pid").exists())
    pid = (home / "clip_jax_run/pid").read_text().strip()
    # The shell that would note the exit code goes first, as all do at once when a machine loses its power.
    parent = subprocess.run(["ps", "-o", "ppid=", "-p", pid], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["kill", "-KILL", parent, pid], check=True)
  _, said = script.communicate(timeout=30)
  assert script.returncode == 0, said
  assert "worker-0 none" in said and "failure 1 of 5" in said
  assert world.starts() == 2


def test_a_request_that_is_taken_up_while_it_waits_may_be_deleted_by_others(world):
  world.cloud(state="WAITING_FOR_RESOURCES")
  script = subprocess.Popen(world.command("tpu_vm/babysit.sh", *RUN), cwd=world.root, env=world.env, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: world.calls(f"{GCLOUD} describe"))
  assert world.run("tpu_vm/stop.sh", "b16", "--zone=us-west4-a").returncode == 0
  _, said = script.communicate(timeout=30)
  assert script.returncode == 75
  assert "was deleted by somebody else" in said
  assert world.calls(f"{GCLOUD} create") == []


def test_ended_and_started_again_it_takes_up_the_run(world, babysit):
  world.plan({"code": 0, "seconds": 3})
  script = subprocess.Popen(world.command("tpu_vm/babysit.sh", *RUN), cwd=world.root, env=world.env, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: world.starts(1))
  wait_until(lambda: len(world.calls(f"{GCLOUD} ssh")) > 4)  # it watches
  script.send_signal(signal.SIGTERM)
  _, said = script.communicate(timeout=30)
  assert "goes on costing" in said and world.state["state"] == "ACTIVE"
  done = babysit()
  assert done.returncode == 0, done.stderr
  assert "The run goes on; watching it." in done.stderr
  assert world.starts() == 1


@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_stop_saves_and_the_watcher_lets_it_be(world, keep):
  world.plan({"code": 0, "seconds": 30})
  script = subprocess.Popen(world.command("tpu_vm/babysit.sh", *RUN), cwd=world.root, env=world.env, stderr=subprocess.PIPE, text=True)
  wait_until(lambda: world.starts(0) and world.starts(1))
  done = world.run("tpu_vm/stop.sh", "b16", "--zone=us-west4-a", *keep)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split("\n")[:2] == ["worker-0 stopped 75", "worker-1 stopped 75"]
  _, said = script.communicate(timeout=30)
  assert script.returncode == 75, said
  assert world.starts() == 1
  assert world.state["state"] == ("ACTIVE" if keep else "NONE")


def wait_until(true, seconds=30):
  """Waits, or fails."""
  until = time.monotonic() + seconds
  while not true():
    assert time.monotonic() < until
    time.sleep(0.05)
