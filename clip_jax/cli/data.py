"""`clip-jax data`: the index, what a data set is like, how fast it is read, and its preparation."""

import argparse
import ast
import dataclasses
import os

from clip_jax.cli import arguments as types
from clip_jax.errors import UsageError, redact


def add(verbs, verb):
  """Adds the verbs.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
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
  _add_looks(verb, data)
  _add_convert(verb, data)


def _add_looks(verb, data):
  bench = verb(
    data, "bench", _data_bench, _show_bench,
    "Measure how many training examples a second this machine makes of a data set, and where the time goes.",
    "clip-jax data bench 'shards/*.tar' --threads 1,8 --data order=blocks --data 'crop_scale=(0.5, 1.0)'",
  )  # fmt: skip
  bench.add_argument("--threads", type=types.counts, default=(), metavar="N,N,...", help="how many (1, 2, 4, ... up to the cores)")
  bench.add_argument("--seconds", type=types.seconds, default=5.0, metavar="S", help="time for each number of threads (5)")
  inspect = verb(
    data, "inspect", _data_inspect, _show_inspect,
    "Tell what a model will see of a data set: sizes, captions, what cannot be read, duplicates; and as a page with pictures.",
    "clip-jax data inspect 'gs://bucket/laion/*.tar' --html laion.html",
  )  # fmt: skip
  inspect.add_argument("--html", metavar="FILE", help="also write a page that shows all of it, with samples")
  inspect.add_argument("--scan", type=types.count, default=10_000, metavar="N", help="records looked at, in the order of training (10000)")
  inspect.add_argument("--samples", type=types.count, default=32, metavar="N", help="examples of the first step on the page (32)")
  for one in (bench, inspect):
    one.add_argument("source", nargs="?", default="", help=(
      "what config.data.path takes: a glob of files, local, gs:// or s3://; nothing, where --data gives a mixture"
    ))  # fmt: skip
    one.add_argument("--model", default="ViT-B-16", metavar="NAME", help="whose image size and tokenizer (ViT-B-16)")
    one.add_argument("--tokenizer", metavar="PATH", help="another tokenizer than the model's, as config.model.tokenizer takes it")
    one.add_argument("--data", action="append", default=[], metavar="KEY=VALUE", help="a key of config.data; may be repeated")


def _add_convert(verb, data):
  convert = verb(
    data, "convert", _data_convert, _show_convert,
    "Prepare a data set: verify, make smaller, filter, remove copies and test images, shuffle into ArrayRecord or tars (needs Beam).",
    "clip-jax data convert 'gs://bucket/laion/*.tar' gs://bucket/prepared --max-size 256 -- --runner=DataflowRunner",
  )  # fmt: skip
  convert.set_defaults(passed_on=[])
  convert.add_argument("source", metavar="IN", help="what config.data.path takes: a glob of files, local, gs:// or s3://")
  convert.add_argument("out", metavar="OUT", help="the folder to write; the same command goes on with what a stopped one left")

  def option(name, text, **more):
    convert.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **more)

  option("format", "what to write (array_record)", choices=("array_record", "tar"))
  option("name", "what names of ArrayRecord files begin with (data)")
  option("shard-size", "bytes of a file, about (1GB)", type=types.number_of_bytes, metavar="SIZE")
  option("max-size", "larger images are made smaller, never larger; pixels of the shorter side", type=types.count, metavar="N")
  option("resize-mode", "limit the shorter or the longer side (img2dataset's names)", choices=("keep_ratio", "keep_ratio_largest"))
  option("quality", "of JPEGs that are written anew (95)", type=types.count, metavar="N")
  option("min-size", "pixels of the shorter side, at least", type=types.count, metavar="N")
  option("max-aspect", "longer side over shorter side, at most", type=float, metavar="R")
  option("min-caption", "characters, at least", type=types.count, metavar="N")
  option("max-caption", "characters, at most", type=types.count, metavar="N")
  option("language", "keep this one; may be repeated; records without a tag pass, and are counted", action="append", metavar="TAG", dest="languages")
  option("language-key", "where the tag is (LANGUAGE, language, ...)", metavar="NAME")
  option("min-score", "CLIP score, at least; records without one pass, and are counted", type=float, metavar="X")
  option("score-key", "where the score is (similarity, clip_score, ...)", metavar="NAME")
  option("same-image", "of the same pixels with other captions (merge)", choices=("merge", "first", "separate"))
  option("near-distance", "bits of 64 in which the perceptual hashes of copies may differ, or none (4)", type=types.count_or_none, metavar="N")
  option("exclude", "evaluation images that must not be trained on: a folder, a glob or a data set; may be repeated", action="append", metavar="PATH")
  option("exclude-distance", "as --near-distance, to one of those (4)", type=types.count_or_none, metavar="N")
  option("seed", "of the order that is written (0)", type=int, metavar="N")
  option("caption", "name of a caption to read; may be repeated", action="append", metavar="NAME", dest="captions")
  option("image", "name of the column or feature with the image", metavar="NAME")
  option("allow-truncated", "use the whole records of tar shards that are cut off", action="store_true")
  option("range-records", "records that are one piece of work (500)", type=types.count, metavar="N")


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

  config = _data_config(arguments)
  threads = arguments.threads or bench.default_threads()
  rows = bench.measure(dataset.create(config), config, threads, arguments.seconds, types.tracker("measuring"))
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
  found = inspection.inspect(config, arguments.scan, arguments.samples if html else 0, types.tracker("inspecting"))
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


def _data_convert(arguments):
  from clip_jax.data import preparation

  given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(preparation.Settings) if hasattr(arguments, field.name)}
  given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
  return preparation.convert(arguments.source, arguments.out, preparation.Settings(**given), arguments.passed_on)


def _show_convert(found):
  dropped = ", ".join(f"{name} {count:,}" for name, count in found["dropped"].items() if count)
  print(f"{found['records']:,} of {found['input']['records']:,} records are kept; dropped: {dropped or 'none'}.")
  print(f"shards: {len(found['shards']):,}, {found['bytes']:,} bytes; dataset_info.json has all counts.")
