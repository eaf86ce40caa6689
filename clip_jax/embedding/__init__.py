"""Embeddings of large sets, in the layout of clip-retrieval: a part of the set is files of its own, made by one host.

A part is a range of record numbers, and its bytes depend on nothing but the weights and those records. So hosts need not know of one
another, and who was killed makes its unfinished part again: each record is in the folder once, or not yet.

    DIR/embed.json                          what the folder holds, written first
    DIR/img_emb/img_emb_N.npy               float16 [rows, embed_dim], of unit length
    DIR/text_emb/text_emb_N.npy             the same of first captions
    DIR/metadata/metadata_N.parquet         which records the rows are; written last, so that it stands for a whole part
    DIR/bad_records/bad_records_N.jsonl     what was left out, if anything was
"""

import contextlib
import dataclasses
import itertools

import numpy as np

import clip_jax
from clip_jax.data import images
from clip_jax.embedding.folder import DTYPE, METADATA, Folder, Part
from clip_jax.embedding.reading import TOGETHER, Records
from clip_jax.errors import DataError, StorageError, redact, redacted
from clip_jax.evaluate.encode import NOTHING

FORMAT = 1  # of embed.json
# Records whose texts are sorted by length together, and whose metadata are a row group. Bits depend on it, so it is one number for
# any devices.
BLOCK = 1 << 15
LOOKED_AT = 100  # records, to know whether there are captions and labels


class Stopped(Exception):
  """Somebody wishes to stop; what is finished is on disk."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What to embed, and who does which part of it.

  Attributes:
    output: the folder to write.
    path: what the source was opened with, for people.
    only: "image" or "text"; "" for images, and for texts where there are captions.
    part_size: records of a part.
    host: number of this one, from 0.
    hosts: how many there are; part p is made by host p mod `hosts`.
  """

  output: str
  path: str
  only: str = ""
  part_size: int = 1_000_000
  host: int = 0
  hosts: int = 1


def embed(encoder, params, model, source, request, progress=lambda part, done, total: None):
  """Makes the parts of this host that are not there yet.

  Args:
    encoder: a `clip_jax.evaluate.encode.Encoder` on devices of this process alone.
    params: parameters on its mesh.
    model: where they are from, a `clip_jax.convert.sources.Source`.
    source: a `clip_jax.data.sources.Source`.
    request: a `Request`.
    progress: called with the number of a part, how many records of this host are done, and how many it has. It may raise `Stopped`,
      and so may what the encoder calls.

  Returns:
    A dict of counts, ready for JSON: of this host's parts and records, but for "all_parts" and "parts_there".

  Raises:
    UsageError: the folder holds something else, or the data are not right.
    StorageError: something cannot be read or written; what is finished is whole.
  """
  settings = describe(encoder, params, model, source, request)
  folder = Folder(request.output, settings)
  parts = range(request.host, settings["parts"], request.hosts)
  total = sum(len(folder.records(part)) for part in parts)
  before, rows, stopped = 0, {}, False
  try:
    folder.claim()
    folder.clean(parts)
    rows = {part: found for part in parts if (found := folder.rows(part)) is not None}
    before, done = len(rows), sum(len(folder.records(part)) for part in rows)
    progress(next((part for part in parts if part not in rows), 0), done, total)
    for part in (part for part in parts if part not in rows):
      rows[part] = _make(folder, part, encoder, params, source, lambda n, part=part, done=done: progress(part, done + n, total))
      done += len(folder.records(part))
  except Stopped:
    stopped = True
  except OSError as error:
    raise StorageError(
      f"{folder.path} cannot be written: {error.strerror or error}. What is finished is whole; the same command goes on."
    ) from error
  there = sum(folder.file(METADATA, part).exists() for part in range(settings["parts"]))
  records = sum(len(folder.records(part)) for part in rows)
  told = {"output": redact(request.output), "embeddings": settings["embeddings"], "embed_dim": settings["embed_dim"]}
  told |= {"host": request.host, "hosts": request.hosts, "parts": len(parts), "parts_before": before, "parts_done": len(rows)}
  told |= {"records": total, "records_done": records, "rows": sum(rows.values()), "bad_records": records - sum(rows.values())}
  return told | {"all_parts": settings["parts"], "parts_there": there, "stopped": stopped}


