"""Plans: what they promise other programs, what their numbers have to do with each other, and what the compiler says of their advice."""

import dataclasses
import json
import types

import jax
import pytest
from ml_collections import ConfigDict

from clip_jax.config import recipes
from clip_jax.errors import ConfigError, UsageError
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import chips, estimate, memory, planner, slices
from clip_jax.plan import compile as compiler
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.plan import conftest

NUMBER, NONE = (int, float), type(None)
# Every key of a plan, and what its value may be.
KEYS = {
  "config": str,
  "topology": str,
  "accelerator_type": (str, NONE),
  "slices": int,
  "chips": int,
  "method": str,
  "fits": bool,
  "peak_hbm_bytes": int,
  "hbm_capacity_bytes": int,
  "missing_bytes": int,
  "memory": dict,
  "flops": (*NUMBER, NONE),
  "bytes_accessed": (*NUMBER, NONE),
  "hbm_traffic_bytes": (*NUMBER, NONE),
  "collectives": (dict, NONE),
  "limits_s": (dict, NONE),
  "step_time_lower_bound_s": (float, NONE),
  "step_time_estimate_s": (float, NONE),
  "efficiency": (float, NONE),
  "samples_per_second": (float, NONE),
  "days": (float, NONE),
  "chip_hours": (float, NONE),
  "cost": (float, NONE),
  "samples": int,
  "advice": list,
  "compile_s": (float, NONE),
}
SPEED = ("limits_s", "step_time_lower_bound_s", "step_time_estimate_s", "efficiency", "samples_per_second", "days", "chip_hours", "cost")


def is_a(value, kinds):
  return isinstance(value, kinds) and (not isinstance(value, bool) or kinds is bool)


def check(found, price, batch):
  """Checks that a plan is what other programs rely on; as they see it, behind JSON."""
  found = json.loads(json.dumps(found, allow_nan=False))
  assert {key for key in KEYS if key not in found} == set()
  for key, kinds in KEYS.items():
    assert is_a(found[key], kinds), (key, found[key])
  assert found["method"] in ("compiler", "analytic")
  assert set(found["memory"]) <= {*memory.PARTS, "arguments"} and all(is_a(size, int) and size >= 0 for size in found["memory"].values())
  assert all(flag.startswith("--config.") and "=" in flag for flags in found["advice"] for flag in flags) and all(found["advice"])
  assert (found["missing_bytes"] > 0) == (not found["fits"]) and (found["compile_s"] is None) == (found["method"] == "analytic")
  if not found["fits"]:
    assert found["missing_bytes"] == found["peak_hbm_bytes"] - found["hbm_capacity_bytes"]
    assert all(found[key] is None for key in SPEED)
    return
  assert found["peak_hbm_bytes"] <= found["hbm_capacity_bytes"] and found["advice"] == []
  for kind, pair in found["collectives"].items():
    assert kind in estimate.SENT and len(pair) == 2 and all(is_a(number, NUMBER) and number > 0 for number in pair)
  if found["days"] is None:  # a machine whose chip has no published peak
    assert all(found[key] is None for key in SPEED)
    return
  assert found["step_time_lower_bound_s"] == max(found["limits_s"].values()) > 0
  assert found["step_time_estimate_s"] == pytest.approx(found["step_time_lower_bound_s"] / found["efficiency"])
  assert found["samples_per_second"] == pytest.approx(batch / found["step_time_estimate_s"])
  assert found["days"] * 86_400 * found["samples_per_second"] == pytest.approx(found["samples"])
  assert found["chip_hours"] == pytest.approx(found["days"] * 24 * found["chips"])
  assert found["cost"] == (None if price is None else pytest.approx(found["chip_hours"] * price))
  chip = chips.of_topology(found["topology"])
  assert found["limits_s"]["compute"] == pytest.approx(found["flops"] / chip.flops)
  assert found["limits_s"]["memory"] == pytest.approx(found["hbm_traffic_bytes"] / chip.memory_bandwidth)


# Too much for a v5e on its own by half, and refused in a second; made of few and large arrays, so that what fits compiles fast.
WIDE = {
  "image_size": 224,
  "embed_dim": 128,
  "compute_dtype": "bfloat16",
  "vision": {"patch_size": 16, "width": 2048, "layers": 1, "heads": 32},
  "text": {"context_length": 32, "width": 128, "layers": 1, "heads": 2},
}
BATCH = 2048


def wide(**sections):
  return {"model": WIDE, "train": {"global_batch_size": BATCH, "samples": 1_000_000}, **sections}


