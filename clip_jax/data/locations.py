"""Where data lies: what paths and URLs may be, and what of them may be shown."""

import hashlib
import os
import re
from pathlib import Path

from clip_jax.errors import DataError, redact


def is_remote(path):
  """Whether a path is in a bucket."""
  return "://" in path


def check(path):
  """Checks that a path is of a kind that can be read.

  Raises:
    DataError: it is a URL of another kind, or holds credentials.
  """
  match = re.match(r"(\w+)://([^/]*)", path)
  # A key may have slashes in it, so that what looks like a bucket ends before the @; and no bucket's name has a colon.
  if match and ("@" in match[2] or ":" in match[2] and "@" in path):
    raise DataError(
      f"{path}: credentials do not belong in a path, which is written to logs; set them in the environment."
    )
  if match and match[1] not in ("gs", "s3"):
    raise DataError(f"{path}: only local paths, gs:// and s3:// can be read.")
  if match and not match[2]:
    raise DataError(f"{path}: the name of the bucket is missing.")


def file_name(path):
  """What a file is called in the names of its records, which are shown and kept; without what signs its URL."""
  return redact(path).rpartition("/")[2]


def expand_braces(pattern):
  """Lists what a pattern with `{00000..00099}` and `{a,b}` stands for."""
  match = re.search(r"\{([^{}]*)\}", pattern)
  if not match:
    return [pattern]
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
  if numbers:
    low, high = sorted(map(int, numbers.groups()))
    choices = [f"{i:0{len(numbers[1])}}" for i in range(low, high + 1)]
  else:
    choices = match[1].split(",")
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [whole for c in choices for whole in expand_braces(before + c + after)]


def cache_folder(name):
  """A folder for what can be made again: in `$CLIP_JAX_CACHE`, or in `~/.cache/clip_jax`."""
  return Path(os.environ.get("CLIP_JAX_CACHE") or "~/.cache/clip_jax").expanduser() / name


def cache_key(*parts):
  """A short name for what depends on strings."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(f"{len(part)}:{part}".encode())
  return digest.hexdigest()[:32]
