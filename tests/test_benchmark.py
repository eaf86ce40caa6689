"""Files of results, classifiers that are kept, and what models are called; the command itself is in tests/end_to_end."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from clip_jax import benchmark
from clip_jax.cli import evaluation
from clip_jax.convert import sources
from clip_jax.evaluate import datasets, tasks
from clip_jax.evaluate.result import Result, Score
from clip_jax.evaluate.zero_shot import ZeroShot
from tests.convert import models

SUBJECT = dict(zip(benchmark.KEYS, ("ViT-B-32", "openai", "mnist", "zeroshot_classification", "en", "test"), strict=True))


def test_the_table_has_a_column_for_each_metric_and_its_error(tmp_path):
  results = benchmark.Results(tmp_path / "r.csv")
  results.add(SUBJECT, Result(4, {"acc1": Score(0.5, 0.25, 0.1), "ece": Score(float("nan"))}))
  results.add(SUBJECT | {"task": "zeroshot_retrieval"}, Result(9, {
    "image_to_text_R@5": Score(0.5, 0.1), "text_to_image_R@1_1k": Score(0.25, 0.125), "image_to_text_full_R@10": Score(1.0, 0.0),
  }))  # fmt: skip
  results.write()
  first, second = csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text()))
  assert first["acc1"] == "0.5" and first["acc1_standard_error"] == "0.25" and first["ece"] == "" and first["items"] == "4"
  assert first["model_fullname"] == "ViT-B-32 openai" and first["text_retrieval_recall@5"] == ""
  assert second["text_retrieval_recall@5"] == "0.5" and second["image_retrieval_recall@1_1k"] == "0.25"
  assert second["text_retrieval_full_recall@10"] == "1.0" and second["image_retrieval_recall@1_1k_standard_error"] == "0.125"
  written = json.loads((tmp_path / "r.json").read_text())
  assert written["rows"][0]["metrics"] == {"acc1": 0.5, "ece": None} and written["rows"][0]["chance"] == {"acc1": 0.1}


@pytest.mark.parametrize("where, name", [
  ("runs/emoji/checkpoints/1250", "emoji"), ("imported/vitb32", "vitb32"),
  ("runs/emoji (mean of the 2 checkpoints 1000 to 1250)", "emoji"), ("ViT-B-32.pt", "ViT-B-32.pt"),
])  # fmt: skip
def test_models_without_a_name(where, name):
  assert benchmark.run_name(where) == name


def test_classifiers_are_kept_for_the_weights_sizes_and_prompts_they_are_of(tmp_path, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  _, source = models.checkpoint(tmp_path / "model", models.model("vit"))
  held_out = datasets.EvaluationSet("x", datasets.CLASSIFICATION, [], classes=("cat", "dog"), templates=("a {c}",))

  def classifier(source, held_out=held_out):
    model = benchmark.Loaded(source, 4)
    calls = []
    texts = model.encoder.texts
    monkeypatch.setattr(model.encoder, "texts", lambda *given: calls.append(1) or texts(*given))
    return ZeroShot(held_out, model.encoder, model.kept).classifier(model.params), len(calls)

  first, encoded = classifier(source)
  again, none = classifier(source)
  assert encoded == 1 and none == 0 and first.tobytes() == again.tobytes()
  # The same numbers in a model that computes something else.
  other = dataclasses.replace(source, model=dataclasses.replace(source.model, activation="gelu"))
  assert source.model.activation != "gelu"
  changed, encoded = classifier(other)
  assert encoded == 1 and np.abs(changed - first).max() > 1e-6
  assert classifier(source, dataclasses.replace(held_out, templates=("one {c}",)))[1] == 1
  # What is damaged is made again.
  for file in (tmp_path / "cache/classifiers").iterdir():
    file.write_bytes(file.read_bytes()[:-3])
  assert classifier(source)[1] == 1


def test_a_digest_is_of_all_that_embeddings_depend_on(tmp_path):
  params, source = models.checkpoint(tmp_path / "one", models.model("vit"))
  assert source.digest() == source.digest(source.params()) == sources.find(tmp_path / "one").digest()
  _, other = models.checkpoint(tmp_path / "two", models.model("vit"), seed=1)
  squashed = dataclasses.replace(source, model=dataclasses.replace(source.model, resize_mode="squash"))
  assert len({source.digest(), other.digest(), squashed.digest()}) == 3


def test_the_command_line_names_the_tasks_and_suites_there_are():
  assert ("auto", *tasks.PROBES) == evaluation.TASKS  # said twice: `--help` loads nothing
  for suite in datasets.SUITES:
    assert suite in evaluation.EPILOG
