"""Lists of image files: imagefolders of Hugging Face, and CSV files as open_clip takes them."""

import concurrent.futures
import csv
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clip_jax.data.sources.folder import FolderSource
from clip_jax.data.sources.protocol import Options, Record
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, StorageError

CAPTIONS = ["plain", 'with, comma and "quotes"', "two\nlines", "ünïcödé 🦊", "tab\there"]


def write(path, rows):
  """Writes rows, dicts of the same keys, in the format that the name says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  elif path.suffix == ".parquet":
    pq.write_table(pa.Table.from_pylist(rows), path)
  else:
    with path.open("w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
      writer.writeheader()
      writer.writerows(rows)
  return str(path)


@pytest.fixture
def images(tmp_path):
  """A folder with files `0.jpg` to `4.jpg`, and one below."""
  folder = tmp_path / "images"
  (folder / "sub").mkdir(parents=True)
  for i in range(5):
    (folder / f"{i}.jpg").write_bytes(b"image %d" % i)
  (folder / "sub" / "5.png").write_bytes(b"image 5")
  (tmp_path / "secret.jpg").write_bytes(b"secret")
  return folder


def records_of(path, **options):
  source = FolderSource(str(path), Options(**options))
  return source.fetch(range(len(source)))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_imagefolder(images, ending):
  name = f"metadata.{ending}"
  rows = [{"file_name": f"{i}.jpg", "text": caption, "label": i + 3} for i, caption in enumerate(CAPTIONS)]
  rows.append({"file_name": "sub/5.png", "text": "below", "label": 8})
  write(images / name, rows)
  found = records_of(images)
  assert found == [Record(b"image %d" % i, [row["text"]], f"{name}/{row['file_name']}", i + 3) for i, row in enumerate(rows)]
  assert records_of(f"{images}/") == found == records_of(images / name)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_several_captions(images, ending):
  write(images / f"metadata.{ending}", [{"file_name": "0.jpg", "captions": ["a", "b"], "n": {"x": [1]}}, {"file_name": "1.jpg", "captions": ["c"], "n": None}])
  assert [record.captions for record in records_of(images)] == [["a", "b"], ["c"]]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("names", [("filepath", "title"), ("image", "caption"), ("file_name", "text"), ("path", "txt")])
def test_lists_of_open_clip(images, tmp_path, ending, names):
  file, caption = names
  rows = [{"other": "x", file: str(images / f"{i}.jpg"), caption: text} for i, text in enumerate(CAPTIONS)]
  rows.append({"other": "", file: "images/sub/../sub/5.png", caption: "relative"})
  found = records_of(write(tmp_path / f"list.{ending}", rows))
  assert [(record.image, record.captions) for record in found] == [(b"image %d" % i, [row[caption]]) for i, row in enumerate(rows)]


def test_tabs_in_a_file_with_another_name(images, tmp_path):
  """open_clip separates with tabs unless it is told otherwise, whatever the file is called; some write a mark first."""
  (tmp_path / "list.csv").write_text("\ufefffilepath\ttitle\nimages/0.jpg\ta, b\nimages/1.jpg\ta 5\" pipe\n", encoding="utf-8")
  assert [record.captions for record in records_of(tmp_path / "list.csv")] == [["a, b"], ['a 5" pipe']]


def test_windows_lines_and_names_of_classes(images, tmp_path):
  (tmp_path / "list.csv").write_bytes(b"filepath,title,label\r\nimages/0.jpg,a,cat\r\nimages/1.jpg,NULL,dog\r\n")
  assert [(record.captions, record.label) for record in records_of(tmp_path / "list.csv")] == [(["a"], None), (["NULL"], None)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1), min_size=1), st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
def test_any_text(images, tmp_path, texts, ending):
  rows = [{"filepath": "images/0.jpg", "title": text} for text in texts]
  for text, record in zip(texts, records_of(write(tmp_path / f"list.{ending}", rows)), strict=True):
    assert isinstance(record, DataError) if text.isspace() else record.captions == [text]


def test_columns_that_are_asked_for(images, tmp_path):
  path = write(tmp_path / "list.csv", [{"filepath": "-", "where": "images/0.jpg", "short": "s", "long": "l"}])
  found = records_of(path, captions=(("short", 2.0), ("long", 1.0)), image="where")
  assert found == [Record(b"image 0", ["s", "l"], "list.csv/images/0.jpg", None, (2.0, 1.0))]


@pytest.mark.parametrize(
  "name", ["../secret.jpg", "sub/../../secret.jpg", "..", "{root}/secret.jpg", "file:///etc/passwd", "gs://bucket/key", "s3://bucket/key"]
)
def test_names_that_lead_out_of_an_imagefolder(images, tmp_path, name):
  name = name.format(root=tmp_path)
  write(images / "metadata.jsonl", [{"file_name": name, "text": "t"}, {"file_name": "sub/../0.jpg", "text": "t"}])
  bad, good = records_of(images)
  assert str(bad) == f"metadata.jsonl/{name}: it is outside of {images}; metadata.jsonl may name files in it only."
  assert good.image == b"image 0"


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("", "row 0: it names no file"),
    (None, "row 0: it names no file"),
    ("a\0b.jpg", "it names no file"),
    ("9.jpg", "no such file"),
    (".", "is a folder"),
    ("sub", "is a folder"),
    ("0.jpg/1.jpg", "cannot be read"),
    ("x" * 5000, "cannot be read"),
  ],
)
def test_files_that_cannot_be_read(images, name, message):
  write(images / "metadata.jsonl", [{"file_name": name, "text": "t"}, {"file_name": "0.jpg", "text": "t"}])
  bad, good = records_of(images)
  assert isinstance(bad, DataError)
  assert message in str(bad)
  assert good.image == b"image 0"


def test_links_and_missing_captions(images, tmp_path):
  rows = [{"image": "http://host/0.jpg", "text": "t"}, {"image": "images/0.jpg", "text": " "}, {"image": "images/1.jpg", "text": "t"}]
  link, blank, good = records_of(write(tmp_path / "list.csv", rows))
  assert "only local paths, gs:// and s3:// can be read" in str(link)
  assert "none of text holds a caption" in str(blank)
  assert good.image == b"image 1"


@pytest.mark.parametrize(
  ("name", "content", "options", "message"),
  [
    ("list.csv", "", {}, "list.csv cannot be parsed"),
    ("list.csv", "filepath,title\n", {}, "there is no row"),
    ("list.csv", "filepath,title\na,b,c\n", {}, "list.csv cannot be parsed: .*Expected 2 columns, got 3"),
    ("list.csv", "file,words\na,b\n", {}, "has no caption column: .* Name one with data.captions: words"),
    ("list.csv", "url,title\na,b\n", {}, "has no column of paths: file_name or .* Name it with data.image"),
    ("list.csv", "filepath,title\na,b\n", {"image": "filpath"}, "has no column of paths 'filpath'. Did you mean filepath"),
    ("list.csv", "filepath,title\na,b\n", {"captions": (("titel", 1.0),)}, "has no caption column 'titel'. Did you mean title"),
    ("list.jsonl", "{]", {}, "list.jsonl cannot be parsed"),
    ("list.jsonl", '{"image": "a", "text": "b"}\n{"image": "a", "text": ["b"]}', {}, "list.jsonl cannot be parsed"),
    ("list.parquet", "PAR1", {}, "list.parquet cannot be parsed"),
  ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, options, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(DataError, match=message):
    FolderSource(str(tmp_path / name), Options(**options))


def test_text_that_is_not_utf8(tmp_path):
  (tmp_path / "list.csv").write_bytes(b"filepath,title\na,caf\xe9\n")
  with pytest.raises(DataError, match="list.csv cannot be parsed: .*UTF"):
    FolderSource(str(tmp_path / "list.csv"))


def test_a_folder_without_a_list(tmp_path):
  with pytest.raises(DataError, match="is no folder with metadata.jsonl, metadata.csv or metadata.parquet. Give such"):
    FolderSource(str(tmp_path))
  write(tmp_path / "train" / "metadata.csv", [{"file_name": "a", "text": "b"}])
  with pytest.raises(DataError, match="Did you mean .*/train?"):
    FolderSource(str(tmp_path))
  with pytest.raises(DataError, match="list.csv: no such file"):
    FolderSource(str(tmp_path / "list.csv"))


def test_indices_and_fingerprints(images):
  path = write(images / "metadata.csv", [{"file_name": "0.jpg", "text": "t"}])
  source = FolderSource(path)
  for index in (-1, 1):
    with pytest.raises(IndexError):
      source[index]
    with pytest.raises(IndexError):
      source.key(index)
  assert FolderSource(path).fingerprint == source.fingerprint != FolderSource(path, Options(image="file_name")).fingerprint
  os.utime(path, (1, 1))
  assert FolderSource(path).fingerprint != source.fingerprint


def test_a_store_that_does_not_answer(images):
  class Broken(Storage):
    def read_many(self, ranges):
      if ranges[0][0].endswith("jpg"):
        raise StorageError("away")
      return super().read_many(ranges)

  write(images / "metadata.csv", [{"file_name": "0.jpg", "text": "t"}])
  with pytest.raises(StorageError, match="away"):
    records_of(images, storage=Broken())


def test_eight_threads_read_what_one_reads(images):
  write(images / "metadata.csv", [{"file_name": f"{i % 5}.jpg", "text": f"caption {i}"} for i in range(100)])
  source = FolderSource(str(images))
  expected = source.fetch(range(100))
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    assert list(executor.map(source.__getitem__, [*range(100)] * 8)) == expected * 8


def test_from_a_bucket(images, tmp_path, s3):
  write(images / "metadata.jsonl", [{"file_name": name, "text": "t"} for name in ("0.jpg", "./sub/5.png", "../list.csv", "9.jpg")])
  url = s3.put_folder(images, "folder/images")
  names = ["images/0.jpg", "../folder/images/1.jpg", f"{url}/2.jpg", str(images / "3.jpg"), "../../../x.jpg"]
  s3.put("folder/list.csv", "filepath,title\n" + "".join(f"{name},t\n" for name in names))
  first, below, outside, missing = records_of(url)
  assert (first.image, below.image) == (b"image 0", b"image 5")
  assert "it is outside of" in str(outside)
  assert "no such file" in str(missing)
  *found, outside = records_of(s3.url("folder/list.csv"))
  assert [record.image for record in found] == [b"image %d" % i for i in range(4)]
  assert "it is outside of s3://clip-jax-test" in str(outside)
