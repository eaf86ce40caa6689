"""`python benchmarks/step_clock.py` as people run it, with very small models: what it measures, compares, and says when it cannot."""

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.errors import UsageError
from tests.conftest import COMPILED

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "step_clock.py"
sys.path.append(str(SCRIPT.parent))
clock, steps, processes = map(importlib.import_module, ("step_clock", "contenders.steps", "contenders.processes"))
BATCH = 4
# With a scale of 1 the logits of any embeddings are nearly the same, so that the first loss is nearly that of a guess.
TINY = {
  "model.image_size": 16,
  "model.embed_dim": 24,
  "model.logit_scale_init": 1.0,
  "model.vision.patch_size": 8,
  "model.vision.width": 32,
  "model.vision.layers": 2,
  "model.vision.heads": 4,
  "model.text.context_length": 12,
  "model.text.width": 16,
  "model.text.layers": 1,
  "model.text.heads": 2,
}
# Stand for packages: one that cannot be imported, and one whose process is ended.
MISSING = "raise ModuleNotFoundError(\"No module named 'open_clip'\", name='open_clip')\n"
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"


def run(*arguments, changes=TINY, path=()):
  """Runs the script and returns its exit code, its standard output and its errors."""
  settings = [f"{key}={value}" for key, value in changes.items()]
  command = [sys.executable, SCRIPT, f"--batch={BATCH}", "--rounds=1", "--json", "--set", *settings, *arguments]
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_NUM_CPU_DEVICES": "1"}
  variables |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
  variables.pop("GLIBC_TUNABLES", None)
  done = subprocess.run(command, cwd=ROOT, env=variables, text=True, capture_output=True, timeout=500)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_ours_and_a_peer_are_measured_in_both_types():
  code, out, err = run("--peer", "transformers", "--rounds=2")
  assert code == 0, err
  found = json.loads(out)
  assert err.count("ready") == (4 if found["together"] else 8)  # the memory of this machine decides
  assert found.keys() == {
    *("date", "machine", "device", "versions", "config", "model", "batch", "changes", "rounds", "steps", "together", "load"),
    *("contenders", "ratios", "failures"),
  }
  assert found["device"] == {"kind": "cpu", "platform": "cpu", "count": 1}
  assert found["machine"]["glibc_tunables"].endswith("glibc.malloc.hugetlb=1")
  assert {"jax", "torch", "transformers"} <= found["versions"].keys()
  rows = {(row["name"], row["dtype"]): row for row in found["contenders"]}
  assert rows.keys() == {(name, dtype) for name in ("ours", "transformers") for dtype in ("float32", "bfloat16")}
  for row in rows.values():
    assert len(row["each"]) == 2
    assert min(row["each"]) > 0
    assert row["samples_per_second"] == statistics.median(row["each"])
    assert row["mfu"] is None
    assert row["first_loss"] == pytest.approx(math.log(BATCH), abs=0.3)
  # The types are really two: the same examples and parameters, and another rounding.
  for name in ("ours", "transformers"):
    assert rows[name, "float32"]["first_loss"] != rows[name, "bfloat16"]["first_loss"]
  rates = {key: row["samples_per_second"] for key, row in rows.items()}
  ratios = {dtype: rates["ours", dtype] / rates["transformers", dtype] for dtype in ("float32", "bfloat16")}
  best = {name: max(rate for (who, _), rate in rates.items() if who == name) for name in ("ours", "transformers")}
  assert found["ratios"] == {"transformers": {"best": best["ours"] / best["transformers"], **ratios}}


@pytest.mark.slow
def test_who_fails_is_reported_and_the_others_go_on(tmp_path):
  (tmp_path / "open_clip.py").write_text(MISSING)
  (tmp_path / "transformers.py").write_text(KILLED)
  code, out, err = run("--dtype", "float32", "--peer", "open_clip", "transformers", path=[tmp_path])
  assert code == 1, err
  found = json.loads(out)
  assert [row["name"] for row in found["contenders"]] == ["ours"]
  assert found["contenders"][0]["samples_per_second"] > 0
  assert found["ratios"] == {}
  errors = {failure["name"]: failure["error"] for failure in found["failures"]}
  assert errors == {
    "open_clip": "open_clip cannot be imported (ModuleNotFoundError: No module named 'open_clip'): pip install open_clip_torch",
    "transformers": "its process was ended by signal 9, as for lack of memory; --apart has one process at a time.",
  }
  assert errors["open_clip"] in err
  assert "Traceback" not in err


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config", "vitb64"], "no configs/vitb64.py"),
    (["--set", "model.widths=3"], "config.model.widths is not a key"),
    (["--set", "train.remat"], "not KEY=VALUE"),
    (["--set", "train.seed=one"], "train.seed=one cannot be set"),
  ],
)
def test_wrong_usage_is_one_line_and_nothing_starts(arguments, words):
  code, out, err = run(*arguments, changes={"train.seed": 0})
  assert (code, out) == (2, "")
  assert words in err
  assert len(err.splitlines()) == 1


def test_settings_reach_the_config():
  config = clock.resolved("vitb32", 4, {"loss.method": "ring", "data.crop_scale": "(0.5, 1.0)", "train.scan": "True"})
  assert (config.train.global_batch_size, config.loss.method, config.train.scan) == (4, "ring", True)
  assert config.data.crop_scale == (0.5, 1.0)


