"""What launchers tell the processes that they start, in their own variables."""

import contextlib
import http.server
import re
import threading

import pytest

from clip_jax.errors import UsageError
from clip_jax.parallel import clusters

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
# As one node of three with two tasks each and a last one with one has them.
SLURM = {
  "SLURM_JOB_ID": "4103",
  "SLURM_STEP_NODELIST": "n[09-10],gpu-a",
  "SLURM_NTASKS": "5",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
  "SLURM_DISTRIBUTION": "block",
}
# As mpirun of version 4.1.4 sets them.
OPEN_MPI = {
  "OMPI_COMM_WORLD_SIZE": "3",
  "OMPI_COMM_WORLD_RANK": "2",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
  "OMPI_COMM_WORLD_LOCAL_RANK": "0",
  "OMPI_MCA_orte_hnp_uri": "3076390912.0;tcp://192.168.4.7,172.17.0.1:46743",
}
GKE = {"TPU_WORKER_HOSTNAMES": "run-0.run,run-1.run", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run"}


def test_a_process_alone_has_no_cluster():
  assert clusters.find({}) is None
  assert clusters.find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "1", "SLURM_NTASKS": "1"}) is None
  assert clusters.find({**SLURM, "SLURM_NTASKS": "1"}) is None
  # The script of sbatch has the number of tasks, but is none of them.
  assert clusters.find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "n[1-8]"}) is None


def test_three_variables_win_over_a_launcher_and_the_address_alone_only_changes_its():
  assert clusters.find({**BY_HAND, **SLURM})[:4] == ("environment variables", "10.0.0.1:1234", 4, 2)
  for of_launcher in (SLURM, OPEN_MPI, GKE):
    told = clusters.find(of_launcher)
    assert clusters.find({**of_launcher, "JAX_COORDINATOR_ADDRESS": "net2:99"}) == told._replace(address="net2:99")


def test_tasks_of_slurm_know_their_hosts():
  cluster = clusters.find(SLURM)
  assert cluster[:4] == ("Slurm", "n09:61447", 5, 3)
  assert cluster.hosts == {0: "n09", 1: "n09", 2: "n10", 3: "n10", 4: "gpu-a"}
  assert not cluster.joined
  # Numbers that go round among nodes: only the first host is sure.
  assert clusters.find({**SLURM, "SLURM_DISTRIBUTION": "cyclic"}).hosts == {0: "n09"}
  assert clusters.find({**SLURM, "SLURM_NTASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_DISTRIBUTION": "cyclic"}).hosts == {0: "n09", 1: "n10", 2: "gpu-a"}


@pytest.mark.parametrize(
  "variables, gpu",
  [
    ({}, 1),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, 1),
    ({"CUDA_VISIBLE_DEVICES": "1"}, None),  # its launcher shows it one alone
    ({"SLURM_STEP_TASKS_PER_NODE": "1(x5)", "SLURM_LOCALID": "0"}, None),  # all GPUs of its node
    ({"SLURM_NODEID": "2", "SLURM_PROCID": "4", "SLURM_LOCALID": "0"}, None),  # alone on the last node
  ],
  ids=str,
)
def test_tasks_that_share_a_node_have_a_gpu_each_and_one_that_does_not_has_all(variables, gpu):
  assert clusters.find({**SLURM, **variables}).gpu == gpu


def test_gpus_are_those_that_are_shown_or_that_the_driver_lists(monkeypatch, tmp_path):
  for shown, names in (("4,5", ["4", "5"]), ("GPU-a1", ["GPU-a1"]), ("", [])):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert clusters.visible_gpus() == names
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  monkeypatch.setenv("PATH", str(tmp_path))
  assert clusters.visible_gpus() == []
  program = tmp_path / "nvidia-smi"
  program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\necho warning\n")
  program.chmod(0o755)
  assert clusters.visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(
  "short, names",
  [
    ("n1", ["n1"]),
    ("n1,m2", ["n1", "m2"]),
    ("n[1-3]", ["n1", "n2", "n3"]),
    ("n[008-011,20],x", ["n008", "n009", "n010", "n011", "n20", "x"]),
    ("rack[0-1]n[1-2]", ["rack0n1", "rack0n2", "rack1n1", "rack1n2"]),
    ("a-b[1,3]-ib.site", ["a-b1-ib.site", "a-b3-ib.site"]),
  ],
)
def test_short_lists_of_hosts_are_written_out(short, names):
  assert clusters.expand(short) == names


def test_open_mpi_before_version_5_tells_where_mpirun_is():
  cluster = clusters.find(OPEN_MPI)
  assert cluster[:4] == ("Open MPI", f"192.168.4.7:{61440 + 3076390912 // 4096 % 4096}", 3, 2) and cluster.gpu is None
  ip6 = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370"}
  assert clusters.find({**OPEN_MPI, **ip6}).address.startswith("[fe80::b9b:ac5d:9cf0:b858]:")
  assert clusters.find({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "2"}).gpu == 2
  later = {name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}
  with pytest.raises(UsageError, match=r"mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"):
    clusters.find(later)
  assert clusters.find({**later, "JAX_COORDINATOR_ADDRESS": "n1:99"})[:4] == ("Open MPI", "n1:99", 3, 2)


