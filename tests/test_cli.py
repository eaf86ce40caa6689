"""The `clip-jax` command: in real processes, but for what only parses, refuses, or prints a table."""

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from clip_jax import cli
from clip_jax.convert import sources
from clip_jax.parallel import clusters, distributed
from tests.conftest import COMPILED, tiny
from tests.convert import models
from tests.data import buckets

CLI = [sys.executable, "-m", "clip_jax.cli"]
# These processes compile the same small programs every time, too.
CACHE = {"JAX_COMPILATION_CACHE_DIR": str(COMPILED), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}


def run(*arguments, code=0, cwd=None):
  done = subprocess.run([*CLI, *arguments], text=True, capture_output=True, cwd=cwd, env={**os.environ, **CACHE}, check=False)
  assert done.returncode == code, done.stderr
  return done


@pytest.fixture
def here(monkeypatch, capfd):
  """A function as `run`, in this process: a start takes a hundred times as long as to say what is wrong."""

  def call(*arguments, code=0, cwd=None):
    with monkeypatch.context() as patch:
      if cwd:
        patch.chdir(cwd)
      capfd.readouterr()
      try:
        found = cli.main([str(argument) for argument in arguments])
      except SystemExit as error:  # argparse's
        found = error.code or 0
    stdout, stderr = capfd.readouterr()
    assert found == code, stderr
    return types.SimpleNamespace(stdout=stdout, stderr=stderr)

  return call


@pytest.mark.parametrize("verb", [[], ["data", "bench"], ["data", "inspect"], ["doctor"], ["plan"]], ids=" ".join)
def test_help_imports_no_jax(verb):
  script = (
    "import sys; from clip_jax import cli\n"
    "try: cli.main([*sys.argv[1:], '--help'])\n"
    "except SystemExit: pass\n"
    "print(sorted(m for m in ('jax', 'flax', 'numpy', 'rich', 'cv2', 'jinja2') if m in sys.modules))"
  )
  done = subprocess.run([sys.executable, "-c", script, *verb], text=True, capture_output=True, check=True)
  assert done.stdout.splitlines()[-1] == "[]"


VERBS = ["models", "export", "import", "eval", "embed", "data index", "data bench", "data inspect", "data convert", "report", "plan", "doctor", "scaling run", "scaling collect", "scaling fit"]


@pytest.mark.parametrize("verb", map(str.split, VERBS), ids=" ".join)
def test_every_verb_has_help_with_an_example(verb, here):
  assert "example: clip-jax " + " ".join(verb) in here(*verb, "--help").stdout


def test_models_as_json_and_as_a_table(here):
  found = json.loads(run("models", "--json").stdout)
  assert found["ViT-B-16"]["parameters"] == 149_620_737
  assert found["ViT-L-14-336"]["image_size"] == 336
  assert "149.62 M" in here("models").stdout


def test_export_and_import_tell_what_they_did(tmp_path, here):
  params, _ = models.checkpoint(tmp_path / "ours", models.model("openai"))
  found = json.loads(here("export", "ours", "--to", "huggingface", "theirs", "--verify", "--json", cwd=tmp_path).stdout)
  assert found["parameters"] == sum(value.size for value in params.values()) and found["to"] == "huggingface"
  assert max(found["verify"]["image"], found["verify"]["text"]) < 1e-5
  assert found["model"]["activation"] == "quick_gelu"
  done = run("import", "theirs", "again", cwd=tmp_path).stdout
  assert "from huggingface" in done and "activation quick_gelu" in done
  models.assert_same(sources.find(tmp_path / "again"), params)
  done = here("export", "again", "--to", "open_clip", "more", cwd=tmp_path)
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


