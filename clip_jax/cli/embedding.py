"""`clip-jax embed`: the images and texts of a set as embeddings."""

import contextlib
import signal
import sys
import time

from clip_jax import files
from clip_jax.cli import arguments as types
from clip_jax.cli import evaluation
from clip_jax.errors import EXIT_TRY_AGAIN, UsageError

EPILOG = """
DIR has the layout of clip-retrieval: img_emb/img_emb_N.npy, text_emb/text_emb_N.npy (float16), metadata/metadata_N.parquet. The same
command goes on with what a stopped one left. Processes of Slurm, Open MPI, a Cloud TPU slice or the JAX_* variables share the parts;
other machines with the same folder do with --host and --hosts. A host that ends early does not disturb the others."""
DAYS = 30 * 86400  # that a process of a TPU slice, which is bound to the others, waits for them


def add(verbs, verb):
  """Adds the verb.

  Args:
    verbs: the subparsers of the command.
    verb: what makes one of them, as in `clip_jax.cli`.
  """
  embed = verb(
    verbs, "embed", _embed, _show,
    "Embed the images and texts of a set of any size: float16 files in parts, on any number of hosts.",
    "clip-jax embed runs/vitb16 'gs://bucket/laion/*.tar' --output embeddings",
  )  # fmt: skip
  embed.epilog += f"\n{EPILOG}"
  embed.set_defaults(exit_code=lambda found: EXIT_TRY_AGAIN if found["stopped"] else 0)
  embed.add_argument("weights", metavar="MODEL", help="a work directory, a checkpoint, a Hugging Face or open_clip folder, or a file of tensors")
  embed.add_argument("source", metavar="SOURCE", help="what config.data.path takes: a glob of files, local, gs:// or s3://")
  embed.add_argument("--output", required=True, metavar="DIR", help="the folder to write")
  embed.add_argument("--only", choices=("image", "text"), default="", help="images and, where there are captions, first captions, if not given")
  embed.add_argument("--part-size", type=types.count, default=1_000_000, metavar="N", help="records of a part (1000000)")
  embed.add_argument("--batch-size", type=types.count, default=64, metavar="N", help="images that a device takes at a time (64)")
  evaluation.weights(embed)
  embed.add_argument("--source", dest="format", default="auto", metavar="FORMAT", help="tar, parquet, array_record, tfds, folder or classes, where the path does not tell")
  embed.add_argument("--caption", action="append", default=[], metavar="NAME", dest="captions", help="name of a caption to read; may be repeated")
  embed.add_argument("--image", default="", metavar="NAME", help="name of the column or feature with the image")
  embed.add_argument("--allow-truncated", action="store_true", help="use the whole records of tar shards that are cut off")
  embed.add_argument("--host", type=types.count_or_none, metavar="I", help="number of this machine, from 0, where machines do not know of one another")
  embed.add_argument("--hosts", type=types.count, metavar="N", help="how many there are")


def _embed(arguments):
  from clip_jax.data import sources as data
  from clip_jax.parallel import distributed

  distributed.enable_compilation_cache()
  host, hosts = place(arguments.host, arguments.hosts)
  if arguments.format not in (*data.FORMATS, "auto"):
    raise UsageError(f"--source {arguments.format} is no format of data; there are {', '.join(data.FORMATS)}.")
  import jax

  from clip_jax import benchmark, embedding
  from clip_jax.convert import sources
  from clip_jax.evaluate.encode import Encoder

  options = data.Options(tuple((name, 1.0) for name in arguments.captions), arguments.image, allow_truncated=arguments.allow_truncated)
  source = data.create(arguments.format, arguments.source, options)
  model = sources.find(arguments.weights, arguments.model, ema=arguments.ema, average=arguments.average_checkpoints)
  request = embedding.Request(arguments.output, arguments.source, arguments.only, arguments.part_size, host, hosts)
  devices = jax.local_devices()
  mesh = benchmark.everywhere(devices)
  with Progress(request, embedding.Stopped) as progress:
    encoder = Encoder(model.model, mesh, arguments.batch_size * len(devices), lambda *_: progress.check(), tokenizer=model.tokenizer)
    return embedding.embed(encoder, benchmark.on_all(model.params(), mesh), model, source, request, progress)