def test_pods_of_a_slice_and_of_several_slices():
  cluster = clusters.find(GKE)
  assert cluster == ("GKE", "run-0.run:8482", 2, 1, {0: "run-0.run", 1: "run-1.run"}, None, True)
  cluster = clusters.find({**GKE, **SLICES})
  assert cluster == ("GKE", "run-slice-0-0.run:8482", 6, 3, {0: "run-slice-0-0.run", 2: "run-0.run", 3: "run-1.run"}, None, True)
  # Slices of one host each.
  one = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", **SLICES, "MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1:8080"}
  assert clusters.find(one)[1:4] == ("10.0.0.1:8482", 3, 1)


@contextlib.contextmanager
def metadata_server(answers):
  """A server on this machine with attributes of a machine of Google Cloud; an answer that is a number is an error."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      answer = answers.get(self.path.rpartition("/")[2], 404)
      right = self.headers["Metadata-Flavor"] == "Google" and "/computeMetadata/v1/instance/attributes/" in self.path
      self.send_response(answer if isinstance(answer, int) else 200 if right else 403)
      self.send_header("Metadata-Flavor", "Google")
      self.end_headers()
      self.wfile.write(b"" if isinstance(answer, int) else answer.encode())

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def tpu_vm(monkeypatch):
  """A machine with chips and no variable of a launcher; the processes' own metadata server is set by `GCE_METADATA_HOST`."""
  monkeypatch.setattr(clusters, "has_tpu", lambda: True)
  return lambda host: monkeypatch.setenv("GCE_METADATA_HOST", host)


OLD, NEW = "unknown:1:10.0.0.5,unknown:2:10.0.0.6", "t1v-w0,t1v-w1"


@pytest.mark.parametrize("workers, hosts", [(OLD, ["10.0.0.5", "10.0.0.6"]), (NEW, ["t1v-w0", "t1v-w1"])], ids=["triples", "names"])
def test_a_tpu_vm_asks_the_metadata_server_for_its_neighbours(tpu_vm, workers, hosts):
  answers = {"agent-worker-number": "1", "worker-network-endpoints": workers, "tpu-env": "ZONE: 'us-west4-a'\nWORKER_ID: '1'\n"}
  with metadata_server(answers) as host:
    tpu_vm(host)
    assert clusters.find({}) == ("Cloud TPU", f"{hosts[0]}:8482", 2, 1, dict(enumerate(hosts)), None, True)
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1'\n"
    answers["tpu-env"] += slices
    assert clusters.find({}) == ("Cloud TPU", "10.0.0.1:8482", 4, 3, {0: "10.0.0.1", 2: hosts[0], 3: hosts[1]}, None, True)
    assert clusters.find({"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert clusters.find({"JAX_PLATFORMS": "cpu"}) is None
    answers["worker-network-endpoints"], answers["tpu-env"], answers["agent-worker-number"] = "t1v-w0", "", "0"
    assert clusters.find({}) is None  # a slice of one host
    del answers["agent-worker-number"]
    assert clusters.find({}) is None  # no machine of Cloud TPU's


def test_a_tpu_vm_whose_metadata_server_fails_does_not_train_alone(tpu_vm):
  with metadata_server({"agent-worker-number": 503}) as host:
    tpu_vm(host)
    with pytest.raises(UsageError, match=rf"its metadata server {host} does not tell of its neighbours \(HTTP 503\); TPU_SKIP_MDS_QUERY=1"):
      clusters.find({})
  with pytest.raises(UsageError, match=r"does not tell of its neighbours \(.*refused"):
    clusters.find({})


@pytest.mark.parametrize(
  "variables, message",
  [
    *(({name: BY_HAND[name] for name in BY_HAND if name != left_out}, f"without {left_out}; set all three") for left_out in BY_HAND),
    ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID set without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES"),
    ({**BY_HAND, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four"),
    ({**BY_HAND, "JAX_NUM_PROCESSES": ""}, "whole numbers"),
    ({**BY_HAND, "JAX_NUM_PROCESSES": "4.0"}, "JAX_NUM_PROCESSES=4.0"),
    ({**BY_HAND, "JAX_NUM_PROCESSES": "²", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=²"),
    ({**BY_HAND, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1"),
    ({**BY_HAND, "JAX_PROCESS_ID": "4"}, "the first smaller"),
    ({**BY_HAND, "JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "the first smaller"),
    ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "JAX_COORDINATOR_ADDRESS=10.0.0.1 must be HOST:PORT"),
    ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": ""}, "must be HOST:PORT"),
    ({**GKE, "JAX_COORDINATOR_ADDRESS": "host:"}, "must be HOST:PORT"),
    ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_NTASKS=5, SLURM_PROCID=x, SLURM_LOCALID=1: these must be whole numbers, as the launcher sets them"),
    ({**SLURM, "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many: this must be a whole number"),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK=,"),
    ({**GKE, "TPU_WORKER_ID": "one"}, "TPU_WORKER_ID=one"),
    ({**GKE, "MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_SLICE_ID="),
    ({**GKE, **SLICES, "MEGASCALE_COORDINATOR_ADDRESS": ""}, "set without MEGASCALE_COORDINATOR_ADDRESS"),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_one_clear_sentence(variables, message):
  with pytest.raises(UsageError, match=re.escape(message)) as error:
    clusters.find(variables)
  assert "\n" not in str(error.value)
