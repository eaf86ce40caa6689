"""Files and folders that are whole or not there, and lines that end nothing."""

import contextlib
import os
import subprocess
import sys

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


@pytest.mark.parametrize("where", ["/dev/full", "closed pipe"])
def test_a_line_that_cannot_be_printed_ends_nothing(where):
  """Nor does what is left of it, when the process ends."""
  code = "from clip_jax.files import tell\nfor _ in range(1000): tell('a line ' * 10)\nprint('alive')"
  with contextlib.ExitStack() as stack:
    if where == "closed pipe":
      reading, lost = os.pipe()
      os.close(reading)
      stack.callback(os.close, lost)
    else:
      lost = stack.enter_context(open(where, "w"))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=lost, text=True, timeout=60, check=False)
  assert (done.returncode, done.stdout) == (0, "alive\n")


def test_lines_go_to_standard_error_at_once_and_without_secrets(capfd):
  files.tell("reading gs://b/a.tar?sig=abc ...")
  assert capfd.readouterr() == ("", "reading gs://b/a.tar?sig=*** ...\n")
