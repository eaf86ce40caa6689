"""`clip-jax eval` in real processes: the same numbers on any number of devices and hosts, and what it says of bad input."""

import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clip_jax import cli
from clip_jax.cli import evaluation
from tests.convert import models
from tests.end_to_end.runs import ROOT, finish, start_together

WORDS = ("red", "green", "blue", "grey", "pink")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A model, 37 labelled pictures with a training split, and 29 with several captions."""
  folder = tmp_path_factory.mktemp("evaluate")
  models.checkpoint(folder / "model", models.model("vit"))
  models.checkpoint(folder / "other", models.model("vit"), seed=1)
  random = np.random.default_rng(0)

  def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (*random.integers(20, 60, 2), 3), np.uint8)).save(path)

  for split, count in (("test", 37), ("train", 41)):
    for i in range(count):
      write(folder / f"sets/words/{split}/{WORDS[i % 5]}/{i:03}.png")
  lines = []
  for i in range(29):
    write(folder / f"sets/captions/{i:03}.png")
    lines.append(json.dumps({"file_name": f"{i:03}.png", "text": [f"number {i} {'and so on ' * (j * i % 7)}" for j in range(1 + i % 3)]}))
  (folder / "sets/captions/metadata.jsonl").write_text("\n".join(lines))
  return folder


def arguments(place, output, *more):
  what = ("--dataset", "words", "captions", "--data-root", str(place / "sets"), "--output", str(output), "--batch-size", "8")
  return ["eval", str(place / "model"), *what, *more]


def starter(place, output, *more):
  def start(workdir, *overrides, devices=1, environment=()):
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "CLIP_JAX_CACHE": str(place / f"cache{devices}")}
    command = [sys.executable, "-m", "clip_jax.cli", *arguments(place, output, *more)]
    return subprocess.Popen(command, cwd=ROOT, env={**variables, **dict(environment)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

  return start


@pytest.mark.slow
def test_eight_devices_and_two_processes_give_the_numbers_of_one(place, tmp_path, monkeypatch):
  """No size divides anything: 37, 41 and 29 pictures, 8 rows a device."""
  found = {}
  for name in ("one", "eight", "two"):
    (tmp_path / name).mkdir()
  finish(starter(place, tmp_path / "one/results.csv", "--skip-missing")(None))
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  assert cli.main(arguments(place, tmp_path / "eight/results.csv")) == 0  # of this process
  pair = start_together(starter(place, tmp_path / "two/results.csv"), 2, None, environment={"CLIP_JAX_CACHE": str(tmp_path / "more")})
  (out, _), (other, _) = [finish(process) for process in pair]
  assert "37 examples" in out and "37 examples" not in other  # one of them tells
  for name in ("one", "eight", "two"):
    written = json.loads((tmp_path / name / "results.json").read_text())
    found[name] = written["rows"], written["details"]
    assert (tmp_path / name / "results.html").read_text().startswith("<!")
  assert found["eight"] == found["one"] and found["two"] == found["one"]
  rows = {row["task"]: row for row in found["one"][0]}
  assert rows["zeroshot_classification"]["items"] == 37 and rows["zeroshot_retrieval"]["items"] == 29
  assert 0 < rows["zeroshot_retrieval"]["metrics"]["image_retrieval_recall@10"] < 1


def test_the_files_have_clip_benchmarks_columns_and_keep_what_is_there(place, tmp_path, capsys):
  output = tmp_path / "results.csv"
  assert cli.main([*arguments(place, output), "--json"]) == 0
  told = json.loads(capsys.readouterr().out)
  assert set(told) >= {"rows", "comparisons", "output", "page"} and "details" not in told
  with output.open() as file:
    rows = list(csv.DictReader(file))
  by_task = {row["task"]: row for row in rows}
  assert {row["dataset"] for row in rows} == {"words", "captions"} and {row["model"] for row in rows} == {"model"}
  for name in ("acc1", "mean_per_class_recall"):
    assert 0 <= float(by_task["zeroshot_classification"][name]) <= 1
  for name in ("image_retrieval_recall@1", "image_retrieval_recall@5", "text_retrieval_recall@5", "text_retrieval_full_recall@5"):
    assert 0 <= float(by_task["zeroshot_retrieval"][name]) <= 1, name
    assert float(by_task["zeroshot_retrieval"][f"{name}_standard_error"]) >= 0
  # Another model joins, and the first one again replaces its rows.
  for model in ("other", "model"):
    again = arguments(place, output)
    again[1] = str(place / model)
    assert cli.main(again) == 0
  with output.open() as file:
    assert [row["model"] for row in csv.DictReader(file)] == ["other", "other", "model", "model"]


def test_what_takes_long_says_how_far_it_is():
  seconds, file = [0.0], io.StringIO()
  told = evaluation.Told(file, now=lambda: seconds[0])
  told.begin("emoji: imagenet1k")
  for done in range(64, 50_000, 64):
    seconds[0] += 0.05
    told.progress(done, 50_000)
  lines = file.getvalue().splitlines()
  assert len(lines) == 3 and all(line.startswith("emoji: imagenet1k  ") and "/50,000  1,280/s" in line for line in lines)
  assert lines[0].endswith("29 s left") and lines[-1].endswith("9 s left")
  told.begin("emoji: digits")
  for done in (64, 128, 180):
    seconds[0] += 0.1
    told.progress(done, 180)
  assert file.getvalue().splitlines() == lines  # what is quick is not talked about


def test_the_page_can_be_made_again(place, tmp_path, capsys):
  output = tmp_path / "results.csv"
  assert cli.main(arguments(place, output)) == 0
  page = (tmp_path / "results.html").read_text()
  (tmp_path / "results.html").unlink()
  assert cli.main(["report", str(output)]) == 0
  assert (tmp_path / "results.html").read_text() == page
  (tmp_path / "results.json").unlink()
  assert cli.main(["report", str(output)]) == 2
  assert "results.json" in capsys.readouterr().err


def test_two_models_are_compared_on_the_same_examples(place, tmp_path, capsys):
  output = tmp_path / "results.csv"
  command = arguments(place, output, "--task", "auto", "--json")
  command.insert(2, str(place / "other"))
  assert cli.main(command) == 0
  told = json.loads(capsys.readouterr().out)
  rows = {(row["model"], row["dataset"]): row["metrics"] for row in told["rows"]}
  compared = {(one["dataset"], one["metric"]): one for one in told["comparisons"]}
  one = compared["words", "acc1"]
  assert one["models"] == ["model", "other"] and one["test"] == "McNemar's exact test"
  assert one["difference"] == pytest.approx(rows["model", "words"]["acc1"] - rows["other", "words"]["acc1"])
  assert 37 * one["difference"] == pytest.approx(one["only_first"] - one["only_second"])
  one = compared["captions", "image_retrieval_recall@5"]
  assert one["test"] == "sign-flip test" and 0 < one["p_value"] <= 1
  assert compared.keys() >= {("captions", f"{way}_retrieval_recall@{k}") for way in ("image", "text") for k in (1, 5, 10)}


def test_probes_and_the_number_of_their_examples(place, tmp_path, capsys):
  command = arguments(place, tmp_path / "r.csv", "--task", "knn", "linear_probe", "fewshot_linear_probe", "--json")
  command[3:5] = ["words"]
  assert cli.main(command) == 0
  rows = {row["task"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
  assert set(rows) == {"knn", "linear_probe", "fewshot_linear_probe"}
  assert {"knn_acc1", "knn_mean_per_class_recall"} <= set(rows["knn"]["metrics"])
  assert {"lp_acc1", "lp_mean_per_class_recall", "regulariser"} <= set(rows["linear_probe"]["metrics"])
  assert {"fs1_acc1", "fs16_acc1"} <= set(rows["fewshot_linear_probe"]["metrics"])


@pytest.mark.parametrize("changes, says", [
  ({"--dataset": ["nowhere"]}, "nowhere: no data set in"),
  ({"--output": ["results.txt"]}, "results are written as a .csv file"),
  ({"--output": ["nowhere/results.csv"]}, "the folder nowhere does not exist"),
  ({"--template": ["a photo"]}, "'a photo' has no {c}"),
  ({"--language": ["cn"]}, "words: its class names and templates are not known in the language 'cn'"),
  ({"--split": ["holdout"]}, "words: no data set in"),
  ({"--ema": []}, "holds no moving average of the weights"),
  ({"--average-checkpoints": ["2"]}, "holds 0 checkpoints, and the mean of 2 was asked for"),
  ({"--task": ["knn"], "--dataset": ["captions"]}, "captions: a probe needs images of one class each"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(place, tmp_path, capsys, monkeypatch, changes, says):
  monkeypatch.chdir(tmp_path)
  given = {"--dataset": ["words"], "--data-root": [str(place / "sets")], "--output": ["results.csv"], **changes}
  assert cli.main(["eval", str(place / "model"), *(word for flag, values in given.items() for word in (flag, *values))]) == 2
  out, err = capsys.readouterr()
  assert says in err and "Traceback" not in err and out == "" and len(err.strip().splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_results_of_others_are_not_written_over(place, tmp_path, capsys):
  (tmp_path / "results.csv").write_text("model,acc1\nmine,0.5\n")
  assert cli.main(arguments(place, tmp_path / "results.csv")) == 2
  assert "results.json is not beside it" in capsys.readouterr().err
  (tmp_path / "results.json").write_text('{"mine": 1}')
  assert cli.main(arguments(place, tmp_path / "results.csv")) == 2
  assert "is not of this command" in capsys.readouterr().err
  assert (tmp_path / "results.csv").read_text() == "model,acc1\nmine,0.5\n"


def test_missing_sets_can_be_left_out(place, tmp_path, capsys):
  command = arguments(place, tmp_path / "r.csv", "--skip-missing", "--json")
  command[3:5] = ["words", "vtab/pets"]
  assert cli.main(command) == 0
  out, err = capsys.readouterr()
  assert [row["dataset"] for row in json.loads(out)["rows"]] == ["words"] and "left out: vtab/pets" in err
