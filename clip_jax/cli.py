"""The `clip-jax` command: parses, calls one function, prints.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

import argparse
import json
import sys

from clip_jax.errors import UsageError

EXIT_USAGE = 2


def main(argv=None):
  """Runs one command.

  Args:
    argv: the arguments; those of the process if not given.

  Returns:
    The exit code: 0 done, 2 wrong usage or input. Anything else that goes wrong is raised.
  """
  arguments = _parser().parse_args(argv)
  try:
    result = arguments.run(arguments)
  except UsageError as error:
    print(error, file=sys.stderr)
    return EXIT_USAGE
  if arguments.json:
    print(json.dumps(result))
  else:
    arguments.show(result)
  return 0


def _parser():
  parser = argparse.ArgumentParser(
    prog="clip-jax", description="CLIP models in JAX: what is around training. Training is `python main.py`."
  )
  verbs = parser.add_subparsers(metavar="VERB", required=True)

  def verb(group, name, run, show, text, example):
    one = group.add_parser(
      name,
      help=text,
      description=text,
      epilog=f"example: {example}",
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    one.set_defaults(run=run, show=show)
    return one

  verb(verbs, "models", _models, _show_models, "List the models known by name.", "clip-jax models")
  data = verbs.add_parser("data", help="Look after training data.", description="Look after training data.")
  data = data.add_subparsers(metavar="VERB", required=True)
  index = verb(
    data, "index", _data_index, _show_index,
    "Build the byte-offset index of webdataset tar shards; training does it too, on first use.",
    "clip-jax data index 'shards/{00000..00099}.tar'",
  )  # fmt: skip
  index.add_argument("path", help="a glob of shards; {a..b} and {a,b} are expanded")
  index.add_argument("--rebuild", action="store_true", help="build them anew even if they are up to date")
  index.add_argument("--allow-truncated", action="store_true", help="accept shards that are cut off")
  report = verb(
    verbs, "report", _report, _show_report, "Write report.html of a run.", "clip-jax report runs/quickstart"
  )
  report.add_argument("workdir", help="the run's work directory")
  verb(verbs, "doctor", _doctor, _show_doctor, "Tell what this machine has for training.", "clip-jax doctor")
  return parser


def _models(_):
  from clip_jax import config as configs
  from clip_jax.models import zoo
  from clip_jax.models.clip import parameter_count

  found = {}
  for name in zoo.MODELS:
    model = configs.resolve({"model": {"name": name}, "train": {"steps": 1}}).model
    found[name] = {**configs.to_dict(model), "parameters": parameter_count(model)}
  return found


def _show_models(found):
  print(f"{'name':<14}{'image':>6}{'embed':>7}  {'vision':<18}{'text':<16}{'parameters':>12}")
  for name, model in found.items():
    vision, text = (f"{t['width']}/{t['layers']}/{t['heads']}" for t in (model["vision"], model["text"]))
    print(
      f"{name:<14}{model['image_size']:>6}{model['embed_dim']:>7}  {vision:<18}{text:<16}"
      f"{model['parameters'] / 1e6:>10.2f} M"
    )
  print("vision and text: width/layers/heads")


def _data_index(arguments):
  from clip_jax.data.sources import tar

  paths = tar.expand(arguments.path)
  tables = tar.index_shards(
    paths, allow_truncated=arguments.allow_truncated, rebuild=arguments.rebuild
  )
  return {"shards": len(paths), "records": sum(len(t) for t in tables), "bytes": sum(t.nbytes for t in tables)}


def _show_index(found):
  print(f"{found['records']:,} records in {found['shards']:,} shards; the index takes {found['bytes']:,} bytes.")


def _report(arguments):
  from clip_jax.report import page

  try:
    return {"report": str(page.write(arguments.workdir))}
  except (FileNotFoundError, ValueError) as error:
    raise UsageError(str(error)) from error


def _show_report(found):
  print(found["report"])


def _doctor(_):
  from clip_jax.parallel import distributed
  from clip_jax.train import environment

  distributed.leave_tpu_out()
  return environment.describe() | {"extras": environment.extras()}


def _show_doctor(found):
  for key, value in found.items():
    if key != "extras":
      print(f"{key:<18}{value}")
  for extra, missing in found["extras"].items():
    print(f"extra {extra:<12}" + (f"missing: {', '.join(missing)}" if missing else "installed"))


if __name__ == "__main__":
  sys.exit(main())
