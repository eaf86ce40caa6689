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


@pytest.mark.parametrize("verb", [[], ["data", "bench"], ["data", "inspect"]], ids=" ".join)
def test_help_imports_no_jax(verb):
  script = (
    "import sys; from clip_jax import cli\n"
    "try: cli.main([*sys.argv[1:], '--help'])\n"
    "except SystemExit: pass\n"
    "print(sorted(m for m in ('jax', 'flax', 'numpy', 'rich', 'cv2', 'jinja2') if m in sys.modules))"
  )
  done = subprocess.run([sys.executable, "-c", script, *verb], text=True, capture_output=True, check=True)
  assert done.stdout.splitlines()[-1] == "[]"


VERBS = ["models", "export", "import", "data index", "data bench", "data inspect", "data convert", "report", "doctor"]


@pytest.mark.parametrize("verb", map(str.split, VERBS), ids=" ".join)
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


def test_data_bench_as_json_and_as_a_table(colors):
  found = json.loads(run("data", "bench", colors, "--threads", "1,2", "--seconds", "0.1", "--data", "order=blocks", "--json").stdout)
  assert (found["source"], found["model"], found["image_size"]) == (colors, "ViT-B-16", 224)
  assert [row["threads"] for row in found["threads"]] == [1, 2]
  for row in found["threads"]:
    assert sum(row[stage] for stage in ("read", "decode", "resize", "tokenize", "other")) == pytest.approx(1)
    assert row["images_per_second"] > 0 and row["megabytes_per_second"] > 0
  done = run("data", "bench", colors, "--threads", "1", "--seconds", "0.1", "--model", "ViT-L-14-336")
  assert "336 pixels" in done.stdout and "tokenize" in done.stdout and done.stderr == ""


def test_data_inspect_as_json_as_a_summary_and_as_a_page(colors, tmp_path):
  arguments = ["data", "inspect", "--data", f"mixture=[({colors!r}, 1)]", "--data", "crop_scale=(0.5, 1.0)"]
  found = json.loads(run(*arguments, "--scan", "40", "--json").stdout)
  assert (found["records"], found["looked_at"], found["width"]["max"]) == (64, 40, 24) and "html" not in found
  done = run(*arguments, "--html", "page.html", "--samples", "3", cwd=tmp_path)
  assert "64 records, 64 looked at" in done.stdout and done.stdout.endswith("page.html\n") and done.stderr == ""
  html = (tmp_path / "page.html").read_text()
  assert html.count("<article") == 3 and "the colour " in html and "[0.5, 1.0]" in html


def test_the_setup_of_a_siglip_model_is_accepted(colors):
  done = run("data", "inspect", colors, "--model", "ViT-B-16-SigLIP", "--tokenizer", "nowhere/spiece.model", code=2)
  assert "nowhere/spiece.model does not exist" in done.stderr


@pytest.mark.slow
def test_data_convert_counts_passes_options_to_beam_and_never_overwrites(colors, tmp_path):
  out = tmp_path / "prepared"
  command = ["data", "convert", colors, str(out), "--format", "tar", "--near-distance", "none", "--max-size", "16"]
  found = json.loads(run(*command, "--json", "--", "--runner=DirectRunner", "--direct_num_workers=1").stdout)
  assert found["input"]["records"] == 64 and found["settings"]["max_size"] == 16
  index = json.loads(run("data", "index", f"{out}/*.tar", "--json").stdout)
  assert index["records"] == found["records"] == 64
  assert "the data set is finished" in run(*command, code=2).stderr
  wrong = run("data", "convert", colors, str(tmp_path / "x"), "--", "--runner=Nobody", code=2)
  assert "Beam cannot run with --runner=Nobody" in wrong.stderr and not (tmp_path / "x").exists()


def test_doctor_tells_devices_and_versions():
  found = json.loads(run("doctor", "--json").stdout)
  assert found["devices"] >= 1 and found["jax"] and isinstance(found["extras"]["plan"], list)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["data", "index", "nowhere/*.tar"], "nowhere/*.tar: no such file"),
    (["data", "bench", "nowhere/*.tar"], "nowhere/*.tar: no such file"),
    (["data", "bench", "nowhere/*.tar", "--threads", "1,0"], "'0' is not a whole number from 1 on"),
    (["data", "bench", "nowhere/*.tar", "--seconds", "nan"], "'nan' is not a number of seconds"),
    (["data", "bench", "nowhere/*.tar", "--data", "blok=3"], "config.data.blok is not a key of data. Did you mean block?"),
    (["data", "bench", "nowhere/*.tar", "--data", "order"], "--data order: expected KEY=VALUE"),
    (["data", "bench", "nowhere/*.tar", "--data", "crop_scale={[]: 1}"], "config.data.crop_scale is '{[]: 1}'"),
    (["data", "inspect"], "config.data.path is empty"),
    (["data", "inspect", "nowhere/*.tar", "--model", "ViT"], "config.model.name='ViT' is not a known model"),
    (["data", "inspect", "nowhere/*.tar", "--html", "missing/page.html"], "it must be a file in a folder that exists"),
    (["report", "nowhere"], "nowhere"),
    (["export", "nowhere", "out", "--to", "openai"], "nowhere does not exist"),
    (["export", "nowhere", "out", "--to", "keras"], "invalid choice"),
    (["export", "nowhere", "out", "--to", "openai", "--max-shard-size", "5 stones"], "'5 stones' is not a size; 5GB and 500MB are"),
    (["import", ".", "out"], "holds no checkpoint"),
    (["data", "convert", "nowhere/*.tar", "out"], "nowhere/*.tar: no such file"),
    (["data", "convert", "in", "out", "--format", "zip"], "invalid choice"),
    (["data", "convert", "in", "out", "--near-distance", "-1"], "'-1' is not a whole number from 1 on"),
    (["models", "--", "--runner=DirectRunner"], "nothing can follow -- here: --runner=DirectRunner"),
    (["fly"], "invalid choice"),
    ([], "required"),
  ],
)
def test_wrong_usage_exits_with_2(arguments, message, tmp_path):
  done = run(*arguments, code=2, cwd=tmp_path)
  assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
