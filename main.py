"""Trains a CLIP model: python main.py --config=configs/vitb16.py --workdir=DIR [--config.a.b=value ...].

--config   a recipe: a Python file whose get_config() returns a ConfigDict
--workdir  folder for checkpoints, metrics and the report
--profile=START:END  traces steps START to END - 1 into WORKDIR/profile (docs/performance.md)
--dry_run  does everything but train: opens data and evaluation sets, compiles the step, prints the plan (docs/planning.md)
--compiled=FILE  uses a step that `clip-jax plan --save-compiled` compiled, instead of compiling
--force_new  begins anew where there is a run, which is moved to WORKDIR/before
--config.a.b=value  changes a key; clip_jax/config/schema.py says which there are

Started again with the same work directory, it resumes what is there. Exit codes: 0 done, 2 wrong usage,
config or input, 75 stopped early with everything saved, 1 anything else (docs/reliability.md).
"""

import os
import re
import sys

from absl import flags

from clip_jax.config import recipes
from clip_jax.errors import (
  EXIT_FAILED,
  EXIT_TRY_AGAIN,
  EXIT_USAGE,
  StorageError,
  TrainingError,
  UsageError,
)

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the report.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything that a run needs, print its plan, and stop.")
COMPILED = flags.DEFINE_string("compiled", None, "A file of `clip-jax plan --save-compiled`.")
FORCE_NEW = flags.DEFINE_bool("force_new", False, "Begin anew where there is a run, which is moved to WORKDIR/before.")
PROFILE = flags.DEFINE_string("profile", None, "START:END, steps to trace into WORKDIR/profile; END is not traced.")


def main(argv):
  """Runs one training and returns the exit code."""
  if {"--help", "-help", "-h"} & set(argv):
    print(__doc__)
    return 0
  try:
    config = parse(argv)
    profile = window(PROFILE.value)
    # Imported after the flags are known to be right: a typing error should not cost seconds.
    from clip_jax import config as configs
    from clip_jax import train
    from clip_jax.parallel import distributed
    from clip_jax.report import page, terminal

    settings = configs.resolve(config).train
    distributed.enable_compilation_cache()
    distributed.initialize(settings.host_timeout, settings.join_timeout, settings.deterministic)
    if DRY_RUN.value:
      check(config, argv, profile)
      return 0
    result = train.run(config, WORKDIR.value, profile=profile, compiled=COMPILED.value, force_new=FORCE_NEW.value)
    import jax

    if jax.process_index() == 0:
      tell(result, page, terminal)
    return 0 if result.complete else EXIT_TRY_AGAIN
  except UsageError as error:
    print(error, file=sys.stderr)
    return EXIT_USAGE
  except StorageError as error:
    print(f"{error} The last checkpoint is whole; the same command goes on from it.", file=sys.stderr)
    return EXIT_FAILED
  except TrainingError as error:
    print(error, file=sys.stderr)
    return EXIT_FAILED


def parse(argv):
  """Reads the flags.

  Args:
    argv: the command line, program name first.

  Returns:
    The `ConfigDict` of the recipe with its overrides.

  Raises:
    UsageError: a flag or an override that does not exist, has the wrong type, or is missing.
  """
  of_config, others = recipes.split(argv[1:])
  try:
    rest = flags.FLAGS([argv[0], *others])
  except flags.Error as error:
    raise UsageError(str(error).strip()) from error
  config = recipes.load(of_config)
  if len(rest) > 1:
    raise UsageError(f"{rest[1]!r} is not a flag; flags start with --, as in --workdir=runs/mine.")
  for name, value in (("config", config), ("workdir", WORKDIR.value)):
    if value is None:
      raise UsageError(f"--{name} is missing: python main.py --config=configs/vitb16.py --workdir=DIR")
  return config


def check(config, argv, profile):
  """Does everything but train, and prints what it finds."""
  import jax

  from clip_jax.plan import dry_run, show

  main = jax.process_index() == 0
  name = recipes.name(argv)
  tell = (lambda what, text: print(f"{what:<12}{text}", flush=True)) if main else (lambda what, text: None)
  found = dry_run.run(config, WORKDIR.value, name, profile, COMPILED.value, tell)
  if main:
    print(show.page(found))


def window(text):
  """The value of --profile as two numbers, or None if it was not given.

  Raises:
    UsageError: it is something else.
  """
  if text is None:
    return None
  match = re.fullmatch(r"(-?\d+):(-?\d+)", text)
  if not match:
    raise UsageError(f"--profile={text} is not START:END; 10:15 traces steps 10 to 14.")
  return int(match[1]), int(match[2])


def tell(result, page, terminal):
  """Prints how the run ended and where its report is."""
  workdir = WORKDIR.value
  if not result.complete:
    print(f"Stopped after step {result.step:,} of {result.steps:,}, all saved. The same command goes on.")
    return
  report = page.write(workdir)
  if result.started == result.steps:
    print(f"{workdir} is complete: all {result.steps:,} steps are done. Report: {report}")
    return
  terminal.print_results(workdir)
  print(f"Done: {result.steps:,} steps. Report: {report}  Checkpoints: {workdir}/checkpoints")


def use_huge_pages():
  """Starts this program again with memory in pages of 2 MiB, where glibc can; the second time does nothing.

  XLA:CPU gets its arrays from the system at every step and gives them back, and in pages of 4 KiB, each zeroed by itself, that is a
  quarter of the step's time (docs/benchmarks.md, "XLA:CPU"). glibc reads the setting before any program begins.
  """
  setting, given = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
  if sys.platform == "linux" and setting not in given:
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, f"{setting}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
  use_huge_pages()
  sys.exit(main(sys.argv))