def _show(found):
  parts = f"{found['parts_done']:,} of {found['parts']:,} parts"
  of_host = f" of host {found['host']} (of {found['hosts']})" if found["hosts"] > 1 else ""
  print(f"{found['output']}: {parts}{of_host}, {found['rows']:,} rows of {' and '.join(found['embeddings'])} embeddings, {found['embed_dim']} numbers each.")
  if found["bad_records"]:
    print(f"{found['bad_records']:,} records could not be read and are left out; they are listed in {found['output']}/bad_records.")
  if found["stopped"]:
    print("Stopped; what is finished is whole. The same command goes on.")
  elif found["parts_there"] < found["all_parts"]:
    print(f"Of all hosts {found['parts_there']:,} of {found['all_parts']:,} parts are there.")


def place(host=None, hosts=None):
  """The number of this process among those that share the work, and how many they are.

  Processes are not joined where a launcher tells them their numbers: one that is done, or dead, would end or delay the others.

  Args:
    host: the number, if it was given.
    hosts: how many, if that was given.

  Raises:
    UsageError: only one of the two was given, or they do not go together.
  """
  from clip_jax.parallel import clusters, distributed

  if host is None and hosts is None:
    cluster = clusters.find()
    if cluster is not None and not cluster.joined:
      if cluster.gpu is not None:
        import jax

        jax.config.update("jax_cuda_visible_devices", str(cluster.gpu))
      distributed.leave_tpu_out()
      return cluster.number, cluster.count
    distributed.initialize(DAYS)
    import jax

    return jax.process_index(), jax.process_count()
  if host is None or hosts is None or host >= hosts:
    raise UsageError("--host and --hosts must be whole numbers, the first smaller: 0 and 4 are the first of four machines.")
  distributed.leave_tpu_out()
  return host, hosts


class Progress:
  """How far it is, for people, on standard error; and the signals that stop it between two batches."""

  def __init__(self, request, stopped, file=None):
    """Prepares.

    Args:
      request: an `embedding.Request`.
      stopped: what to raise when a signal has come.
      file: where to write; standard error if not given.
    """
    self._request, self._stopped, self._file = request, stopped, file or sys.stderr
    self._received, self._live = None, None
    self._begun = self._said = self._first = None

  def __enter__(self):
    from clip_jax.train.stopping import handled

    self._handled = handled(self._receive)
    self._handled.__enter__()
    return self

  def __exit__(self, *reason):
    self._handled.__exit__(*reason)
    if self._live:
      self._live.stop()

  def _receive(self, number, _):
    self._received = number
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    files.tell(f"\n{signal.Signals(number).name}: stopping after this batch; the part that is being made is begun again by the same command.")

  def check(self):
    """Raises what stops the work, if a signal has come."""
    if self._received is not None:
      raise self._stopped

  def __call__(self, part, done, total):
    """Shows it.

    Args:
      part: the number of the part that is being made.
      done: records that are done.
      total: all that this host has.
    """
    self.check()
    now = time.monotonic()
    if self._first is None:
      self._first, self._said = done, now
    elif self._begun is None:  # the first batch's time is that of compiling
      self._begun, self._first = now, done
    line = self._line(part, done, total, now)
    if self._file.isatty():
      self._live = self._live or self._bar(total)
      self._live.update(self._task, completed=done, line=line)
    elif done == total or now - self._said >= evaluation.SECONDS_BETWEEN_LINES:
      self._said = now
      with contextlib.suppress(OSError):  # a log on a disk that is full
        print(f"{done:,}/{total:,} records  {line}", file=self._file, flush=True)

  def _line(self, part, done, total, now):
    from clip_jax.train.progress import duration

    host = f"  host {self._request.host} of {self._request.hosts}" if self._request.hosts > 1 else ""
    if self._begun is None or done == self._first:
      return f"part {part}{host}"
    rate = (done - self._first) / (now - self._begun)
    return f"part {part}{host}  {rate:,.0f} records/s  {duration((total - done) / rate)} left"

  def _bar(self, total):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    live = Bar(MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"), console=Console(file=self._file))
    self._task = live.add_task("", total=total, line="")
    live.start()
    return live