def describe(encoder, params, model, source, request):
  """What embed.json says, for arguments as `embed` takes them.

  Returns:
    A dict, ready for JSON.

  Raises:
    DataError: none of the first records can be read, or texts are asked for and there are none.
  """
  first = source.fetch(range(min(len(source), LOOKED_AT)))
  good = [record for record in first if not isinstance(record, DataError)]
  if not good:
    raise DataError(f"{request.path}: none of the first {len(first)} records can be read; {first[0]}")
  captions, labels = any(record.captions for record in good), any(record.label is not None for record in good)
  if request.only == "text" and not captions:
    raise DataError(f"{request.path}: its records have classes and no captions; there is no text to embed.")
  kinds = [request.only] if request.only else ["image", "text"] if captions else ["image"]
  # `image_path` is what clip-retrieval's reader calls it.
  columns = ["key", "index", *["image_path"] * ("image" in kinds), *["caption"] * captions, *["label"] * labels]
  told = {"clip_jax": clip_jax.__version__, "model": model.model.name, "layout": model.layout, "where": model.where, "source": request.path}
  return redacted(
    {"format": FORMAT, **told, "weights": model.digest(params), "fingerprint": source.fingerprint, "records": len(source)}
    | {"part_size": request.part_size, "parts": -(-len(source) // request.part_size), "batch_size": encoder.chunk}
    | {"embeddings": kinds, "embed_dim": encoder.model.embed_dim, "dtype": DTYPE.name, "columns": columns}
  )


def _make(folder, number, encoder, params, source, progress):
  # Makes one part; returns its number of rows.
  waiting, count, done = [], 0, 0
  with Part(folder, number) as part, contextlib.closing(_pieces(folder, number, encoder, params, source)) as pieces:
    for piece in itertools.chain(pieces, [None]):
      if waiting and (piece is None or count >= BLOCK):
        _add(part, folder, encoder, params, waiting)
        waiting, count = [], 0
      if piece is not None:
        waiting.append(piece)
        count, done = count + len(piece[0]), done + len(piece[0])
        progress(done)
    return part.finish()


def _add(part, folder, encoder, params, pieces):
  # Writes a block of records, of whose texts it makes embeddings.
  items = [item for some, _ in pieces for item in some]
  good = [item for item in items if item.error is None]
  embeddings = {}
  if "image" in folder.arrays:
    embeddings["image"] = np.concatenate([rows for _, rows in pieces])[[item.error is None for item in items]]
  if "text" in folder.arrays:
    tokens = np.array([item.tokens for item in good], np.int32).reshape(len(good), encoder.model.text.context_length)
    embeddings["text"] = encoder.texts(params, tokens)
  columns = {name: [getattr(item, name) for item in good] for name in ("key", "index", "caption", "label")}
  bad = [{"index": item.index, "key": item.key, "error": item.error} for item in items if item.error is not None]
  part.add(embeddings, columns | {"image_path": columns["key"]}, bad)


def _pieces(folder, number, encoder, params, source):
  # Yields (`Item`s, embeddings of their images, or None) of some records after the others; how many does not depend on devices.
  size, mode = encoder.model.image_size, encoder.model.resize_mode
  noted, blank = {}, np.zeros((size, size, 3), np.uint8)
  tokenizer = encoder.tokenizer if "text" in folder.arrays else None

  def load(place):
    item, pixels = records(place), blank
    if item.error is None:
      try:
        pixels = images.resize_and_crop(images.decode(item.image), size, mode)
      except images.DecodeError as error:
        item = item._replace(error=str(error))
    noted[place] = item._replace(image=None)
    return pixels, NOTHING

  with contextlib.closing(Records(source, folder.records(number), tokenizer)) as records:
    if "image" not in folder.arrays:
      for start in range(0, len(records), TOGETHER):
        yield [records(place)._replace(image=None) for place in range(start, min(start + TOGETHER, len(records)))], None
      return
    with contextlib.closing(encoder.chunks(params, len(records), load, NOTHING)) as chunks:
      for start, rows, _ in chunks:
        yield [noted.pop(place) for place in range(start, start + len(rows))], rows
