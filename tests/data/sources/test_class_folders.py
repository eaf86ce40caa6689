"""Folders of classes, read as torchvision's ImageFolder reads them."""

import pytest

from clip_jax.data import sources
from clip_jax.errors import DataError


def write(folder, files):
  for name in files:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())


FILES = ["b/2.png", "b/1.JPG", "a/x.webp", "a/notes.txt", "c d/1.jpeg", "list.csv"]


def test_classes_are_numbered_by_name_and_files_are_in_order(tmp_path):
  write(tmp_path, FILES)
  source = sources.create("classes", str(tmp_path))
  assert source.folders == ("a", "b", "c d") and len(source) == 4
  assert [(record.key, record.label) for record in source] == [("a/x.webp", 0), ("b/1.JPG", 1), ("b/2.png", 1), ("c d/1.jpeg", 2)]
  assert source[2].image == b"b/2.png" and source[2].captions == []
  assert sources.create("auto", f"classes:{tmp_path}").fingerprint == source.fingerprint
  (tmp_path / "a/y.png").write_bytes(b"")
  assert sources.create("classes", str(tmp_path)).fingerprint != source.fingerprint


def test_folders_that_are_all_numbers_are_in_their_order(tmp_path):
  write(tmp_path, [f"{i}/x.png" for i in (0, 2, 10, 9)])
  assert sources.create("classes", str(tmp_path)).folders == ("0", "2", "9", "10")


def test_a_file_that_is_gone_is_named(tmp_path):
  write(tmp_path, FILES)
  source = sources.create("classes", str(tmp_path))
  (tmp_path / "b/1.JPG").unlink()
  found = source.fetch([0, 1])
  assert found[0].label == 0 and isinstance(found[1], DataError) and str(found[1]).startswith("b/1.JPG: ")
  with pytest.raises(IndexError):
    source.fetch([4])


def test_what_holds_no_class(tmp_path):
  write(tmp_path, ["x.png"])
  with pytest.raises(DataError, match=r"no image in a folder of it; DIR/CLASS/IMAGE\.jpg would be one"):
    sources.create("classes", str(tmp_path))


def test_from_a_bucket(s3):
  for name in FILES:
    s3.put(f"classes/{name}", name.encode())
  source = sources.create("classes", s3.url("classes"))
  assert source.folders == ("a", "b", "c d") and source[1].image == b"b/1.JPG"
