"""Writing files so that a reader, or a crash, never sees half of one."""

import os
from pathlib import Path


def write_text(path, text):
  """Writes a text file whole or not at all.

  Args:
    path: the file; an older one is replaced.
    text: its content.
  """
  path = Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with temporary.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
