"""The `clip-jax` command: parses, calls one function, prints.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

import argparse
import inspect
import json
import os
import sys
from pathlib import Path

from clip_jax.cli import arguments as types
from clip_jax.cli import data, doctor, embedding, evaluation, plan, scaling
from clip_jax.errors import EXIT_FAILED, EXIT_USAGE, StorageError, TrainingError, UsageError, redact
from clip_jax.files import tell


def main(argv=None):
  """Runs one command.

  Args:
    argv: the arguments; those of the process if not given.

  Returns:
    The exit code: 0 done, 2 wrong usage or input, 1 a disk or a bucket that does not answer, or a machine that `doctor`
    finds broken. Anything else that goes wrong is raised.
  """
  own, passed_on = _split(sys.argv[1:] if argv is None else list(argv))
  parser = _parser()
  overrides = [argument for argument in own if argument.startswith("--config.")]
  arguments = parser.parse_args([argument for argument in own if argument not in overrides])
  if overrides and not hasattr(arguments, "overrides"):
    parser.error(f"nothing here has a config: {overrides[0]}")
  arguments.overrides = overrides
  if passed_on and not hasattr(arguments, "passed_on"):
    parser.error(f"nothing can follow -- here: {' '.join(passed_on)}")
  arguments.passed_on = passed_on
  code = 0
  try:
    result = arguments.run(arguments)
    # Of what takes minutes each, one after the other.
    for found in result if inspect.isgenerator(result) else [result]:
      if arguments.json:
        print(json.dumps(arguments.json_of(found)), flush=True)
      else:
        arguments.show(found)
      code = arguments.exit_code(found)
  except UsageError as error:
    tell(str(error))
    return EXIT_USAGE
  except (StorageError, TrainingError) as error:
    tell(str(error))
    return EXIT_FAILED
  except BrokenPipeError:  # who reads has seen enough, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say so again at its end
    return EXIT_FAILED
  return code


def _split(argv):
  # What follows -- is for somebody else: of `data convert`, for Beam.
  at = argv.index("--") if "--" in argv else len(argv)
  return argv[:at], argv[at + 1 :]


class _Parser(argparse.ArgumentParser):
  # Its subparsers are of this class, too.

  def error(self, message):
    super().error(redact(message))  # which quotes what was given


def _parser():
  parser = _Parser(
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
    one.set_defaults(run=run, show=show, json_of=lambda found: found, exit_code=lambda _: 0)
    return one

  verb(verbs, "models", _models, _show_models, "List the models known by name.", "clip-jax models")
  data.add(verbs, verb)
  report = verb(
    verbs, "report", _report, _show_report, "Write report.html of a run or a sweep, or the page of results of `eval`.", "clip-jax report runs/quickstart"
  )
  report.add_argument("workdir", help="the work directory of a run or a sweep; or results.csv of `eval`")
  export = verb(
    verbs, "export", _export, _show_export,
    "Write a model for others: OpenAI's .pt file, open_clip's hub folder, a Hugging Face folder, StableHLO or ONNX.",
    "clip-jax export runs/vitb16 --to huggingface exported/vitb16 --verify",
  )  # fmt: skip
  export.add_argument("checkpoint", help="a work directory or checkpoint; or another project's folder or file")
  export.add_argument("out", help="what to write; there must be nothing yet")
  export.add_argument("--to", required=True, choices=("openai", "open_clip", "huggingface", "stablehlo", "onnx"), help="the layout")
  export.add_argument("--verify", action="store_true", help="run the same images and texts through both (needs torch)")
  export.add_argument("--max-shard-size", type=types.number_of_bytes, default="5GB", metavar="SIZE", help=(
    "Hugging Face weights larger than this are split over files (5GB)"
  ))  # fmt: skip
  imports = verb(
    verbs, "import", _import, _show_import,
    "Make a checkpoint of another project's weights: OpenAI, open_clip or Hugging Face; .pt, .bin or safetensors.",
    "clip-jax import ViT-B-32.pt imported/vitb32",
  )  # fmt: skip
  imports.add_argument("source", metavar="FILE_OR_FOLDER", help="a file of weights, or a folder with its config")
  imports.add_argument("out", help="the checkpoint folder to write; there must be nothing yet")
  for one in (export, imports):
    one.add_argument("--model", metavar="NAME", help=(
      "which model a file of tensors holds that does not say so, such as ViT-B-32-quickgelu"
    ))  # fmt: skip
  evaluation.add(verbs, verb)
  embedding.add(verbs, verb)
  plan.add(verbs, verb)
  scaling.add(verbs, verb)
  doctor.add(verbs, verb)
  return parser


def _models(_):
  from clip_jax import config as configs
  from clip_jax.models import size, zoo

  found = {}
  for name in zoo.MODELS:
    model = configs.model_from_dict({"name": name})
    image, text = size.forward_macs(model)
    more = {"parameters": size.parameters(model), "image_gmacs": image / 1e9, "text_gmacs": text / 1e9}
    found[name] = configs.to_dict(model) | more
  return found


def _show_models(found):
  print(f"{'name':<25}{'image':>6}{'embed':>7}  {'vision':<19}{'text':<13}{'activation':<12}{'parameters':>12}{'GMACs':>16}")
  for name, model in found.items():
    vision, text = model["vision"], model["text"]
    layers = "-".join(map(str, vision["stages"])) if vision["stages"] else vision["layers"]
    vision = f"{vision['width']}/{layers}/{vision['heads']}"
    text = f"{text['width']}/{text['layers']}/{text['heads']}"
    print(
      f"{name:<25}{model['image_size']:>6}{model['embed_dim']:>7}  {vision:<19}{text:<13}{model['activation']:<12}"
      f"{model['parameters'] / 1e6:>10,.2f} M{model['image_gmacs']:>8.2f} +{model['text_gmacs']:>6.2f}"
    )
  print("vision and text: width/layers/heads; GMACs: one image + one text, forward; activation: of the Transformers' MLPs")


def _report(arguments):
  from clip_jax.report import evaluation_page, page

  if arguments.workdir.endswith((".csv", ".json")):
    return {"report": str(evaluation_page.write(arguments.workdir))}
  if (Path(arguments.workdir) / "sweep.json").exists():
    return {"report": scaling.page(arguments.workdir)["report"]}
  try:
    return {"report": str(page.write(arguments.workdir))}
  except (FileNotFoundError, ValueError) as error:
    raise UsageError(str(error)) from error


def _show_report(found):
  print(found["report"])


def _find(path, name):
  from clip_jax.convert import sources
  from clip_jax.parallel import distributed

  distributed.leave_tpu_out()
  return sources.find(path, name)


def _described(source, out):
  from clip_jax import config as configs
  from clip_jax.models import size

  model = source.model
  return {"out": str(out), "from": source.layout, "parameters": size.parameters(model), "model": configs.to_dict(model)}


def _export(arguments):
  from clip_jax.convert import exports

  source = _find(arguments.checkpoint, arguments.model)
  verified = exports.write(
    source, arguments.to, arguments.out,
    split_bytes=arguments.max_shard_size, track=types.tracker("exporting"), verified=arguments.verify,
  )  # fmt: skip
  found = _described(source, arguments.out) | {"to": arguments.to}
  return found | ({"verify": verified} if verified else {})


def _show_export(found):
  print(f"{found['out']}: {_what(found)}, for {found['to']}.")
  if "verify" in found:
    seen = found["verify"]
    differences = ", ".join(f"{key} {seen[key]:.1e}" for key in ("image", "text", "logits"))
    print(f"Largest difference to {seen['with']}: {differences}.")


def _import(arguments):
  from clip_jax.convert import exports

  source = _find(arguments.source, arguments.model)
  exports.import_weights(source, arguments.out, track=types.tracker("importing"))
  return _described(source, arguments.out)


def _show_import(found):
  print(f"{found['out']}: {_what(found)}, from {found['from']}.")
  model = found["model"]
  print(
    f"activation {model['activation']}, norm epsilon {model['norm_epsilon']:g}, images of {model['image_size']} pixels "
    f"({model['resize_mode']}), texts of {model['text']['context_length']} tokens ({model['tokenizer']})."
  )


def _what(found):
  return f"{found['model']['name'] or 'a model without a name'}, {found['parameters'] / 1e6:,.2f} M parameters"
