"""The order of the examples: a permutation an epoch, the same for everybody, for ever.

The yardstick is `Reference`, the Feistel network of the module's docstring in plain Python
integers, one value at a time, with nothing of NumPy's in it.
"""

import collections
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax.data import order

WORD = 2**64
HUGE = 2_000_000_000


class Reference:
  """Luby & Rackoff's network over the next power of two, walked until it falls inside."""

  def __init__(self, seed, length):
    self.seed, self.length = seed, length
    bits = max(math.ceil(math.log2(length)), 2)
    self.low, self.high = 2 ** (bits // 2), 2 ** (bits - bits // 2)

  def example(self, position):
    epoch, value = divmod(position, self.length)
    key = self.mix(self.seed ^ self.mix(epoch))
    value = self.encrypt(value, key)
    while value >= self.length:
      value = self.encrypt(value, key)
    return value

  def encrypt(self, value, key):
    high, low = divmod(value, self.low)
    for i in range(8):
      constant = 0x9E3779B97F4A7C15 * (i + 1) % WORD
      if i % 2:
        high ^= self.mix(key ^ constant ^ self.mix(low)) % self.high
      else:
        low ^= self.mix(key ^ constant ^ self.mix(high)) % self.low
    return high * self.low + low

  def substitute(self, index, attempt):
    return self.mix(self.seed ^ self.mix(index ^ self.mix(attempt))) % self.length

  @staticmethod
  def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def epoch_of(seed, length, epoch=0):
  return order.examples(seed, length, np.arange(length, dtype=np.int64) + epoch * length)


seeds = st.integers(0, 2**63 - 1)
# Around powers of two the network's domain is exactly, or hardly, larger than the data set.
lengths = st.integers(1, 5000) | st.integers(1, 12).flatmap(
  lambda k: st.sampled_from([max(2**k - 1, 1), 2**k, 2**k + 1])
)


@settings(max_examples=150, deadline=None)
@given(seed=seeds, length=lengths, epoch=st.integers(0, 2**20))
@example(seed=0, length=1, epoch=0)
@example(seed=2**63 - 1, length=2, epoch=1)
@example(seed=7, length=3, epoch=2)
@example(seed=7, length=4, epoch=2)
@example(seed=7, length=5, epoch=2)
def test_every_epoch_is_a_permutation(seed, length, epoch):
  got = epoch_of(seed, length, epoch)
  assert got.dtype == np.int64
  assert sorted(got.tolist()) == list(range(length))


@settings(max_examples=200, deadline=None)
@given(
  seed=seeds,
  length=lengths | st.integers(1, 2**40),
  positions=st.lists(st.integers(0, 2**50), min_size=1, max_size=8),
)
@example(seed=0, length=1, positions=[0, 1, 2**50])
@example(seed=2**63 - 1, length=2**40, positions=[2**50, 2**40, 2**40 - 1])
def test_equals_the_network_in_plain_integers(seed, length, positions):
  want = [Reference(seed, length).example(p) for p in positions]
  assert order.examples(seed, length, np.array(positions)).tolist() == want


def test_golden_values():
  # The order is a contract: a run that resumes under a later version must go on where it stopped,
  # so these numbers may not change, ever. Both ways of computing them are held to it.
  golden = {
    (0, 10): [9, 0, 6, 1, 8, 7, 8, 0, 5, 9, 8, 0],
    (42, 1_000): [274, 389, 600, 545, 438, 443, 677, 680, 82, 801, 794, 736],
    (2**63 - 1, HUGE): [
      239499888,
      1924861649,
      1502358256,
      1939576614,
      568319470,
      428970742,
      372133729,
      594074044,
      1232118885,
      1961242363,
      25992623,
      370674845,
    ],
  }
  for (seed, length), want in golden.items():
    # Six from the start, and six over the end of the third epoch.
    positions = [*range(6), *range(3 * length - 3, 3 * length + 3)]
    assert order.examples(seed, length, positions).tolist() == want
    assert [Reference(seed, length).example(p) for p in positions] == want


def test_golden_substitutes():
  # For the same reason as above.
  golden = [4, 0, 433, 871528088]
  cases = [(0, 10, 3, 1), (0, 10, 3, 2), (42, 1_000, 999, 1), (2**63 - 1, HUGE, 123_456_789, 100)]
  assert [order.substitute(*case) for case in cases] == golden
  assert [Reference(s, n).substitute(i, a) for s, n, i, a in cases] == golden


def test_epochs_and_seeds_differ():
  orders = {
    (seed, epoch): tuple(epoch_of(seed, 50, epoch).tolist())
    for seed in range(20)
    for epoch in range(20)
  }
  assert len(set(orders.values())) == len(orders)


@settings(max_examples=60, deadline=None)
@given(
  seed=seeds,
  length=st.integers(1, 300),
  batch=st.sampled_from([64, 192, 576]),
  step=st.integers(0, 10_000),
  hosts=st.sampled_from([1, 2, 3, 64]),
)
def test_any_split_over_hosts_gives_the_same_global_batch(seed, length, batch, step, hosts):
  parts = np.array_split(np.arange(batch), hosts)
  got = np.concatenate(
    [order.examples(seed, length, order.positions_of_step(step, batch, rows)) for rows in parts]
  )
  want = [Reference(seed, length).example(p) for p in range(step * batch, (step + 1) * batch)]
  assert got.tolist() == want
  assert order.examples(seed, length, order.positions_of_step(step, batch)).tolist() == want


@settings(max_examples=50, deadline=None)
@given(seed=seeds, length=st.integers(1, 100), data=st.data())
def test_depends_on_nothing_but_the_position(seed, length, data):
  """One by one, in any order and shape, and among others: an example stays where it is."""
  stream = order.examples(seed, length, np.arange(400))
  chosen = data.draw(st.lists(st.integers(0, 399), min_size=1, max_size=24))
  assert order.examples(seed, length, np.array(chosen)).tolist() == stream[chosen].tolist()
  assert [int(order.examples(seed, length, p)) for p in chosen] == stream[chosen].tolist()
  square = np.array(chosen[: len(chosen) // 2 * 2], np.int64).reshape(2, -1)
  got = order.examples(seed, length, square)
  assert got.shape == square.shape
  np.testing.assert_array_equal(got, stream[square])


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_batches_that_cross_the_end_of_an_epoch(length):
  """Batches of 64 over sets that do not divide it: each epoch of the stream is still whole."""
  stream = np.concatenate(
    [order.examples(5, length, order.positions_of_step(step, 64)) for step in range(2 * length)]
  )
  assert len(stream) == 128 * length
  for epoch in stream.reshape(128, length):
    assert sorted(epoch.tolist()) == list(range(length))


def test_no_positions_give_no_examples():
  assert order.examples(0, 10, np.array([], np.int64)).shape == (0,)


@pytest.mark.parametrize("length", [0, -1])
def test_an_empty_data_set_has_no_order(length):
  with pytest.raises(ValueError, match=f"a data set of {length} records"):
    order.examples(0, length, np.arange(3))


def test_positions_do_not_overflow():
  """Step 400,000 of a batch of 32,768 is past 2**31, and a step may come as int32 from a device."""
  want = [400_000 * 32_768 + row for row in (0, 32_767)]
  for kind in (int, np.int32, np.int64):
    got = order.positions_of_step(kind(400_000), 32_768, np.array([0, 32_767], np.int32))
    assert got.tolist() == want
    assert got.dtype == np.int64


def test_two_thousand_million_records_take_no_memory():
  positions = np.arange(HUGE - 50_000, HUGE + 50_000)  # both sides of the end of the first epoch
  order.examples(1, HUGE, positions[:10])
  tracemalloc.start()
  try:
    got = order.examples(1, HUGE, positions)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 100 * positions.nbytes  # 80 MB; one byte a record would be 2,000 MB
  first, second = got[:50_000], got[50_000:]
  for half in (first, second):
    assert half.min() >= 0
    assert half.max() < HUGE
    assert len(np.unique(half)) == len(half)
  # Both halves are spread evenly: 20 buckets, 19 degrees of freedom, p = 1e-6 is at 64.
  for half in (first, second):
    counts = np.bincount(half * 20 // HUGE, minlength=20)
    assert np.sum((counts - 2_500) ** 2 / 2_500) < 64


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
def test_small_sets_see_every_order_equally_often(length):
  """3,000 permutations of a handful of records: each order there is, as often as the others."""
  count = 3_000
  stream = order.examples(11, length, np.arange(count * length)).reshape(count, length)
  seen = collections.Counter(map(tuple, stream.tolist()))
  orders = math.factorial(length)
  expected = count / orders
  chi_square = sum((seen[o] - expected) ** 2 / expected for o in seen)
  chi_square += (orders - len(seen)) * expected
  # Wilson & Hilferty 1931: the cube root of chi square is nearly normal. Five sigma.
  freedom = orders - 1
  limit = freedom * (1 - 2 / (9 * freedom) + 5 * math.sqrt(2 / (9 * freedom))) ** 3
  assert chi_square < limit


@pytest.mark.parametrize("position", [0, 1, 4_999])
def test_each_place_holds_any_record_over_seeds_and_over_epochs(position):
  length, draws, buckets = 5_000, 4_000, 25
  over_seeds = [int(order.examples(seed, length, position)) for seed in range(draws)]
  over_epochs = order.examples(3, length, position + length * np.arange(draws))
  for got in (over_seeds, over_epochs):
    counts = np.bincount(np.array(got) * buckets // length, minlength=buckets)
    expected = draws / buckets
    # 24 degrees of freedom: p = 1e-6 is at 73.
    assert np.sum((counts - expected) ** 2 / expected) < 73


def test_no_trace_of_the_stored_order():
  """Shards are often sorted by source: neighbours in the stream must not be neighbours on disk."""
  length = 100_000
  for epoch in range(3):
    got = epoch_of(9, length, epoch)
    place = np.arange(length)
    # Of a random permutation these are normal with a deviation of 1 / sqrt(length) = 0.0032.
    assert abs(np.corrcoef(place, got)[0, 1]) < 0.016
    assert abs(np.corrcoef(got[:-1], got[1:])[0, 1]) < 0.016
    # Of 99,999 pairs of neighbours about two are neighbours on disk, whichever comes first.
    assert np.sum(np.abs(np.diff(got)) == 1) < 20
    # Records within 100 of each other, in batches of 1,000: as many as by chance, 2 * 99 / 100,000.
    close = np.mean(np.abs(np.diff(got)) < 100)
    assert close == pytest.approx(2 * 99 / length, rel=0.5)
    # And one epoch says nothing of the next.
    assert abs(np.corrcoef(got, epoch_of(9, length, epoch + 1))[0, 1]) < 0.016


@given(
  seed=seeds, length=st.integers(1, 2**40), index=st.integers(0, 2**40), attempt=st.integers(1, 100)
)
def test_substitutes_equal_plain_integers_and_lie_in_the_set(seed, length, index, attempt):
  got = order.substitute(seed, length, index % length, attempt)
  assert type(got) is int
  assert 0 <= got < length
  assert got == Reference(seed, length).substitute(index % length, attempt)
  assert got == order.substitute(seed, length, np.int64(index % length), attempt)


def test_substitutes_vary_with_attempt_record_and_seed():
  base = {order.substitute(0, HUGE, 5, attempt) for attempt in range(1, 101)}
  assert len(base) == 100
  assert len({order.substitute(0, HUGE, index, 1) for index in range(100)}) == 100
  assert len({order.substitute(seed, HUGE, 5, 1) for seed in range(100)}) == 100


# In blocks.

some_blocks = st.builds(order.Blocks, block=st.integers(1, 9), window=st.integers(1, 6), lanes=st.integers(1, 9))


@settings(max_examples=200, deadline=None)
@given(seed=seeds, length=st.integers(1, 700), blocks=some_blocks, stride=st.integers(1, 80), epoch=st.integers(0, 5))
def test_blocks_each_epoch_is_a_permutation(seed, length, blocks, stride, epoch):
  positions = np.arange(epoch * length, (epoch + 1) * length)
  got = order.examples_in_blocks(seed, length, positions, blocks, stride)
  assert sorted(got.tolist()) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, length=st.integers(1, 300), blocks=some_blocks, data=st.data())
def test_blocks_depend_on_nothing_but_the_position(seed, length, blocks, data):
  stream = order.examples_in_blocks(seed, length, np.arange(900), blocks, 16)
  chosen = data.draw(st.lists(st.integers(0, 899), min_size=1, max_size=20))
  assert order.examples_in_blocks(seed, length, np.array(chosen), blocks, 16).tolist() == stream[chosen].tolist()
  assert int(order.examples_in_blocks(seed, length, chosen[0], blocks, 16)) == stream[chosen[0]]


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_host_has_few_blocks_open_and_reads_each_once(hosts):
  """What the order is for: a host's rows come from its own lanes, and a block is used up within a window."""
  length, batch, blocks = 64 * 1000, 64, order.Blocks(block=50, window=4, lanes=8)
  steps = length // batch
  stream = order.examples_in_blocks(1, length, np.arange(steps * batch), blocks, batch).reshape(steps, batch)
  for rows in np.split(np.arange(batch), hosts):
    mine = stream[:, rows] // blocks.block  # [steps, rows]
    first, last = {}, {}
    for step, row in enumerate(mine):
      for block in row.tolist():
        first.setdefault(block, step)
        last[block] = step
    # A lane uses 8 records a step and has 200 in a window, and windows do not begin where lanes do.
    assert max(last[block] - first[block] for block in first) <= 200 // 8
    open_at = [sum(first[b] <= step <= last[b] for b in first) for step in range(0, steps, 37)]
    assert max(open_at) <= 2 * blocks.window * blocks.lanes / hosts
    # Lanes meet in a block or window at their ends only.
    assert len(first) <= length / blocks.block / hosts + 2 * blocks.window * blocks.lanes / hosts


def test_blocks_differ_between_epochs_and_seeds_and_are_in_no_order():
  blocks = order.Blocks(16, 4, 4)
  first, second = (order.examples_in_blocks(0, 4096, np.arange(4096) + e * 4096, blocks, 64) for e in (0, 1))
  other = order.examples_in_blocks(1, 4096, np.arange(4096), blocks, 64)
  for a, b in ((first, second), (first, other)):
    assert (a == b).mean() < 0.01
  assert abs(np.corrcoef(first, np.arange(4096))[0, 1]) < 0.1
  assert (np.diff(first) == 1).mean() < 0.05


# Mixtures.

some_weights = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(tuple)


@settings(max_examples=200, deadline=None)
@given(seed=seeds, weights=some_weights, period=st.integers(0, 1000))
def test_every_period_of_a_mixture_has_exactly_its_weights(seed, weights, period):
  total = sum(weights)
  components, own = order.mixture(seed, weights, np.arange(period * total, (period + 1) * total))
  assert np.bincount(components, minlength=len(weights)).tolist() == list(weights)
  for component, weight in enumerate(weights):
    # And its own stream goes on where the last period ended.
    assert sorted(own[components == component].tolist()) == list(range(period * weight, (period + 1) * weight))


@settings(max_examples=50, deadline=None)
@given(
  seed=seeds,
  lengths=st.lists(st.integers(1, 60), min_size=2, max_size=3).map(tuple),
  blocks=st.none() | some_blocks,
  data=st.data(),
)
def test_each_component_goes_through_its_own_epochs(seed, lengths, blocks, data):
  weights = data.draw(st.tuples(*(st.integers(1, 7) for _ in lengths)))
  found = order.Order(seed, lengths, weights, blocks, batch=16)
  components, indices = found.examples(np.arange(sum(weights) * 60))
  for component, length in enumerate(lengths):
    stream = indices[components == component]
    assert len(stream) == 60 * weights[component]
    # A period mixes the positions of a component, so its epochs are whole at the ends of periods.
    counts = np.bincount(stream, minlength=length)
    assert counts.max() - counts.min() <= 1


def test_a_component_is_ordered_by_itself_and_the_first_as_without_others():
  one = order.Order(5, (100,), (1,))
  several = order.Order(5, (100, 100, 70), (2, 1, 1))
  components, indices = several.examples(np.arange(400))
  _, own = order.mixture(5, (2, 1, 1), np.arange(400))
  first = components == 0
  np.testing.assert_array_equal(indices[first], one.examples(own[first])[1])
  streams = [indices[components == c][np.argsort(own[components == c])] for c in range(2)]
  assert (streams[0][:100] == streams[1][:100]).mean() < 0.1
  assert several.substitute(0, 3, 1) == order.substitute(5, 100, 3, 1)
  assert {several.substitute(2, i, 1) for i in range(500)} == set(range(70))


@pytest.mark.parametrize(
  ("weights", "whole"),
  [((0.7, 0.3), (7, 3)), ((1.0, 2.0, 1.0), (1, 2, 1)), ((0.1, 0.05), (2, 1)), ((3.0,), (1,)), ((1e-3, 0.999), (1, 999))],
)
def test_weights_are_the_decimal_numbers_that_were_written(weights, whole):
  assert order.whole_weights(weights) == whole


def test_tables_and_formula_are_one_permutation():
  """Of two thousand million records the round functions are tables; over many epochs they are computed."""
  positions = np.array([0, 1, HUGE - 1, HUGE, 5 * HUGE + 3])
  apart = np.concatenate([order.examples(3, HUGE, positions[i : i + 1]) for i in range(5)])
  assert order.examples(3, HUGE, positions).tolist() == apart.tolist()
