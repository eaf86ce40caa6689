"""Where records come from: random access by index, one file a format."""

from clip_jax.data import emoji
from clip_jax.data.sources.protocol import Record, Source
from clip_jax.data.sources.tar import TarSource
from clip_jax.errors import DataError

__all__ = ["Record", "Source", "create"]


def create(name, path, *, allow_truncated=False):
  """Opens a source.

  Args:
    name: "tar", or "emoji", whose path is a glob inside the folder it writes on first use.
    path: a glob of shards; {a..b} and {a,b} are expanded.
    allow_truncated: use the whole records of a shard that is cut off.

  Returns:
    A `Source`.

  Raises:
    DataError: no shard, an unreadable shard, or shards without a single record.
  """
  if name == "emoji":
    path = str(emoji.prepare() / path)
  elif not path:
    raise DataError("config.data.path is empty; give a glob of shards, such as 'shards/*.tar'.")
  return TarSource(path, allow_truncated=allow_truncated)
