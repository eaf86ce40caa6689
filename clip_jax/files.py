"""Writing files so that a reader, or a crash, never sees half of one; and lines for people, which must not end a run."""

import contextlib
import glob
import json
import os
import shutil
import sys
from pathlib import Path

from clip_jax.errors import DataError, UsageError, redact


def tell(text):
  """Prints a line for people, who may wait: to standard error, as standard output is for results.

  Standard error may be a file on a disk that is full, or a pipe that nobody reads any more. No line is worth a run, so
  it is lost then. What signs the URLs in it is taken out.

  Args:
    text: without the newline at its end.
  """
  with contextlib.suppress(OSError):
    print(redact(text), file=sys.stderr, flush=True)


def write_text(path, text):
  """Writes a text file whole or not at all.

  Args:
    path: the file; an older one is replaced.
    text: its content.
  """
  write_bytes(path, text.encode())


def write_bytes(path, content):
  """Writes a file whole or not at all.

  Args:
    path: the file; an older one is replaced.
    content: of it.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path, content):
  """Writes a JSON file that people read, too, whole or not at all."""
  write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path):
  """The object in a JSON file.

  Raises:
    DataError: the file is missing, or holds none.
  """
  try:
    content = json.loads(Path(path).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise DataError(f"{path} is missing.") from error
  except (OSError, ValueError) as error:
    raise DataError(f"{path} cannot be read as JSON ({error}).") from error
  if not isinstance(content, dict):
    raise DataError(f"{path} holds no JSON object.")
  return content


@contextlib.contextmanager
def new(path):
  """A path to write a new file or folder at, which gets its name once it is whole.

  Args:
    path: where it shall be; its parent folder is made if it is missing.

  Yields:
    A path beside it where nothing is. What is left there by an error, or by Ctrl-C, is removed.

  Raises:
    UsageError: there is something at `path` already, or nothing can be written beside it.
  """
  path = Path(path)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise UsageError(f"{path} exists already; remove it, or choose another name.")
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # without a dot in front, which Orbax's globs pass over
  parents = [parent for parent in path.absolute().parents if not parent.exists()]  # the innermost first
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
  except OSError as error:
    raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error
  finally:
    for leftover in path.parent.glob(f"{glob.escape(temporary.name)}*"):  # Orbax adds endings of its own
      shutil.rmtree(leftover, ignore_errors=True)
      leftover.unlink(missing_ok=True)
    for parent in parents:
      with contextlib.suppress(OSError):  # it is not empty, as after all that went well
        parent.rmdir()
