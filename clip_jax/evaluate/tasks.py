"""What is done with an evaluation set: the task it is made for, or a probe of image features."""

import numpy as np

from clip_jax import config as configs
from clip_jax.data import sources
from clip_jax.data.pipeline import evaluation_pixels
from clip_jax.errors import UsageError
from clip_jax.evaluate import datasets, uncertainty, zero_shot
from clip_jax.evaluate.result import Result, Score
from clip_jax.evaluate.retrieval import Retrieval
from clip_jax.evaluate.selection import Selection
from clip_jax.evaluate.zero_shot import ZeroShot

LINEAR_PROBE, FEW_SHOT, NEAREST = "linear_probe", "fewshot_linear_probe", "knn"
PROBES = (LINEAR_PROBE, FEW_SHOT, NEAREST)
SHOTS = (1, 2, 4, 8, 16)  # examples a class, as Radford et al. 2021, figure 6


def of_config(config, encoder, training):
  """The evaluators that a run's config asks for.

  Args:
    config: a resolved `Config`.
    encoder: an `Encoder`.
    training: the `Dataset` that is trained on, for yardsticks.

  Returns:
    A list of functions from parameters to a `Result`.

  Raises:
    UsageError: a set cannot be used.
  """
  held_out = config.eval
  found = []
  for name, item in held_out.retrieval.items():
    one = datasets.EvaluationSet(name, datasets.RETRIEVAL, sources.create(item.source, item.path))
    found.append(Retrieval(one, encoder, item, training))
  for name, item in held_out.zero_shot.items():
    source = sources.create(item.source, item.path)
    found.append(ZeroShot(datasets.given(name, source, item.classes, item.templates, f"config.eval.zero_shot.{name}"), encoder))
  names = [name for given in held_out.datasets for name in datasets.SUITES.get(given, (given,))]
  for name in dict.fromkeys(names):
    found.append(evaluator(datasets.open_set(name, held_out.data_root, alone=len(names) == 1), encoder))
  return found


def evaluator(held_out, encoder, kept=None, show=0):
  """What scores a model on a set, by the set's own task.

  Args:
    held_out: a `datasets.EvaluationSet`.
    encoder: an `Encoder`.
    kept: keeps text classifiers, as `ZeroShot` takes it.
    show: pictures of a kind in the details, for a page; 0: none, and no more numbers than training logs.

  Returns:
    A function from parameters to a `Result`.
  """
  if held_out.task == datasets.CLASSIFICATION:
    return ZeroShot(held_out, encoder, kept, show)
  if held_out.task == datasets.RETRIEVAL:
    return Retrieval(held_out, encoder, configs.Retrieval(gallery=show), every_definition=bool(show))
  return Selection(held_out, encoder)


class Probes:
  """Probes of the image features of one model: the embeddings before they are normalised."""

  def __init__(self, held_out, encoder, params):
    """Embeds the training and the held-out split.

    Args:
      held_out: a `datasets.EvaluationSet` of images of one class each.
      encoder: an `Encoder` that does not normalise.
      params: parameters of the model, on the mesh.

    Raises:
      UsageError: it is no such set, or has no training split.
    """
    if held_out.task != datasets.CLASSIFICATION or held_out.multilabel:
      raise UsageError(f"{held_out.name}: a probe needs images of one class each; this set is for {held_out.task}.")
    training = held_out.train()
    self._classes = len(held_out.classes)
    self._test, self._train = (features(one, encoder, params) for one in (held_out, training))

  def __call__(self, task, track=None):
    """Fits and scores a probe.

    Args:
      task: one of `PROBES`.
      track: wraps what takes long, to show how far it is.

    Returns:
      A `Result` of the held-out split.
    """
    # Its solver takes a second to load, which training need not wait for.
    from clip_jax.evaluate import probe

    test, train, classes = self._test, self._train, self._classes
    if task == NEAREST:
      return zero_shot.from_scores(probe.k_nearest(train, test, classes), test[1], "knn_")
    if task == LINEAR_PROBE:
      found = probe.linear_probe(train, test, classes, track=track)
      result = zero_shot.from_scores(found["scores"], test[1], "lp_")
      return Result(result.items, result.scores | {"regulariser": Score(found["regulariser"])}, result.outcomes)
    scores, outcomes = {}, {}
    for shots in SHOTS:
      drawn = probe.few_shot(train, test, classes, shots)["scores"]
      right = drawn.argmax(axis=2) == test[1]
      # Which examples are drawn matters more than which are held out.
      error = uncertainty.of_mean(right.mean(axis=1)) * (len(right) / max(len(right) - 1, 1)) ** 0.5
      scores[f"fs{shots}_acc1"] = Score(float(right.mean()), error, 1 / classes)
      outcomes[f"fs{shots}_acc1"] = right.mean(axis=0), None
    return Result(len(test[1]), scores, outcomes)


def features(held_out, encoder, params):
  """Image features of a set and its labels.

  Args:
    held_out: a `datasets.EvaluationSet`.
    encoder: an `Encoder`.
    params: parameters of the model, on the mesh.

  Returns:
    float32 [n, embed_dim] and int32 [n].
  """
  model = encoder.model

  def load(index):
    record = held_out.source[int(index)]
    return evaluation_pixels(record, model.image_size, model.resize_mode), zero_shot.label_of(record, held_out)

  parts = [(embeddings, labels) for _, embeddings, labels in encoder.chunks(params, len(held_out.source), load, np.int32(0))]
  return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
