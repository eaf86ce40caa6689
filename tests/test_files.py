"""Files and folders that are whole or not there."""

import pytest

from clip_jax import files
from clip_jax.errors import UsageError


def left(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_is_not_finished_leaves_nothing_not_even_new_parents(tmp_path, error, is_folder):
  with pytest.raises(error), files.new(tmp_path / "a/b/out") as temporary:
    assert temporary.parent == tmp_path / "a/b" and not temporary.exists()
    if is_folder:
      temporary.mkdir()
      (temporary / "half").write_text("1")
    else:
      temporary.write_text("half")
    raise error
  assert left(tmp_path) == []


def test_what_is_finished_has_its_name_and_an_empty_folder_may_have_been_there(tmp_path):
  for out in (tmp_path / "a/out", tmp_path / "empty"):
    if out.name == "empty":
      out.mkdir()
    with files.new(out) as temporary:
      temporary.mkdir()
      (temporary / "whole").write_text("1")
  assert left(tmp_path) == ["a", "a/out", "a/out/whole", "empty", "empty/whole"]


def test_what_is_there_is_kept_and_what_cannot_be_written_is_a_sentence(tmp_path):
  (tmp_path / "out").write_text("mine")
  with pytest.raises(UsageError, match="out exists already"), files.new(tmp_path / "out"):
    raise AssertionError("not reached")
  with pytest.raises(UsageError, match="out/below cannot be written"), files.new(tmp_path / "out/below"):
    raise AssertionError("not reached")
  assert (tmp_path / "out").read_text() == "mine" and left(tmp_path) == ["out"]
