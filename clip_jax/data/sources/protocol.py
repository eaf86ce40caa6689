"""What every source of records promises."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from clip_jax.data.storage import Storage
from clip_jax.errors import DataError

# Far over what any text tower reads; what is longer is a web page in the wrong place.
MAX_CAPTION = 1 << 16  # bytes
TOGETHER = 256  # records that are read at a time by who goes through all of them


class Record(NamedTuple):
  """One image with its captions, as it is stored."""

  image: bytes  # encoded
  captions: list[str]  # empty only where there is a label
  key: str  # names the record in messages: shard and member
  label: int | tuple[int, ...] | None = None  # of labelled evaluation sets; several where the options say so
  weights: tuple[float, ...] | None = None  # of the captions, where the options give some
  extra: dict | None = None  # what else is stored with it, by name, where the options ask for it


@dataclasses.dataclass(frozen=True)
class Options:
  """What a source is told beside its path.

  Attributes:
    captions: (name, weight) of the captions to read: members, JSON keys, columns or features. What a format
      calls a caption by itself, if there are none.
    image: name of the column or feature with the image; found by itself if empty.
    extra: give what else is stored with each record: the keys of a tar's `.json`, other columns or features.
    multilabel: in tars, a `.npy` with a number for each class, above 0 for those there are, is the label.
    allow_truncated: use the whole records of a tar shard that is cut off.
    storage: what reads bytes.
    log: called with lines of progress; they go to standard error if it is not given.
  """

  captions: tuple[tuple[str, float], ...] = ()
  image: str = ""
  extra: bool = False
  multilabel: bool = False
  allow_truncated: bool = False
  storage: Storage = dataclasses.field(default_factory=Storage, compare=False)
  log: object = dataclasses.field(default=None, compare=False)


class Source(Protocol):
  """A data set with random access. Safe to read from many threads."""

  fingerprint: str  # another one when the records, or what is read of them, are others

  def __len__(self) -> int:
    """Number of records."""

  def __getitem__(self, index: int) -> Record:
    """The record at an index; raises DataError where it cannot be read."""

  def __iter__(self) -> Iterator[Record]:
    """All records in order; raises DataError at one that cannot be read."""

  def fetch(self, indices: Sequence[int]) -> list[Record | DataError]:
    """The records at some indices, read together; in the place of one that cannot be read, why."""

  def key(self, index: int) -> str:
    """What names the record in messages, also where it cannot be read."""


class RandomAccess:
  """The methods of a `Source` that follow from `fetch` and `__len__`."""

  def __getitem__(self, index):
    """The record at an index.

    Raises:
      DataError: it cannot be read.
      IndexError: there is none.
    """
    (record,) = self.fetch([index])
    if isinstance(record, DataError):
      raise record
    return record

  def __iter__(self):
    """The records in order, read some hundred at a time; raises DataError at one that cannot be read."""
    for start in range(0, len(self), TOGETHER):
      for record in self.fetch(range(start, min(start + TOGETHER, len(self)))):
        if isinstance(record, DataError):
          raise record
        yield record

  def check_index(self, index):
    """Raises IndexError unless there is a record at an index."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index:,} of {len(self):,}")


def captions_of(
  fields: Mapping[str, object],
  wanted: Sequence[tuple[str, float]],
  usual: Sequence[str],
  key: str,
  label: int | None = None,
) -> tuple[list[str], tuple[float, ...] | None]:
  """The captions among a record's fields, and their weights.

  Args:
    fields: texts, or lists of texts, by name; None, empty and blank ones count as missing.
    wanted: (name, weight) of those to take; a list shares its weight evenly.
    usual: without them, the names to look for; the first that is there is taken.
    key: names the record in messages.
    label: its class number; a labelled record needs no caption.

  Returns:
    The captions, and a weight for each if some are wanted.

  Raises:
    DataError: there is none, one is no text, or one is longer than `MAX_CAPTION` bytes.
  """
  captions, weights = [], []
  for name, weight in wanted or [(name, 1.0) for name in usual]:
    texts = fields.get(name)
    texts = [texts] if isinstance(texts, str) or texts is None else texts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str | None) for text in texts):
      raise DataError(f"{key}: {name!r} is neither a text nor a list of texts.")
    texts = [text for text in texts if text and not text.isspace()]
    captions += texts
    weights += [weight / len(texts) for _ in texts]
    if captions and not wanted:
      break
  if not captions and label is not None:
    return [], None
  if not captions:
    raise DataError(f"{key}: none of {', '.join(name for name, _ in wanted) or ', '.join(usual)} holds a caption.")
  longest = max(len(caption.encode("utf-8", "replace")) for caption in captions)
  if longest > MAX_CAPTION:
    raise DataError(f"{key}: a caption of {longest:,} bytes; {MAX_CAPTION:,} is the most.")
  return captions, tuple(weights) if wanted else None
