"""What XLA is told beside its defaults."""

import os
import subprocess
import sys

import pytest

from clip_jax.parallel import clusters, xla


@pytest.fixture
def told(monkeypatch):
  """A function that gives XLA_FLAGS after `set_flags`, as a list, from what it was before."""

  def tell(before, gpus=False, **options):
    monkeypatch.setattr(clusters, "has_gpu_plugin", lambda: gpus)
    monkeypatch.setenv("XLA_FLAGS", before)
    for _ in range(2):  # the second time changes nothing
      xla.set_flags(**options)
    return os.environ["XLA_FLAGS"].split()

  return tell


def flags_of(platform, deterministic=False):
  return [f"--{flag.name}={flag.value}" for flag in xla.FLAGS if flag.platform == platform and flag.deterministic <= deterministic]


def test_flags_are_those_of_devices_that_may_be_here(told):
  assert told("") == flags_of("cpu")
  assert sorted(told("", gpus=True)) == sorted(flags_of("cpu") + flags_of("gpu"))
  assert sorted(told("", gpus=True, deterministic=True)) == sorted(flags_of("cpu") + flags_of("gpu", True))
  assert "--xla_gpu_deterministic_ops=true" in told("", gpus=True, deterministic=True)
  assert "--xla_gpu_deterministic_ops=true" not in told("", gpus=True)


def test_what_was_set_before_stays(told):
  before = ["--xla_dump_to=there", "--xla_gpu_enable_latency_hiding_scheduler=false"]
  found = told(" ".join(before), gpus=True)
  assert found[:2] == before and sum("latency_hiding" in flag for flag in found) == 1


def test_every_flag_is_one_that_xla_knows_and_has_a_reason():
  """It ends a process that is told of another one."""
  program = "import jax; print(jax.jit(lambda x: x + 1)(1))"

  def ran(flags):
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False)

  assert ran([f"--{flag.name}={flag.value}" for flag in xla.FLAGS]).stdout == "2\n"
  assert "Unknown flag" in ran(["--xla_cpu_collectives_are_quick=true"]).stderr
  assert all(len(flag.reason) > 40 and flag.platform in ("cpu", "gpu") for flag in xla.FLAGS)
