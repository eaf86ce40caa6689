"""What becomes of one record: why it is dropped, or how it is written."""

import hashlib
import io
import json
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

from clip_jax.data import images
from clip_jax.data.preparation import hashes
from clip_jax.data.sources.protocol import MAX_CAPTION
from clip_jax.data.sources.selection import Filters
from clip_jax.errors import DataError

LONGEST_SIDE = 65_500  # pixels, of what libjpeg writes
JPEG_BYTES = 0.4  # a pixel, of photographs at the quality of 95

LANGUAGE_KEYS = ("language", "LANGUAGE", "lang")
SCORE_KEYS = ("similarity", "clip_score", "clip_similarity", "clip_l14_similarity_score", "clip_b32_similarity_score")
# What is written of every record by itself.
OWN = {"image", "caption", "captions", "txt", "text", "label", "cls", "key", "width", "height", "json"}

# How messages of sources begin or go on, and the reason that is counted.
UNREADABLE = (
  ("leads out of the archive", "hostile_name"),
  ("a caption of", "caption_too_long_to_read"),
  ("holds a caption", "no_caption"),
  ("neither 'caption' nor 'captions'", "no_caption"),
)


class Judged(NamedTuple):
  """A record as the manifest has it; with a `reason` it is dropped, and what comes after says nothing."""

  reason: str
  message: str = ""
  captions: tuple[str, ...] = ()
  pixels: bytes = b""  # digest
  looks: int | None = None  # perceptual hash
  texts: int = 0  # digest of the captions
  width: int = 0  # pixels, as it is
  height: int = 0
  size: int = 0  # bytes that it will take, about
  untagged: tuple[str, ...] = ()  # filters that could not tell


class Prepared(NamedTuple):
  """A record as it is written."""

  image: bytes  # a JPEG
  captions: list[str]
  label: int | None
  key: str
  width: int
  height: int
  more: dict  # what else the source has of it, as JSON has it


def judge(record, settings):
  """Looks at all of a record.

  Args:
    record: a `Record`, or the `DataError` in its place.
    settings: `Settings`.

  Returns:
    A `Judged`.
  """
  if isinstance(record, DataError):
    return look(record, settings)
  captions, reason = captions_of(record, settings)
  if reason:
    return Judged(reason)
  reason, untagged = _tags(metadata(record), settings)
  if reason:
    return Judged(reason)
  found = look(record, settings)
  if found.reason:
    return found
  width, height = found.width, found.height
  kind = Filters(min_size=settings.min_size, max_aspect=settings.max_aspect)
  failed = [name for name, mask in kind.failed(np.array([width]), np.array([height]), np.array([0])).items() if mask[0]]
  size = resized(width, height, settings)
  if failed or max(size) > LONGEST_SIDE:
    return Judged(failed[0] if failed else "max_side")
  as_it_is = size == (width, height) and _is_plain(record.image)
  taken = len(record.image) if as_it_is else int(JPEG_BYTES * math.prod(size))
  return found._replace(
    captions=tuple(captions),
    texts=int.from_bytes(hashlib.blake2b("\0".join(captions).encode(), digest_size=8).digest(), "big"),
    size=taken + sum(map(len, captions)),
    untagged=tuple(untagged),
  )


def look(record, settings):
  """Decodes an image and hashes what it shows.

  Args:
    record: a `Record`, or the `DataError` in its place.
    settings: `Settings`.

  Returns:
    A `Judged`.
  """
  if isinstance(record, DataError):
    message = str(record)
    return Judged(next((reason for part, reason in UNREADABLE if part in message), "unreadable"), message[:1000])
  try:
    image = images.decode(record.image, max_pixels=settings.max_pixels)
  except images.DecodeError as error:
    return Judged("too_many_pixels" if "claims to have" in str(error) else "undecodable", str(error)[:1000])
  height, width = image.shape[:2]
  return Judged("", pixels=hashes.of_pixels(image), looks=hashes.perceptual(image), width=width, height=height)


