"""Data sets in the layouts that others write them in: CLIP_benchmark's, TFDS's, folders, lists, SugarCrepe's, Winoground's."""

import functools
import http.server
import io
import json
import shutil
import threading
import typing

import numpy as np
import pytest

from clip_jax.errors import DataError, UsageError
from clip_jax.evaluate import datasets, downloads, prompts
from clip_jax.evaluate.selection import Selection
from clip_jax.evaluate.zero_shot import ZeroShot
from tests.data.sources.test_tfds import features, prepare
from tests.evaluate.conftest import Given, pictures, png, write_shard

PNGS = [png(picture) for picture in pictures(6)]


def npy(values):
  buffer = io.BytesIO()
  np.save(buffer, np.array(values))
  return buffer.getvalue()


def webdataset(folder, members, kind=None, split="test", **texts):
  """A set as CLIP_benchmark writes it, two records a shard."""
  (folder / split).mkdir(parents=True)
  records = [{"webp" if i % 2 else "png": image, **more} for i, (image, more) in enumerate(zip(PNGS, members, strict=True))]
  for shard in range(3):
    write_shard(folder / split / f"{shard}.tar", records[2 * shard : 2 * shard + 2])
  (folder / split / "nshards.txt").write_text("3\n")
  if kind:
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
  for name, lines in texts.items():
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
  return folder


LABELS = [0, 2, 1, 1, 0, 2]
CLASSES = ("cat", "dog", "tree")
LABELLED = [{"cls": str(label).encode()} for label in LABELS]


@pytest.mark.parametrize("place", ["vtab/three", "wds_vtab-three", "vtab-three", "three", "."])
def test_a_webdataset_of_labelled_images_wherever_it_lies(tmp_path, place):
  webdataset(tmp_path / place, LABELLED, classnames=CLASSES, zeroshot_classification_templates=["a {c}.", "one {c}"])
  found = datasets.open_set("vtab/three", str(tmp_path))
  assert found.task == datasets.CLASSIFICATION and not found.multilabel and found.split == "test"
  assert found.classes == CLASSES and found.templates == ("a {c}.", "one {c}")
  assert [record.label for record in found.source] == LABELS
  assert [record.image for record in found.source] == PNGS


def test_a_root_with_places_for_the_name(tmp_path):
  webdataset(tmp_path / "data-vtab-three-end", LABELLED, classnames=CLASSES)
  found = datasets.open_set("vtab/three", f"{tmp_path}/data-{{dataset_cleaned}}-end")
  assert found.classes == CLASSES and found.templates == prompts.PLAIN


def test_names_and_templates_that_are_known_stand_in_for_missing_files(tmp_path):
  webdataset(tmp_path / "wds_mnist", LABELLED)
  found = datasets.open_set("mnist", str(tmp_path))
  assert found.classes[:3] == ("0", "1", "2") and found.templates == prompts.templates("mnist")
  webdataset(tmp_path / "wds_mine", LABELLED)
  with pytest.raises(UsageError, match=r"wds_mine has no classnames\.txt, and the class names of mine are not known"):
    datasets.open_set("mine", str(tmp_path))


def test_other_languages_take_known_prompts_and_not_what_lies_with_the_data(tmp_path):
  webdataset(tmp_path / "imagenet1k", LABELLED, classnames=CLASSES, zeroshot_classification_templates=["a {c}"])
  found = datasets.open_set("imagenet1k", str(tmp_path), language="cn")
  assert found.classes == prompts.classes("imagenet1k", "cn") and found.language == "cn"
  with pytest.raises(UsageError, match="mnist: its class names and templates are not known in the language 'cn'"):
    webdataset(tmp_path / "mnist", LABELLED)
    datasets.open_set("mnist", str(tmp_path), language="cn")


@pytest.mark.parametrize("text", ["", "many", "0", "-1"])
def test_a_number_of_shards_that_is_none(tmp_path, text):
  webdataset(tmp_path / "x", LABELLED, classnames=CLASSES)
  (tmp_path / "x/test/nshards.txt").write_text(text)
  with pytest.raises(DataError, match=r"nshards\.txt holds .* instead of the number of shards"):
    datasets.open_set("x", str(tmp_path))


