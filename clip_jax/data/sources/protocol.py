"""What every source of records promises."""

from typing import NamedTuple, Protocol


class Record(NamedTuple):
  """One image with its captions, as it is stored."""

  image: bytes  # encoded
  captions: list[str]
  key: str  # names the record in messages: shard and member
  label: int | None = None  # of labelled evaluation sets


class Source(Protocol):
  """A data set with random access. Safe to read from many threads."""

  def __len__(self) -> int:
    """Number of records."""

  def __getitem__(self, index: int) -> Record:
    """The record at an index; raises DataError where it cannot be read."""

  def key(self, index: int) -> str:
    """What names the record in messages, also where it cannot be read."""
