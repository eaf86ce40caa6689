"""Data sets that TensorFlow Datasets prepared, read as it reads them, without TensorFlow."""

import concurrent.futures
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from clip_jax.data.sources.protocol import Options
from clip_jax.data.sources.tfds import TfdsSource
from clip_jax.errors import DataError

features = tfds.features


def pixels(i):
  buffer = io.BytesIO()
  Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(buffer, "png")
  return buffer.getvalue()


def prepare(folder, kinds, rows, splits=None, shards=1):
  """Prepares a data set of a configuration `2014` as `tfds build` does; returns the folder of its version."""

  class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014")]

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

    def _split_generators(self, manager):
      return {split: self._generate_examples(indices) for split, indices in (splits or {"train": range(10)}).items()}

    def _generate_examples(self, indices):
      yield from ((i, rows(i)) for i in indices)

  builder = Tiny(data_dir=str(folder), config="2014", file_format="array_record")
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=shards))
  return Path(builder.data_dir)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
  """The shape of coco_captions, with three shards."""
  kinds = {
    "image": features.Image(encoding_format="png"),
    "image/filename": features.Text(),
    "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
    "objects": features.Sequence({"bbox": features.BBoxFeature(), "label": features.ClassLabel(names=["x", "y"])}),
  }

  def row(i):
    captions = [{"id": 2 * i + k, "text": f"caption {k} of {i} – ü"} for k in range(1 + i % 3)]
    return {"image": io.BytesIO(pixels(i)), "image/filename": f"{i}.png", "captions": captions, "objects": []}

  return prepare(tmp_path_factory.mktemp("coco"), kinds, row, {"train": range(20), "val": range(20, 27)}, shards=3)


def theirs(folder, split):
  """What tfds itself reads: images and lists of captions."""
  source = tfds.builder_from_directory(folder).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
  return [(r["image"], [text.decode() for text in r["captions"]["text"]]) for r in source]


def ours(path, **options):
  source = TfdsSource(path, Options(**options))
  return [(record.image, record.captions) for record in source.fetch(range(len(source)))]


@pytest.mark.parametrize("split", ["train", "val", "train[:50%]", "train[3:7]", "val+train[-2:]", "train[2:4]+train[9:11]"])
def test_a_split_is_read_as_tfds_reads_it(coco, split):
  found = ours(f"{coco}#{split}")
  assert found == theirs(coco, split)
  assert {image for image, _ in found} <= {pixels(i) for i in range(27)}


def test_train_is_read_by_default(coco):
  assert ours(str(coco)) == ours(f"{coco}#train")
  assert len(ours(str(coco))) == 20


def test_keys_and_fingerprints(coco):
  whole, some = TfdsSource(str(coco)), TfdsSource(f"{coco}#train[4:]")
  assert some.key(0) == whole.key(4) == some[0].key == "tiny-train.array_record-00000-of-00003/4"
  assert len({whole.fingerprint, some.fingerprint, TfdsSource(f"{coco}#val").fingerprint}) == 3
  assert whole.fingerprint == TfdsSource(str(coco)).fingerprint
  for index in (-1, 20):
    with pytest.raises(IndexError):
      whole[index]
    with pytest.raises(IndexError):
      whole.key(index)


def test_features_that_are_asked_for(coco):
  options = Options(captions=(("captions/text", 1.0), ("image/filename", 0.5)))
  for record in TfdsSource(str(coco), options).fetch(range(20)):
    *texts, name = record.captions
    assert name.endswith(".png")
    assert record.weights == (*[1 / len(texts)] * len(texts), 0.5)


def test_nested_features_and_labels(tmp_path):
  kinds = {
    "photo": features.Image(),
    "about": {"deep": {"caption": features.Text()}, "text": features.Sequence(features.Text())},
    "label": features.ClassLabel(names=["a", "b"]),
  }
  folder = prepare(
    tmp_path,
    kinds,
    lambda i: {"photo": io.BytesIO(pixels(i)), "about": {"deep": {"caption": f"deep {i}"}, "text": []}, "label": i % 2},
  )
  for record in TfdsSource(str(folder)).fetch(range(10)):
    i = int(record.captions[0].removeprefix("deep "))
    assert (record.image, record.label) == (pixels(i), i % 2)
  assert TfdsSource(str(folder)).classes == ("a", "b")


def test_encoded_images_as_strings(tmp_path):
  kinds = {"jpg": features.Tensor(shape=(), dtype=np.str_), "txt": features.Tensor(shape=(), dtype=np.str_)}
  folder = prepare(tmp_path, kinds, lambda i: {"jpg": pixels(i), "txt": f"text {i}"})
  assert sorted(ours(str(folder))) == sorted((pixels(i), [f"text {i}"]) for i in range(10))


