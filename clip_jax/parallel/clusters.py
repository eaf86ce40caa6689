"""Who starts the processes of a run, and what that tells each of them: a table of launchers.

`jax.distributed` knows most of these launchers, too, but not the names of hosts that do not come, and it gives a Slurm task that has
a node to itself the first of its GPUs alone.
"""

import glob
import importlib.util
import itertools
import os
import re
import subprocess
from typing import NamedTuple

from clip_jax.errors import UsageError
from clip_jax.parallel import metadata

# Set together by whoever starts processes by hand; they win over a launcher, and the first alone only changes its address.
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TPU_PORT = 8482  # libtpu's own are 8471 to 8479
METADATA_SECONDS = 20.0


class Cluster(NamedTuple):
  """What a launcher tells a process of a run.

  Attributes:
    name: of the launcher.
    address: HOST:PORT at which the first process is met.
    count: how many processes there are.
    number: which one this is, from 0.
    hosts: a dict from numbers of processes to names of their hosts, of those that the launcher tells.
    gpu: the number of the one GPU that is this process's, or None if all that it sees are.
    joined: whether the processes' devices are one system, so that none can work without the others.
  """

  name: str
  address: str
  count: int
  number: int
  hosts: dict = {}
  gpu: int | None = None
  joined: bool = False


def find(variables=None):
  """What the launcher of this process tells it.

  Args:
    variables: environment variables; those of this process if None.

  Returns:
    A `Cluster`, or None for a process that is alone.

  Raises:
    UsageError: variables that go together are not set together, or to what cannot be.
  """
  variables = os.environ if variables is None else variables
  given = [name for name in BY_HAND if name in variables]
  if len(given) == len(BY_HAND):
    return _by_hand(*(variables[name] for name in BY_HAND))
  for look in (_slurm, _open_mpi, _gke, _cloud_tpu):
    cluster = look(variables)
    if cluster is not None and cluster.count > 1:
      return cluster
  if given:
    missing = ", ".join(name for name in BY_HAND if name not in given)
    raise UsageError(f"{', '.join(given)} set without {missing}; set all three, or none.")
  return None


def has_tpu():
  """Whether this machine has TPU chips."""
  return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def has_gpu_plugin():
  """Whether JAX is installed for GPUs."""
  return any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin"))


