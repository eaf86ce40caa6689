"""How many pairs a second does the training step do here, and how many do others? Runs it, and theirs, in turns.

    python benchmarks/step_clock.py
    python benchmarks/step_clock.py --config vitb32 --batch 32 --peer transformers open_clip
    python benchmarks/step_clock.py --config vitb16 --batch 256 --dtype bfloat16 --set train.remat=minimal --json

Ours is the step that main.py runs, on all devices of this machine. A peer is a plain training loop in PyTorch around the model of
that project, of the same sizes and on the same examples: zero_grad, forward, contrastive loss, backward, AdamW (fused); on an
NVIDIA GPU the model is compiled. It is given float32 pixels that are normalised already; ours gets bytes and does that itself, and also
computes the norms that it logs. bfloat16 is `model.compute_dtype` for ours and `torch.autocast` for the peers, with float32 parameters for
all. The loading of data is no part of it (benchmarks/input_pipeline.py).

Every contender is a process of its own, and all have main.py's setting of memory; GLIBC_TUNABLES=glibc.malloc.hugetlb=0 in the environment is how to
see them without. On a processor all are built and warmed up, and then run in turns. Where memory is short of that, with `--apart`, and on an
accelerator, whose memory two frameworks do not share, each turn builds and warms up anew. Exit codes: 0 done, 1 a contender failed, 2 wrong usage.
"""

import argparse
import ast
import functools
import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where configs/ is

from contenders import processes
from contenders.steps import INSTALL

from clip_jax import config as configs
from clip_jax.errors import UsageError

OURS = "ours"
HUGE_PAGES = "glibc.malloc.hugetlb"


def main():
  """Measures, prints and returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="vitb32", help="a recipe of configs/")
  parser.add_argument("--batch", type=positive, default=32)
  parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
  parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config, as train.remat=full")
  parser.add_argument("--peer", nargs="+", choices=INSTALL, default=[])
  parser.add_argument("--rounds", type=positive, default=5)
  parser.add_argument("--steps", type=positive, help="a round; 1 on a processor and 10 on an accelerator if left out")
  parser.add_argument("--apart", action="store_true", help="one process at a time, even where memory has room for all")
  parser.add_argument("--json", action="store_true", help="print one object")
  arguments = parser.parse_args()
  given = os.environ.get("GLIBC_TUNABLES", "")
  if HUGE_PAGES not in given:  # as main.py does; read when a process begins, so this one need not have it
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (given, f"{HUGE_PAGES}=1")))
  try:
    # The length of the run is nothing to its step, and the 12.8 billion pairs of a recipe are more steps of 4 than int32 can count.
    common = {"train.steps": "2_000_000_000"} | changes(arguments.set)
    runs = [resolved(arguments.config, arguments.batch, common | {"model.compute_dtype": d}) for d in arguments.dtype]
  except UsageError as error:
    print(error, file=sys.stderr)
    return 2
  load, here = os.getloadavg()[0], processes.look()
  on_cpu = here["platform"] == "cpu"
  count = arguments.steps or (1 if on_cpu else 10)
  contenders = [processes.Contender(who, run, count, here) for who in [OURS, *arguments.peer] for run in runs]
  together = processes.measure(contenders, arguments.rounds, together=on_cpu and not arguments.apart)
  found = summary(contenders, here) | {
    "config": arguments.config,
    "model": runs[0].model.name,
    "batch": arguments.batch,
    "changes": arguments.set,
    "rounds": arguments.rounds,
    "steps": count,
    "together": together,
    "load": [load, os.getloadavg()[0]],
  }
  if arguments.json:
    print(json.dumps(found))
  else:
    show(found)
  return 1 if found["failures"] else 0


def positive(text):
  """A whole number of at least 1."""
  if int(text) < 1:
    raise ValueError(text)
  return int(text)


def changes(settings):
  """KEY=VALUE of the command line as a dict."""
  wrong = next((setting for setting in settings if "=" not in setting), None)
  if wrong:
    raise UsageError(f"--set {wrong} is not KEY=VALUE, as train.remat=full is.")
  return dict(setting.split("=", 1) for setting in settings)


def resolved(name, batch, changes):
  """The `Config` of a recipe with another batch and other values.

  Args:
    name: of a file in configs/, without .py.
    batch: the global batch.
    changes: a dict from dotted keys to values as they stand on a command line.
  """
  try:
    recipe = importlib.import_module(f"configs.{name}").get_config()
  except ModuleNotFoundError as error:
    raise UsageError(f"--config {name}: there is no configs/{name}.py.") from error
  recipe.train.global_batch_size = batch
  for key, value in changes.items():
    configs.check_key(key)
    *groups, last = key.split(".")
    try:
      functools.reduce(getattr, groups, recipe)[last] = value_of(value)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UsageError(f"--set {key}={value} cannot be set ({' '.join(str(error).split())}).") from error
  return configs.resolve(recipe)


def value_of(text):
  """What a setting on the command line means: a number, a tuple, or a word."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def summary(contenders, here):
  """What was found, as one object for JSON."""
  rows = [contender.row for contender in contenders if not contender.error]
  versions = [contender.about.get("versions", {}) for contender in contenders]
  return {
    "date": here["date"],
    "machine": here["machine"],
    "device": {"kind": here["device"], "platform": here["platform"], "count": here["devices"]},
    "versions": functools.reduce(dict.__or__, versions, here["versions"]),
    "contenders": rows,
    "ratios": ratios(rows),
    "failures": [{"name": c.who, "dtype": c.dtype, "error": c.error} for c in contenders if c.error],
  }


def ratios(rows):
  """Our samples per second over those of each peer: of the best of each ("best"), and of each type that both have."""
  rates = {}
  for row in rows:
    rates.setdefault(row["name"], {})[row["dtype"]] = row["samples_per_second"]
  ours = rates.pop(OURS, {})
  return {
    peer: {"best": max(ours.values()) / max(each.values())} | {d: ours[d] / each[d] for d in ours if d in each}
    for peer, each in rates.items()
    if ours
  }


def show(found):
  """Prints it as a table."""
  device, machine = found["device"], found["machine"]
  print(f"{found['config']} ({found['model']}), batch {found['batch']:,}, {' '.join(found['changes'])} {found['date']}")
  print(f"{device['count']} x {device['kind']}; {machine['cores']} cores of {machine['cpu']}; load {found['load'][0]:.1f} before")
  print(f"{'contender':<24}{'samples/s':>10}{'MFU':>8}  each round")
  for row in found["contenders"]:
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    each = " ".join(f"{rate:.2f}" for rate in row["each"])
    print(f"{row['name'] + ' ' + row['dtype']:<24}{row['samples_per_second']:>10.2f}{mfu:>8}  {each}")
  for peer, of in found["ratios"].items():
    print(f"ours / {peer}: " + ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in of.items()))
  for failure in found["failures"]:
    print(f"{failure['name']} {failure['dtype']} failed: {failure['error']}")


if __name__ == "__main__":
  sys.exit(main())
