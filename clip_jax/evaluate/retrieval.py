"""Image-text retrieval: recall at K both ways (Radford et al. 2021, table 13)."""

import base64
import io
import math
import random

import numpy as np
from PIL import Image

from clip_jax.data import images
from clip_jax.data.pipeline import evaluation_pixels, tokenizer_for
from clip_jax.errors import DataError
from clip_jax.evaluate import nearest_image
from clip_jax.evaluate.search import nearest

KS = (1, 5, 10)
THUMBNAIL = 96  # pixels, of pictures in the report


class Retrieval:
  """Recall at K of a held-out set of images and their captions."""

  def __init__(self, name, source, config, encoder, training):
    """Reads the captions of the set; its images are read at each evaluation.

    Args:
      name: what the metrics are called by.
      source: a `Source`.
      config: `clip_jax.config.Retrieval`.
      encoder: an `Encoder`.
      training: the `Dataset` that is trained on, for the yardstick.

    Raises:
      DataError: a record has no caption.
    """
    self.name, self.source, self._config, self._encoder = name, source, config, encoder
    self._training = training
    captions = [record.captions for record in source]
    without = next((i for i, found in enumerate(captions) if not found), None)
    if without is not None:
      raise DataError(f"{source.key(without)}: no caption; of a set for retrieval every image needs one.")
    if config.first_caption:
      captions = [c[:1] for c in captions]
    self.captions = [caption for c in captions for caption in c]
    self.owners = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
    self._tokens = tokenizer_for(encoder.model)(self.captions)

  def __call__(self, params):
    """Scores a model.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      A dict of "eval/NAME/image_to_text_R@K" and the like, each with its chance beside it, and a list
      with what the report shows of the set.
    """
    image = self._encoder.images(params, len(self.source), self.pixels)
    text = self._encoder.texts(params, self._tokens)
    numbers = np.arange(len(image))
    found, scores = nearest(image, text, max(KS))
    metrics = recalls(self.owners[found] == numbers[:, None], "image_to_text", self.owners)
    back, _ = nearest(text, image, max(KS))
    metrics |= recalls(back == self.owners[:, None], "text_to_image", self.owners)
    metrics = {f"eval/{self.name}/{key}": value for key, value in metrics.items()}
    return metrics, self._gallery(image, text, found, scores)

  def pixels(self, index):
    """The image of a record with the evaluation transform: uint8 [size, size, 3]."""
    model = self._encoder.model
    return evaluation_pixels(self.source[int(index)], model.image_size, model.resize_mode)

  def yardstick(self):
    """Scores that need no training, for sets that ask for them: "eval/NAME/nearest_pixels_R@K"."""
    if not self._config.nearest_training_image:
      return {}
    scores = nearest_image.scores(self._training, self.source)
    return {f"eval/{self.name}/{key}": value for key, value in scores.items()}

  def _gallery(self, image, text, found, scores):
    count = min(self._config.gallery, len(image))
    if not count:
      return []
    # The same pictures at every evaluation and of every run, so that pages can be compared.
    chosen = random.Random(0).sample(range(len(image)), count)
    first = np.searchsorted(self.owners, np.arange(len(image)))
    pictures = {i: data_uri(self.source[i].image) for i in chosen}

    def top(i):
      return [
        {"caption": self.captions[j], "score": float(score), "correct": bool(self.owners[j] == i)}
        for j, score in zip(found[i, :5], scores[i, :5], strict=True)
      ]

    retrieved = [
      {"set": self.name, "image": pictures[i], "caption": self.captions[first[i]], "top": top(i)}
      for i in chosen
    ]
    shown = chosen[:12]
    similarity = {
      "set": self.name,
      "images": [pictures[i] for i in shown],
      "captions": [self.captions[first[i]] for i in shown],
      "matrix": (image[shown] @ text[first[shown]].T).tolist(),
    }
    return [{"retrieval": retrieved, "similarity": similarity}]


def data_uri(encoded):
  """An image file's picture as a small PNG that a page can hold."""
  picture = Image.fromarray(images.decode(encoded))
  picture.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  picture.save(buffer, "png")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def recalls(correct, direction, owners):
  """Recall at each K of `KS`, with what chance would give.

  A query counts as answered if any of its right answers is among the first K.

  Args:
    correct: bool [queries, at least K or all candidates], in rank order.
    direction: "image_to_text" or "text_to_image".
    owners: int [captions], the image each caption belongs to, every image having one.

  Returns:
    A dict of "DIRECTION_R@K" and "DIRECTION_R@K/chance", fractions.
  """
  captions, images_ = len(owners), int(owners.max()) + 1
  if direction == "image_to_text":
    answers, candidates = np.bincount(owners, minlength=images_), captions
  else:
    answers, candidates = np.ones(captions, int), images_
  metrics = {}
  for k in KS:
    metrics[f"{direction}_R@{k}"] = float(correct[:, :k].any(axis=1).mean())
    metrics[f"{direction}_R@{k}/chance"] = chance(answers, candidates, k)
  return metrics


def chance(answers, candidates, k):
  """Expected recall at K of a random ranking: one minus the odds that K draws miss every right answer.

  Args:
    answers: int array, right answers of each query.
    candidates: number of candidates.
    k: draws.
  """
  k = min(k, candidates)
  values, counts = np.unique(answers, return_counts=True)
  miss = [math.comb(candidates - int(m), k) / math.comb(candidates, k) for m in values]
  return float(1 - np.dot(miss, counts) / counts.sum())