def test_a_template_without_a_place_is_named_with_its_file(tmp_path):
  webdataset(tmp_path / "x", LABELLED, classnames=CLASSES, zeroshot_classification_templates=["a photo"])
  with pytest.raises(UsageError, match=r"x: the template 'a photo' has no \{c\}"):
    datasets.open_set("x", str(tmp_path))


def test_a_webdataset_of_captions_has_one_a_line(tmp_path):
  texts = [{"txt": f"number {i}\nthe picture {i}\n".encode()} for i in range(6)]
  webdataset(tmp_path / "flickr8k", texts, kind="retrieval")
  found = datasets.open_set("flickr8k", str(tmp_path))
  assert found.task == datasets.RETRIEVAL
  assert [record.captions for record in found.source] == [[f"number {i}", f"the picture {i}"] for i in range(6)]
  assert found.source[4].captions == ["number 4", "the picture 4"] and len(found.source) == 6


def test_a_webdataset_of_images_with_several_labels(tmp_path):
  flags = [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
  webdataset(tmp_path / "voc2007_multilabel", [{"npy": npy(row)} for row in flags], kind="multilabel", classnames=CLASSES)
  found = datasets.open_set("voc2007_multilabel", str(tmp_path))
  assert found.multilabel and [record.label for record in found.source] == [tuple(np.flatnonzero(row)) for row in flags]

  from sklearn import metrics

  images = np.random.default_rng(0).normal(size=(6, 3))
  result = ZeroShot(found, Given(images, np.eye(3)))(None)
  want = metrics.average_precision_score(np.array(flags), images, average="macro")
  assert result.scores["mean_average_precision"].value == pytest.approx(want, abs=1e-6)
  assert result.scores["mean_average_precision"].standard_error > 0 and list(result.scores) == ["mean_average_precision"]


@pytest.mark.parametrize("content", [b"no array", npy("text"), npy([[1, 0]])])
def test_several_labels_that_are_none(tmp_path, content):
  webdataset(tmp_path / "x", [{"npy": content}] * 6, kind="multilabel", classnames=CLASSES)
  with pytest.raises(DataError, match=r"its \.npy is not a list of numbers, one for each class"):
    datasets.open_set("x", str(tmp_path))


def class_folders(folder, names):
  for number, name in enumerate(names):
    (folder / name).mkdir(parents=True)
    for i in range(2):
      (folder / name / f"{i}.png").write_bytes(PNGS[(2 * number + i) % 6])
    (folder / name / "notes.txt").write_text("not an image")


def test_folders_of_classes(tmp_path):
  class_folders(tmp_path / "pets/test", ["tabby_cat", "dog", "hedgehog"])
  class_folders(tmp_path / "pets/train", ["dog", "hedgehog", "tabby_cat"])
  found = datasets.open_set("pets_of_mine", f"{tmp_path}/pets")
  assert found.classes == ("dog", "hedgehog", "tabby cat") and found.templates == prompts.PLAIN
  assert [record.label for record in found.source] == [0, 0, 1, 1, 2, 2]
  assert found.source[4].image == PNGS[0] and found.source.key(4) == "tabby_cat/0.png"
  assert found.train().split == "train" and len(found.train().source) == 6
  shutil.rmtree(tmp_path / "pets/train")
  with pytest.raises(UsageError, match="pets_of_mine: no data set in"):
    found.train()


def test_folders_called_as_imagenets_have_its_class_names(tmp_path):
  """ImageNet-A and -R have folders of some of its classes, V2 has all of them by number, in the order of text."""
  class_folders(tmp_path / "imagenet-a", ["n02123045", "n01440764", "n02099601"])
  found = datasets.open_set("imagenet-a", str(tmp_path))
  assert found.classes == ("tench", "Golden Retriever", "tabby cat")
  assert found.templates == prompts.templates("imagenet1k")
  class_folders(tmp_path / "imagenetv2", map(str, range(1_000)))
  found = datasets.open_set("imagenetv2", str(tmp_path))
  assert found.classes == prompts.classes("imagenet1k")
  assert [found.source[i].label for i in (4, 20, 1_999)] == [2, 10, 999]


def test_objectnet_as_it_is_unpacked_has_the_classes_that_imagenet_has(tmp_path):
  folder = tmp_path / "objectnet"
  class_folders(folder / "images", ["alarm_clock", "band_aid", "wheel"])
  (folder / "mappings").mkdir()
  labels = {"alarm_clock": "Alarm clock", "band_aid": "Band Aid", "wheel": "Wheel"}
  (folder / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
  (folder / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps({"Band Aid": "Band Aid", "Alarm clock": "analog clock; digital clock"}))
  found = datasets.open_set("objectnet", str(tmp_path))
  assert found.classes == ("alarm clock", "band aid") and [record.label for record in found.source] == [0, 0, 1, 1]
  assert found.templates == prompts.templates("imagenet1k")


def test_a_set_of_tfds_by_its_name(tmp_path):
  kinds = {"image": features.Image(), "label": features.ClassLabel(names=["n02123045", "n01440764"])}

  def row(i):
    return {"image": io.BytesIO(PNGS[i]), "label": i % 2}

  folder = prepare(tmp_path / "written", kinds, row, splits={"train": range(4), "validation": range(6)})
  for version in ("2.9.0", "2.10.0"):
    shutil.copytree(folder, tmp_path / "imagenet2012" / version)
  found = datasets.open_set("imagenet2012", str(tmp_path))
  assert found.classes == ("tabby cat", "tench") and len(found.templates) == 80 and len(found.source) == 6
  assert "2.10.0" in found.source._shards.paths[0] and len(found.train().source) == 4


def test_lists_of_files_with_labels_or_captions(tmp_path):
  for name, header, value in (("labelled", "label", "1"), ("described", "text", "a picture")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "one.png").write_bytes(PNGS[0])
    (tmp_path / name / "metadata.csv").write_text(f"file_name,{header}\none.png,{value}\n")
  assert datasets.open_set("described", str(tmp_path)).task == datasets.RETRIEVAL
  # Without splits it is a test split, and nothing to train a probe on.
  with pytest.raises(UsageError, match="described: no data set in"):
    datasets.open_set("described", str(tmp_path), split="train")
  with pytest.raises(UsageError, match="the class names of labelled are not known"):
    datasets.open_set("labelled", str(tmp_path))
  shutil.copytree(tmp_path / "described", tmp_path / "described/train")
  found = datasets.open_set("described", str(tmp_path))
  assert found.train().source.fingerprint != found.source.fingerprint and found.train().split == "train"


def test_what_is_not_there_is_told_with_where_it_was_looked_for(tmp_path):
  with pytest.raises(UsageError) as error:
    datasets.open_set("vtab/caltech101", str(tmp_path), alone=False)
  assert f"vtab/caltech101: no data set in {tmp_path}/vtab/caltech101, {tmp_path}/wds_vtab-caltech101" in str(error.value)
  with pytest.raises(UsageError, match=r"No suite is called 'vtab\+\+'.*Did you mean"):
    datasets.names_of("vtab++")


def test_sugar_crepe(tmp_path):
  (tmp_path / "sugar_crepe/val2017").mkdir(parents=True)
  rows = {}
  for i in range(4):
    (tmp_path / f"sugar_crepe/val2017/{i}.png").write_bytes(PNGS[i])
    rows[str(3 * i)] = {"filename": f"{i}.png", "caption": f"right {i}", "negative_caption": f"wrong {i}"}
  (tmp_path / "sugar_crepe/add_att.json").write_text(json.dumps(rows))
  found = datasets.open_set("sugar_crepe/add_att", str(tmp_path))
  assert found.task == datasets.SELECTION and len(found.source) == 4 and found.source[2].image == PNGS[2]
  # Of four pictures the second prefers the wrong caption, and the third has a tie, which is lost.
  right = np.array([[1, 0]] * 4)
  wrong = np.array([[0, 1], [2, 0], [1, 0], [0, 0]])
  texts = np.stack([right, wrong], axis=1).reshape(8, 2)
  result = Selection(found, Given(right, texts))(None)
  assert {name: score.value for name, score in result.scores.items()} == {"text_acc": 0.5, "image_acc": 1, "acc": 0.5}
  assert result.scores["acc"].chance == 0.5 and result.items == 4
  assert result.outcomes["text_acc"][0].tolist() == [1, 0, 0, 1]


def test_winoground(tmp_path):
  folder = tmp_path / "winoground"
  (folder / "images").mkdir(parents=True)
  lines = []
  for i in range(3):
    for j in range(2):
      (folder / f"images/ex_{i}_img_{j}.png").write_bytes(PNGS[2 * i + j])
    lines.append({"id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1", "caption_0": "a b", "caption_1": "b a"})
  (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
  found = datasets.open_set("winoground", str(tmp_path))
  assert len(found.source) == 6 and found.source[3].image == PNGS[3]
  # Scores of pictures (rows) with captions: all right; texts right and pictures wrong; the other way round.
  scores = np.array([[[2, 1], [1, 2]], [[2, 1], [3, 4]], [[2, 3], [1, 4]]], np.float64)
  result = Selection(found, Given(scores.reshape(6, 2), np.tile(np.eye(2), (3, 1))))(None)
  assert result.outcomes["text_acc"][0].tolist() == [1, 1, 0]
  assert result.outcomes["image_acc"][0].tolist() == [1, 0, 1]
  assert result.outcomes["acc"][0].tolist() == [1, 0, 0]
  assert [result.scores[name].chance for name in ("text_acc", "image_acc", "acc")] == [1 / 4, 1 / 4, 1 / 6]


def test_a_list_that_is_none_is_named(tmp_path):
  (tmp_path / "sugar_crepe.json").write_text('[{"filename": 1}]')
  with pytest.raises(DataError, match=r"sugar_crepe\.json is not a list of pictures with two captions"):
    datasets.open_set("sugar_crepe", str(tmp_path))


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves files, those that begin with /hub by way of a redirection; it fails once for each tar."""

  failed: typing.ClassVar = set()

  def do_GET(self):
    if self.path.startswith("/hub/"):
      self.send_response(302)
      self.send_header("Location", self.path.removeprefix("/hub"))
      self.send_header("Content-Length", "0")
      self.end_headers()
    elif self.path.endswith(".tar") and self.path not in self.failed:
      self.failed.add(self.path)
      self.send_error(503)
    else:
      super().do_GET()

  def log_message(self, *_):
    """Says nothing."""


def test_a_set_of_a_web_server_is_copied_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  webdataset(tmp_path / "www/wds_vtab-three", LABELLED, classnames=CLASSES)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www")))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  root = f"http://127.0.0.1:{server.server_port}/hub/wds_{{dataset_cleaned}}"
  try:
    found = datasets.open_set("vtab/three", root)
    assert found.classes == CLASSES and [record.image for record in found.source] == PNGS
    assert "3 of 3 shards" in capsys.readouterr().err
    with pytest.raises(UsageError, match="vtab/three: no data set in http://127.0.0.1"):
      found.train()
    with pytest.raises(UsageError, match="vtab/four: no data set in http://127.0.0.1"):
      datasets.open_set("vtab/four", root)
    (tmp_path / "www/wds_vtab-three/test/2.tar").unlink()
    assert len(datasets.open_set("vtab/three", root).source) == 6  # of the copy
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"2\.tar is not there, though nshards\.txt tells of 3"):
      datasets.open_set("vtab/three", root)
  finally:
    server.shutdown()
  assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_addresses_of_the_hub():
  page = "https://huggingface.co/datasets/clip-benchmark/wds_mnist"
  for address in (page, f"{page}/", f"{page}/tree/main", f"{page}/resolve/main"):
    assert downloads.address(address) == f"{page}/resolve/main"
  assert downloads.address(f"{page}/tree/v2") == f"{page}/resolve/v2"
  assert downloads.address("https://example.com/sets/mnist/") == "https://example.com/sets/mnist"
