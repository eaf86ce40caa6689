"""`clip-jax scaling`: sweeps of runs, what they found, and the laws in it."""

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path

from clip_jax import files
from clip_jax.cli import arguments as types
from clip_jax.errors import EXIT_FAILED, EXIT_TRY_AGAIN, UsageError

EPILOG = """
A sweep is a Python file whose get_sweep() returns runs, such as configs/scaling/emoji_grid.py; those in configs/scaling are known by
name. FILE:ARGUMENT is passed on to it. --config.a.b=value changes a key of all runs (docs/scaling.md)."""
EXECUTORS = ("local", "slurm", "gke", "print")
SECONDS_BETWEEN_LINES = 30


def add(verbs, verb):
  """Adds the verbs.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
  text = "Scaling experiments: run a sweep, collect what it found, fit power laws."
  group = verbs.add_parser("scaling", help=text, description=text).add_subparsers(metavar="VERB", required=True)
  run = verb(
    group, "run", _run, _show_run,
    "Start what of a sweep is missing, resume what was stopped, skip what is done; then results, laws, plots and a page.",
    "clip-jax scaling run emoji_grid --workdir runs/emoji_grid",
  )  # fmt: skip
  run.epilog += f"\n{EPILOG}"
  run.set_defaults(overrides=[], exit_code=lambda found: found["exit_code"], json_of=lambda found: {k: v for k, v in found.items() if k != "exit_code"})
  run.add_argument("sweep", metavar="SWEEP", help="FILE[:ARGUMENT], or a name in configs/scaling")
  run.add_argument("--workdir", required=True, metavar="DIR", help="the folder of the sweep; its runs are in DIR/runs")
  run.add_argument("--executor", choices=EXECUTORS, default="local", help="where to train: processes here, jobs of Slurm or Kubernetes; print only says how (local)")
  run.add_argument("--max-parallel", type=types.count, metavar="N", help="runs at a time (1; of jobs: all)")
  run.add_argument("--template", metavar="FILE", help="the batch script or manifest of a job, with $name, $command and $log")
  run.add_argument("--topology", metavar="NAME", help="say first what it takes there, by an estimate: v5e:16x16, v5litepod-256, h100:64")
  run.add_argument("--price-per-chip-hour", type=types.price, metavar="P", help="and what it costs")
  collect = verb(
    group, "collect", _collect, lambda found: print(f"{found['results']}: {found['rows']} rows of {found['runs']} runs"),
    "Write results.csv of a sweep: a row for each finished run and each set it was evaluated on.",
    "clip-jax scaling collect runs/emoji_grid",
  )  # fmt: skip
  collect.add_argument("workdir", metavar="DIR", help="the folder of a sweep")
  collect.add_argument("--output", metavar="FILE.csv", help="what to write (DIR/results.csv)")
  _add_fit(verb, group)


def _add_fit(verb, group):
  fit = verb(
    group, "fit", _fit, _show_fit,
    "Fit error = beta C^alpha to a table of results, with intervals; C is GMACs of one pair times samples seen.",
    "clip-jax scaling fit zeroshot_results.csv --task imagenet --metric acc1 --where 'upstream_dataset!=CLIP-WIT'",
  )  # fmt: skip
  fit.add_argument("results", metavar="FILE.csv", help="of `collect`, or with the same columns")
  fit.add_argument("--task", required=True, metavar="TASK", help="imagenet, robustness, coco, flickr30k, vtab+, or a downstream_dataset as the table has it")
  fit.add_argument("--metric", metavar="COLUMN", help="error is 1 minus it (acc1, or what the task is known by)")
  fit.add_argument("--where", nargs="+", action="extend", default=[], metavar="CONDITION", help="COLUMN=VALUE or COLUMN!=VALUE; rows must fulfil all")
  fit.add_argument("--group", metavar="COLUMN", help="a law for each value of it")
  fit.add_argument("--method", choices=("frontier", "all", "saturating"), default="frontier", help="the best of each of 5 bins of compute, as published; all points; or all with a limit (frontier)")
  fit.add_argument("--at", nargs="+", type=_compute, default=[], metavar="C", help="computes to forecast, GMACs times samples, such as 1e13 (the largest, and ten times it)")
  fit.add_argument("--plot", metavar="FILE", help="also draw it: .svg or .png")


def _compute(text):
  if not re.fullmatch(r"\d+(\.\d*)?([eE][+-]?\d+)?", text, re.ASCII) or not 0 < float(text) < 1e300:
    raise argparse.ArgumentTypeError(f"{text!r} is no compute; 1e13 is (GMACs times samples).")
  return float(text)


def _run(arguments):
  import jax

  jax.config.update("jax_platforms", "cpu")  # of this process alone: accelerators are for those that it starts
  from clip_jax.scaling import collect, executors, runner, sweep
  from clip_jax.train import stopping

  plans = sweep.load(arguments.sweep, arguments.workdir, arguments.overrides)
  head = _head(arguments, plans)
  if arguments.executor == "print":
    return head | {"commands": [one.line for one in plans], "exit_code": 0}
  sweep.check_unchanged(plans)
  folder = Path(arguments.workdir)
  files.tell(_sentences(head))
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UsageError(f"--workdir={folder} cannot be made: {error.strerror}.") from error
  if arguments.executor == "local":
    if arguments.template:
      raise UsageError("--template is for jobs of a cluster; --executor local has none.")
    executor = executors.Local(folder, arguments.max_parallel or 1)
  else:
    kind = {"slurm": executors.Slurm, "gke": executors.Gke}[arguments.executor]
    executor = kind(folder, arguments.max_parallel or len(plans), arguments.template)
  collect.describe(folder, head["sweep"], plans)
  signals = []
  with stopping.handled(lambda number, _: signals.append(number)), _Live() as live:
    rows = runner.Runner(plans, executor).run(live.show, lambda: bool(signals))
  states = {row.planned.run.name: row.state for row in rows}
  failed = [f"{row.planned.run.name}: {row.reason}" for row in rows if row.state in ("failed", "blocked")]
  complete = all(state == "done" for state in states.values())
  code = 0 if complete else EXIT_FAILED if failed else EXIT_TRY_AGAIN
  return head | {"executor": arguments.executor, "states": states, "failed": failed, "exit_code": code} | page(folder)


def _head(arguments, plans):
  """What a sweep is and takes, before it begins."""
  todo = sum(one.own_samples for one in plans)
  found = {
    "sweep": Path(arguments.sweep.partition(":")[0]).stem,
    "runs": len(plans),
    "forks": sum(bool(one.run.parent) for one in plans),
    "samples": todo,
    "samples_without_forks": sum(one.config.train.samples for one in plans),
    "gmacs": sum(one.gmacs * one.own_samples for one in plans),
    "training_flops": sum(one.training_flops for one in plans),
  }
  if not arguments.topology:
    if arguments.price_per_chip_hour:
      raise UsageError("--price-per-chip-hour needs --topology, to say how many chips for how many hours.")
    return found
  return found | _cost(plans, arguments.topology, arguments.price_per_chip_hour)


def _cost(plans, topology, price):
  from clip_jax.plan import planner

  where, hours, without, known = planner.target(topology), 0.0, [], {}
  for one in plans:
    # Most runs make the same step, more or less often.
    train, optimizer = one.config.train, one.config.optimizer
    step = one.config.model, one.config.loss, one.config.mesh, train.global_batch_size, train.remat, train.scan, train.microbatches, optimizer.name
    if step not in known:
      known[step] = train.samples, planner.by_estimate(planner.resolved(one.recipe, where), where)
    samples, answer = known[step]
    if answer["chip_hours"] is None:
      without.append(one.run.name)
    else:
      hours += answer["chip_hours"] * one.own_samples / samples
  found = {"topology": topology, "chip_hours": hours, "chip_days": hours / 24, "cost": None if price is None else hours * price}
  return found | {"does_not_fit": without}


def _sentences(head):
  text = f"{head['sweep']}: {head['runs']} runs"
  if head["forks"]:
    saved = 1 - head["samples"] / head["samples_without_forks"]
    text += f", {head['forks']} of them cooldowns that fork from another, which saves {saved:.0%} of the samples"
  text += f". {head['samples']:,} samples to train, {head['gmacs']:.3g} GMACs forward, {head['training_flops']:.3g} FLOPs in training."
  if "topology" in head:
    text += f"\nOn {head['topology']}, by an estimate: {head['chip_days']:,.3g} chip-days"
    text += "" if head["cost"] is None else f", at this price {head['cost']:,.2f}"
    if head["does_not_fit"]:
      text += f"; without {', '.join(head['does_not_fit'])}, which it says do not fit"
    text += ". `clip-jax plan` asks the compiler."
  return text


def page(folder):
  """Collects what a sweep has found, fits its laws, and writes its plots and its page.

  Args:
    folder: of the sweep.

  Returns:
    A dict of "report", a path; and, if a run is finished that was evaluated, "results", "laws" and "plots", paths, and
    "without_law", sentences.
  """
  from clip_jax.report import scaling_page
  from clip_jax.scaling import collect

  found = {}
  rows = collect.rows(folder)
  if rows:
    results, missing = collect.write_results(folder, rows), collect.write_laws(folder)
    found = {"results": str(results), "laws": str(Path(folder) / collect.LAWS), "plots": _plots(folder), "without_law": missing}
  return found | {"report": str(scaling_page.write(folder))}


def _plots(folder):
  from clip_jax.report import scaling_plots
  from clip_jax.scaling import collect

  plots = {}
  for law in files.read_json(Path(folder) / collect.LAWS)["laws"]:
    plots.setdefault(re.sub(r"[^\w.@+-]+", "-", f"{law['task']}-{law['metric']}"), []).append(law)
  (Path(folder) / "plots").mkdir(exist_ok=True)
  paths = [Path(folder) / "plots" / f"{name}.svg" for name in plots]
  for path, drawn in zip(paths, plots.values(), strict=True):
    scaling_plots.write(path, drawn)
  return [str(path) for path in paths]


def _show_run(found):
  if "commands" in found:
    print("\n".join([f"# {line}" for line in _sentences(found).splitlines()] + found["commands"]))
    return
  states = list(found["states"].values())
  print(f"{states.count('done')} of {len(states)} runs are done.")
  for sentence in found["failed"]:
    print(f"NOT DONE: {sentence}")
  for key in ("results", "report"):
    if key in found:
      print(found[key])
  if found["exit_code"] == EXIT_TRY_AGAIN:
    left = "what is trained is saved" if found["executor"] == "local" else "jobs go on without it"
    print(f"Stopped; {left}. The same command goes on.")


class _Live:
  """The runs of a sweep, for people: a table that changes on a terminal, lines where there is none."""

  def __init__(self, now=time.monotonic):
    self._live, self._now, self._said, self._states = None, now, None, {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._live:
      self._live.stop()

  def show(self, rows):
    """Shows how far they are.

    Args:
      rows: of `clip_jax.scaling.runner.Row`.
    """
    with contextlib.suppress(OSError):
      if sys.stderr.isatty():
        self._table(rows)
      else:
        self._lines(rows)

  def _table(self, rows):
    from rich.console import Console
    from rich.live import Live

    if self._live is None:
      self._live = Live(console=Console(stderr=True), auto_refresh=False)
      self._live.start()
    self._live.update(table_of(rows), refresh=True)

  def _lines(self, rows):
    now = self._now()
    for row in rows:
      name = row.planned.run.name
      if self._states.get(name) != row.state and not row.state.startswith(("ready", "waits")):
        files.tell(f"{name}  {row.state}  {_progress(row)}{'  ' + row.reason if row.reason else ''}".rstrip())
      self._states[name] = row.state
    if self._said is None or now - self._said >= SECONDS_BETWEEN_LINES:
      self._said = now
      running = "   ".join(f"{row.planned.run.name} {_progress(row)}" for row in rows if row.state == "running")
      files.tell(f"{sum(row.state == 'done' for row in rows)} of {len(rows)} done   {running}".rstrip())


def table_of(rows):
  """The live table.

  Args:
    rows: of `clip_jax.scaling.runner.Row`.

  Returns:
    Something that rich shows.
  """
  from rich.table import Table

  from clip_jax.train.progress import duration

  found = Table(title=f"{sum(row.state == 'done' for row in rows)} of {len(rows)} runs are done", title_justify="left")
  for column, side in (("run", "left"), ("state", "left"), ("step", "right"), ("loss", "right"), ("samples/s", "right"), ("left", "right")):
    found.add_column(column, justify=side, no_wrap=True)
  # What there is most to see of comes first: a terminal may have fewer lines than a sweep has runs.
  first = ("running", "failed", "blocked", "ready", "waits", "done")
  for row in sorted(rows, key=lambda row: first.index(row.state.partition(" ")[0])):
    status, running = row.status, row.state == "running"
    style = {"done": "green", "running": "bold", "failed": "red", "blocked": "red"}.get(row.state, "dim")
    found.add_row(
      row.planned.run.name, row.state, f"{status.step:,}/{row.planned.config.train.steps:,}",
      "" if status.loss is None else f"{status.loss:.3f}",
      f"{status.rate:,.0f}" if running and status.rate else "",
      duration(status.seconds) if running and status.seconds is not None else "",
      style=style,
    )  # fmt: skip
  return found


def _progress(row):
  from clip_jax.train.progress import duration

  status, steps = row.status, row.planned.config.train.steps
  loss = "" if status.loss is None else f" loss {status.loss:.3f}"
  left = f" {duration(status.seconds)} left" if row.state == "running" and status.seconds else ""
  return f"{status.step:,}/{steps:,}{loss}{left}"


def _collect(arguments):
  from clip_jax.scaling import collect

  path, found = collect.results(arguments.workdir, arguments.output)
  return {"results": str(path), "rows": len(found), "runs": len({row["name"] for row in found})}


def _fit(arguments):
  from clip_jax.scaling import collect, table

  rows = table.read(arguments.results)
  where = [table.condition(text) for text in arguments.where]
  found = collect.laws(rows, [arguments.task], arguments.metric, arguments.method, where, arguments.group, arguments.at, files.tell)
  if arguments.plot:
    from clip_jax.report import scaling_plots

    scaling_plots.write(arguments.plot, found)
  return found


def _show_fit(found):
  from clip_jax.scaling import collect

  for law in found:
    group = "" if law["group"] is None else f"{law['group']}: "
    print(f"{group}{law['task']} {law['metric']}, {law['method']}, {law['n']} points")
    limit = f"{law['limit']:.4f} + " if law["method"] == "saturating" else ""
    print(f"  E = {limit}{law['beta']:.4g} C^{law['alpha']:.4f}")
    for name in ("alpha", "beta", *(["limit"] if limit else [])):
      pair = law[f"{name}_ci"]
      print(f"  {name:<6}{law[name]:10.4g}  {'too few points for an interval' if pair is None else f'95 % {pair[0]:.4g} to {pair[1]:.4g}'}")
    left_out = "" if law["leave_one_out"] is None else f", each point by the others {law['leave_one_out']:.4f}"
    print(f"  mean absolute error {law['mae']:.4f}{left_out}")
    for one in law["forecast"]:
      between = "" if one["low"] is None else f", a new run 95 % between {one['low']:.4f} and {one['high']:.4f}"
      print(f"  at C = {one['compute']:.3g}: E = {one['error']:.4f}{between}")
    if law["method"] == "frontier":
      for one in collect.optimal(law)["budgets"]:
        print(f"  best at C = {one['compute']:.3g}, by the runs on the frontier: {one['gmacs']:.3g} GMACs a pair, {one['samples']:.3g} samples")
