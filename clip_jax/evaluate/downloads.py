"""Data sets of web servers, such as CLIP_benchmark's on the Hugging Face hub, copied into the cache folder.

Only its webdataset layout says by itself which files there are.
"""

import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from clip_jax.data.locations import cache_folder, cache_key
from clip_jax.errors import DataError, StorageError, redact
from clip_jax.files import tell

OPTIONAL = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
SECONDS = 60  # without an answer
ATTEMPTS = 4


def is_web(path):
  """Whether a path is a URL of a web server."""
  return path.startswith(("http://", "https://"))


def fetch(url, split):
  """Copies a split of a data set, unless it is there already.

  Args:
    url: of the folder; of the Hugging Face hub as the address of its page, `https://huggingface.co/datasets/ORG/NAME/tree/main`.
    split: "test" or "train".

  Returns:
    The local folder, or None if there is no such data set.

  Raises:
    DataError: nshards.txt holds no number.
    StorageError: the server does not answer.
  """
  base = address(url)
  folder = cache_folder("evaluation") / cache_key(base)
  if not _get(f"{base}/{split}/nshards.txt", folder / split / "nshards.txt"):
    return None
  text = (folder / split / "nshards.txt").read_text().strip()
  if not text.isdecimal():
    (folder / split / "nshards.txt").unlink()
    raise DataError(f"{redact(base)}/{split}/nshards.txt holds {text[:20]!r} instead of a number.")
  for name in OPTIONAL:
    _get(f"{base}/{name}", folder / name)
  for number in range(int(text)):
    if not _get(f"{base}/{split}/{number}.tar", folder / split / f"{number}.tar", f"{redact(base)}/{split}: {number + 1} of {text} shards"):
      raise DataError(f"{redact(base)}/{split}/{number}.tar is not there, though nshards.txt tells of {text}.")
  return str(folder)


def address(url):
  """Where files of a folder are, of the Hugging Face hub by the address of its page."""
  page = re.fullmatch(r"(https://huggingface\.co/datasets/[^/]+/[^/]+)(?:/(?:tree|resolve|raw)/([^/]+))?/?", url)
  return f"{page[1]}/resolve/{page[2] or 'main'}" if page else url.rstrip("/")


def _get(url, path, said=None):
  # Whether there is such a file; it is whole or not there.
  if path.exists():
    return True
  path.parent.mkdir(parents=True, exist_ok=True)
  if said:
    tell(said)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  for attempt in range(ATTEMPTS):
    time.sleep(attempt)
    try:
      with urllib.request.urlopen(url, timeout=SECONDS) as answer, temporary.open("wb") as file:
        shutil.copyfileobj(answer, file)
        length = answer.headers.get("Content-Length")
        if length is not None and file.tell() != int(length):
          raise ConnectionError(f"{file.tell():,} of {int(length):,} bytes came")
      temporary.replace(path)
      return True
    except urllib.error.HTTPError as error:
      if error.code in (404, 410) or (error.code in (401, 403) and path.name in OPTIONAL):
        return False
      reason = f"HTTP {error.code}"
      if error.code < 500 and error.code != 429:
        break
    except (urllib.error.URLError, OSError) as error:
      reason = str(getattr(error, "reason", error))
    finally:
      Path(temporary).unlink(missing_ok=True)
  raise StorageError(f"{redact(url)} cannot be read ({reason}).")
