"""What the programs that `launch/` calls take, from their reference pages; read by the fake ones, which refuse anything else."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
  """One command.

  Attributes:
    page: where its flags are documented.
    values: flags with a value.
    switches: flags without one.
    required: groups of flags, of each of which exactly one must be there.
    words: how many arguments without dashes it takes, at least and at most.
  """

  page: str
  values: tuple[str, ...] = ()
  switches: tuple[str, ...] = ()
  required: tuple[tuple[str, ...], ...] = ()
  words: tuple[int, int] = (1, 1)


GCLOUD = "https://docs.cloud.google.com/sdk/gcloud/reference"
WIDE = ("--project", "--format")  # of all of gcloud's commands
CREATE = (
  *("--zone", "--accelerator-type", "--runtime-version", "--node-id", "--node-count", "--node-prefix", "--labels", "--metadata-from-file"),
  *("--network", "--subnetwork", "--service-account", "--valid-until-duration"),
)
CREATED = (("--zone",), ("--runtime-version",), ("--accelerator-type",), ("--node-id", "--node-count"))
REACH = ("--tunnel-through-iap", "--internal-ip", "--quiet")

COMMANDS = {
  "gcloud config get": Command(f"{GCLOUD}/config/get"),
  # Those of the README alone.
  "gcloud auth login": Command(f"{GCLOUD}/auth/login", words=(0, 0)),
  "gcloud auth configure-docker": Command(f"{GCLOUD}/auth/configure-docker"),
  "gcloud config set": Command(f"{GCLOUD}/config/set", words=(2, 2)),
  "gcloud services enable": Command(f"{GCLOUD}/services/enable", words=(1, 9)),
  "gcloud iam service-accounts create": Command(f"{GCLOUD}/iam/service-accounts/create"),
  "gcloud projects add-iam-policy-binding": Command(
    f"{GCLOUD}/projects/add-iam-policy-binding", ("--member", "--role"), (), (("--member",), ("--role",))
  ),
  "gcloud beta quotas info list": Command(f"{GCLOUD}/beta/quotas/info/list", ("--service", *WIDE), (), (("--service",),), (0, 0)),
  "gcloud compute tpus accelerator-types list": Command(f"{GCLOUD}/compute/tpus/accelerator-types/list", ("--zone",), words=(0, 0)),
  "gcloud compute tpus tpu-vm list": Command(f"{GCLOUD}/compute/tpus/tpu-vm/list", ("--zone",), words=(0, 0)),
  "gcloud compute instances list": Command(f"{GCLOUD}/compute/instances/list", words=(0, 0)),
  "gcloud compute disks list": Command(f"{GCLOUD}/compute/disks/list", words=(0, 0)),
  "gcloud filestore instances list": Command(f"{GCLOUD}/filestore/instances/list", words=(0, 0)),
  "gcloud storage buckets list": Command(f"{GCLOUD}/storage/buckets/list", WIDE, words=(0, 0)),
  "gcloud storage buckets create": Command(
    f"{GCLOUD}/storage/buckets/create", ("--location", "--soft-delete-duration"),
    ("--uniform-bucket-level-access", "--enable-hierarchical-namespace"), (("--location",),),
  ),
  "gcloud storage buckets add-iam-policy-binding": Command(
    f"{GCLOUD}/storage/buckets/add-iam-policy-binding", ("--member", "--role"), (), (("--member",), ("--role",))
  ),
  "gcloud storage cp": Command(f"{GCLOUD}/storage/cp", (), ("--recursive",), (), (2, 2)),
  "gcloud storage rm": Command(f"{GCLOUD}/storage/rm", (), ("--recursive",)),
  "gcloud storage cat": Command(f"{GCLOUD}/storage/cat"),
  "gcloud artifacts repositories list": Command(f"{GCLOUD}/artifacts/repositories/list", words=(0, 0)),
  "gcloud artifacts repositories create": Command(
    f"{GCLOUD}/artifacts/repositories/create", ("--repository-format", "--location"), (), (("--repository-format",), ("--location",))
  ),
  "gcloud container clusters list": Command(f"{GCLOUD}/container/clusters/list", words=(0, 0)),
  "gcloud container clusters delete": Command(f"{GCLOUD}/container/clusters/delete", ("--location",)),
  "gcloud container clusters get-credentials": Command(f"{GCLOUD}/container/clusters/get-credentials", ("--location",)),
  "gcloud container clusters create": Command(
    f"{GCLOUD}/container/clusters/create", ("--location", "--num-nodes", "--machine-type", "--workload-pool", "--addons")
  ),
  "gcloud container node-pools create": Command(
    f"{GCLOUD}/container/node-pools/create",
    (
      *("--cluster", "--location", "--node-locations", "--machine-type", "--tpu-topology", "--num-nodes"),
      *("--workload-metadata", "--min-nodes", "--max-nodes"),
    ),
    ("--spot", "--enable-autoscaling"), (("--cluster",),),
  ),
  "kubectl apply": Command(
    "https://kubernetes.io/docs/reference/kubectl/generated/kubectl_apply", ("--filename",), ("--server-side",), (("--filename",),), (0, 0)
  ),
  "kubectl create serviceaccount": Command(
    "https://kubernetes.io/docs/reference/kubectl/generated/kubectl_create/kubectl_create_serviceaccount"
  ),
  "kubectl describe": Command("https://kubernetes.io/docs/reference/kubectl/generated/kubectl_describe", words=(1, 2)),
  "kubectl get": Command("https://kubernetes.io/docs/reference/kubectl/generated/kubectl_get", (), ("--show-labels",)),
  "gcloud compute tpus queued-resources create": Command(
    f"{GCLOUD}/compute/tpus/queued-resources/create", (*CREATE, *WIDE), ("--spot", "--reserved", "--internal-ips", "--quiet"), CREATED
  ),
  "gcloud alpha compute tpus queued-resources create": Command(
    f"{GCLOUD}/alpha/compute/tpus/queued-resources/create",
    (*CREATE, *WIDE, "--provisioning-model", "--max-run-duration"),
    ("--spot", "--reserved", "--internal-ips", "--quiet"),
    (*CREATED, ("--provisioning-model",), ("--max-run-duration",)),
  ),
  "gcloud compute tpus queued-resources describe": Command(
    f"{GCLOUD}/compute/tpus/queued-resources/describe", ("--zone", *WIDE), ("--quiet",), (("--zone",),)
  ),
  "gcloud compute tpus queued-resources list": Command(f"{GCLOUD}/compute/tpus/queued-resources/list", ("--zone",), words=(0, 0)),
  "gcloud compute tpus queued-resources delete": Command(
    f"{GCLOUD}/compute/tpus/queued-resources/delete", ("--zone", *WIDE), ("--force", "--async", "--quiet"), (("--zone",),)
  ),
  "gcloud compute tpus queued-resources ssh": Command(
    f"{GCLOUD}/compute/tpus/queued-resources/ssh", ("--zone", "--node", "--worker", "--command", *WIDE), REACH, (("--zone",), ("--command",))
  ),
  "gcloud compute tpus queued-resources scp": Command(
    f"{GCLOUD}/compute/tpus/queued-resources/scp", ("--zone", "--node", "--worker", *WIDE), REACH, (("--zone",),), (2, 2)
  ),
  "kubectl create": Command(
    "https://kubernetes.io/docs/reference/kubectl/generated/kubectl_create", ("--filename", "--namespace"), (), (("--filename",),), (0, 0)
  ),
  "kubectl delete": Command(
    "https://kubernetes.io/docs/reference/kubectl/generated/kubectl_delete", ("--cascade", "--namespace"), (), (), (2, 2)
  ),
  "kubectl logs": Command(
    "https://kubernetes.io/docs/reference/kubectl/generated/kubectl_logs",
    ("--tail", "--container", "--selector", "--namespace"), ("--follow",), (("--selector",),), (0, 0),
  ),
  # The first word is the script; what follows it is the script's.
  "sbatch": Command(
    "https://slurm.schedmd.com/sbatch.html",
    (
      *("--job-name", "--chdir", "--output", "--export", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--partition", "--account"),
      *("--qos", "--time", "--constraint", "--reservation", "--cpus-per-task", "--mem"),
    ),
    ("--exclusive",), (("--nodes",),), (1, 1),
  ),
  "squeue": Command("https://slurm.schedmd.com/squeue.html", ("--name", "--format", "--states"), ("--me", "--noheader"), (), (0, 0)),
  "scontrol update": Command("https://slurm.schedmd.com/scontrol.html", (), (), (), (2, 2)),
  "scancel": Command("https://slurm.schedmd.com/scancel.html", ("--signal", "--state"), (), (("--signal", "--state"),)),
  "docker build": Command("https://docs.docker.com/reference/cli/docker/buildx/build", ("--file", "--tag", "--label", "--build-arg"), (), (("--tag",),), (1, 1)),
  "docker push": Command("https://docs.docker.com/reference/cli/docker/image/push"),
  "sky jobs launch": Command(
    "https://docs.skypilot.co/en/latest/reference/cli.html",
    ("--name", "--workdir", "--gpus", "--env", "--infra"), ("--detach-run", "--yes", "--no-use-spot"), (("--name",),),
  ),
  "xpk cluster create": Command(
    "https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/clusters.md",
    ("--cluster", "--tpu-type", "--num-slices", "--zone", "--project"), ("--spot", "--enable-gcsfuse-csi-driver", "--enable-workload-identity"),
    (("--cluster",), ("--tpu-type",)), (0, 0),
  ),
  "xpk storage attach": Command(
    "https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/storage.md",
    ("--cluster", "--type", "--bucket", "--mount-point", "--readonly", "--auto-mount", "--size", "--mount-options", "--zone", "--project"),
    (), (("--cluster",), ("--type",), ("--mount-point",), ("--readonly",), ("--auto-mount",)),
  ),
  "xpk workload create": Command(
    "https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md",
    (
      *("--cluster", "--workload", "--tpu-type", "--num-slices", "--docker-image", "--command", "--max-restarts", "--zone", "--project"),
      *("--restart-on-exit-codes", "--termination-grace-period-seconds", "--storage"),
    ),
    ("--spot",), (("--cluster",), ("--workload",), ("--tpu-type",), ("--command",)), (0, 0),
  ),
  "xpk workload delete": Command(
    "https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/workloads.md",
    ("--cluster", "--workload", "--zone", "--project"), (), (("--cluster",),), (0, 0),
  ),
  "xpk cluster delete": Command(
    "https://github.com/AI-Hypercomputer/xpk/blob/main/docs/usage/clusters.md", ("--cluster", "--zone", "--project"), (), (("--cluster",),), (0, 0)
  ),
  "sky jobs logs": Command("https://docs.skypilot.co/en/latest/reference/cli.html", ("--name",), words=(0, 0)),
  "sky jobs cancel": Command("https://docs.skypilot.co/en/latest/reference/cli.html", ("--name",), words=(0, 0)),
  "gcluster deploy": Command("https://docs.cloud.google.com/cluster-toolkit/docs/deploy/deploy-cluster", ("-d", "--vars"), ("--auto-approve",)),
  "gcluster destroy": Command("https://docs.cloud.google.com/cluster-toolkit/docs/deploy/destroy-cluster", (), ("--auto-approve",)),
}


def command_of(words):
  """The key of `COMMANDS` that a command line begins with.

  Args:
    words: of the command line, the program first.
  """
  for length in range(len(words), 0, -1):
    if " ".join(words[:length]) in COMMANDS:
      return " ".join(words[:length])
  raise AssertionError(f"{' '.join(words[:5])} is not documented in tests/launch/documented.py")


def check(words):
  """Raises an `AssertionError` for a command line that its reference page does not allow.

  Args:
    words: of the command line, the program first.
  """
  name = command_of(words)
  command, given, others = COMMANDS[name], [], []
  rest = iter(words[len(name.split()) :])
  for word in rest:
    flag, _, value = word.partition("=")
    if not word.startswith("-") or word == "-":
      others.append(word)
      if name == "sbatch":
        break
    elif flag in command.values:
      value = value if "=" in word else next(rest, "")
      assert value, f"{name}: {flag} without a value"
      given.append(flag)
    else:
      assert word in command.switches, f"{name}: {word} is not in {command.page}"
      given.append(word)
  for group in command.required:
    assert sum(flag in given for flag in group) == 1, f"{name}: one of {group} in {words}"
  least, most = command.words
  assert least <= len(others) <= most, f"{name}: {others}"
