"""Classification by prompts: the classifier's formula, the accuracy, and labels that cannot be."""

import numpy as np
import pytest

from clip_jax.data import sources
from clip_jax.errors import DataError
from clip_jax.evaluate import datasets
from clip_jax.evaluate.zero_shot import ZeroShot
from tests.evaluate.conftest import MESHES, Given, encoder, pictures, placed, png, write_shard

CLASSES = ("cat", "dog on a chair", "tree")
TEMPLATES = ("a photo of a {}.", "{}", "art of the {}, large")
LABELS = [2, 0, 1, 1, 2, 0, 0, 2, 1, 0, 2]
PICTURES = pictures(len(LABELS), seed=5)


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
  return labelled(tmp_path_factory.mktemp("labelled") / "set.tar", LABELS)


def labelled(path, labels):
  """A shard of pictures with labels; None is a record without one."""
  return write_shard(
    path,
    [
      {"png": png(picture), "txt": b"a picture", **({} if label is None else {"cls": str(label).encode()})}
      for picture, label in zip(pictures(len(labels), seed=5), labels, strict=True)
    ],
  )


def evaluator(path, encode, templates=TEMPLATES):
  source = sources.create("tar", path)
  return ZeroShot(datasets.given("labelled", source, CLASSES, templates, "config.eval.zero_shot.labelled"), encode)


def weights(one_at_a_time):
  """Class by class, as in Radford et al. 2021, section 3.1.4, and their released notebook."""
  columns = []
  for name in CLASSES:
    embeddings = one_at_a_time.texts([template.replace("{}", name) for template in TEMPLATES])
    mean = sum(e / np.linalg.norm(e) for e in embeddings) / len(embeddings)
    columns.append(mean / np.linalg.norm(mean))
  return np.array(columns)


@pytest.mark.parametrize("data, fsdp", MESHES)
def test_classifier_and_accuracy_on_any_mesh(shard, params, one_at_a_time, data, fsdp):
  want = weights(one_at_a_time)
  encode = encoder(data, fsdp)
  on_mesh = placed(params, encode.mesh)
  evaluate = evaluator(shard, encode)
  np.testing.assert_allclose(evaluate.classifier(on_mesh), want, rtol=0, atol=1e-6)
  # With one template a class is that prompt, so it is the mean that has been seen above.
  single = evaluator(shard, encode, TEMPLATES[:1]).classifier(on_mesh)
  assert np.abs(single - want).max() > 1e-2

  logits = one_at_a_time.images(PICTURES) @ want.T
  assert np.diff(np.sort(logits, axis=1), axis=1).min() > 1e-5
  result = evaluate(on_mesh)
  accuracy = np.mean(logits.argmax(axis=1) == LABELS)
  assert 0 < accuracy < 1
  recalls = [np.mean(logits.argmax(axis=1)[np.equal(LABELS, i)] == i) for i in range(3)]
  found = result.flat("labelled")
  assert found["eval/labelled/acc1"] == pytest.approx(accuracy) and found["eval/labelled/acc1/chance"] == 1 / 3
  assert found["eval/labelled/acc1/standard_error"] == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 11))
  assert found["eval/labelled/mean_per_class_recall"] == pytest.approx(np.mean(recalls))
  scaled = np.exp(params["logit_scale"]) * logits
  confidence = np.exp(scaled - scaled.max(axis=1, keepdims=True))
  confidence = (confidence / confidence.sum(axis=1, keepdims=True)).max(axis=1)
  bins = np.minimum((confidence * 15).astype(int), 14)
  right = logits.argmax(axis=1) == LABELS
  ece = sum(abs(np.sum(right[bins == b]) - np.sum(confidence[bins == b])) for b in range(15)) / 11
  assert found["eval/labelled/ece"] == pytest.approx(ece, abs=1e-4)
  assert "eval/labelled/acc5" not in found and result.details == {}  # of three classes five are all


def test_accuracy_counts_the_class_with_the_largest_inner_product(shard):
  # Prompts of a class point, on average, along its own axis.
  prompts = np.repeat(np.eye(3), len(TEMPLATES), axis=0)
  right = np.eye(3)[LABELS]
  wrong = np.roll(right, 1, axis=1)
  mixed = np.concatenate([right[:4], wrong[4:]])
  for images, accuracy in ((right, 1), (wrong, 0), (mixed, 4 / 11)):
    result = evaluator(shard, Given(images + 0.3, prompts))(None)
    assert result.scores["acc1"].value == pytest.approx(accuracy)


def test_classes_are_unit_vectors_however_much_their_prompts_agree(shard):
  # Of class 0 two prompts agree and one is at right angles; of the others all agree.
  prompts = [[1, 0, 0], [1, 0, 0], [0, 1, 0], *[[0, 0, 1]] * 3, *[[0, 1, 0]] * 3]
  got = evaluator(shard, Given(np.zeros((11, 3)), prompts)).classifier(None)
  np.testing.assert_allclose(got, [[2 / 5**0.5, 1 / 5**0.5, 0], [0, 0, 1], [0, 1, 0]], atol=1e-7)


@pytest.mark.parametrize("label", [None, -1, 3, 1000])
def test_a_label_without_a_class_is_named_with_its_record(tmp_path, label):
  path = labelled(tmp_path / "odd.tar", [0, 1, label, 2])
  with pytest.raises(DataError) as error:
    evaluator(path, Given(np.eye(4), np.eye(4)))
  message = str(error.value)
  assert message.startswith("odd.tar/00002.png:")
  assert f"label is {label}" in message and "3 classes" in message and "0 to 2" in message
  assert "config.eval.zero_shot.labelled" in message


