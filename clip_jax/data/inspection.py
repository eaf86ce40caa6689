"""What a model will see of a data set: records are read, decoded and tokenized as in training, and counted."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import re
from typing import NamedTuple

import cv2
import numpy as np

from clip_jax.data import dataset as datasets
from clip_jax.data import images
from clip_jax.data.pipeline import CHUNK, BadRecords, Loader, tokenizer_for
from clip_jax.data.tokenizer import ClipTokenizer
from clip_jax.errors import DataError, redact

KEYS = 5  # named of each kind of bad record
COPIES, CAPTIONS, COPIES_OF_ONE = 8, 10, 4  # groups of equal images and captions that are shown, and members of a group
CAPTION = 300  # characters kept of a caption that may turn out to be a copy
THUMBNAIL = 160  # pixels of the longer side
MOST_POSITIONS = 1 << 24  # of a mixture in which one component has almost no weight
PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
NO_FILTERS = dict(min_size=0, max_aspect=None, min_caption=0, max_caption=None)


class Sample(NamedTuple):
  """A row of the first batch."""

  pixels: np.ndarray  # uint8 [size, size, 3], what the model gets
  key: str
  captions: list[str]  # of the record
  chosen: str  # the one that the model gets
  pieces: list[tuple[int, str, bool]]  # its tokens up to the end: id, text, and whether it only marks the start or the end


class Copy(NamedTuple):
  """One of several records with the same image."""

  key: str
  captions: list[str]
  pixels: np.ndarray  # uint8 [height, width, 3], small


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What was found.

  Attributes:
    summary: numbers and names, ready for JSON.
    values: what its percentiles are of, an array by name.
    samples: some of the first batch.
    copies: of the images that are there most often the number of records, and some of them; none where no samples are wanted.
  """

  summary: dict
  values: dict[str, np.ndarray]
  samples: list[Sample]
  copies: list[tuple[int, list[Copy]]]


def inspect(config, scan, samples=0, track=iter):
  """Looks at the data of a run.

  Args:
    config: a resolved `Config`.
    scan: positions of the run's order to look at, from the first; each record once, all of a smaller data set.
    samples: how many rows of the first batch to give.
    track: passes a list on, and shows people how far this is.

  Returns:
    An `Inspection`.

  Raises:
    UsageError: the data cannot be opened.
    StorageError: a disk or a bucket does not answer.
  """
  dataset, tokenizer = datasets.create(config), tokenizer_for(config.model)
  looks = _looks(dataset, config, tokenizer, _positions(dataset, scan), track)
  good = [look for look in looks if look.error is None]
  of_image, of_caption = _by_digest(good)
  values = _values(good)
  summary = {
    "source": redact(config.data.path) or f"a mixture of {len(config.data.mixture)}",
    "model": config.model.name,
    "image_size": config.model.image_size,
    "context_length": config.model.text.context_length,
    "records": len(dataset),
    "components": _components(dataset, config),
    "looked_at": len(looks),
    "formats": dict(collections.Counter(look.format for look in good).most_common()),
    **{name: _percentiles(array) for name, array in values.items()},
    "smaller_than_model": _share(values["shorter_side"] < config.model.image_size),
    "fill_context": _share(values["tokens"] == config.model.text.context_length),
    "bad": _bad(looks),
    "duplicates": {
      "images": len(good) - len(of_image),
      "captions": len(values["tokens"]) - len(of_caption),
      "most_repeated": [
        {"caption": text, "times": times} for times, text in sorted(of_caption.values(), reverse=True)[:CAPTIONS] if times > 1
      ],
    },
  }
  groups = sorted((places for places in of_image.values() if len(places) > 1), key=len, reverse=True)
  copies = [(len(places), _copies(dataset, config, places[:COPIES_OF_ONE])) for places in groups[:COPIES] if samples]
  return Inspection(summary, values, _samples(dataset, config, tokenizer, samples), copies)


