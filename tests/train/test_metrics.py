"""metrics.jsonl: whole lines, each step once, also after a crash."""

import json

import pytest

from clip_jax.train import metrics


def steps_in(path):
  return [line["step"] for line in metrics.read(path)]


def write(workdir, start, steps):
  writer = metrics.MetricsWriter(workdir, start)
  for step in steps:
    writer.write(step, 8 * step, {"loss": 1 / step})
  writer.close()


def test_lines_hold_step_samples_and_time(tmp_path):
  write(tmp_path, 0, [1, 2])
  lines = metrics.read(tmp_path / "metrics.jsonl")
  assert [(line["step"], line["samples_seen"], line["loss"]) for line in lines] == [(1, 8, 1.0), (2, 16, 0.5)]
  assert all(line["time"] > 1.7e9 for line in lines)
  assert any("tfevents" in p.name for p in (tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1}'])
def test_a_resumed_run_drops_later_lines_and_a_torn_one(tmp_path, torn):
  write(tmp_path, 0, [1, 2, 3, 4, 5])
  path = tmp_path / "metrics.jsonl"
  path.write_text(path.read_text() + torn)
  assert steps_in(path) == [1, 2, 3, 4, 5]
  write(tmp_path, 3, [4, 5, 6])
  assert steps_in(path) == [1, 2, 3, 4, 5, 6]
  assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_values_that_are_not_finite_are_null(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, 8, {"loss": float("nan"), "gradient_norm": float("inf")})
  writer.close()
  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda x: pytest.fail(x))
  assert line["loss"] is None and line["gradient_norm"] is None


def test_a_missing_file_has_no_lines(tmp_path):
  assert metrics.read(tmp_path / "metrics.jsonl") == []
