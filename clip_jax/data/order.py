"""Which examples make which step: a pure function of the seed, the data-set length and the step.

The stream of a run is position 0, 1, 2, ...: step `s` of a run with global batch `b` is positions
`s * b` to `s * b + b - 1`, whatever the number of hosts. Position `p` belongs to epoch `p // length`, and
each epoch is a permutation of the data set of its own. Nothing of the size of the data set is kept.

The permutation is a Feistel network (Luby & Rackoff 1988) over the next power of two, walked until it
falls inside the data set (Black & Rogaway 2002, "cycle walking"), which is a bijection whatever the round
function is.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import numpy as np

# One constant a round: multiples of 2**64 divided by the golden ratio.
_ROUNDS = tuple(np.uint64(0x9E3779B97F4A7C15 * i % 2**64) for i in range(1, 9))
# A round function that is written down for an epoch is much faster than one that is computed for each
# position, and gives the same. Not where a batch spans many short epochs, or the tables get large.
_FEW_EPOCHS, _TABLE_BITS, _SMALL_BITS = 4, 20, 12
_TOGETHER = 8192  # positions whose intermediate results stay in a core's own cache
# Of a permutation inside a window, which is but the second step of a shuffle (four are Luby & Rackoff's number).
_WINDOW_ROUNDS = 4
_BLOCKS, _WINDOWS, _MIXTURE, _COMPONENT = (np.uint64(i << 56) for i in (0xB1, 0xB2, 0xB3, 0xB4))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """An order for object stores: few large reads instead of one a record (docs/data.md).

  Attributes:
    block: neighbouring records that are read together.
    window: blocks, in a random order, whose records are shuffled together.
    lanes: windows that are open at the same time; each fills its own rows of the batch, so a host
      opens only the windows of its rows.
  """

  block: int = 128
  window: int = 16
  lanes: int = 64


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of a run over one data set, or over a mixture of several.

  Attributes:
    seed: the run's data seed, 0 <= seed < 2**63.
    lengths: number of records of each component, at least 1.
    weights: how many of `sum(weights)` neighbouring positions each component gets, exactly.
    blocks: `Blocks`, or None for one permutation of all records.
    batch: the global batch size, for which lanes are laid out.
  """

  seed: int
  lengths: tuple[int, ...]
  weights: tuple[int, ...] = (1,)
  blocks: Blocks | None = None
  batch: int = 1

  def examples(self, positions):
    """The component and the record of each position of the stream.

    Args:
      positions: int64 [n].

    Returns:
      Two int64 [n]: which component, and which of its records. Each component goes
      through its own epochs.
    """
    positions = np.atleast_1d(np.asarray(positions, np.int64))
    if len(self.lengths) == 1:
      return np.zeros_like(positions), self._of_component(0, positions)
    components, own = mixture(self.seed, self.weights, positions)
    indices = np.empty_like(positions)
    for component in range(len(self.lengths)):
      here = components == component
      indices[here] = self._of_component(component, own[here])
    return components, indices

  def substitute(self, component, index, attempt):
    """The record of a component that takes the place of one that cannot be read."""
    return substitute(self._seed(component), self.lengths[component], index, attempt)

  def _of_component(self, component, positions):
    seed, length = self._seed(component), self.lengths[component]
    if self.blocks is None:
      return examples(seed, length, positions)
    stride = max(self.batch * self.weights[component] // sum(self.weights), 1)
    return examples_in_blocks(seed, length, positions, self.blocks, stride)

  def _seed(self, component):
    if component == 0:
      return self.seed
    return int(_mix(np.uint64(self.seed) ^ _mix(_COMPONENT ^ np.uint64(component))) >> np.uint64(1))


def examples(seed, length, positions):
  """The data-set index of each position of the stream.

  Args:
    seed: the run's data seed, 0 <= seed < 2**63.
    length: number of records in the data set, at least 1.
    positions: int64 array of positions in the stream, any shape.

  Returns:
    int64 array of the same shape with values in [0, length).
  """
  if length < 1:
    raise ValueError(f"a data set of {length} records has no order")
  positions = np.asarray(positions, np.int64)
  return _permuted(seed, length, positions.reshape(-1)).reshape(positions.shape)


def examples_in_blocks(seed, length, positions, blocks, stride):
  """The data-set index of each position of the stream, in an order that reads whole blocks.

  The blocks of an epoch are put in a random order and every `window` of them are shuffled together. The
  rows of a batch are cut into `lanes`, each of which goes through a part of that sequence of its own.

  Args:
    seed: the run's data seed, 0 <= seed < 2**63.
    length: number of records in the data set, at least 1.
    positions: int64 array of positions in the stream, any shape.
    blocks: a `Blocks`.
    stride: positions from a row to the same row of the next step.

  Returns:
    int64 array of the same shape with values in [0, length); each epoch is a permutation.
  """
  if length < 1:
    raise ValueError(f"a data set of {length} records has no order")
  positions = np.asarray(positions, np.int64)
  parts = np.split(positions.reshape(-1), range(_TOGETHER, positions.size, _TOGETHER))
  return np.concatenate([_in_blocks(seed, length, part, blocks, stride) for part in parts]).reshape(positions.shape)


def mixture(seed, weights, positions):
  """Which component of a mixture each position of the stream belongs to.

  Of every `sum(weights)` positions from a multiple of it on, each component gets exactly its weight, in a
  random order.

  Args:
    seed: the run's data seed, 0 <= seed < 2**63.
    weights: a whole number of each component, at least 1.
    positions: int64 array of positions in the stream, any shape.

  Returns:
    Two int64 arrays of the same shape: the component, and the position in the stream of that component.
  """
  ends = np.cumsum(weights)
  periods, slots = np.divmod(np.asarray(positions, np.int64), ends[-1])
  slots = _permute(slots, int(ends[-1]), _epoch_keys(np.uint64(seed) ^ _MIXTURE, periods))
  components = np.searchsorted(ends, slots, side="right")
  return components, periods * np.asarray(weights)[components] + slots - (ends - weights)[components]


def whole_weights(weights):
  """The smallest whole numbers in the same proportions as some decimal numbers.

  Args:
    weights: positive numbers; 0.1 means one tenth, not the nearest binary number.
  """
  exact = [Fraction(str(weight)) for weight in weights]
  total = sum(exact)
  shares = [weight / total for weight in exact]
  denominator = math.lcm(*(share.denominator for share in shares))
  return tuple(int(share * denominator) for share in shares)


def positions_of_step(step, batch, rows=None):
  """Positions of the stream that make a step.

  Args:
    step: the global step, from 0.
    batch: the global batch size.
    rows: which rows of the batch, an int array; all of them if not given.

  Returns:
    int64 array of positions.
  """
  rows = np.arange(batch) if rows is None else np.asarray(rows)
  return int(step) * int(batch) + rows.astype(np.int64)


def substitute(seed, length, index, attempt):
  """The record that takes the place of one that cannot be read, the same on every host.

  Args:
    seed: the run's data seed.
    length: number of records in the data set.
    index: the record that cannot be read.
    attempt: 1 for the first substitute, 2 if that cannot be read either, and so on.

  Returns:
    An index in [0, length).
  """
  key = _mix(np.uint64(seed) ^ _mix(np.uint64(index) ^ _mix(np.uint64(attempt))))
  return int(key % np.uint64(length))


def _in_blocks(seed, length, positions, blocks, stride):
  epochs, places = np.divmod(positions, length)
  places = _lanes(places, length, blocks.lanes, max(stride // blocks.lanes, 1))
  span = blocks.block * blocks.window
  windows, inside = np.divmod(places, span)
  keys = _mix(_epoch_keys(np.uint64(seed) ^ _WINDOWS, epochs) ^ _mix(windows.astype(np.uint64)))
  last = length // span  # the last window may be shorter
  for here, size in ((windows < last, span), (windows == last, length % span)):
    if here.any():
      inside[here] = _permute(inside[here], size, keys[here], _WINDOW_ROUNDS)
  slots, rows = np.divmod(windows * span + inside, blocks.block)
  whole = length // blocks.block  # what is left over stays at the end
  here = slots < whole
  slots[here] = _permuted(int(np.uint64(seed) ^ _BLOCKS), whole, epochs[here] * whole + slots[here])
  return slots * blocks.block + rows


def _lanes(places, length, lanes, rows):
  # Row by row of a lane to one lane after the other; what does not fill all lanes stays at the end.
  share = length // (lanes * rows) * rows  # records of each lane
  groups = places // rows
  rounds = groups // lanes
  lane = groups - rounds * lanes
  return np.where(places < share * lanes, lane * share + (rounds - groups) * rows + places, places)


def _epoch_keys(seed, epochs):
  return _mix(seed ^ _mix(epochs.astype(np.uint64)))


def _permuted(seed, length, positions):
  # The stream of the permutations of one epoch after the other, at some positions: int64 [n].
  first, last = (int(positions.min()) // length, int(positions.max()) // length) if positions.size else (0, -1)
  if last - first >= _FEW_EPOCHS or _half_bits(length)[1] > _TABLE_BITS:
    epochs, places = np.divmod(positions, length)
    return _permute(places, length, _epoch_keys(np.uint64(seed), epochs))
  result = np.empty_like(positions)
  for epoch in range(first, last + 1):
    places = positions - epoch * length
    here = ... if first == last else (places >= 0) & (places < length)
    result[here] = _permute_by_tables(places[here], length, _tables(seed, epoch, length))
  return result


def _half_bits(length):
  bits = max(int(length - 1).bit_length(), 2)
  return bits // 2, bits - bits // 2


@functools.lru_cache(maxsize=32)  # of some epochs and components; 1 MB each for billions of records
def _tables(seed, epoch, length):
  low_bits, high_bits = _half_bits(length)
  key = _epoch_keys(np.uint64(seed), np.array(epoch))
  tables = []
  for i, constant in enumerate(_ROUNDS):
    bits, out = (low_bits, high_bits) if i % 2 else (high_bits, low_bits)
    values = _mix(np.arange(1 << bits, dtype=np.uint64))
    kind = np.uint16 if high_bits <= 16 else np.uint32
    tables.append((_mix(key ^ constant ^ values) & np.uint64((1 << out) - 1)).astype(kind))
  return tables


def _permute_by_tables(values, length, tables):
  low_bits, _ = _half_bits(length)
  kind = tables[0].dtype
  high, low = (values >> low_bits).astype(kind), (values & ((1 << low_bits) - 1)).astype(kind)
  for i, table in enumerate(tables):
    if i % 2:
      high ^= table.take(low)
    else:
      low ^= table.take(high)
  result = high.astype(np.int64) << low_bits | low
  outside = result >= length
  if outside.any():
    result[outside] = _permute_by_tables(result[outside], length, tables)
  return result


def _permute(values, length, keys, rounds=8):
  low_bits, high_bits = (np.uint64(bits) for bits in _half_bits(length))
  low_mask, high_mask = (np.uint64((1 << int(bits)) - 1) for bits in (low_bits, high_bits))
  mixed = _small_mixed().take if high_bits <= _SMALL_BITS else _mix
  values, keys = np.broadcast_arrays(np.asarray(values).astype(np.uint64), keys)
  result = np.empty(values.shape, np.uint64)
  pending = np.ones(values.shape, bool)
  current = values.copy()
  while pending.any():
    high, low, key = current[pending] >> low_bits, current[pending] & low_mask, keys[pending]
    for i, constant in enumerate(_ROUNDS[:rounds]):
      if i % 2:
        high ^= _mix(key ^ constant ^ mixed(low)) & high_mask
      else:
        low ^= _mix(key ^ constant ^ mixed(high)) & low_mask
    current[pending] = high << low_bits | low
    done = pending & (current < length)
    result[done] = current[done]
    pending &= ~done
  return result.astype(np.int64)


@functools.cache
def _small_mixed():
  return _mix(np.arange(1 << _SMALL_BITS, dtype=np.uint64))


def _mix(value):
  # The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit.
  # In place, for most of the time would go into new arrays.
  with np.errstate(over="ignore"):
    first = value >> np.uint64(30)
    first ^= value
    first *= np.uint64(0xBF58476D1CE4E5B9)
    second = first >> np.uint64(27)
    second ^= first
    second *= np.uint64(0x94D049BB133111EB)
    return second ^ second >> np.uint64(31)
