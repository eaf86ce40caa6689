"""What a run trains on: one source or a mixture of several, in the run's order."""

import hashlib

from clip_jax.data import order, sources
from clip_jax.data.sources.block_cache import BlockCache
from clip_jax.data.sources.selection import Filters, Selection
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError

NAMED = 64  # records of a component, spread evenly, whose names tell it from another


def create(config, log=None):
  """Opens what a config trains on.

  Args:
    config: a resolved `Config`.
    log: called with lines of progress; standard error if not given.

  Returns:
    A `Dataset`.

  Raises:
    DataError: a source cannot be opened, or has no record that passes the filters.
  """
  data = config.data
  options = sources.Options(
    captions=data.captions, image=data.image, allow_truncated=data.allow_truncated,
    storage=Storage(data.read_deadline), log=log,
  )  # fmt: skip
  filters = Filters(data.min_size, data.max_aspect, data.min_caption, data.max_caption)
  opened = {path: sources.create(data.source, path, options) for path, _ in data.mixture or ((data.path, 1.0),)}
  return Dataset({path: Selection(one, filters, log) if filters else one for path, one in opened.items()}, config)


class Dataset:
  """The components of a run's data in the run's order. Safe to read from many threads.

  Attributes:
    lengths: number of records of each component.
    order: the `order.Order`.
  """

  def __init__(self, parts, config):
    """Puts components in order.

    Args:
      parts: a `Source` by its path, one or as many as `config.data.mixture` has.
      config: a resolved `Config`.
    """
    data = config.data
    self._paths, self._parts = list(parts), list(parts.values())
    self.lengths = tuple(map(len, self._parts))
    self._ordered, blocks = self._parts, None
    if data.order == "blocks":
      blocks = order.Blocks(data.block, data.window, data.lanes)
      limit = int(data.block_cache * 2**30) // len(self._parts)
      self._ordered = [BlockCache(part, data.block, limit) for part in self._parts]
    weights = order.whole_weights([weight for _, weight in data.mixture]) if data.mixture else (1,)
    self.order = order.Order(data.seed, self.lengths, weights, blocks, config.train.global_batch_size)

  def __len__(self):
    return sum(self.lengths)

  def __getitem__(self, index):
    """A record of all components, one component after the other, read by itself.

    Raises:
      DataError: it cannot be read.
      IndexError: there is none.
    """
    for part in self._parts:
      if index < len(part):
        return part[index]
      index -= len(part)
    raise IndexError(f"{index:,} records past the last")

  def at(self, positions):
    """The records at positions of the stream.

    Args:
      positions: int64 [n].

    Returns:
      A list of (place, record): the place is what `read`, `key` and `substitute` take; the record a `Record`, or the
      `DataError` that says why it cannot be read.
    """
    components, indices = self.order.examples(positions)
    places = list(zip(components.tolist(), indices.tolist(), strict=True))
    found = {}
    for component in set(components.tolist()):
      wanted = [place for place in places if place[0] == component]
      found[component] = iter(self._ordered[component].fetch([index for _, index in wanted]))
    return [(place, next(found[place[0]])) for place in places]

  def read(self, place):
    """The `Record` at a place, or the `DataError` that says why it cannot be read."""
    component, index = place
    try:
      return self._parts[component][index]
    except DataError as error:
      return error

  def key(self, place):
    """What names the record at a place in messages."""
    component, index = place
    return self._parts[component].key(index)

  def substitute(self, place, attempt):
    """The place of the same component whose record is taken instead, the same on every host."""
    component, index = place
    return component, self.order.substitute(component, index, attempt)

  def digest(self):
    """A digest of what some records of each component are called, the same wherever they lie."""
    found = hashlib.sha256()
    for part in self._parts:
      for index in sorted({i * (len(part) - 1) // max(NAMED - 1, 1) for i in range(NAMED)}):
        found.update(f"{index} {part.key(index)}\n".encode())
    return found.hexdigest()[:16]

  def describe(self, place):
    """A place as it stands in `bad_records.jsonl`; of a mixture with the path of the component."""
    component, index = place
    return {"index": index} | ({"source": self._paths[component]} if len(self._parts) > 1 else {})
