"""The `clip-jax` command: parses, calls one function, prints.

Nothing heavy is imported before a verb needs it, so that `--help` answers at once.
"""

import argparse
import ast
import json
import os
import re
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
    "Build the byte-offset index of webdataset tar shards, beside them; training does it too, on first use.",
    "clip-jax data index 'gs://bucket/laion/{00000..00099}.tar'",
  )  # fmt: skip
  index.add_argument("path", help="a glob of shards, local, gs:// or s3://; {a..b} and {a,b} are expanded")
  index.add_argument("--processes", type=int, default=0, metavar="N", help="shards read at the same time (one a core)")
  index.add_argument("--rebuild", action="store_true", help="build them anew even if they are up to date")
  index.add_argument("--allow-truncated", action="store_true", help="accept shards that are cut off")
  _add_looks_at_data(verb, data)
  report = verb(
    verbs, "report", _report, _show_report, "Write report.html of a run.", "clip-jax report runs/quickstart"
  )
  report.add_argument("workdir", help="the run's work directory")
  export = verb(
    verbs, "export", _export, _show_export,
    "Write a model for others: OpenAI's .pt file, open_clip's hub folder, a Hugging Face folder, StableHLO or ONNX.",
    "clip-jax export runs/vitb16 --to huggingface exported/vitb16 --verify",
  )  # fmt: skip
  export.add_argument("checkpoint", help="a work directory or checkpoint; or another project's folder or file")
  export.add_argument("out", help="what to write; there must be nothing yet")
  export.add_argument("--to", required=True, choices=("openai", "open_clip", "huggingface", "stablehlo", "onnx"), help="the layout")
  export.add_argument("--verify", action="store_true", help="run the same images and texts through both (needs torch)")
  export.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help=(
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
  verb(verbs, "doctor", _doctor, _show_doctor, "Tell what this machine has for training.", "clip-jax doctor")
  return parser


def _add_looks_at_data(verb, data):
  bench = verb(
    data, "bench", _data_bench, _show_bench,
    "Measure how many training examples a second this machine makes of a data set, and where the time goes.",
    "clip-jax data bench 'shards/*.tar' --threads 1,8 --data order=blocks --data 'crop_scale=(0.5, 1.0)'",
  )  # fmt: skip
  bench.add_argument("--threads", type=_counts, default=(), metavar="N,N,...", help="how many (1, 2, 4, ... up to the cores)")
  bench.add_argument("--seconds", type=_seconds, default=5.0, metavar="S", help="time for each number of threads (5)")
  inspect = verb(
    data, "inspect", _data_inspect, _show_inspect,
    "Tell what a model will see of a data set: sizes, captions, what cannot be read, duplicates; and as a page with pictures.",
    "clip-jax data inspect 'gs://bucket/laion/*.tar' --html laion.html",
  )  # fmt: skip
  inspect.add_argument("--html", metavar="FILE", help="also write a page that shows all of it, with samples")
  inspect.add_argument("--scan", type=_count, default=10_000, metavar="N", help="records looked at, in the order of training (10000)")
  inspect.add_argument("--samples", type=_count, default=32, metavar="N", help="examples of the first step on the page (32)")
  for one in (bench, inspect):
    one.add_argument("source", nargs="?", default="", help=(
      "what config.data.path takes: a glob of files, local, gs:// or s3://; nothing, where --data gives a mixture"
    ))  # fmt: skip
    one.add_argument("--model", default="ViT-B-16", metavar="NAME", help="whose image size and tokenizer (ViT-B-16)")
    one.add_argument("--tokenizer", metavar="PATH", help="another tokenizer than the model's, as config.model.tokenizer takes it")
    one.add_argument("--data", action="append", default=[], metavar="KEY=VALUE", help="a key of config.data; may be repeated")


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


def _data_index(arguments):
  from clip_jax.data.sources import tar, tar_index
  from clip_jax.data.storage import Storage

  storage = Storage()
  paths = tar.shards(arguments.path, storage)
  index = tar_index.Index(
    paths, allow_truncated=arguments.allow_truncated, storage=storage, rebuild=arguments.rebuild, beside=True,
    processes=arguments.processes or os.cpu_count(),
  )  # fmt: skip
  return {"shards": len(paths), "records": len(index.rows), "bytes": index.rows.nbytes + index.ends.nbytes}


def _show_index(found):
  print(f"{found['records']:,} records in {found['shards']:,} shards; the index takes {found['bytes']:,} bytes.")


def _data_config(arguments):
  from clip_jax import config as configs
  from clip_jax.models import zoo

  data = {"path": arguments.source}
  for setting in arguments.data:
    key, equals, value = setting.partition("=")
    if not equals:
      raise UsageError(f"--data {setting}: expected KEY=VALUE, as in --data order=blocks.")
    try:
      data[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
      data[key] = value  # a word, or a path
  model = {"name": arguments.model, "tokenizer": arguments.tokenizer}
  # A model with a bias goes with this loss only, of which nothing is computed here.
  loss = {"name": "sigmoid"} if "logit_bias_init" in zoo.MODELS.get(arguments.model, {}) else {}
  return configs.resolve({"model": model, "loss": loss, "train": {"steps": 1}, "data": data})


def _data_bench(arguments):
  from clip_jax.data import bench, dataset
  from clip_jax.data.storage import redact

  config = _data_config(arguments)
  threads = arguments.threads or bench.default_threads()
  rows = bench.measure(dataset.create(config), config, threads, arguments.seconds, _tracker("measuring"))
  source = redact(config.data.path) or f"a mixture of {len(config.data.mixture)}"
  return {"source": source, "model": arguments.model, "image_size": config.model.image_size, "threads": rows}


def _show_bench(found):
  stages = ("read", "decode", "resize", "tokenize", "other")
  print(f"{found['source']}, as {found['model']} gets it ({found['image_size']} pixels)")
  print(f"{'threads':>7}{'images/s':>12}{'a thread':>12}{'MB/s':>10}" + "".join(f"{stage:>10}" for stage in stages))
  for row in found["threads"]:
    rate = row["images_per_second"]
    print(
      f"{row['threads']:>7}{rate:>12,.0f}{rate / row['threads']:>12,.0f}{row['megabytes_per_second']:>10,.1f}"
      + "".join(f"{row[stage]:>10.1%}" for stage in stages)
    )
  print("MB/s: of encoded images; read to other: shares of the threads' time, resize with the rest of augmentation")


def _data_inspect(arguments):
  from pathlib import Path

  from clip_jax import config as configs
  from clip_jax.data import inspection
  from clip_jax.report import data_page

  html = arguments.html
  if html and not (Path(html).absolute().parent.is_dir() and not Path(html).is_dir()):  # before all the work
    raise UsageError(f"--html {html}: it must be a file in a folder that exists.")
  config = _data_config(arguments)
  found = inspection.inspect(config, arguments.scan, arguments.samples if html else 0, _tracker("inspecting"))
  if html:
    try:
      data_page.write(html, found, configs.to_dict(config)["data"])
    except OSError as error:
      raise UsageError(f"{html} cannot be written: {error.strerror or error}.") from error
  return found.summary | ({"html": html} if html else {})


def _show_inspect(found):
  from clip_jax.report import data_page

  print("\n".join(data_page.lines(found)))
  if "html" in found:
    print(found["html"])


def _report(arguments):
  from clip_jax.report import page

  try:
    return {"report": str(page.write(arguments.workdir))}
  except (FileNotFoundError, ValueError) as error:
    raise UsageError(str(error)) from error


def _show_report(found):
  print(found["report"])


def _bytes(text):
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
  if not match or not float(match[1]):
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; 5GB and 500MB are.")
  return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def _count(text):
  if not re.fullmatch(r"0*[1-9]\d{0,11}", text, re.ASCII):
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on.")
  return int(text)


def _counts(text):
  return tuple(map(_count, text.split(",")))


def _seconds(text):
  if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text, re.ASCII) or not float(text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds.")
  return float(text)


def _find(path, name):
  from clip_jax.convert import sources
  from clip_jax.parallel import distributed

  distributed.leave_tpu_out()
  return sources.find(path, name)


def _tracker(what):
  from rich.console import Console
  from rich.progress import track

  # To stderr, and only for people: standard output is for the result.
  return lambda items: track(items, what, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)


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
    split_bytes=arguments.max_shard_size, track=_tracker("exporting"), verified=arguments.verify,
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
  exports.import_weights(source, arguments.out, track=_tracker("importing"))
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