def test_a_name_stands_for_a_folder(coco, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(coco.parents[2]))
  for name in ("tfds:tiny/2014", "tfds:tiny/2014:1.0.0", "tiny", "tiny/2014#val"):
    assert ours(name) == theirs(coco, "val" if "#val" in name else "train")
  with pytest.raises(DataError, match="no data set 'tinny' in .*tfds build tinny --file_format=array_record"):
    TfdsSource("tfds:tinny")
  with pytest.raises(DataError, match="no such folder"):
    TfdsSource(str(tmp_path / "missing"))


@pytest.mark.parametrize(
  ("split", "options", "message"),
  [
    ("trian", {}, "has no split 'trian'. Did you mean train"),
    ("q", {}, "has no split 'q'. There are: train, val"),
    ("train[:x]", {}, r"has no split 'train\[:x\]'"),
    ("train[:0]", {}, "is empty"),
    ("train", {"image": "imag"}, "has no image feature 'imag'. Did you mean image"),
    ("train", {"captions": (("captions/txt", 1.0),)}, "has no caption feature 'captions/txt'. Did you mean captions/text"),
    ("train", {"captions": (("captions/id", 1.0),)}, "has no caption feature 'captions/id'"),
  ],
)
def test_what_is_not_there(coco, split, options, message):
  with pytest.raises(DataError, match=message):
    TfdsSource(f"{coco}#{split}", Options(**options))


def test_a_data_set_without_captions(tmp_path):
  folder = prepare(tmp_path, {"image": features.Image(), "title": features.Text()}, lambda i: {"image": io.BytesIO(pixels(i)), "title": "t"})
  with pytest.raises(DataError, match="has no caption feature: .* Name a text with data.captions: title"):
    TfdsSource(str(folder))
  assert ours(str(folder), captions=(("title", 1.0),))[0][1] == ["t"]


def test_a_folder_that_is_no_version(coco, tmp_path):
  with pytest.raises(DataError, match="did you mean .*2014/1.0.0"):
    TfdsSource(str(coco.parents[1]))
  with pytest.raises(DataError, match="did you mean .*2014/1.0.0"):
    TfdsSource(str(coco.parent))
  with pytest.raises(DataError, match="holds no dataset_info.json; give the folder of a version"):
    TfdsSource(str(tmp_path))


def change(folder, name, edit):
  path = folder / name
  path.write_text(edit(path.read_text()))
  return str(folder)


def test_damaged_and_unreadable_data_sets(coco, tmp_path):
  def copy(name):
    return shutil.copytree(coco, tmp_path / name)

  def without_format(text):
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "fileFormat"})

  for edit in (lambda text: text.replace("array_record", "tfrecord", 1), without_format):
    folder = change(copy(f"tfrecord {edit.__name__}"), "dataset_info.json", edit)
    with pytest.raises(DataError, match="in the format tfrecord, which only TensorFlow reads. Prepare it with --file_format=array_record"):
      TfdsSource(folder)
  for name in ("dataset_info.json", "features.json"):
    for broken in ("", "[]", "{}", "{\"a\": ", "null", "\0"):
      folder = change(copy(f"{name} {len(list(tmp_path.iterdir()))}"), name, lambda _, broken=broken: broken)
      with pytest.raises(DataError, match="cannot be read|in the format tfrecord"):
        TfdsSource(folder)
  folder = change(copy("fewer"), "dataset_info.json", lambda text: re.sub(r'"shardLengths": \[\s*"\d+"', '"shardLengths": ["99"', text))
  with pytest.raises(DataError, match="records, but dataset_info.json tells of 99"):
    TfdsSource(folder)
  folder = copy("missing")
  for shard in folder.glob("*train*"):
    shard.unlink()
  with pytest.raises(DataError, match="tiny-train.array_record-00000-of-00003 cannot be read"):
    TfdsSource(str(folder))


def test_from_a_bucket(coco, s3):
  url = s3.put_folder(coco, "tfds/tiny/2014/1.0.0")
  assert ours(url) == ours(str(coco))
  assert ours(f"{url}/#val[2:]") == ours(f"{coco}#val[2:]")
  with pytest.raises(DataError, match="did you mean s3://.*/tfds/tiny/2014/1.0.0"):
    TfdsSource(s3.url("tfds/tiny"))


def test_eight_threads_read_what_one_reads(coco):
  source = TfdsSource(str(coco))
  expected = source.fetch(range(20))
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    assert list(executor.map(source.__getitem__, [*range(20)] * 8)) == expected * 8


def test_tensorflow_is_not_imported(coco, tmp_path):
  """Also where it is installed."""
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text("import os; os._exit(3)")
  program = f"from clip_jax.data.sources.tfds import TfdsSource; assert TfdsSource({str(coco)!r})[3].captions"
  subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
