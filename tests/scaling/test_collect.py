"""Rows and laws of a sweep's folder: what is finished, what it is called, and what is best for an amount of compute."""

import csv
import json

import numpy as np
import pytest

from clip_jax.errors import DataError, UsageError
from clip_jax.scaling import collect, table

RUNS = [("S", "x", 0.1), ("S", "y", 0.1), ("M", "x", 0.4), ("M", "y", 0.4), ("L", "x", 1.6), ("L", "y", 1.6)]
SAMPLES = (1_000, 4_000, 16_000)
ALPHA, BETA = -0.2, 0.9


def error_of(gmacs, samples):
  return BETA * (gmacs * samples) ** ALPHA


@pytest.fixture
def folder(tmp_path):
  """A sweep of 18 finished runs whose errors are exactly on a law, and one run that is not finished."""
  described = []
  for arch, data, gmacs in RUNS:
    for samples in SAMPLES:
      name = f"{arch}_{data}_{samples}"
      described.append({"name": name, "arch": arch, "data": data, "gmacs": gmacs, "samples": samples, "steps": samples // 10})
      error = error_of(gmacs, samples)
      lines = [
        {"step": samples // 20, "eval/held/text_to_image_R@5": 0.9, "eval/held/acc1": 0.9},
        {"step": samples // 10, "loss": 1.0},
        {"step": samples // 10, "eval/held/text_to_image_R@5": 1 - error, "eval/held/image_to_text_R@5": 1 - error / 2}
        | {"eval/held/text_to_image_R@5/chance": 0.1, "eval/held/text_to_image_R@1": 0.05, "eval/classes/acc1": 1 - error, "eval/classes/ece": 0.1},
      ]
      write_log(tmp_path, name, lines)
  described.append({"name": "late", "arch": "L", "data": "x", "gmacs": 1.6, "samples": 100, "steps": 10})
  write_log(tmp_path, "late", [{"step": 5, "eval/held/acc1": 0.5}])
  described.append({"name": "never", "arch": "L", "data": "x", "gmacs": 1.6, "samples": 100, "steps": 10})
  (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "sweep": "mine", "runs": described}))
  return tmp_path


def write_log(folder, name, lines):
  workdir = folder / "runs" / name
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "metrics.jsonl").write_text("".join(json.dumps({"samples_seen": 0, "time": 0.0} | line) + "\n" for line in lines))


def test_each_finished_run_and_set_is_a_row_with_the_papers_columns(folder):
  path, rows = collect.results(folder)
  with path.open() as file:
    written = list(csv.DictReader(file))
  assert path == folder / "results.csv" and tuple(written[0]) == table.COLUMNS and len(written) == len(rows) == 36
  one = next(row for row in written if row["name"] == "M_y_4000" and row["downstream_dataset"] == "held")
  error = error_of(0.4, 4_000)
  assert (one["arch"], one["upstream_dataset"], one["task"], one["acc1"]) == ("M", "y", "zeroshot_retrieval", "")
  numbers = {"samples_seen": 4_000, "gmacs": 0.4, "gmacs_total": 1_600, "image_retrieval_recall@5": 1 - error, "text_retrieval_recall@5": 1 - error / 2}
  assert {key: float(one[key]) for key in numbers} == pytest.approx(numbers)
  classes = next(row for row in written if row["name"] == "M_y_4000" and row["downstream_dataset"] == "classes")
  assert classes["task"] == "zeroshot_classification" and float(classes["acc1"]) == pytest.approx(1 - error)
  assert not {row["name"] for row in written} & {"late", "never"}


def test_what_was_evaluated_later_is_there_too_and_wins(folder):
  rows = [
    {"pretrained": f"{folder}/runs/S_x_1000/checkpoints/100 (the moving average)", "dataset": "imagenet1k", "metrics": {"acc1": 0.25, "ece": 0.1}},
    {"pretrained": str(folder / "runs/S_x_1000"), "dataset": "classes", "metrics": {"acc1": 0.5}},
    {"pretrained": "elsewhere/run", "dataset": "imagenet1k", "metrics": {"acc1": 0.9}},
  ]
  (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
  found = {(row["name"], row["downstream_dataset"]): row.get("acc1") for row in collect.rows(folder)}
  assert found["S_x_1000", "imagenet1k"] == 0.25 and found["S_x_1000", "classes"] == 0.5 and 0.9 not in found.values()


def test_laws_of_groups_and_forecasts(folder):
  rows = table.read(collect.results(folder)[0])
  (law,) = collect.laws(rows, ["held"], method="all", at=[1e6])
  assert (law["group"], law["task"], law["metric"], law["n"]) == (None, "held", "image_retrieval_recall@5", 18)
  assert (law["beta"], law["alpha"]) == pytest.approx((BETA, ALPHA))
  assert law["forecast"][0]["error"] == pytest.approx(BETA * 1e6**ALPHA)
  assert law["curve"][0]["compute"] == pytest.approx(100) and law["curve"][-1]["compute"] == pytest.approx(10 * 1.6 * 16_000)
  groups = collect.laws(rows, ["held", "classes"], method="all", group="upstream_dataset")
  assert [(one["task"], one["group"], one["n"]) for one in groups] == [("held", "x", 9), ("held", "y", 9), ("classes", "x", 9), ("classes", "y", 9)]
  json.dumps(groups, allow_nan=False)
  with pytest.raises(UsageError, match="held, name S_x_1000: A law needs at least two points"):
    collect.laws(rows, ["held"], group="name")
  told = []
  few = [row for row in rows if row.values["arch"] != "L" or row.values["samples_seen"] == 1_000 and row.values["upstream_dataset"] == "x"]
  found = collect.laws(few, ["held"], method="all", group="arch", tell=told.append)
  assert [law["group"] for law in found] == ["S", "M"] and told == ["held, arch L: A law needs at least two points, of different compute, and there is one."]


def test_the_compute_optimal_model_grows_as_it_was_made_to(folder):
  """Runs above the frontier, and on it models of a size that goes with the root of compute."""
  computes = np.geomspace(1e2, 1e6, 5)
  points = [{"name": f"best{i}", "gmacs": c**0.5 / 100, "compute": c, "error": c**-0.1} for i, c in enumerate(computes)]
  points += [{"name": f"worse{i}", "gmacs": 1.0, "compute": c * 1.1, "error": 1.2 * c**-0.1} for i, c in enumerate(computes)]
  for one in points:
    one |= {"arch": one["name"], "data": "x", "samples": one["compute"] / one["gmacs"]}
  fitted = [{"index": i} for i in range(5)]
  law = {"task": "t", "metric": "m", "points": points, "fitted": fitted, "forecast": [{"compute": 1e8, "error": 0.1}]}
  found = collect.optimal(law)
  assert [one["name"] for one in found["frontier"]] == [f"best{i}" for i in range(5)]
  assert (found["gmacs_exponent"], found["samples_exponent"]) == pytest.approx((0.5, 0.5))
  assert found["budgets"] == [pytest.approx({"compute": 1e8, "gmacs": 100, "samples": 1e6, "error": 0.1})]
  alike = collect.optimal(law | {"points": [one | {"gmacs": 1.0} for one in points]})
  assert alike["gmacs_exponent"] is None and alike["budgets"] == []


def test_laws_are_written_for_every_set_and_what_has_none_is_told(folder):
  collect.results(folder)
  assert collect.write_laws(folder) == []
  content = json.loads((folder / "laws.json").read_text())
  assert [(law["task"], law["method"]) for law in content["laws"]] == [(t, m) for t in ("held", "classes") for m in ("frontier", "all")]
  assert [one["task"] for one in content["optimal"]] == ["held", "classes"]
  described = json.loads((folder / "sweep.json").read_text())
  (folder / "sweep.json").write_text(json.dumps(described | {"runs": described["runs"][:1]}))
  collect.results(folder)
  assert collect.write_laws(folder)[0].startswith("frontier: held: A law needs at least two points")


@pytest.mark.parametrize(
  "spoil, message",
  [
    (lambda folder: (folder / "sweep.json").unlink(), "sweep.json is missing"),
    (lambda folder: (folder / "sweep.json").write_text('{"format": 9, "runs": []}'), "sweep.json has format 9; this version reads format 1"),
    (lambda folder: (folder / "sweep.json").write_text('{"format": 1, "runs": []}'), "has no finished run that was evaluated yet; `clip-jax scaling run` goes on with it"),
    (lambda folder: (folder / "runs/S_x_1000/metrics.jsonl").write_text('{"step": 100, "eval/'), "runs/S_x_1000/metrics.jsonl cannot be read"),
  ],
)
def test_folders_that_are_none_are_told_in_a_sentence(folder, spoil, message):
  spoil(folder)
  with pytest.raises(DataError, match=message) as raised:
    collect.results(folder)
  assert "\n" not in str(raised.value) and not (folder / "results.csv").exists()
