"""Compositional sets: of a caption and one that is almost the same, which fits the picture?

SugarCrepe (Hsieh et al. 2023, arXiv 2306.14610) has a picture and two captions; Winoground (Thrush et al. 2022, arXiv 2204.03162)
two pictures and two captions, of the same words in another order.
"""

import dataclasses
import json
import os
import posixpath

import numpy as np

from clip_jax.data.pipeline import evaluation_pixels
from clip_jax.data.sources import Record
from clip_jax.errors import DataError
from clip_jax.evaluate import uncertainty
from clip_jax.evaluate.result import Result, Score

IMAGES = ("", "images/", "val2017/", "../val2017/", "../../val2017/")  # folders of pictures, from that of the list


@dataclasses.dataclass(frozen=True)
class Item:
  """Pictures and captions that belong together; the n-th caption is that of the n-th picture, and others are of none.

  Attributes:
    key: names it in messages.
    images: paths.
    captions: texts.
  """

  key: str
  images: tuple[str, ...]
  captions: tuple[str, ...]


class Items:
  """The items of a list, and their pictures as records."""

  def __init__(self, items, storage):
    """Keeps them; no picture is read."""
    self.items, self._storage = items, storage
    self._pictures = [(item, path) for item in items for path in item.images]

  def __len__(self):
    return len(self._pictures)

  def __getitem__(self, index):
    """The `Record` of a picture; those of an item follow one another."""
    item, path = self._pictures[index]
    return Record(self._storage.read(path), [], f"{item.key} ({posixpath.basename(path)})")


class Lines:
  """A source whose captions are the lines of its texts, as CLIP_benchmark keeps several captions of an image."""

  def __init__(self, source):
    """Wraps a `Source`."""
    self._source = source
    self.fingerprint = f"lines {source.fingerprint}"

  def __len__(self):
    return len(self._source)

  def __getitem__(self, index):
    """The record at an index."""
    record = self._source[index]
    return record._replace(captions=[line for text in record.captions for line in text.splitlines() if line.strip()])

  def __iter__(self):
    """All records in order."""
    for record in self._source:
      yield record._replace(captions=[line for text in record.captions for line in text.splitlines() if line.strip()])

  def key(self, index):
    """What names a record in messages."""
    return self._source.key(index)


def find(place, storage):
  """The set at a place: `PLACE.json` of SugarCrepe, or `PLACE/examples.jsonl` of Winoground.

  Args:
    place: a path or URL.
    storage: a `Storage`.

  Returns:
    `Items`, or None if there is neither.

  Raises:
    DataError: what is there is something else.
  """
  place = os.path.expanduser(place)
  for path, read in ((f"{place}.json", _sugar_crepe), (f"{place}/examples.jsonl", _winoground)):
    try:
      content = storage.read(path)
    except DataError:
      continue
    try:
      rows = read(content.decode())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise DataError(f"{path} is not a list of pictures with two captions ({type(error).__name__}: {error}).") from error
    if not rows:
      raise DataError(f"{path} is empty.")
    return Items([_located(path, storage, *row) for row in rows], storage)
  return None


def _sugar_crepe(content):
  return [(number, [row["filename"]], [row["caption"], row["negative_caption"]]) for number, row in json.loads(content).items()]


def _winoground(content):
  rows = [json.loads(line) for line in content.splitlines() if line.strip()]
  return [
    (str(row["id"]), [_with_ending(row["image_0"]), _with_ending(row["image_1"])], [row["caption_0"], row["caption_1"]]) for row in rows
  ]


def _with_ending(name):
  return name if "." in name else f"{name}.png"


def _located(path, storage, number, images, captions):
  folder = posixpath.dirname(path)
  if not all(isinstance(text, str) and text for text in (*images, *captions)):
    raise DataError(f"{path}: example {number} lacks a picture or a caption.")
  # Where the first one is, all of them are.
  places = [posixpath.normpath(posixpath.join(folder, place)) if "://" not in folder else f"{folder}/{place}".rstrip("/") for place in IMAGES]
  return Item(f"{posixpath.basename(path)}/{number}", tuple(_first(places, image, storage) for image in images), tuple(captions))


def _first(places, image, storage):
  for place in places[:-1]:
    if "://" not in place and os.path.exists(f"{place}/{image}"):
      return f"{place}/{image}"
  return f"{places[1]}/{image}"


class Selection:
  """Scores of a compositional set."""

  def __init__(self, held_out, encoder):
    """Keeps what it needs.

    Args:
      held_out: a `datasets.EvaluationSet` whose source are `Items`.
      encoder: an `Encoder`.
    """
    self.set, self._encoder = held_out, encoder

  def __call__(self, params):
    """Scores a model.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      A `Result`: of pictures whose own captions all win "text_acc", of captions whose pictures do "image_acc", and both, "acc"
      (Winoground's text, image and group scores). A tie is lost.
    """
    model, source = self._encoder.model, self.set.source
    images = self._encoder.images(
      params, len(source), lambda index: evaluation_pixels(source[index], model.image_size, model.resize_mode)
    )
    texts = self._encoder.texts(params, self._encoder.tokenizer([text for item in source.items for text in item.captions]))
    image_at = text_at = 0
    found = {"text_acc": [], "image_acc": []}
    for item in source.items:
      scores = images[image_at : image_at + len(item.images)] @ texts[text_at : text_at + len(item.captions)].T
      image_at, text_at = image_at + len(item.images), text_at + len(item.captions)
      found["text_acc"].append(wins(scores))
      found["image_acc"].append(wins(scores.T))
    found["acc"] = np.logical_and(*found.values())
    return Result(
      len(source.items),
      {name: Score(float(np.mean(seen)), uncertainty.of_mean(seen), self._chance(name)) for name, seen in found.items()},
      outcomes={name: (np.asarray(seen, np.float64), None) for name, seen in found.items()},
    )

  def _chance(self, name):
    # Of scores in any order. With two of each: 1/4 of texts and of pictures, and 1/6 of both (Thrush et al. 2022, table 3).
    item = self.set.source.items[0]
    images, captions = len(item.images), len(item.captions)
    pairs = min(images, captions)
    if pairs == 1:
      return 1 / {"text_acc": captions, "image_acc": images, "acc": captions * images}[name]
    return 1 / 6 if name == "acc" else 1 / 4


def wins(scores):
  """Whether in each of the first rows, as many as there are pairs, the entry on the diagonal is the largest, and alone so."""
  pairs = min(scores.shape)
  return all((np.delete(scores[i], i) < scores[i, i]).all() for i in range(pairs))
