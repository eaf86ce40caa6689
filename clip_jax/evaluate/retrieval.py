"""Image-text retrieval: recall at K both ways (Radford et al. 2021, table 13)."""

import math
import random

import numpy as np

from clip_jax.data.pipeline import evaluation_pixels
from clip_jax.errors import DataError
from clip_jax.evaluate import nearest_image, uncertainty
from clip_jax.evaluate.pictures import data_uri
from clip_jax.evaluate.result import Result, Score
from clip_jax.evaluate.search import nearest

KS = (1, 5, 10)
FOLDS, FOLD = 5, 1_000  # COCO's test images in parts, as older papers report it


class Retrieval:
  """Recall at K of a held-out set of images and their captions."""

  def __init__(self, held_out, encoder, config, training=None, every_definition=False):
    """Reads the captions of the set; its images are read at each evaluation.

    Args:
      held_out: a `datasets.EvaluationSet`.
      encoder: an `Encoder`.
      config: `clip_jax.config.Retrieval`; its path is not used.
      training: the `Dataset` that is trained on, for the yardstick.
      every_definition: whether to count in the other usual ways, too: as "full", the share of all right captions that is
        among the first K, and of a set of 5,000 images, as COCO's, as "1k", the mean of five parts of 1,000.

    Raises:
      DataError: a record has no caption.
    """
    self.set, self._config, self._encoder = held_out, config, encoder
    self._training, self._every_definition = training, every_definition
    captions = [record.captions for record in held_out.source]
    without = next((i for i, found in enumerate(captions) if not found), None)
    if without is not None:
      raise DataError(f"{held_out.source.key(without)}: no caption; of a set for retrieval every image needs one.")
    if config.first_caption:
      captions = [c[:1] for c in captions]
    self.captions = [caption for c in captions for caption in c]
    self.owners = np.repeat(np.arange(len(captions)), [len(c) for c in captions])
    self._tokens = encoder.tokenizer(self.captions)

  def __call__(self, params):
    """Scores a model.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      A `Result` with "image_to_text_R@K" and "text_to_image_R@K", and a gallery in its details.
    """
    image = self._encoder.images(params, len(self.set.source), self.pixels)
    text = self._encoder.texts(params, self._tokens)
    scores, outcomes, found = both_ways(image, text, self.owners)
    if self._every_definition:
      scores |= self._others(image, text, found[0])
    return Result(len(image), scores, outcomes, self._gallery(image, text, *found))

  def pixels(self, index):
    """The image of a record with the evaluation transform: uint8 [size, size, 3]."""
    model = self._encoder.model
    return evaluation_pixels(self.set.source[int(index)], model.image_size, model.resize_mode)

  def yardstick(self):
    """Scores that need no training, for sets that ask for them: "eval/NAME/nearest_pixels_R@K"."""
    if not self._config.nearest_training_image:
      return {}
    scores = nearest_image.scores(self._training, self.set.source)
    return {f"eval/{self.set.name}/{key}": value for key, value in scores.items()}

  def _others(self, image, text, found):
    right = self.owners[found] == np.arange(len(image))[:, None]
    answers = np.bincount(self.owners)
    scores = {}
    if answers.max() > 1:
      for k in KS:
        share = right[:, :k].sum(axis=1) / answers
        scores[f"image_to_text_full_R@{k}"] = Score(float(share.mean()), uncertainty.of_mean(share), min(k / len(text), 1.0))
    if len(image) == FOLDS * FOLD:
      parts = [self._fold(image, text, slice(start, start + FOLD)) for start in range(0, len(image), FOLD)]
      for name in parts[0]:
        # The parts are of different images, so that their errors add up as those of one set.
        error = sum(part[name].standard_error ** 2 for part in parts) ** 0.5 / FOLDS
        scores[f"{name}_1k"] = Score(float(np.mean([part[name].value for part in parts])), error, parts[0][name].chance)
    return scores

  def _fold(self, image, text, rows):
    here = (self.owners >= rows.start) & (self.owners < rows.stop)
    return both_ways(image[rows], text[here], self.owners[here] - rows.start)[0]

  def _gallery(self, image, text, found, scores):
    count = min(self._config.gallery, len(image))
    if not count:
      return {}
    # The same pictures at every evaluation and of every run, so that pages can be compared.
    chosen = random.Random(0).sample(range(len(image)), count)
    first = np.searchsorted(self.owners, np.arange(len(image)))
    pictures = {i: data_uri(self.set.source[i].image) for i in chosen}

    def top(i):
      return [
        {"caption": self.captions[j], "score": float(score), "correct": bool(self.owners[j] == i)}
        for j, score in zip(found[i, :5], scores[i, :5], strict=True)
      ]

    retrieved = [
      {"set": self.set.name, "image": pictures[i], "caption": self.captions[first[i]], "top": top(i)}
      for i in chosen
    ]
    shown = chosen[:12]
    similarity = {
      "set": self.set.name,
      "images": [pictures[i] for i in shown],
      "captions": [self.captions[first[i]] for i in shown],
      "matrix": (image[shown] @ text[first[shown]].T).tolist(),
    }
    return {"retrieval": retrieved, "similarity": similarity}


def both_ways(image, text, owners):
  """Recall at each K of `KS`, images to texts and texts to images, computed in blocks.

  A query counts as answered if any of its right answers is among the first K.

  Args:
    image: float32 [images, embed_dim].
    text: float32 [captions, embed_dim].
    owners: int [captions], the image each caption belongs to, every image having one.

  Returns:
    A dict of `Score`s, what `Result` calls outcomes, and of images the captions found, int [images, K], and their scores.
  """
  found, similarities = nearest(image, text, max(KS))
  back, _ = nearest(text, image, max(KS))
  # Captions of one image are not independent queries.
  ways = {
    "image_to_text": (owners[found] == np.arange(len(image))[:, None], None, np.bincount(owners, minlength=len(image)), len(text)),
    "text_to_image": (back == owners[:, None], owners, np.ones(len(text), int), len(image)),
  }
  scores, outcomes = {}, {}
  for way, (right, groups, answers, candidates) in ways.items():
    for k in KS:
      hit = right[:, :k].any(axis=1).astype(np.float64)
      scores[f"{way}_R@{k}"] = Score(float(hit.mean()), uncertainty.of_mean(hit, groups), chance(answers, candidates, k))
      outcomes[f"{way}_R@{k}"] = hit, groups
  return scores, outcomes, (found, similarities)


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
