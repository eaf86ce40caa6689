"""`clip-jax doctor`: what this machine is like, what is wrong with it, and how to mend it."""

import contextlib
import dataclasses
import os
import sys

EPILOG = """
exit codes: 0 nothing is wrong (warnings may be), 1 something is, 2 wrong usage.
On several machines, run it on all of them at the same time, as training is: the first process tells what all have found."""


def add(verbs, verb):
  """Adds the verb.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
  doctor = verb(
    verbs, "doctor", _doctor, _show_doctor,
    "Check this machine: versions, devices and the network between them, memory, limits, disk, buckets; say how to mend what is wrong.",
    "clip-jax doctor --workdir runs/vitb16 --bucket gs://bucket/laion",
  )  # fmt: skip
  doctor.epilog += f"\n{EPILOG}"
  doctor.set_defaults(exit_code=lambda found: 1 if found["wrong"] else 0)
  doctor.add_argument("--workdir", default=".", metavar="DIR", help="where training will write (the current folder)")
  doctor.add_argument("--bucket", action="append", default=[], metavar="URL", help=(
    "gs://NAME or s3://NAME, and what names of objects begin with, from which training will read; may be repeated"
  ))  # fmt: skip


def _doctor(arguments):
  from clip_jax.train import doctor, environment

  with _stdout_kept_clean():
    examined = doctor.run(arguments.workdir, arguments.bucket)
  found = examined.machine | {
    "extras": environment.extras(),
    "checks": [dataclasses.asdict(check) for check in examined.checks],
    "wrong": examined.count("wrong"),
    "warnings": examined.count("warning"),
  }
  if examined.process:  # the first process tells
    raise SystemExit(arguments.exit_code(found))
  return found


@contextlib.contextmanager
def _stdout_kept_clean():
  # The library that joins processors, Gloo, says there that it is connected; standard output is for the result.
  sys.stdout.flush()
  kept = os.dup(1)
  os.dup2(2, 1)
  try:
    yield
  finally:
    os.dup2(kept, 1)
    os.close(kept)


def _show_doctor(found):
  width = max(len(check["name"]) for check in found["checks"])

  def row(status, name, text):
    print(f"{status:<8} {name:<{width}}  {text}")

  for check in found["checks"]:
    row(check["status"], check["name"], check["found"])
    if check["advice"]:
      row("", "", check["advice"])
  missing = [extra for extra, modules in found["extras"].items() if modules]
  there = [extra for extra in found["extras"] if extra not in missing]
  row("", "extras", f"{', '.join(there) or 'none'}" + (f"; not installed: {', '.join(missing)}." if missing else "."))
  wrong, warnings = found["wrong"], found["warnings"]
  print(f"{wrong} wrong, {warnings} warning{'' if warnings == 1 else 's'}." if wrong or warnings else "All well.")
