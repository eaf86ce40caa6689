"""Zero-shot classification by prompts (Radford et al. 2021, section 3.1)."""

import numpy as np

from clip_jax.data.pipeline import evaluation_pixels, tokenizer_for
from clip_jax.errors import DataError


class ZeroShot:
  """Accuracy on a labelled held-out set."""

  def __init__(self, name, source, config, encoder):
    """Reads the labels of the set.

    Args:
      name: what the metrics are called by.
      source: a `Source` whose records have labels.
      config: `clip_jax.config.ZeroShot`.
      encoder: an `Encoder`.

    Raises:
      DataError: a record has no label, or one that no class name belongs to.
    """
    self.name, self.source, self._config, self._encoder = name, source, config, encoder
    self._tokenizer = tokenizer_for(encoder.model)
    labels = []
    for record in source:
      if record.label is None or not 0 <= record.label < len(config.classes):
        raise DataError(
          f"{record.key}: its label is {record.label}; config.eval.zero_shot.{name} has "
          f"{len(config.classes)} classes and needs a .cls member from 0 to {len(config.classes) - 1}."
        )
      labels.append(record.label)
    self._labels = np.asarray(labels)

  def __call__(self, params):
    """Scores a model.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      A dict of "eval/NAME/acc1" and its chance, fractions, and an empty list of examples.
    """
    weights = self.classifier(params)
    embeddings = self._encoder.images(params, len(self._labels), self._pixels)
    # [images, classes]: as large as the answer, and classes are few.
    guesses = np.argmax(embeddings @ weights.T, axis=1)
    name = f"eval/{self.name}/acc1"
    accuracy = float(np.mean(guesses == self._labels))
    return {name: accuracy, f"{name}/chance": 1 / len(self._config.classes)}, []

  def yardstick(self):
    """Nothing: there is no yardstick for a classifier yet."""
    return {}

  def classifier(self, params):
    """One embedding a class: the mean over templates of normalised embeddings, normalised again.

    Args:
      params: parameters of the model, on the mesh.

    Returns:
      float32 [classes, embed_dim].
    """
    classes, templates = self._config.classes, self._config.templates
    prompts = [template.format(name) for name in classes for template in templates]
    embeddings = self._encoder.texts(params, self._tokenizer(prompts))
    means = embeddings.reshape(len(classes), len(templates), -1).mean(axis=1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)

  def _pixels(self, index):
    model = self._encoder.model
    return evaluation_pixels(self.source[int(index)], model.image_size, model.resize_mode)
