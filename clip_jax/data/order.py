"""Which examples make which step: a pure function of the seed, the data-set length and the step.

The stream of a run is position 0, 1, 2, ...: step `s` of a run with global batch `b` is positions
`s * b` to `s * b + b - 1`, whatever the number of hosts. Position `p` belongs to epoch `p // length`, and
each epoch is a permutation of the data set of its own. Nothing of the size of the data set is kept.

The permutation is a Feistel network (Luby & Rackoff 1988) over the next power of two, walked until it
falls inside the data set (Black & Rogaway 2002, "cycle walking"), which is a bijection whatever the round
function is.
"""

import numpy as np

# One constant a round: multiples of 2**64 divided by the golden ratio.
_ROUNDS = tuple(np.uint64(0x9E3779B97F4A7C15 * i % 2**64) for i in range(1, 9))


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
  epochs = (positions // length).astype(np.uint64)
  return _permute((positions % length).astype(np.uint64), length, _mix(np.uint64(seed) ^ _mix(epochs)))


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


def _permute(values, length, keys):
  bits = max(int(length - 1).bit_length(), 2)
  low_bits = np.uint64(bits // 2)
  low_mask = np.uint64((1 << (bits // 2)) - 1)
  high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
  values, keys = np.broadcast_arrays(values, keys)
  result = np.empty(values.shape, np.uint64)
  pending = np.ones(values.shape, bool)
  current = values.copy()
  while pending.any():
    high, low, key = current[pending] >> low_bits, current[pending] & low_mask, keys[pending]
    for i, constant in enumerate(_ROUNDS):
      if i % 2:
        high ^= _mix(key ^ constant ^ _mix(low)) & high_mask
      else:
        low ^= _mix(key ^ constant ^ _mix(high)) & low_mask
    current[pending] = high << low_bits | low
    done = pending & (current < length)
    result[done] = current[done]
    pending &= ~done
  return result.astype(np.int64)


def _mix(value):
  # The finaliser of SplitMix64 (Steele et al. 2014): every input bit reaches every output bit.
  with np.errstate(over="ignore"):
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