@pytest.fixture
def recipe(tmp_path):
  """A function that reads the wide config with flags, as main.py would."""
  path = tmp_path / "wide.py"
  values = tiny()
  values.update(wide(mesh={"data": -1, "fsdp": 1, "tensor": 1, "sharding": "fsdp"}))
  values["train"].update({"remat": "none", "scan": False, "microbatches": 1})
  path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n  return ConfigDict({values!r})\n")
  return lambda *flags: recipes.load([f"--config={path}", *flags])


@pytest.fixture(scope="module")
def programs():
  """What was compiled, or why it was not, by what it was made of."""
  return {}


@pytest.fixture
def once(programs, monkeypatch):
  """The compiler is asked once for a program that several tests need."""
  compile = compiler.compile

  def remembered(function, *arguments, fresh=False):
    lowered = function.lower(*arguments)
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    key = device.device_kind, jax.config.jax_optimization_level, lowered.as_text()
    if key not in programs:
      try:
        programs[key] = compile(types.SimpleNamespace(lower=lambda *_: lowered), *arguments, fresh=fresh)
      except compiler.OutOfMemoryError as error:
        programs[key] = error.with_traceback(None)  # without the arrays and frames that it would keep
    if isinstance(programs[key], compiler.OutOfMemoryError):
      raise programs[key]
    return programs[key]

  monkeypatch.setattr(compiler, "compile", remembered)


@pytest.mark.slow
def test_a_small_config_fits_and_every_number_of_its_plan_agrees_with_the_others(quickly):
  config, where = conftest.resolved("v5litepod-4")
  found, (compiled, mesh) = planner.plan(config, where, "tiny", price=1.2)
  check(found, price=1.2, batch=16)
  assert (found["config"], found["topology"], found["accelerator_type"]) == ("tiny", "v5e:2x2", "v5litepod-4")
  assert (found["chips"], found["slices"], found["method"], found["samples"]) == (4, 1, "compiler", 4 * 16)
  assert found["fits"] and found["hbm_capacity_bytes"] == round(15.75 * 2**30) and mesh.size == 4
  report = compiler.report(compiled)
  assert (found["peak_hbm_bytes"], found["flops"], found["collectives"]) == (report.peak_bytes, report.flops, report.collectives)
  assert "network" not in found["limits_s"] and found["limits_s"]["interconnect"] > 0


@pytest.mark.slow
def test_of_a_tpu7x_a_chip_is_two_devices(quickly):
  config, where = conftest.resolved("tpu7x:1x1x1")
  found, (compiled, mesh) = planner.plan(config, where)
  check(found, price=None, batch=16)
  assert mesh.size == 2 and found["chips"] == 1 and found["accelerator_type"] == "tpu7x-2"
  report = compiler.report(compiled)
  assert found["peak_hbm_bytes"] == 2 * report.peak_bytes and found["hbm_capacity_bytes"] == round(2 * 94.75 * 2**30)
  assert found["flops"] == 2 * report.flops and found["bytes_accessed"] == 2 * report.bytes_accessed
  assert found["hbm_traffic_bytes"] == 2 * report.hbm_bytes
  assert found["memory"] == {part: 2 * size for part, size in report.memory.items()}
  assert found["collectives"] == {kind: [count, 2 * size] for kind, (count, size) in report.collectives.items()}


@pytest.mark.slow
def test_slices_are_joined_by_a_network_that_takes_its_time(quickly):
  config, where = conftest.resolved("v5e:2x2", mesh={"dcn_data": 2})
  found, (_, mesh) = planner.plan(config, where, price=0.5)
  check(found, price=0.5, batch=16)
  assert (found["slices"], found["chips"], mesh.size) == (2, 8, 8)
  assert found["limits_s"]["network"] > 0
  assert found["limits_s"]["network"] == pytest.approx(estimate.network_bytes(config, 4) / where.chip.network)


@pytest.mark.slow
def test_here_are_the_devices_of_this_machine():
  config, where = conftest.resolved(planner.HERE)
  assert (where.devices, where.chip, where.share) == (jax.device_count(), None, 1)
  found, (compiled, mesh) = planner.plan(config, where, "tiny", price=1.0)
  check(found, price=1.0, batch=16)
  assert (found["topology"], found["accelerator_type"], found["chips"]) == ("here", None, 8) and found["fits"]
  assert mesh.devices.flat[0] in jax.devices() and found["days"] is None
  # It really is the step: it runs.
  state, create = states.describe(config, mesh)
  batch = jax.tree.map(lambda one: jax.device_put(jax.numpy.zeros(one.shape, one.dtype), one.sharding), steps.inputs(config, mesh))
  _, metrics = compiled(jax.jit(create, out_shardings=states.shardings_of(state))(), batch)
  assert float(metrics["loss"]) > 0