def test_data_bench_as_json_and_as_a_table(colors, here):
  found = json.loads(run("data", "bench", colors, "--threads", "1,2", "--seconds", "0.1", "--data", "order=blocks", "--json").stdout)
  assert (found["source"], found["model"], found["image_size"]) == (colors, "ViT-B-16", 224)
  assert [row["threads"] for row in found["threads"]] == [1, 2]
  for row in found["threads"]:
    assert sum(row[stage] for stage in ("read", "decode", "resize", "tokenize", "other")) == pytest.approx(1)
    assert row["images_per_second"] > 0 and row["megabytes_per_second"] > 0
  done = here("data", "bench", colors, "--threads", "1", "--seconds", "0.1", "--model", "ViT-L-14-336")
  assert "336 pixels" in done.stdout and "tokenize" in done.stdout and done.stderr == ""


def test_data_inspect_as_json_as_a_summary_and_as_a_page(colors, tmp_path, here):
  arguments = ["data", "inspect", "--data", f"mixture=[({colors!r}, 1)]", "--data", "crop_scale=(0.5, 1.0)"]
  found = json.loads(here(*arguments, "--scan", "40", "--json").stdout)
  assert (found["records"], found["looked_at"], found["width"]["max"]) == (64, 40, 24) and "html" not in found
  done = run(*arguments, "--html", "page.html", "--samples", "3", cwd=tmp_path)
  assert "64 records, 64 looked at" in done.stdout and done.stdout.endswith("page.html\n") and done.stderr == ""
  html = (tmp_path / "page.html").read_text()
  assert html.count("<article") == 3 and "the colour " in html and "[0.5, 1.0]" in html


def test_the_setup_of_a_siglip_model_is_accepted(colors, here):
  done = here("data", "inspect", colors, "--model", "ViT-B-16-SigLIP", "--tokenizer", "nowhere/spiece.model", code=2)
  assert "nowhere/spiece.model does not exist" in done.stderr


@pytest.mark.slow
def test_data_convert_counts_passes_options_to_beam_and_never_overwrites(colors, tmp_path, here):
  out = tmp_path / "prepared"
  command = ["data", "convert", colors, str(out), "--format", "tar", "--near-distance", "none", "--max-size", "16"]
  found = json.loads(run(*command, "--json", "--", "--runner=DirectRunner", "--direct_num_workers=1").stdout)
  assert found["input"]["records"] == 64 and found["settings"]["max_size"] == 16
  index = json.loads(here("data", "index", f"{out}/*.tar", "--json").stdout)
  assert index["records"] == found["records"] == 64
  assert "the data set is finished" in here(*command, code=2).stderr
  wrong = here("data", "convert", colors, str(tmp_path / "x"), "--", "--runner=Nobody", code=2)
  assert "Beam cannot run with --runner=Nobody" in wrong.stderr and not (tmp_path / "x").exists()


@pytest.fixture
def recipes(tmp_path):
  """A folder with recipes of a very small model: small.py, and again.py, which is the same."""
  train = {"global_batch_size": 16, "steps": 4, "remat": "none", "scan": False, "microbatches": 1}
  values = tiny(train=train, mesh={"data": -1, "fsdp": 1, "tensor": 1, "sharding": "fsdp"})
  for name in ("small", "again"):
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n  return ConfigDict({values!r})\n"
    (tmp_path / f"{name}.py").write_text(text)
  return tmp_path


@pytest.mark.slow
def test_plans_as_json_are_one_object_a_line_and_nothing_else(recipes):
  done = run("plan", "--json", "--config=small.py", "--topology", "v5litepod-4", "h100:8", "--config.train.steps=8", cwd=recipes)
  compiled, estimated = map(json.loads, done.stdout.splitlines())  # a third line would not go in
  assert (compiled["topology"], compiled["accelerator_type"], compiled["chips"], compiled["method"]) == ("v5e:2x2", "v5litepod-4", 4, "compiler")
  assert (estimated["topology"], estimated["accelerator_type"], estimated["chips"], estimated["method"]) == ("h100:8", None, 8, "analytic")
  assert compiled["config"] == estimated["config"] == "small.py" and compiled["samples"] == estimated["samples"] == 8 * 16
  assert compiled["fits"] is estimated["fits"] is True and compiled["cost"] is None and set(compiled) == set(estimated)


