"""launch/gke: the manifests that submit.sh makes, against Kubernetes' schemas and JobSet's, and what it is told to be."""

import re

import jsonschema
import pytest
import yaml

from tests.launch import jobset

RUN = ("b16", "configs/vitb16.py")
BUCKET = "gs://my-bucket/runs/b16"
IMAGE = "--image=us-west4-docker.pkg.dev/my-project/clip/tpu:1"


def manifest(world, workdir, *flags):
  """What submit.sh has kubectl create."""
  world.forget()
  done = world.run("gke/submit.sh", *RUN, workdir, *flags)
  assert done.returncode == 0, done.stderr
  (call,) = world.records()
  return yaml.safe_load(call["given"])


def pod_of(made):
  """The pod template of a JobSet."""
  return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]


MANIFESTS = {
  "one slice": (BUCKET, "--topology=v5e:4x4", IMAGE),
  "several slices": (BUCKET, "--topology=v5p:4x4x8", "--slices=2", IMAGE, "--queue=train", "--spot", "--service-account=trainer", "--max-restarts=3"),
  "one chip": (BUCKET, "--topology=v6e:1x1", IMAGE),
  "a claim": ("/runs/b16", "--topology=v4:2x2x2", IMAGE, "--volume-claim=runs"),
  "GPUs": (BUCKET, "--topology=h100:32", IMAGE, "--queue=train", "--", "--config.data.path=it's \"{0..9}\"\n\\$HOME.tar"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_one_that_jobset_and_kubernetes_take(world, name):
  kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
  made = manifest(world, *MANIFESTS[name])
  jsonschema.validate(made, jobset.SCHEMA)
  for one in made["spec"]["replicatedJobs"]:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": made["metadata"]["name"]}, "spec": one["template"]["spec"]}
    kubernetes.validate(job, kubernetes.latest_version(), strict=True)
    template = one["template"]["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**template["metadata"], "name": "pod"}, "spec": template["spec"]}
    kubernetes.validate(pod, kubernetes.latest_version(), strict=True)


def test_the_schemas_see_what_is_wrong(world):
  kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
  made = manifest(world, *MANIFESTS["one slice"])
  made["spec"]["failurePolicy"]["rules"][0]["onExitCodes"] = [2]
  with pytest.raises(jsonschema.ValidationError, match="onExitCodes"):
    jsonschema.validate(made, jobset.SCHEMA)
  spec = {**made["spec"]["replicatedJobs"][0]["template"]["spec"], "hosts": 4}
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "b16"}, "spec": spec}
  with pytest.raises(kubernetes.ValidationError):
    kubernetes.validate(job, kubernetes.latest_version(), strict=True)


@pytest.mark.parametrize(
  ("topology", "hosts", "chips", "selector"),
  [
    ("v4:2x2x2", 2, 4, "tpu-v4-podslice"),
    ("v5e:1x1", 1, 1, "tpu-v5-lite-podslice"),
    ("v5e:16x16", 64, 4, "tpu-v5-lite-podslice"),
    ("v5p:4x4x8", 32, 4, "tpu-v5p-slice"),
    ("v6e:2x4", 2, 4, "tpu-v6e-slice"),
    ("tpu7x:2x2x1", 1, 4, "tpu7x"),
  ],
)
def test_a_topology_gets_its_hosts_and_its_nodes(world, topology, hosts, chips, selector):
  made = manifest(world, BUCKET, f"--topology={topology}", IMAGE)
  job, pod = made["spec"]["replicatedJobs"][0]["template"]["spec"], pod_of(made)["spec"]
  assert job["completions"] == job["parallelism"] == hosts
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  shape = topology.partition(":")[2]
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": selector, "cloud.google.com/gke-tpu-topology": shape}


def test_machines_of_eight_chips_are_one_host(world):
  made = manifest(world, BUCKET, "--topology=v6e:2x4", "--chips-per-host=8", IMAGE)
  assert made["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 1
  assert pod_of(made)["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}


def outcome(made, exit_code=None, disrupted=False):
  """What JobSet does when the first pod of a Job fails: the Job's rules give it a reason and a message, and the JobSet's rules an action.

  As https://kubernetes.io/docs/tasks/job/pod-failure-policy and https://jobset.sigs.k8s.io/docs/tasks/failure_policy describe it.
  """
  job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
  assert job["backoffLimit"] == 0
  for place, rule in enumerate(job["podFailurePolicy"]["rules"]):
    codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
    if codes and exit_code in codes["values"]:
      message = f"Container train for pod default/b16-slice-0-0-x2x2x failed with exit code {exit_code} matching FailJob rule at index {place}"
    elif disrupted and {"type": "DisruptionTarget", "status": "True"} in conditions:
      message = f"Pod default/b16-slice-0-0-x2x2x has condition DisruptionTarget matching FailJob rule at index {place}"
    else:
      continue
    reason = "PodFailurePolicy"
    break
  for rule in made["spec"]["failurePolicy"]["rules"]:
    patterns = rule.get("onJobFailureMessagePatterns", [""])
    if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
      return rule["action"]
  return "RestartJobSet"


@pytest.mark.parametrize("name", ["one slice", "several slices", "GPUs"])
def test_how_a_process_ends_says_what_becomes_of_the_run(world, name):
  made = manifest(world, *MANIFESTS[name])
  assert outcome(made, 2) == "FailJobSet"
  assert outcome(made, 75) == outcome(made, 75, disrupted=True) == outcome(made, None, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
  assert outcome(made, 1) == outcome(made, 134) == outcome(made, 22) == "RestartJobSet"
  assert made["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"  # no new process while an old one still saves
  assert pod_of(made)["spec"]["restartPolicy"] == "Never"
  assert pod_of(made)["spec"]["terminationGracePeriodSeconds"] >= 300


def test_gpus_are_told_of_each_other_by_the_names_of_jobset(world):
  made = manifest(world, *MANIFESTS["GPUs"])
  env = {one["name"]: one for one in pod_of(made)["spec"]["containers"][0]["env"]}
  assert env["JAX_COORDINATOR_ADDRESS"]["value"] == "b16-nodes-0-0.b16:8476"
  assert env["JAX_NUM_PROCESSES"]["value"] == "4"
  assert env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert pod_of(made)["spec"]["securityContext"]["runAsNonRoot"] is True


def test_a_bucket_is_mounted_so_that_what_is_synced_stays(world):
  pod = pod_of(manifest(world, *MANIFESTS["one slice"]))
  assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
  (volume,) = pod["spec"]["volumes"]
  options = volume["csi"]["volumeAttributes"]["mountOptions"].split(",")
  assert {"implicit-dirs", "metadata-cache:ttl-secs:0", "write:enable-streaming-writes:false", "file-system:rename-dir-limit:200000"} < set(options)
  (train,) = pod["spec"]["containers"]
  assert train["volumeMounts"] == [{"name": "runs", "mountPath": "/buckets/my-bucket"}]
  assert "--workdir=/buckets/my-bucket/runs/b16" in train["args"]


def test_overrides_arrive_as_they_are(world):
  (override,) = MANIFESTS["GPUs"][-1:]
  assert pod_of(manifest(world, *MANIFESTS["GPUs"]))["spec"]["containers"][0]["args"][-1] == override


def test_the_command_of_a_container_begins_main_with_its_arguments(world, tmp_path):
  train = pod_of(manifest(world, *MANIFESTS["one slice"]))["spec"]["containers"][0]
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
  python.chmod(0o755)
  command = [*train["command"], *train["args"]]
  command[2] = command[2].replace("ulimit -l 68719476736", "true")  # which takes the rights that it has there
  assert world.shell(command, PATH=f"{tmp_path}:/bin:/usr/bin").stdout.splitlines() == train["args"]


def test_queues_spot_nodes_and_accounts_are_where_they_are_looked_for(world):
  made = manifest(world, *MANIFESTS["several slices"])
  assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "train"
  assert made["metadata"]["annotations"] == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
  assert made["spec"]["replicatedJobs"][0]["replicas"] == 2
  pod = pod_of(made)["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["serviceAccountName"] == "trainer"


def test_a_dry_run_prints_what_can_be_pasted(world):
  words = (*RUN, *MANIFESTS["GPUs"])
  printed = world.run("gke/submit.sh", *words[: words.index("--")], "--dry-run", *words[words.index("--") :]).stdout
  assert world.shell(["bash", "-c", printed]).returncode == 0
  world.run("gke/submit.sh", *words)
  printed_call, real_call = world.records()
  assert printed_call == real_call


def test_logs_are_of_one_pod_and_stop_waits_for_all(world):
  world.run("gke/logs.sh", "b16", "--follow", "--slice=1", "--host=2", "--namespace=team")
  world.run("gke/stop.sh", "b16")
  logs, stop = world.calls()
  selector = "jobset.sigs.k8s.io/jobset-name=b16,jobset.sigs.k8s.io/job-index=1,batch.kubernetes.io/job-completion-index=2"
  assert f"--selector={selector}" in logs and "--follow" in logs
  assert stop == ["kubectl", "delete", "jobset", "b16", "--cascade=foreground"]