def captions_of(record, settings):
  """The captions of a record that pass.

  Args:
    record: a `Record`.
    settings: `Settings`.

  Returns:
    Captions, and why the record is dropped or an empty text.
  """
  # Half of a pair of surrogates, which JSON can hold, is no text.
  captions = list(dict.fromkeys(c.strip().encode("utf-8", "replace").decode() for c in record.captions))
  if not captions:  # only a labelled record has none
    return [], ""
  kind = Filters(min_caption=settings.min_caption, max_caption=settings.max_caption)
  known = np.zeros(len(captions), int)
  failed = kind.failed(known, known, np.array([len(caption) for caption in captions]))
  passed = [c for i, c in enumerate(captions) if not any(mask[i] for mask in failed.values())]
  return passed, "" if passed else next(name for name, mask in failed.items() if mask[0])


def metadata(record):
  """What the source has of a record beside image and captions; nothing if that is larger than a caption may be."""
  found = dict(record.extra or {})
  try:
    inner = json.loads(found.get("json") or "{}")  # of a set that was prepared before
    found |= inner if isinstance(inner, dict) else {}
    more = {str(name): value for name, value in found.items() if name not in OWN and value is not None}
    text = json.dumps(more, default=str)
  except (ValueError, TypeError, RecursionError):
    return {}
  return json.loads(text) if len(text) <= MAX_CAPTION else {}


def _tags(more, settings):
  # Why a record is dropped for its tags, and which filters had none to look at.
  untagged = []
  if settings.languages:
    tag = _first(more, settings.language_key, LANGUAGE_KEYS)
    if not isinstance(tag, str) or not tag:
      untagged.append("language")
    elif tag.lower() not in [name.lower() for name in settings.languages]:
      return "language", []
  if settings.min_score is not None:
    score = _first(more, settings.score_key, SCORE_KEYS)
    try:
      score = float(score)
    except (TypeError, ValueError):
      score = math.nan
    if math.isnan(score):
      untagged.append("score")
    elif score < settings.min_score:
      return "min_score", []
  return "", untagged


def _first(more, name, usual):
  return next((more[key] for key in ([name] if name else usual) if key in more), None)


def resized(width, height, settings):
  """The size that an image is written with.

  Args:
    width: pixels.
    height: pixels.
    settings: `Settings`.

  Returns:
    (width, height)
  """
  side = min(width, height) if settings.resize_mode == "keep_ratio" else max(width, height)
  if settings.max_size is None or side <= settings.max_size:
    return width, height
  return tuple(max(1, round(settings.max_size * one / side)) for one in (width, height))


def _is_plain(encoded):
  # Whether it is a JPEG in RGB whose pixels are upright as they are stored.
  if encoded[:2] != images.JPEG:
    return False
  try:
    image = Image.open(io.BytesIO(encoded))
    return image.mode == "RGB" and image.getexif().get(ExifTags.Base.Orientation, 1) in (0, 1)
  except Exception:  # whatever a damaged header may lead Pillow to: the pixels have been read
    return False


def prepare(record, settings):
  """Makes a record what is written.

  Args:
    record: a `Record` that was judged to pass.
    settings: `Settings`.

  Returns:
    A `Prepared`.

  Raises:
    DataError: its image cannot be decoded (any more).
  """
  captions, _ = captions_of(record, settings)
  stored = images.header_size(record.image)
  if stored and resized(*stored, settings) == stored and _is_plain(record.image):
    return Prepared(record.image, captions, record.label, record.key, *stored, metadata(record))
  try:
    image = images.decode(record.image, max_pixels=settings.max_pixels)
  except images.DecodeError as error:
    raise DataError(f"{record.key}: {error}") from error
  size = resized(image.shape[1], image.shape[0], settings)
  more = {"original_width": image.shape[1], "original_height": image.shape[0]} | metadata(record)
  if size != image.shape[1::-1]:
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
  _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
  return Prepared(encoded.tobytes(), captions, record.label, record.key, *size, more)
