"""Held-out results as rows."""

from clip_jax.report.results import results_table


def test_a_standard_error_is_read_beside_its_value():
  rows = results_table({"eval/x/acc1": 0.5068, "eval/x/acc1/chance": 0.1, "eval/x/acc1/standard_error": 0.0124, "eval/x/ece": 0.075})
  assert [(row.metric, row.result, row.standard_error) for row in rows] == [("acc1", "50.7% ± 1.2", 0.0124), ("ece", "7.5%", None)]
  assert "ECE" in rows[1].label