class _Look(NamedTuple):
  """What is remembered of a record."""

  place: tuple[int, int]
  key: str
  error: str | None
  format: str = ""
  bytes: int = 0
  size: tuple[int, int] = (0, 0)  # width, height as the model sees them
  captions: tuple[tuple, ...] = ()  # (characters, tokens, digest, beginning) of each
  digest: bytes = b""  # of the image


def _positions(dataset, scan):
  # Of a mixture, a small component comes round again before a large one has been gone through.
  lengths, weights = dataset.order.lengths, dataset.order.weights
  if len(lengths) == 1:
    return np.arange(min(scan, len(dataset)))
  if scan >= len(dataset):
    periods = max(-(-length // weight) for length, weight in zip(lengths, weights, strict=True))
    scan = min(periods * sum(weights), MOST_POSITIONS)
  _, first = np.unique(np.stack(dataset.order.examples(np.arange(scan))), axis=1, return_index=True)
  return np.sort(first)


def _looks(dataset, config, tokenizer, positions, track):
  pool = concurrent.futures.ThreadPoolExecutor(config.data.threads or os.cpu_count())
  try:
    chunks = np.split(positions, range(CHUNK, len(positions), CHUNK))
    tasks = [pool.submit(_look, dataset, config, tokenizer, chunk) for chunk in chunks]
    return [look for task in track(tasks) for look in task.result()]
  finally:
    pool.shutdown(cancel_futures=True)


def _look(dataset, config, tokenizer, positions):
  return [_look_at(dataset, config, tokenizer, place, record) for place, record in dataset.at(positions)]


def _look_at(dataset, config, tokenizer, place, record):
  if isinstance(record, DataError):
    named = re.fullmatch(r"(\S+): (.*)", str(record), re.DOTALL)  # most messages say whose they are
    return _Look(place, *(named.groups() if named else (dataset.key(place), str(record))))
  key, kind = record.key, _format(record.image)
  if not record.captions:
    return _Look(place, key, "it has a class but no caption.", kind)
  try:
    height, width, _ = images.decode(record.image, max_pixels=config.data.max_pixels).shape
  except images.DecodeError as error:
    return _Look(place, key, str(error), kind)
  lengths = [stop - start for start, stop in map(text_span(tokenizer), tokenizer(record.captions))]
  captions = tuple(
    (len(text), length, _digest(text.encode("utf-8", "surrogatepass")), text[:CAPTION])
    for text, length in zip(record.captions, lengths, strict=True)
  )
  return _Look(place, key, None, kind, len(record.image), (width, height), captions, _digest(record.image))


def text_span(tokenizer):
  """A function from a row of a tokenizer's ids to (start, stop) of what is not padding, special tokens included."""
  if isinstance(tokenizer, ClipTokenizer):
    pad, end = None, tokenizer.end_token
  else:
    pad, end = tokenizer.pad_id, tokenizer.end_id

  def span(row):
    start = 0 if pad is None else int((row != pad).argmax())
    ends = np.flatnonzero(row[start:] == end)
    return start, start + int(ends[0]) + 1 if len(ends) else len(row)

  return span


def _digest(content):
  return hashlib.blake2b(content, digest_size=16).digest()


def _format(encoded):
  if encoded[:2] == images.JPEG:
    return "JPEG"
  if encoded[:8] == images.PNG:
    return "PNG"
  if encoded[:6] in images.GIF:
    return "GIF"
  return "WebP" if encoded[8:12] == b"WEBP" else "other"


def _by_digest(good):
  # The places of each image, and of each caption how often it is there and how it begins.
  of_image, of_caption = {}, {}
  for look in good:
    of_image.setdefault(look.digest, []).append(look.place)
    for _, _, digest, beginning in look.captions:
      times, text = of_caption.get(digest, (0, beginning))
      of_caption[digest] = times + 1, text
  return of_image, of_caption


def _values(good):
  sizes = np.array([look.size for look in good], np.int64).reshape(-1, 2)
  captions = np.array([caption[:2] for look in good for caption in look.captions], np.int64).reshape(-1, 2)
  return {
    "bytes": np.array([look.bytes for look in good], np.int64),
    "width": sizes[:, 0],
    "height": sizes[:, 1],
    "shorter_side": sizes.min(axis=1),
    "aspect": sizes[:, 0] / sizes[:, 1],
    "captions": np.array([len(look.captions) for look in good], np.int64),
    "characters": captions[:, 0],
    "tokens": captions[:, 1],
  }


def _percentiles(array):
  if not len(array):
    return None
  found = np.percentile(array, list(PERCENTILES.values()))
  return dict(zip(PERCENTILES, found.tolist(), strict=True)) | {"mean": float(array.mean())}


def _share(mask):
  return float(mask.mean()) if len(mask) else None


def _components(dataset, config):
  data = config.data
  pairs = data.mixture or ((data.path, 1.0),)
  everything = dataset.lengths
  if any(getattr(data, name) != default for name, default in NO_FILTERS.items()):
    unfiltered = dataclasses.replace(config, data=dataclasses.replace(data, **NO_FILTERS))
    everything = datasets.create(unfiltered).lengths
  total = sum(weight for _, weight in pairs)
  return [
    {"path": redact(path), "records": length, "share": weight / total, "filtered_out": whole - length}
    for (path, weight), length, whole in zip(pairs, dataset.lengths, everything, strict=True)
  ]


def _bad(looks):
  # Messages differ in what they quote: numbers, and how a file begins.
  kinds = {}
  for look in looks:
    if look.error is not None:
      kind = re.sub(r"\(starts with .*\)|\d[\d,]*", "", look.error, flags=re.DOTALL)
      kinds.setdefault((kind, look.format), []).append(look)
  most_first = sorted(kinds.values(), key=len, reverse=True)
  return {
    "records": sum(map(len, most_first)),
    "reasons": [
      {"reason": same[0].error, "records": len(same), "keys": [look.key for look in same[:KEYS]]} for same in most_first
    ],
  }


class _Witness:
  """Sees what a `Loader` takes for a row: as its clock it is called with every stage."""

  def __call__(self, stage, function, *arguments):
    if stage == "image":
      self.record = arguments[0]  # the last one is that which could be decoded
    elif stage == "tokenize":
      (self.captions,) = arguments
    return function(*arguments)


def _samples(dataset, config, tokenizer, count):
  witness, span, found = _Witness(), text_span(tokenizer), []
  load = Loader(dataset, config, BadRecords(None, 1.0), witness)
  size, length = config.model.image_size, config.model.text.context_length
  for position in range(min(count, len(dataset), config.train.global_batch_size)):
    out = {"images": np.empty((1, size, size, 3), np.uint8), "tokens": np.empty((1, length), np.int32)}
    try:
      load(np.array([position]), out)
    except DataError:  # neither it nor any substitute can be read; the counts tell why
      continue
    row = out["tokens"][0]
    pieces = [_piece(tokenizer, int(i)) for i in row[slice(*span(row))]]
    found.append(Sample(out["images"][0], witness.record.key, witness.record.captions, witness.captions[0], pieces))
  return found


def _piece(tokenizer, token):
  if isinstance(tokenizer, ClipTokenizer):
    marks = {tokenizer.start_token: "start", tokenizer.end_token: "end"}
  else:
    marks = {tokenizer.end_id: "end"}
  return token, marks.get(token) or tokenizer.decode([token]), token in marks


def _copies(dataset, config, places):
  records = [dataset.read(place) for place in places]
  return [
    Copy(record.key, record.captions, _thumbnail(images.decode(record.image, max_pixels=config.data.max_pixels)))
    for record in records
    if not isinstance(record, DataError)
  ]


def _thumbnail(image):
  scale = THUMBNAIL / max(image.shape[:2])
  if scale >= 1:
    return image
  return cv2.resize(image, [max(round(side * scale), 1) for side in image.shape[1::-1]], interpolation=cv2.INTER_AREA)