@pytest.mark.slow
def test_a_machine_without_published_peaks_says_what_does_not_fit_and_cannot_say_what_is_fastest():
  config, where = conftest.resolved(planner.HERE)
  found, _ = planner.plan(config, dataclasses.replace(where, capacity=10_000_000))
  check(found, price=None, batch=16)
  assert not found["fits"] and found["advice"]
  with pytest.raises(UsageError, match="peak"):
    planner.search(config, where)


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_its_first_advice_really_does(recipe, quickly, once):
  where = planner.target("v5e:1x1")
  found, step = planner.plan(planner.resolved(recipe(), where), where, "wide")
  check(found, price=None, batch=BATCH)
  assert not found["fits"] and step is None and found["flops"] is found["collectives"] is None
  assert sum(found["memory"].values()) == pytest.approx(found["peak_hbm_bytes"], abs=len(memory.PARTS))
  assert found["advice"]
  config = planner.resolved(recipe(*found["advice"][0]), where)
  better, _ = planner.plan(config, where, "wide")
  check(better, price=None, batch=BATCH)
  assert better["fits"] and better["method"] == "compiler"


def test_what_is_missing_counts_the_state_once(quickly, once):
  """A moving average of the parameters is one more array of each: so much more is missing, and not twice as much."""
  found = []
  for decay in (None, 0.999):
    config, where = conftest.resolved("v5e:1x1", WIDE, train={"global_batch_size": BATCH, "steps": 1}, optimizer={"ema_decay": decay})
    found.append(planner.plan(config, where)[0])
  parameters = found[0]["memory"]["parameters"]
  assert parameters > 2**27 and not found[0]["fits"]
  assert found[1]["missing_bytes"] - found[0]["missing_bytes"] == pytest.approx(parameters, rel=0.2)
  # The message is in hundredths of a GiB, and all of it is what the compiler needs.
  step = steps.create(config, mesh := meshes.create(config, compiler.devices("v5e:1x1")))
  with pytest.raises(compiler.OutOfMemoryError) as error:
    compiler.compile(step, states.describe(config, mesh)[0], steps.inputs(config, mesh))
  assert found[1]["peak_hbm_bytes"] == error.value.needed_bytes > where.capacity


def test_advice_is_never_to_change_nothing(monkeypatch):
  """Where the estimate has it that a config fits, and the compiler does not, more than nothing is advised."""
  config, where = conftest.resolved("v5e:2x2", train={"global_batch_size": 64, "steps": 1})
  monkeypatch.setattr(compiler, "compile", refuse)
  found, _ = planner.plan(config, where)
  assert not found["fits"] and found["advice"] and all(found["advice"])


def refuse(*_, **__):
  raise compiler.OutOfMemoryError("RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (16.25G) exceeds available HBM (15.75G).")


def test_a_refusal_is_read_whatever_its_unit():
  for text, size in (("(16.25G)", 16.25 * 2**30), ("(900.50M)", 900.5 * 2**20), ("(3K)", 3 * 2**10)):
    error = compiler.OutOfMemoryError(f"RESOURCE_EXHAUSTED: total memory required for HLO temporaries {text} exceeds available HBM (15.75G).")
    assert error.needed_bytes == int(size)
  assert compiler.OutOfMemoryError("RESOURCE_EXHAUSTED: no room").needed_bytes is None


@pytest.mark.slow
def test_a_search_finds_changes_with_which_it_fits(recipe, quickly, once):
  where, told = planner.target("v5e:1x1"), []
  found = planner.search(planner.resolved(recipe(), where), where, "wide", price=2.0, most=2, tell=told.append)
  check(found, price=2.0, batch=BATCH)
  assert found["fits"] and found["flags"] and 1 <= len(found["tried"]) <= 2 and len(told) == len(found["tried"])
  for one in found["tried"]:
    check(one, price=2.0, batch=BATCH)
  fastest = min((one for one in found["tried"] if one["fits"]), key=lambda one: one["step_time_lower_bound_s"])
  assert fastest == {key: value for key, value in found.items() if key != "tried"}
  config = planner.resolved(recipe(*found["flags"]), where)
  assert config != planner.resolved(recipe(), where)
  assert estimate.step_flops(config) == pytest.approx(found["flops"], rel=0.1)


