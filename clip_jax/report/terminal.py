"""Held-out results as a table in a terminal or a log."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from clip_jax.report.results import results_table
from clip_jax.report.run_log import read_run


def print_results(workdir, file=None):
  """Prints the last held-out results of a run, each with its chance beside it.

  Args:
    workdir: a training work directory.
    file: where to print; standard output if not given.
  """
  rows = results_table(read_run(Path(workdir) / "metrics.jsonl").results())
  if not rows:
    return
  table = Table(title="Held-out results", title_justify="left")
  table.add_column("set")
  table.add_column("metric")
  yardstick = any(row.yardstick is not None for row in rows)
  for heading in ("result", "chance", *(["nearest pixels"] if yardstick else [])):
    table.add_column(heading, justify="right")
  last = None
  for row in rows:
    if last not in (None, row.set):
      table.add_section()
    cells = [row.result, row.text(row.chance)]
    cells += [row.text(row.yardstick)] if yardstick else []
    table.add_row(row.set if row.set != last else "", row.label.replace("→", "->"), *cells)
    last = row.set
  console = Console(file=file)
  # A log has no width of its own; the table needs no more than this.
  (console if console.is_terminal else Console(file=file, width=100)).print(table)