def test_ratios_are_of_the_best_and_of_each_type_that_both_have():
  def row(name, dtype, rate):
    return {"name": name, "dtype": dtype, "samples_per_second": rate}

  ours = [row("ours", "float32", 10.0), row("ours", "bfloat16", 40.0)]
  rows = [*ours, row("one", "float32", 20.0), row("one", "bfloat16", 16.0), row("other", "float32", 5.0)]
  assert clock.ratios(rows) == {"one": {"best": 2.0, "float32": 0.5, "bfloat16": 2.5}, "other": {"best": 8.0, "float32": 2.0}}
  assert clock.ratios(rows[2:]) == {}


def test_utilisation_is_that_of_the_training_flops():
  config = clock.resolved("vitb32", 256, {})
  contender = processes.Contender("ours", config, 1, {})
  contender.each, contender.about = [1000.0, 3000.0, 2000.0], {"peak": 989.5e12, "first_loss": 5.5}
  # docs/performance.md: 44.2 GFLOPs a pair, of which the loss of another batch has 0.3 %.
  assert contender.row["mfu"] == pytest.approx(2000 * 44.2e9 / 989.5e12, rel=0.005)


@pytest.mark.parametrize(
  "key, value", [("model.vision.patch_drop", 0.5), ("optimizer.freeze", "^image/"), ("optimizer.name", "lion"), ("model.text.train_length", 16)]
)
def test_a_recipe_that_does_more_than_the_peers_step_is_refused(key, value):
  steps.refuse_what_is_not_plain("transformers", clock.resolved("vitb32", 8, {}))
  with pytest.raises(UsageError, match=f"transformers is measured with {key}="):
    steps.refuse_what_is_not_plain("transformers", clock.resolved("vitb32", 8, {key: str(value)}))


def test_captions_begin_and_end_and_differ():
  config = clock.resolved("vitb32", 8, {})
  images, tokens = steps.examples(config)
  text = config.model.text
  assert (images.shape, images.dtype, tokens.shape) == ((8, 224, 224, 3), "uint8", (8, text.context_length))
  ends = tokens.argmax(1)
  assert (tokens[:, 0] == text.vocab_size - 2).all()
  for row, end in zip(tokens, ends, strict=True):
    assert row[end] == text.vocab_size - 1
    assert (row[1:end] > 0).all()
    assert not row[end + 1 :].any()
  assert len({tuple(row) for row in tokens}) == len(set(map(bytes, images))) == 8


@pytest.fixture
def one_thread():
  """PyTorch on one core: its threads wait actively for each other, which takes forever where others work, too."""
  torch = pytest.importorskip("torch")
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def on_cpu(**changes):
  config = clock.resolved("vitb32", BATCH, {key: str(value) for key, value in TINY.items()} | changes)
  return steps.peer("transformers", config, {"platform": "cpu", "device": "cpu", "devices": 1})


def test_the_peers_step_trains(one_thread):
  run, about = on_cpu(**{"optimizer.warmup_steps": "0"})
  assert about["peak"] is None
  before = run(1)
  assert before == pytest.approx(math.log(BATCH), abs=0.3)
  assert run(10) < before - 0.05  # the same batch again and again


def test_a_peer_of_another_size_is_refused(one_thread, monkeypatch):
  monkeypatch.setattr(steps.size, "parameters", lambda model: 7)
  with pytest.raises(UsageError, match="parameters where ours has 7"):
    on_cpu()


@pytest.mark.parametrize(
  "platform, devices, cuda, words",
  [("tpu", 1, True, "PyTorch finds no X"), ("gpu", 1, False, "PyTorch finds no X"), ("gpu", 8, True, "CUDA_VISIBLE_DEVICES=0")],
)
def test_a_peer_says_where_it_cannot_run(monkeypatch, platform, devices, cuda, words):
  monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
  with pytest.raises(UsageError, match=words):
    steps.peer("transformers", clock.resolved("vitb32", 8, {}), {"platform": platform, "device": "X", "devices": devices})


class Recorded:
  """A contender that only notes what is asked of it."""

  def __init__(self, name, events):
    self.about = {"memory": 3 * 2**30}
    for call in ("start", "run", "stop"):
      setattr(self, call, lambda call=call: events.append(f"{call} {name}"))


@pytest.mark.parametrize(
  "together, gib, events",
  [
    (True, 9, "start a, start b, run a, run b, run a, run b, stop a, stop b"),
    # What has no process starts one when it is to run, and stopping twice does nothing.
    (False, 9, "run a, stop a, run b, stop b, run a, stop a, run b, stop b, stop a, stop b"),
    (True, 8, "start a, stop a, run a, stop a, run b, stop b, run a, stop a, run b, stop b, stop a, stop b"),
  ],
  ids=["together", "apart", "no room"],
)
def test_contenders_run_in_turns(monkeypatch, together, gib, events):
  monkeypatch.setattr(processes, "available_memory", lambda: gib * 2**30)
  found = []
  assert processes.measure([Recorded("a", found), Recorded("b", found)], 2, together) == (together and gib == 9)
  assert ", ".join(found) == events


@pytest.mark.slow
def test_apart_each_turn_builds_anew():
  code, out, err = run("--dtype", "float32", "--apart", "--rounds=2")
  assert code == 0, err
  found = json.loads(out)
  assert not found["together"]
  assert len(found["contenders"][0]["each"]) == 2
  assert err.count("ours float32: ready") == 2
