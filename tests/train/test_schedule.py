"""Learning rates: the formulas in plain Python, and what holds for all of them."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax import config as configs
from clip_jax.train import schedule as schedules
from tests.conftest import tiny

ENDING, ENDLESS = ("cosine", "linear"), ("rsqrt", "constant")


def rates(steps, **optimizer):
  """The rates of a whole run, and the one after it."""
  resolved = configs.resolve(tiny(optimizer=optimizer, train={"steps": steps})).optimizer
  return np.asarray(schedules.create(resolved, steps)(jnp.arange(steps + 1)), np.float64)


def formula(step, steps, schedule, learning_rate, warmup_steps, cooldown_steps=0, timescale=10_000, end_learning_rate=0.0):
  if cooldown_steps and step > steps - cooldown_steps:
    begin = steps - cooldown_steps
    start = formula(begin, steps, schedule, learning_rate, warmup_steps, 0, timescale)
    return start + (end_learning_rate - start) * (step - begin) / cooldown_steps
  if step < warmup_steps:
    return learning_rate * (step + 1) / warmup_steps
  if schedule == "constant":
    return learning_rate
  if schedule == "rsqrt":
    return learning_rate * math.sqrt(timescale / (timescale + step - warmup_steps))
  done = (step - warmup_steps) / (steps - warmup_steps)
  left = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
  return end_learning_rate + (learning_rate - end_learning_rate) * left


@pytest.mark.parametrize(
  "optimizer",
  [
    dict(schedule="cosine"),
    dict(schedule="cosine", end_learning_rate=0.2, warmup_steps=0),
    dict(schedule="linear"),
    dict(schedule="linear", end_learning_rate=2.0),
    dict(schedule="rsqrt", timescale=10),
    dict(schedule="rsqrt", timescale=10, cooldown_steps=15, end_learning_rate=0.1),
    dict(schedule="rsqrt"),
    dict(schedule="constant"),
    dict(schedule="constant", cooldown_steps=20),
    dict(schedule="constant", cooldown_steps=1, warmup_steps=0),
    dict(schedule="constant", cooldown_steps=39),
  ],
  ids=str,
)
def test_schedules_equal_their_formulas(optimizer):
  optimizer = dict(learning_rate=2.0, warmup_steps=4) | optimizer
  want = [formula(step, 40, **optimizer) for step in range(41)]
  np.testing.assert_allclose(rates(40, **optimizer), want, rtol=2e-6, atol=2e-7)


def test_the_default_warms_up_and_ends_at_zero():
  got = rates(12, learning_rate=2.0, warmup_steps=4)
  np.testing.assert_allclose(got[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(got[8], 1.0, rtol=1e-6)  # half way down
  assert (np.diff(got[4:]) < 0).all() and got[12] < 1e-6


def test_the_timescale_is_where_the_rate_has_fallen_to_one_over_the_root_of_two():
  got = rates(50, learning_rate=1.0, schedule="rsqrt", warmup_steps=10, timescale=30)
  assert got[10] == 1 and got[40] == pytest.approx(2**-0.5)


@settings(max_examples=60, deadline=None)
@given(
  schedule=st.sampled_from(ENDING + ENDLESS),
  steps=st.integers(1, 120),
  warmup=st.integers(0, 150),
  cooldown=st.integers(0, 150),
  timescale=st.integers(1, 200),
  peak=st.floats(1e-5, 10),
  end=st.floats(0, 1),
)
def test_rates_are_continuous_never_above_the_peak_and_end_where_they_should(schedule, steps, warmup, cooldown, timescale, peak, end):
  ends = schedule in ENDING
  cooldown = 0 if ends else cooldown
  end = end * peak if ends or cooldown else 0.0
  optimizer = dict(schedule=schedule, learning_rate=peak, warmup_steps=warmup, cooldown_steps=cooldown, timescale=timescale)
  got = rates(steps, **optimizer, end_learning_rate=end)
  assert np.isfinite(got).all() and got[:-1].min() > 0 and got.max() <= peak * (1 + 1e-6)
  slopes = [1 / max(warmup, 1) * (warmup > 0), math.pi / 2 / max(steps - warmup, 1), 0.5 / timescale]
  slopes += [1 / min(cooldown, steps)] if cooldown else []
  assert np.abs(np.diff(got)).max() <= peak * (max(slopes) + 1e-6)
  if cooldown or (ends and steps > warmup):
    assert got[-1] == pytest.approx(end, rel=1e-5, abs=1e-6 * peak)


@pytest.mark.parametrize("samples, steps", [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
@pytest.mark.parametrize("key", ["warmup", "cooldown", "timescale"])
def test_spans_in_samples_are_spans_in_steps_and_parts_of_a_batch_count(key, samples, steps):
  if key == "timescale" and not samples:
    return
  name = "timescale" if key == "timescale" else f"{key}_steps"
  in_steps, in_samples, both = (
    configs.resolve(tiny(optimizer={"schedule": "rsqrt"} | spans))
    for spans in ({name: steps}, {f"{key}_samples": samples}, {f"{key}_samples": samples, name: 999})
  )
  assert getattr(in_steps.optimizer, name) == steps and in_steps == in_samples == both
  assert configs.resolve(configs.to_dict(in_steps)) == in_steps  # as a resumed run reads it


def test_a_run_that_is_too_short_for_its_spans_is_cut_short():
  np.testing.assert_allclose(rates(2, learning_rate=1.0, warmup_steps=10)[:2], [0.1, 0.2], rtol=1e-6)
  got = rates(4, learning_rate=1.0, warmup_steps=2, schedule="constant", cooldown_steps=10)
  np.testing.assert_allclose(got, np.array([4, 3, 2, 1, 0]) / 4 * 0.5, rtol=1e-6)
