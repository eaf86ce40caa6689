"""What `clip-jax doctor` says of machines that are well, and of those that are not."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clip_jax.errors import UsageError
from clip_jax.plan import chips
from clip_jax.plan.chips import GIB
from clip_jax.train import doctor
from clip_jax.train.doctor import devices, machine, versions
from clip_jax.train.doctor.check import guarded
from clip_jax.train.doctor.devices import Facts

ROOT = Path(__file__).parents[2]
NEEDED = ["optax>=0.2.6", "jax>=0.10", 'wandb>=0.19; extra == "wandb"']
PINNED = [
  "jaxlib<=0.10.2,>=0.10.1", 'libtpu==0.0.42.*; extra == "tpu"', 'jaxlib<=0.10.2,>=0.10.2; extra == "tpu"',
  'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
]  # fmt: skip
GOOD = {"optax": "0.2.8", "jax": "0.10.2", "jaxlib": "0.10.2"}


def judged(python="3.11.7", **changes):
  found = {name.replace("_", "-"): version for name, version in {**GOOD, **changes}.items() if version}
  return versions.judge(python, found, ">=3.11", NEEDED, PINNED)


def test_versions_that_go_together():
  found = judged(libtpu="0.0.42.1", jax_cuda13_plugin="0.10.2")
  assert (found.status, found.advice) == ("ok", "") and "jax 0.10.2, jaxlib 0.10.2, libtpu 0.0.42.1" in found.found
  assert versions.versions().status == "ok"  # what the tests run with


@pytest.mark.parametrize(
  "changes, status, message, advice",
  [
    ({"jaxlib": "0.10.0"}, "wrong", "jaxlib 0.10.0 is installed, and jaxlib<=0.10.2,>=0.10.1 is needed", "pip install 'jaxlib<=0.10.2,>=0.10.1'"),
    ({"optax": "0.1.9"}, "wrong", "optax 0.1.9 is installed", "pip install 'optax>=0.2.6'"),
    ({"optax": None}, "wrong", "optax is missing", "pip install 'optax>=0.2.6'"),
    ({"python": "3.10.4"}, "wrong", "Python 3.10.4 is not >=3.11", "virtual environment anew with Python >=3.11"),
    ({"jax_cuda13_plugin": "0.9.1"}, "wrong", "jax-cuda13-plugin 0.9.1", "pip install 'jax[cuda13]==0.10.2'"),
    ({"libtpu": "0.0.40"}, "warning", "libtpu 0.0.40 is installed, and libtpu==0.0.42.* is needed", "pip install 'jax[tpu]==0.10.2'"),
    ({"libtpu": "0.0.40", "optax": "0.1"}, "wrong", "libtpu 0.0.40", "pip install 'jax[tpu]==0.10.2' 'optax>=0.2.6'"),
    # The pins of a jax that is to be replaced say nothing.
    ({"jax": "0.9.0", "jaxlib": "0.9.0"}, "wrong", "jax 0.9.0 is installed, and jax>=0.10 is needed.", "pip install 'jax>=0.10'"),
  ],
)
def test_versions_that_do_not(changes, status, message, advice):
  found = judged(**changes)
  assert found.status == status and message in found.found and advice in found.advice


V5E = Facts("tpu", "TPU v5 lite", 4, 4, 1, 197e12, 400e9, (devices.TPU,))
H100 = Facts("gpu", "NVIDIA H100 80GB HBM3", 8, 8, 1, 989e12, 900e9, (devices.GPU,))
CPU = Facts("cpu", "cpu", 1, 1)
BUSY = "Backend 'tpu' failed to initialize: ABORTED: The TPU is already in use by process with pid 1234. Not attempting to load libtpu.so"


@pytest.mark.parametrize(
  "facts, status, message, advice",
  [
    (V5E, "ok", "4 devices, TPU v5 lite (tpu).", ""),
    (CPU, "ok", "1 device, cpu.", ""),
    (dataclasses.replace(V5E, count=8, processes=2), "ok", "8 devices, TPU v5 lite (tpu), 4 of them in this process, of 2.", ""),
    (dataclasses.replace(H100, kind="Riva 128", flops=None), "warning", "no MFU", "chips.py"),
    (dataclasses.replace(CPU, present=(devices.TPU,), libtpu=False), "wrong", "only the processor, because libtpu is not", "clip_jax[tpu]"),
    (dataclasses.replace(CPU, present=(devices.TPU,), error=BUSY), "wrong", "The TPU is in use by process 1234.", "ps 1234"),
    (dataclasses.replace(CPU, present=(devices.GPU,)), "wrong", "There is an NVIDIA GPU, but JAX sees only the processor.", "clip_jax[cuda]"),
    (dataclasses.replace(CPU, present=(devices.GPU,), asked="cpu"), "wrong", "for JAX_PLATFORMS=cpu", "unset JAX_PLATFORMS"),
    (Facts(asked="cuda", error="Unknown backend cuda"), "wrong", "JAX does not start: Unknown backend cuda.", "JAX_PLATFORMS=cpu"),
    (Facts(present=(devices.TPU,), asked="tpu", error=BUSY), "wrong", "The TPU is in use by process 1234.", "ps 1234"),
  ],
)
def test_devices(facts, status, message, advice):
  found = devices.devices(facts)
  assert found.status == status and message in found.found and advice in found.advice


def test_accelerators_are_seen_by_their_files(tmp_path):
  assert devices.present(tmp_path) == ()
  for name in ("dev/accel0", "dev/vfio/vfio", "proc/driver/nvidia/version"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  assert devices.present(tmp_path) == (devices.TPU, devices.GPU)
  (tmp_path / "dev/accel0").unlink()
  assert devices.present(tmp_path) == (devices.GPU,)  # dev/vfio/vfio is everywhere


def test_all_devices_add_up_to_the_same():
  facts = devices.gather()
  assert (facts.platform, facts.count, facts.local, facts.accelerators) == ("cpu", 8, 8, 0)
  seconds, agree = devices.measure_all_reduce(jax.devices(), 1 << 20)
  assert seconds > 0 and agree
  found = devices.judge_interconnect(facts, 1, 1 << 20, seconds, agree)
  assert found.status == "ok" and "1 MiB added up over 8" in found.found


def test_bandwidth_is_that_of_the_bus_and_compared_with_one_direction():
  # 2 * 3/4 of 1 GiB in 8.05 ms are 200 GB/s, all that 400 in both directions allow.
  found = devices.judge_interconnect(V5E, 1, GIB, 1.5 * GIB / 200e9, True)
  assert found.status == "ok" and found.found.startswith("200 GB/s of bus bandwidth") and "100% of the 200 published" in found.found
  slow = devices.judge_interconnect(V5E, 1, GIB, 1.5 * GIB / 30e9, True)
  assert slow.status == "warning" and "15% of the 200" in slow.found and slow.advice
  assert devices.judge_interconnect(V5E, 2, GIB, 1.5 * GIB / 30e9, True).status == "ok"  # the network between slices is another
  assert devices.judge_interconnect(dataclasses.replace(H100, processes=2), 1, GIB, 1.0, True).status == "ok"
  assert devices.judge_interconnect(V5E, 1, GIB, 0.01, False).status == "wrong"
  assert devices.interconnect(CPU).status == "skipped"


def test_products_are_compared_with_the_peak():
  assert devices.measure_product(jax.devices()[0], 64, chain=2, rounds=1) > 0
  fast, slow = (devices.judge_product(H100, 8192, 2 * 8192**3 / rate) for rate in (700e12, 90e12))
  assert fast.status == "ok" and "700 TFLOP/s" in fast.found and "71% of its peak of 989" in fast.found
  assert slow.status == "warning" and "nvidia-smi" in slow.advice


def system(root, files):
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
  return root


MEMORY = {"proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemFree: 10 kB\nMemAvailable: {40 * 2**20} kB\nHugePages_Total: 0\n"}
TWO = MEMORY | {
  "proc/self/cgroup": "0::/pod/a\n", "sys/fs/cgroup/pod/a/memory.max": "max\n", "sys/fs/cgroup/pod/memory.max": f"{16 * GIB}\n",
  "sys/fs/cgroup/pod/memory.current": f"{14 * GIB}\n", "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {4 * GIB}\n",
  "sys/fs/cgroup/pod/cpu.max": "150000 100000\n", "sys/fs/cgroup/cpu.max": "max 100000\n",
}  # fmt: skip
ONE = MEMORY | {  # in a container its own group is the outermost that can be seen
  "proc/self/cgroup": "4:memory:/docker/a\n1:cpu,cpuacct:/docker/a\n0::/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{16 * GIB}\n",
  "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{14 * GIB}\n",
  "sys/fs/cgroup/memory/memory.stat": f"cache 5\ntotal_inactive_file {4 * GIB}\n",
  "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}  # fmt: skip


def test_host_memory_is_enough_for_what_training_keeps(tmp_path):
  root = system(tmp_path, MEMORY)
  found = machine.host_memory(8, root)
  assert (found.status, found.found) == ("ok", "40.0 GiB of 64.0 GiB are available.")
  found = machine.host_memory(9, root)
  assert found.status == "warning" and "Training may need 44 GiB." in found.found and "block_cache" in found.advice
  assert machine.host_memory(0, tmp_path / "other").status == "skipped"


@pytest.mark.parametrize("files", [TWO, ONE], ids=["cgroup2", "cgroup1"])
def test_the_limits_of_a_container_count(files, tmp_path):
  root = system(tmp_path, files)
  found = machine.host_memory(0, root)
  assert found.found == "6.0 GiB of 16.0 GiB are available (the limit of this container; the machine has 64.0 GiB)."
  assert found.status == "ok" and machine.host_memory(1, root).status == "warning"
  assert machine.core_limit(root) == 1.5
  assert machine.cores(None, root).found.startswith(f"{min(1.5, len(os.sched_getaffinity(0))):g} of {os.cpu_count()} cores may be used")


def test_cores_are_compared_with_what_the_chips_take(tmp_path):
  root = system(tmp_path, TWO)
  chip = chips.of_kind("NVIDIA L4")
  assert machine.cores(chip.flops, root).status == "ok"
  found = machine.cores(8 * chip.flops, root)
  assert found.status == "warning" and "ViT-B/16 may take 3,143" in found.found and "--max-size" in found.advice


def limited(limit, code):
  """Runs a check in a process with a limit of its own, and gives what it found."""
  script = f"import resource, json, dataclasses; from clip_jax.train.doctor import machine; resource.setrlimit({limit})\n"
  script += f"print(json.dumps(dataclasses.asdict({code})))"
  done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True, cwd=ROOT)
  return json.loads(done.stdout)


def test_few_open_files_are_a_warning():
  found = limited("resource.RLIMIT_NOFILE, (256, 8192)", "machine.open_files()")
  assert found["status"] == "warning" and found["found"].startswith("256 ") and found["advice"].startswith("ulimit -n 8192")
  found = limited("resource.RLIMIT_NOFILE, (256, 512)", "machine.open_files()")
  assert found["status"] == "warning" and "hard limit is 512" in found["found"] and "LimitNOFILE" in found["advice"]
  assert machine.open_files(least=1).status == "ok"


def test_a_folder_that_takes_no_more_is_wrong(tmp_path):
  found = limited("resource.RLIMIT_FSIZE, (4096, 4096)", f"machine.disk({str(tmp_path)!r})")
  assert found["status"] == "wrong" and "File too large" in found["found"] and "Make room" in found["advice"]
  assert list(tmp_path.iterdir()) == []


def test_a_disk_is_written_to_and_left_as_it_was(tmp_path):
  found = machine.disk(tmp_path / "not/yet", least=1, size=1 << 20)
  assert found.status == "ok" and "1 MiB were written" in found.found
  assert list(tmp_path.iterdir()) == []
  found = machine.disk(tmp_path, least=2**62, size=1 << 20)
  assert found.status == "warning" and "keep_last" in found.advice


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
  (tmp_path / "file").touch()
  assert machine.disk(tmp_path / "file" / "run").found == f"{tmp_path / 'file'} is a file, not a folder."
  found = machine.disk("/proc/run")  # of no user, root neither
  assert found.status == "wrong" and found.found.startswith("/proc/run cannot be written") and "--workdir" in found.advice
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/proc/xla")
  found = machine.compilation_cache()
  assert found.status == "warning" and "/proc/xla cannot be written" in found.found and "CLIP_JAX_CACHE" in found.advice
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
  assert machine.compilation_cache().status == "skipped"
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  assert machine.compilation_cache().found == f"{tmp_path / 'cache/xla'} can be written."


def test_little_shared_memory_matters_to_gpus(tmp_path):
  assert machine.shared_memory("gpu", tmp_path, least=2**62).advice.startswith("Containers start with 64 MiB")
  assert machine.shared_memory("cpu", tmp_path, least=2**62).status == "ok"
  assert machine.shared_memory("gpu", tmp_path / "nowhere").status == "skipped"


def test_a_check_that_fails_is_a_check():
  found = guarded("matrix product", devices.measure_product, None, 1)
  assert (found.name, found.status) == ("matrix product", "wrong") and "it cannot be measured" in found.found


def test_wrong_arguments_are_refused_before_anything_is_measured():
  with pytest.raises(UsageError, match="--bucket shards: expected gs://NAME"):
    doctor.run(urls=["shards"])
  with pytest.raises(UsageError, match="only local paths, gs:// and s3://"):
    doctor.run(urls=["http://host/shards"])
  with pytest.raises(UsageError, match="work directories are folders of this machine"):
    doctor.run("gs://bucket/run")


def test_where_jax_cannot_be_imported_the_rest_is_checked(tmp_path):
  (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is version 0.10.0, but this version of jax requires version >= 0.10.1.')")
  command = [sys.executable, "-m", "clip_jax.cli", "doctor", "--json"]
  path = os.pathsep.join((str(tmp_path), str(ROOT)))
  done = subprocess.run(command, text=True, capture_output=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
  found = json.loads(done.stdout)
  checks = {check["name"]: check for check in found["checks"]}
  assert done.returncode == 1 and found["devices"] == 0 and found["device"] is None
  assert "JAX does not start: jaxlib is version 0.10.0" in checks["devices"]["found"] and checks["disk"]["status"] == "ok"


def test_the_first_of_two_processes_tells_what_both_found(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"

  def start(number, *arguments):
    given = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(number), JAX_NUM_CPU_DEVICES="2")
    command = [sys.executable, "-m", "clip_jax.cli", "doctor", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | given)

  running = [start(0, "--json", "--workdir", str(tmp_path)), start(1, "--workdir", "/proc/run")]
  (told, errors), (silent, _) = (process.communicate(timeout=120) for process in running)
  assert [process.returncode for process in running] == [1, 1], errors
  found = json.loads(told)
  assert silent == "" and found["processes"] == 2
  checks = {check["name"]: check for check in found["checks"]}
  assert checks["disk"]["status"] == "ok" and checks["disk (process 1)"]["found"].startswith("/proc/run cannot be written")
  assert "added up over 4" in checks["interconnect"]["found"] and "2 of them in this process, of 2" in checks["devices"]["found"]
