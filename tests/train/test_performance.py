"""What throughput means for chips. Devices with a peak and with memory statistics are not here, so they are made up."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from clip_jax import config as configs
from clip_jax.models import size
from clip_jax.plan import compile as compiler
from clip_jax.train import performance
from tests.conftest import tiny


def config(**sections):
  return configs.resolve(tiny(train={"global_batch_size": 16, "steps": 1}, **sections))


def made_up(kind, count, stats=None, **attributes):
  """Devices as JAX would show them; a CPU is of no kind that has a peak, and counts no memory."""
  return [
    SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats, **attributes) for _ in range(count)
  ]


@pytest.mark.parametrize(
  "kind, attributes, chips, tflops",
  [
    ("TPU v5 lite", {"num_cores": 1}, 8, 197),
    ("TPU v4", {"num_cores": 2}, 8, 275),
    ("TPU7x", {"num_cores": 1}, 4, 2307),  # two devices a chip
    ("NVIDIA H100 80GB HBM3", {}, 8, 989.5),
  ],
)
def test_a_rate_is_shared_by_chips_and_compared_with_their_peak(kind, attributes, chips, tflops):
  run = config()
  values = performance.Meter(run, made_up(kind, 8, **attributes))(1e6)
  assert values["samples_per_second_per_chip"] == 1e6 / chips
  flops = size.training_flops(run.model, 16)
  assert values["mfu"] == pytest.approx(1e6 * flops / (chips * tflops * 1e12))
  assert values.keys() == {"samples_per_second_per_chip", "mfu"}


def test_a_locked_tower_and_the_kind_of_loss_count():
  devices = made_up("TPU v5 lite", 1, num_cores=1)
  whole = performance.Meter(config(), devices)(1e6)["mfu"]
  locked = performance.Meter(config(optimizer={"freeze": "^image/"}), devices)(1e6)["mfu"]
  sigmoid = config(loss={"name": "sigmoid", "max_logit_scale": None}, model={**tiny()["model"], "logit_bias_init": -10.0})
  assert locked < 0.8 * whole
  # One product of 16 x 16 x 16 fewer, of which a pair has a sixteenth.
  assert whole - performance.Meter(sigmoid, devices)(1e6)["mfu"] == pytest.approx(1e6 * 2 * 16 * 16 / 197e12, rel=1e-6)


@pytest.mark.parametrize("kind, attributes", [("NVIDIA RTX 9090", {}), ("TPU v4", {})], ids=["unknown", "cores not told"])
def test_without_a_known_peak_there_is_no_utilisation(kind, attributes):
  assert performance.Meter(config(), made_up(kind, 4, **attributes))(100.0) == {"samples_per_second_per_chip": 25.0}


def test_on_cpu_there_is_neither_a_peak_nor_memory():
  assert performance.Meter(config(), jax.devices())(80.0) == {"samples_per_second_per_chip": 80.0 / len(jax.devices())}


def test_memory_is_that_of_a_device_of_this_process():
  stats = {"bytes_in_use": 3 * 2**30, "peak_bytes_in_use": 5 * 2**30, "bytes_limit": 16 * 2**30}
  other, mine = made_up("TPU v5 lite", 2, stats, num_cores=1)
  other.process_index, other.memory_stats = 1, None  # of another host nothing can be asked
  values = performance.Meter(config(), [other, mine])(1.0)
  assert (values["memory_gib"], values["peak_memory_gib"]) == (3.0, 5.0)


def test_a_runtime_that_counts_no_memory_is_no_error():
  device = compiler.devices("v5e:2x2")[0]  # raises when it is asked, as it is not here
  with pytest.raises(jax.errors.JaxRuntimeError):
    device.memory_stats()
  assert performance.memory(device) == {}


@pytest.mark.parametrize(
  "device, want",
  [
    (SimpleNamespace(platform="gpu", compute_capability="9.0"), "bfloat16"),
    (SimpleNamespace(platform="gpu", compute_capability="7.5"), "float32"),
  ],
)
def test_a_gpu_computes_in_bfloat16_where_it_can(device, want):
  auto = config(model={**tiny()["model"], "compute_dtype": "auto"})
  settled = performance.settled(auto, device)
  assert settled.model.compute_dtype == want
  assert dataclasses.replace(settled, model=auto.model) == auto  # and nothing else is changed
  assert performance.settled(config(), device) == config()


@pytest.mark.parametrize("flags, want", [("fpu avx512_bf16 amx_tile", "bfloat16"), ("fpu amx_bf16", "bfloat16"), ("fpu avx512f", "float32"), (None, "float32")])
def test_a_cpu_computes_in_bfloat16_if_it_has_instructions_for_it(monkeypatch, tmp_path, flags, want):
  path = tmp_path / "cpuinfo"
  if flags is not None:
    path.write_text(f"processor: 0\nflags\t\t: {flags}\n")
  monkeypatch.setattr(performance, "CPU_INFO", path)  # of another processor than this one
  auto = config(model={**tiny()["model"], "compute_dtype": "auto"})
  assert performance.settled(auto, jax.devices()[0]).model.compute_dtype == want


def test_a_tpu_computes_in_bfloat16():
  auto = config(model={**tiny()["model"], "compute_dtype": "auto"})
  assert performance.settled(auto, compiler.devices("v5e:2x2")[0]).model.compute_dtype == "bfloat16"
