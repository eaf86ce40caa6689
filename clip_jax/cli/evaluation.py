"""`clip-jax eval`: models on the benchmarks they are known by."""

import argparse
import contextlib
import sys
import time

from clip_jax import files
from clip_jax.cli import arguments as types

EPILOG = """
A data set is a folder of the root: in CLIP_benchmark's webdataset layout, in TFDS's, a folder for each class, or a list of files
with captions. Suites: imagenet, imagenet_robustness, vtab, vtab+, retrieval, sugar_crepe (docs/evaluation.md)."""
SECONDS_BETWEEN_LINES = 10
TASKS = ("auto", "linear_probe", "fewshot_linear_probe", "knn")


def add(verbs, verb):
  """Adds the verb.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
  evaluation = verb(
    verbs, "eval", _eval, _show,
    "Score models: zero-shot classification, retrieval, probes, compositional sets; with standard errors, and a test of each pair.",
    "clip-jax eval runs/vitb16 --suite imagenet --data-root /data/benchmarks --output results.csv",
  )  # fmt: skip
  evaluation.epilog += f"\n{EPILOG}"
  evaluation.set_defaults(json_of=lambda found: {key: value for key, value in found.items() if key != "details"})
  evaluation.add_argument("models", nargs="+", metavar="MODEL", help="a work directory, a checkpoint, or a Hugging Face or open_clip folder; of several, each pair is compared")
  weights(evaluation)
  what = evaluation.add_mutually_exclusive_group(required=True)
  what.add_argument("--suite", metavar="NAME", help="a list of data sets by name: imagenet, imagenet_robustness, vtab, vtab+, retrieval or sugar_crepe")
  what.add_argument("--dataset", nargs="+", metavar="NAME", help="data sets, as CLIP_benchmark calls them, or folders of your own")
  evaluation.add_argument("--data-root", required=True, metavar="DIR|URL", help="where they are; {dataset_cleaned} in it stands for the name with - for /")
  evaluation.add_argument("--output", metavar="FILE.csv", help="what to write, and beside it FILE.json with everything and FILE.html to look at")
  evaluation.add_argument("--task", nargs="+", choices=TASKS, default=["auto"], help="auto is what a set is made for; the others need a training split")
  evaluation.add_argument("--split", default="test", help="the held-out part (test)")
  evaluation.add_argument("--language", nargs="+", default=["en"], metavar="LANGUAGE", help="of class names and templates: en, cn, jp, it or ar")
  evaluation.add_argument("--template", nargs="+", default=[], metavar="TEXT", help="prompts instead of the known ones, such as 'a photo of a {c}.'")
  evaluation.add_argument("--batch-size", type=types.count, default=64, metavar="N", help="images that a device takes at a time (64)")
  evaluation.add_argument("--skip-missing", action="store_true", help="go on without data sets that are not there")


def weights(parser):
  """Adds the arguments that choose weights.

  Args:
    parser: of a verb.
  """
  parser.add_argument("--model", metavar="NAME", help="which model a file of tensors holds that does not say so")
  parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="of a run, take the moving average of its weights, or not; it is taken where there is one")
  parser.add_argument("--average-checkpoints", type=types.count, default=1, metavar="N", help="of a run, take the mean of its N newest checkpoints")


def _eval(arguments):
  from clip_jax.parallel import distributed

  distributed.enable_compilation_cache()
  distributed.initialize()
  import jax

  from clip_jax import benchmark
  from clip_jax.evaluate import datasets

  names = datasets.names_of(arguments.suite) if arguments.suite else tuple(dict.fromkeys(arguments.dataset))
  request = benchmark.Request(
    names, arguments.data_root, tuple(arguments.task), arguments.split, tuple(arguments.language), tuple(arguments.template),
    arguments.skip_missing, arguments.batch_size,
  )  # fmt: skip
  models = benchmark.open_models(arguments.models, arguments.model, arguments.ema, arguments.average_checkpoints)
  first = jax.process_index() == 0
  found = benchmark.run(models, request, arguments.output, types.tracker("fitting"), Told() if first else None)
  for name, why in found["missing"]:
    files.tell(f"left out: {name}. {why}")
  if arguments.output and first:
    from clip_jax.report import evaluation_page

    found["output"] = arguments.output
    found["page"] = str(evaluation_page.write(arguments.output))
  return found | {"first": first}


class Told:
  """Says on standard error what is evaluated, and of what takes long how far it is."""

  def __init__(self, file=None, now=time.monotonic):
    """Prepares; `file` is standard error if not given, and `now` a clock in seconds."""
    self._file, self._now = file or sys.stderr, now
    self._what, self._begun, self._said, self._first = "", None, None, 0

  def begin(self, what):
    """Something else is evaluated from now on."""
    self._what, self._begun = what, None

  def progress(self, done, count):
    """How many of its images, or of the texts of a length, are done."""
    from clip_jax.train.progress import duration

    now = self._now()
    if self._begun is None or done <= self._first:  # the first batch's time is that of compiling
      self._begun, self._first, self._said = now, done, self._said or now
    elif now - self._said >= SECONDS_BETWEEN_LINES:
      self._said = now
      rate = (done - self._first) / max(now - self._begun, 1e-9)
      with contextlib.suppress(OSError):
        print(f"{self._what}  {done:,}/{count:,}  {rate:,.0f}/s  {duration((count - done) / rate)} left", file=self._file, flush=True)


def _show(found):
  if not found["first"]:
    return
  models = len({row["pretrained"] for row in found["rows"]})
  for row in found["rows"]:
    of = f"{row['model']}, {row['pretrained']}: " if models > 1 else ""
    print(f"\n{of}{row['dataset']}, {row['task']}, {row['items']:,} examples")
    for metric, value in row["metrics"].items():
      error, chance = row["standard_errors"].get(metric), row["chance"].get(metric)
      beside = "" if error is None else f"± {error:.4f}"
      print(f"  {metric:<32}{_number(value)} {beside:<9}  {'' if chance is None else f'chance {chance:.4f}'}".rstrip())
  for one in found["comparisons"]:
    names = one["models"] if len(set(one["models"])) > 1 else one["pretrained"]
    print(
      f"\n{one['dataset']} {one['metric']}: {names[0]} against {names[1]}: {one['difference']:+.4f} ± "
      f"{one['standard_error']:.4f}, p = {one['p_value']:.2g} ({one['test']})"
    )
  if "output" in found:
    print(f"\n{found['output']}\n{found['page']}")


def _number(value):
  return f"{'–':>8}" if value is None else f"{value:8.4f}" if abs(value) <= 1 else f"{value:8.4g}"