@pytest.mark.slow
def test_the_smallest_slice_is_found_by_the_name_of_its_chips(recipes, here):
  found = json.loads(here("plan", "--json", "--min-slice", "--quick", "--config=small.py", "--topology=v5e", cwd=recipes).stdout)
  assert (found["topology"], found["fits"], [one["topology"] for one in found["tried"]]) == ("v5e:1x1", True, ["v5e:1x1"])


def test_a_plan_is_a_page_and_several_are_a_table(recipes, here):
  done = here("plan", "--config", "small.py", "--topology=h100:8", "--price-per-chip-hour=2", cwd=recipes)
  assert done.stdout.startswith("small.py on h100:8, 8 chips, by an estimate") and "at 2 a chip-hour" in done.stdout
  assert "fits" in done.stdout and done.stderr == ""
  done = here("plan", "--config", "small.py", "again.py", "--topology", "h100:8", "a100:4", "--price-per-chip-hour", "2", cwd=recipes)
  lines = done.stdout.splitlines()
  assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1 and done.stderr == ""
  assert [line.split(" | ")[:2] for line in lines[2:]] == [
    ["| small", "h100:8"], ["| small", "a100:4"], ["| again", "h100:8"], ["| again", "a100:4"],
  ]  # fmt: skip


def test_what_does_not_fit_is_an_answer_and_no_error(recipes, here):
  flags = ["--config.train.global_batch_size=16777216", "--config.train.steps=4"]
  found = json.loads(here("plan", "--json", "--config=small.py", "--topology=h100:1", *flags, cwd=recipes).stdout)
  assert found["fits"] is False and found["missing_bytes"] > 0 and found["days"] is None and found["advice"]
  done = here("plan", "--config=small.py", "--topology=h100:1", *flags, cwd=recipes)
  assert "GiB too much" in done.stdout and " ".join(found["advice"][0]) in done.stdout
  better = json.loads(here("plan", "--json", "--config=small.py", "--topology=h100:1", *flags, *found["advice"][0], cwd=recipes).stdout)
  assert better["fits"] is True
  searched = json.loads(here("plan", "--json", "--search", "--config=small.py", "--topology=h100:1", *flags, cwd=recipes).stdout)
  assert searched["fits"] is True and searched["flags"] and searched["tried"]