def visible_gpus():
  """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them: a list, empty where there are none."""
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  if given is not None:
    return [one for one in given.split(",") if one]
  try:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
  except FileNotFoundError:
    return []
  return [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def _by_hand(address, count, number):
  _check_address(address)
  if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
    raise UsageError(f"JAX_PROCESS_ID={number} and JAX_NUM_PROCESSES={count} must be whole numbers, the first smaller.")
  return Cluster("environment variables", address, int(count), int(number))


def _check_address(address):
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal()):
    raise UsageError(f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT.")


def _address(variables, host, port):
  # What is set by hand counts where the launcher's own network is not the one to use.
  address = variables.get(BY_HAND[0], f"{host}:{port}")
  _check_address(address)
  return address


def _whole(variables, *names):
  # Of variables that a launcher sets together.
  values = [variables.get(name, "") for name in names]
  if not all(value.isdecimal() for value in values):
    told = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    raise UsageError(f"{told}: {'these must be whole numbers' if len(names) > 1 else 'this must be a whole number'}, as the launcher sets them.")
  return [int(value) for value in values]


def _several(variables, name):
  return _whole(variables, name)[0] if name in variables else 1


def _gpu(variables, local_count, local_number):
  # Of processes that share a machine each has the GPU of its number, unless its launcher shows it no other.
  shown = variables.get("CUDA_VISIBLE_DEVICES", ",")
  return local_number if local_count > 1 and "," in shown else None


def _slurm(variables):
  # https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES. Only inside a step: the script of sbatch itself has the
  # number of tasks, but is not one of them.
  if "SLURM_STEP_NODELIST" not in variables or _several(variables, "SLURM_NTASKS") == 1:
    return None
  count, number, local_number = _whole(variables, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
  nodes = expand(variables["SLURM_STEP_NODELIST"])
  tasks = _tasks(variables.get("SLURM_STEP_TASKS_PER_NODE", "1"))
  hosts = dict(enumerate(node for node, tasks_there in zip(nodes, tasks, strict=False) for _ in range(tasks_there)))
  # Numbers go to nodes in blocks unless it was asked for otherwise; then only the first is where one thinks.
  if len(hosts) != count or (max(tasks) > 1 and not variables.get("SLURM_DISTRIBUTION", "block").startswith("block")):
    hosts = {0: nodes[0]}
  tasks_here = dict(enumerate(tasks)).get(int(variables.get("SLURM_NODEID", "0")), 1)
  # High ports, of which few are taken, that differ between jobs on the same node.
  port = 61440 + _whole(variables, "SLURM_JOB_ID")[0] % 4096
  return Cluster("Slurm", _address(variables, nodes[0], port), count, number, hosts, _gpu(variables, tasks_here, local_number))


def expand(names):
  """The hosts that Slurm's short form of a list stands for.

  Args:
    names: such as "n[001-003,7],gpu-a" or "rack[0-1]n[1-2]".

  Returns:
    A list of names.
  """
  found = []
  for one in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", names):
    parts = [_range(part[1:-1]) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[]+", one)]
    found += ["".join(combination) for combination in itertools.product(*parts)]
  return found


def _range(text):
  numbers = []
  for part in text.split(","):
    first, _, last = part.partition("-")
    numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
  return numbers


def _tasks(text):
  # "2(x3),1" is 2, 2, 2, 1.
  return [int(count) for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _open_mpi(variables):
  # https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html, and the address of mpirun, which versions before 5 tell.
  if _several(variables, "OMPI_COMM_WORLD_SIZE") == 1:
    return None
  names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
  count, number, local_count, local_number = _whole(variables, *(f"OMPI_COMM_WORLD_{name}" for name in names))
  told = re.match(r"(\d+)\..*?;tcp6?://(?:\[([^,\]]+)|([^,:]+))", variables.get("OMPI_MCA_orte_hnp_uri", ""))
  if not told and BY_HAND[0] not in variables:
    raise UsageError(
      f"Open MPI tells nobody where process 0 is; name its host and a free port: mpirun -x {BY_HAND[0]}=HOST:PORT (versions before 5 tell by themselves)."
    )
  # The number of the job is a multiple of 2 ** 12.
  host, port = (f"[{told[2]}]" if told[2] else told[3], 61440 + int(told[1]) // 4096 % 4096) if told else ("", 0)
  return Cluster("Open MPI", _address(variables, host, port), count, number, gpu=_gpu(variables, local_count, local_number))


def _gke(variables):
  # https://cloud.google.com/kubernetes-engine/docs/how-to/tpus: names of the slice's pods, and this one's place among them.
  names = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES")
  if not names or (len(names.split(",")) == 1 and _several(variables, "MEGASCALE_NUM_SLICES") == 1):
    return None
  return _slices(variables, "GKE", [name.rpartition(":")[0] or name for name in names.split(",")], _whole(variables, "TPU_WORKER_ID")[0])


def _cloud_tpu(variables):
  # A TPU VM tells its neighbours' addresses through its metadata server alone.
  if variables.get("JAX_PLATFORMS", "tpu") != "tpu" or importlib.util.find_spec("libtpu") is None or not has_tpu():
    return None
  if "TPU_SKIP_MDS_QUERY" in variables:
    return None
  number = _metadata("agent-worker-number")
  if not number:  # a machine of Google Cloud, but none that Cloud TPU made
    return None
  # Names, or triples of a name, a number and an address.
  hosts = [worker.split(":")[-1] for worker in _metadata("worker-network-endpoints").split(",")]
  told = dict(re.findall(r"^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata("tpu-env"), re.MULTILINE))
  return _slices({**told, **variables}, "Cloud TPU", hosts, int(number))


def _slices(variables, name, hosts, number):
  # One slice, or several alike, whose first processes know of each other by MEGASCALE's variables.
  slices, mine, first = 1, 0, hosts[0]
  if _several(variables, "MEGASCALE_NUM_SLICES") > 1:
    slices, mine = _whole(variables, "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    first = variables.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]
    if not first:
      raise UsageError(f"MEGASCALE_NUM_SLICES={slices} set without MEGASCALE_COORDINATOR_ADDRESS, the host of the first process of the first slice.")
  before = mine * len(hosts)
  known = {before + place: host for place, host in enumerate(hosts)}
  return Cluster(name, _address(variables, first, TPU_PORT), slices * len(hosts), before + number, {0: first, **known}, joined=True)


def _metadata(attribute):
  try:
    return metadata.ask(f"attributes/{attribute}", METADATA_SECONDS)
  except OSError as error:
    raise UsageError(
      f"This machine has TPU chips, and its metadata server {metadata.host()} does not tell of its neighbours ({getattr(error, 'reason', error)}); "
      "TPU_SKIP_MDS_QUERY=1 says that there are none."
    ) from error
