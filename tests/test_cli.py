"""The `clip-jax` command in real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clip_jax.convert import sources
from tests.convert import models

CLI = [sys.executable, "-m", "clip_jax.cli"]


def run(*arguments, code=0, cwd=None):
  done = subprocess.run([*CLI, *arguments], text=True, capture_output=True, cwd=cwd, check=False)
  assert done.returncode == code, done.stderr
  return done


def test_help_imports_no_jax():
  script = (
    "import sys; from clip_jax import cli\n"
    "try: cli.main(['--help'])\n"
    "except SystemExit: pass\n"
    "print(sorted(m for m in ('jax', 'flax', 'numpy', 'rich') if m in sys.modules))"
  )
  done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
  assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", [["models"], ["export"], ["import"], ["data", "index"], ["report"], ["doctor"]], ids=" ".join)
def test_every_verb_has_help_with_an_example(verb):
  assert "example: clip-jax " + " ".join(verb) in run(*verb, "--help").stdout


def test_models_as_json_and_as_a_table():
  found = json.loads(run("models", "--json").stdout)
  assert found["ViT-B-16"]["parameters"] == 149_620_737
  assert found["ViT-L-14-336"]["image_size"] == 336
  assert "149.62 M" in run("models").stdout


def test_export_and_import_tell_what_they_did(tmp_path):
  params, _ = models.checkpoint(tmp_path / "ours", models.model("openai"))
  found = json.loads(run("export", "ours", "--to", "huggingface", "theirs", "--verify", "--json", cwd=tmp_path).stdout)
  assert found["parameters"] == sum(value.size for value in params.values()) and found["to"] == "huggingface"
  assert max(found["verify"]["image"], found["verify"]["text"]) < 1e-5
  assert found["model"]["activation"] == "quick_gelu"
  done = run("import", "theirs", "again", cwd=tmp_path).stdout
  assert "from huggingface" in done and "activation quick_gelu" in done
  models.assert_same(sources.find(tmp_path / "again"), params)
  done = run("export", "again", "--to", "open_clip", "more", cwd=tmp_path)
  assert done.stdout.startswith("more: a model without a name") and done.stderr == ""


def test_a_pickle_with_code_in_it_exits_with_2_and_writes_nothing(tmp_path):
  (tmp_path / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch HOSTILE'\ntR.")
  done = run("import", "evil.pt", "out", code=2, cwd=tmp_path)
  assert "evil.pt cannot be read" in done.stderr and "Traceback" not in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["evil.pt"]


def test_data_index_counts_records_and_leaves_an_index(colors):
  found = json.loads(run("data", "index", colors, "--rebuild", "--json").stdout)
  assert (found["shards"], found["records"]) == (1, 64)
  assert Path(f"{colors}.index.npz").exists()


def test_doctor_tells_devices_and_versions():
  found = json.loads(run("doctor", "--json").stdout)
  assert found["devices"] >= 1 and found["jax"] and isinstance(found["extras"]["plan"], list)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["data", "index", "nowhere/*.tar"], "nowhere/*.tar: no such file"),
    (["report", "nowhere"], "nowhere"),
    (["export", "nowhere", "out", "--to", "openai"], "nowhere does not exist"),
    (["export", "nowhere", "out", "--to", "keras"], "invalid choice"),
    (["export", "nowhere", "out", "--to", "openai", "--max-shard-size", "5 stones"], "'5 stones' is not a size; 5GB and 500MB are"),
    (["import", ".", "out"], "holds no checkpoint"),
    (["fly"], "invalid choice"),
    ([], "required"),
  ],
)
def test_wrong_usage_exits_with_2(arguments, message, tmp_path):
  done = run(*arguments, code=2, cwd=tmp_path)
  assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