WITHOUT = """
import sys


class Without:
  def __init__(self, finder):
    self.finder = finder

  def __getattr__(self, name):
    return getattr(self.finder, name)

  def find_spec(self, name, *more):
    return None if name.partition(".")[0] == "libtpu" else self.finder.find_spec(name, *more)


BLOCK
from clip_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""
BLOCKS = {"a broken module": "sys.modules['libtpu'] = None", "no package": "sys.meta_path[:] = map(Without, sys.meta_path)"}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_without_the_compiler_for_tpus_the_extra_that_has_it_is_named(recipes, block):
  command = [sys.executable, "-c", WITHOUT.replace("BLOCK", block), "plan", "--config=small.py", "--topology=v5e:2x2"]
  done = subprocess.run(command, text=True, capture_output=True, cwd=recipes, check=False)
  assert (done.returncode, done.stdout) == (2, "")
  said = [line for line in done.stderr.splitlines() if not line.startswith("compiling ")]
  assert len(said) == 1 and "libtpu" in said[0] and "clip_jax[plan]" in said[0]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--topology=v5e:3x3"], "'v5e:3x3' is not a slice of TPU v5e. There are v5e:1x1 (v5litepod-1), v5e:2x2 (v5litepod-4), v5e:2x4 (v5litepod-8)"),
    (["--topology=v5litepod-7"], "v5e:16x16 (v5litepod-256)"),
    (["--topology", "v5e:2x2", "moon:1"], "'moon:1' is not a topology"),
    (["--topology=v5e:2x2", "--config.train.stps=1"], "config.train.stps is not a key of train. Did you mean steps?"),
    (["--topology=v5e:2x2", "--config.train.global_batch_size=6"], "v5e:2x2: config.train.global_batch_size=6 cannot be split over 4 devices"),
    (["--topology=v5e:2x2", "--config", "nowhere.py"], "--config=nowhere.py cannot be loaded: [Errno 2] No such file"),
    (["--topology=v5e:2x2", "--config=again.py", "--save-compiled=x"], "--save-compiled keeps one program"),
    (["--topology", "v5e:2x2", "v5e:2x4", "--save-compiled=x"], "--save-compiled keeps one program"),
    (["--topology=h100:8", "--save-compiled=x"], "--save-compiled keeps one program"),
    (["--topology=v5e:2x2", "--save-compiled=x", "--quick"], "leave one of them out"),
    (["--topology=v5e:2x2", "--save-compiled=x", "--search"], "not allowed with"),
    (["--topology=h100:8", "--min-slice"], "--min-slice is for TPUs"),
    (["--topology=v5e:2x2", "--price-per-chip-hour=cheap"], "'cheap' is not a price"),
    ([], "--topology"),
  ],
)
def test_a_plan_that_cannot_be_made_exits_with_2_before_anything_is_compiled(recipes, here, arguments, message):
  done = here("plan", "--config=small.py", *arguments, code=2, cwd=recipes)
  assert message in done.stderr and "Traceback" not in done.stderr and "compiling" not in done.stderr
  assert done.stdout == "" and not (recipes / "x").exists()


def test_doctor_tells_devices_and_versions():
  done = subprocess.run([*CLI, "doctor", "--json"], text=True, capture_output=True, check=False)
  found = json.loads(done.stdout)
  assert found["devices"] >= 1 and found["jax"] and isinstance(found["extras"]["plan"], list)
  assert done.returncode == (1 if found["wrong"] else 0)  # as on a machine with a GPU that JAX is not installed for
  checks = {check["name"]: check for check in found["checks"]}
  assert checks["versions"]["status"] == checks["disk"]["status"] == "ok"
  assert found["warnings"] == sum(check["status"] == "warning" for check in found["checks"])


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path, monkeypatch):
  monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
  with buckets.s3("shards") as bucket:
    for name, value in bucket.environment.items():
      monkeypatch.setenv(name, value)
    bucket.put("laion/0.tar", b"-")
    done = run("doctor", "--workdir", "/proc/run", "--bucket", "s3://sherds", "--bucket", "s3://shards/laion", code=1)
  lines = done.stdout.splitlines()
  at = next(i for i, line in enumerate(lines) if "There is no bucket s3://sherds." in line)
  assert lines[at].startswith("wrong    bucket ") and lines[at + 1].startswith("          ") and "aws s3 ls" in lines[at + 1]
  assert any(line.startswith("ok       bucket ") and "s3://shards/laion/0.tar" in line for line in lines)
  assert any(line.startswith("ok       region ") for line in lines)
  assert lines[-1].startswith(f"{sum(line.startswith('wrong ') for line in lines)} wrong, ")


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
    (["doctor", "--bucket", "shards"], "--bucket shards: expected gs://NAME, or s3://NAME"),
    (["doctor", "--bucket", "http://host/shards"], "http://host/shards: only local paths, gs:// and s3:// can be read"),
    (["doctor", "--workdir", "gs://bucket/run"], "work directories are folders of this machine"),
    (["data", "convert", "nowhere/*.tar", "out"], "nowhere/*.tar: no such file"),
    (["data", "convert", "in", "out", "--format", "zip"], "invalid choice"),
    (["data", "convert", "in", "out", "--near-distance", "-1"], "'-1' is not a whole number from 1 on"),
    (["models", "--", "--runner=DirectRunner"], "nothing can follow -- here: --runner=DirectRunner"),
    (["models", "--config.train.steps=3"], "nothing here has a config: --config.train.steps=3"),
    (["fly"], "invalid choice"),
    ([], "required"),
  ],
)
def test_wrong_usage_exits_with_2(arguments, message, tmp_path, here):
  done = here(*arguments, code=2, cwd=tmp_path)
  assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


PUBLISHED = str(Path(__file__).parent / "scaling/published.csv")


def test_laws_as_json_are_a_list_of_objects(tmp_path, here):
  plot = tmp_path / "law.svg"
  done = here("scaling", "fit", PUBLISHED, "--task", "imagenet", "--where", "upstream_dataset!=CLIP-WIT", "arch!=ViT-g-14", "--group", "upstream_dataset",
             "--method", "all", "--at", "1e13", "--plot", str(plot), "--json")  # fmt: skip
  laws = json.loads(done.stdout)
  assert [law["group"] for law in laws] == ["LAION-2B", "LAION-400M", "LAION-80M"]
  contract = {"group", "task", "metric", "method", "n", "beta", "alpha", "beta_ci", "alpha_ci", "mae"}
  assert all(contract <= law.keys() and law["alpha_ci"][0] < law["alpha"] < law["alpha_ci"][1] for law in laws)
  assert {(law["task"], law["metric"], law["method"]) for law in laws} == {("imagenet", "acc1", "all")}
  assert [law["n"] for law in laws] == [10, 9, 9] and [law["forecast"][0]["compute"] for law in laws] == [1e13] * 3
  assert plot.read_text().startswith("<svg")


def test_a_law_in_words(here):
  told = here("scaling", "fit", PUBLISHED, "--task", "imagenet", "--metric", "acc1", "--where", "upstream_dataset!=CLIP-WIT").stdout
  assert told.startswith("imagenet acc1, frontier, 29 points\n  E = 5.858 C^-0.1114\n  alpha    -0.1114  95 % ")
  assert "at C = 6.63e+12" in told and "a new run 95 % between" in told


@pytest.mark.parametrize(
  "table, arguments, message",
  [
    (None, (), "nowhere.csv is missing"),
    ("arch,gmacs\na,1\n", (), "downstream_dataset"),
    ("samples_seen,gmacs,downstream_dataset,acc1\n1e9,seven,imagenet1k,0.5\n", (), "line 2"),
    ("samples_seen,gmacs,downstream_dataset,acc1\n1e9,7.4,imagenet1k,76\n", (), "line 2"),
    ("samples_seen,gmacs,downstream_dataset,acc1\n1e9,7.4,imagenet1k,0.76\n", (), "at least two points"),
    ("samples_seen,gmacs,downstream_dataset,acc1\n1e9,7.4,imagenet1k,0.7\n2e9,7.4,imagenet1k,0.8\n", ("--where", "archh=a"), "archh"),
    ("samples_seen,gmacs,downstream_dataset,acc1\n1e9,7.4,imagenet1k,0.7\n2e9,7.4,imagenet1k,0.8\n", ("--plot", "law.gif"), ".svg"),
  ],
)
def test_tables_that_cannot_be_fitted_are_told_in_one_sentence(tmp_path, here, table, arguments, message):
  name = "nowhere.csv"
  if table is not None:
    name = "table.csv"
    (tmp_path / name).write_text(table)
  done = here("scaling", "fit", name, "--task", "imagenet", *arguments, cwd=tmp_path, code=2)
  assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1 and done.stdout == ""


def test_a_reader_that_has_seen_enough_is_no_error():
  command = f"{sys.executable} -m clip_jax.cli scaling run openclip_grid --workdir nowhere --executor print"
  done = subprocess.run(["bash", "-c", f"{command} | head -1"], capture_output=True, text=True, check=True)
  assert done.stdout.startswith("# openclip_grid: 45 runs") and done.stderr == ""


def test_processes_that_do_not_come_are_told_in_one_sentence(monkeypatch, tmp_path, capsys):
  """The first of two processes of an evaluation, whose other one is not started."""
  monkeypatch.setattr(distributed.initialize, "__defaults__", (100, 1.0, False))  # the wait is the loop's to configure
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  for name, value in zip(clusters.BY_HAND, (address, "2", "0"), strict=True):
    monkeypatch.setenv(name, value)
  assert cli.main(["eval", str(tmp_path), "--dataset", "cifar10", "--data-root", str(tmp_path)]) == 1
  out, err = capsys.readouterr()
  assert not out and err.startswith(f"1 of 2 processes came to {address} in 1 s; not there: process 1.") and err.count("\n") == 1