def test_a_search_without_a_compiler_ends_with_the_fastest_of_all_by_the_estimate(recipe):
  where = planner.target("h100:8")
  config = planner.resolved(recipe("--config.train.global_batch_size=524288"), where)
  assert not planner.plan(config, where)[0]["fits"]
  found = planner.search(config, where)
  check(found, price=None, batch=524_288)
  assert found["fits"] and found["method"] == "analytic"
  again = planner.plan(planner.resolved(recipe("--config.train.global_batch_size=524288", *found["flags"]), where), where)[0]
  assert again == {key: value for key, value in found.items() if key not in ("flags", "tried")}
  fitting = [one for one in planner.candidates(config, where) if one.peak <= where.capacity]
  assert found["limits_s"]["compute"] <= 1.1 * min(estimate.step_flops(one.config) for one in fitting) / 8 / where.chip.flops


def test_a_search_where_nothing_comes_near_says_by_how_much():
  config, where = conftest.resolved("h100:1", WIDE, train={"global_batch_size": 2**24, "steps": 1})
  found = planner.search(config, where)
  assert not found["fits"] and found["missing_bytes"] > 0 and found["flags"] == [] and len(found["tried"]) == 1


def test_every_candidate_is_another_config_that_can_be_laid_over_the_devices():
  config, where = conftest.resolved("v5e:4x4", train={"global_batch_size": 64, "steps": 1})
  found = planner.candidates(config, where)
  assert len({(one.config.train, one.config.mesh) for one in found}) == len(found) > 50
  assert any(not one.changes and one.config == config for one in found)
  for one in found:
    meshes.abstract(one.config, where.devices)
    assert one.seconds > 0 and one.peak > 0
  keys = {key for one in found for key in one.changes}
  assert {"train.remat", "train.scan", "train.microbatches", "mesh.fsdp", "mesh.tensor", "mesh.sharding"} <= keys


@pytest.mark.slow
def test_the_smallest_slice_is_one_on_which_it_fits_and_the_next_smaller_is_not(recipe, quickly, once):
  told = []
  found = planner.smallest(recipe(), chips.of_topology("v5e:"), "wide", tell=told.append)
  check(found, price=None, batch=BATCH)
  assert found["fits"] and found["topology"] == "v5e:2x2" and len(told) == len(found["tried"])
  where = planner.target("v5e:1x1")
  smaller, _ = planner.plan(planner.resolved(recipe(), where), where)
  assert not smaller["fits"]


def test_no_slice_is_the_smallest_where_none_can_be_laid_over():
  values = {**tiny(train={"global_batch_size": 6, "steps": 1}), "eval": {"batch_size": 6}}
  assert planner.smallest(ConfigDict(values), chips.of_topology("v5p:")) is None


@pytest.mark.parametrize("topology", ["h100:64", "h200:8", "a100:16"])
def test_gpus_are_planned_by_the_estimate_and_it_says_so(topology):
  config, where = conftest.resolved(topology, {"name": "ViT-B-16", "compute_dtype": "auto"}, **train(512), eval={"batch_size": 64})
  assert config.model.compute_dtype == "bfloat16"
  found, step = planner.plan(config, where, "vitb16", price=2.0)
  check(found, price=2.0, batch=512)
  assert found["method"] == "analytic" and step is None and found["accelerator_type"] is None and found["slices"] == 1
  assert found["chips"] == slices.number_of_chips(topology) and found["fits"]
  assert sum(found["memory"].values()) == pytest.approx(found["peak_hbm_bytes"], abs=len(memory.PARTS))
  assert found["flops"] * found["chips"] == pytest.approx(estimate.step_flops(config))


def train(batch):
  return {"train": {"global_batch_size": batch, "steps": 10}}


def test_machines_with_gpus_are_joined_by_a_network():
  def network(number):
    config, where = conftest.resolved(f"h100:{number}", **train(48), eval={"batch_size": 48})
    return planner.plan(config, where)[0]["limits_s"].get("network", 0)

  assert network(8) == network(4) == 0
  assert network(12) > 0 and network(16) > 0  # two machines, one of them half empty
  assert network(48) > network(16)


def test_a_config_that_cannot_be_laid_over_a_topology_names_it():
  with pytest.raises(ConfigError, match=r"v5e:4x8: config.train.global_batch_size=16 cannot be split over 32 devices"):
    conftest.resolved("v5e:4x8")


def test_what_a_config_computes_in_is_settled_by_the_chip():
  model = {**tiny()["model"], "compute_dtype": "auto"}
  for topology in ("v5e:2x2", "h100:8"):
    assert conftest.resolved(topology, model)[0].model.compute_dtype == "bfloat16"
  assert conftest.resolved(planner.HERE, model)[0].model.compute_dtype in ("bfloat16", "float32")
  assert conftest.resolved("v5e:2x2", {**model, "compute_dtype": "float32"})[0].model.compute_dtype == "float32"
