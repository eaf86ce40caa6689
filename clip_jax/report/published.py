"""Published results to compare with, each with where it is from. Percent here, as their sources write them.

A model can have two values for one data set, from two sources: prompts, resizing and rounding differ a little between
them. `references` gives one a model, and `shifts` keeps to one source a model, so that both coordinates are alike.
"""

from dataclasses import dataclass

OPEN_CLIP = "github.com/mlfoundations/open_clip, docs/openclip_results.csv at commit 0a1cc15"
OPEN_CLIP_RETRIEVAL = "github.com/mlfoundations/open_clip, docs/openclip_retrieval_results.csv at commit 05e7db4"
TABLE_11 = "Radford et al. 2021, table 11"
FIGURE_13 = "Radford et al. 2021, figure 13"
TESTBED = "Taori et al. 2020, github.com/modestyachts/imagenet-testbed, robustness_top1s.csv at commit 28477dc"

IMAGENET = "imagenet1k"
SHIFTED = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")

_SHIFTS = (  # source, model, then ImageNet and SHIFTED: accuracies
  (FIGURE_13, "OpenAI ViT-L/14@336px", 76.2, 70.1, 60.2, 77.1, 88.9, 72.3),
  (OPEN_CLIP, "OpenAI RN50", 59.82, 52.84, 35.44, 23.27, 60.73, 41.41),
  (OPEN_CLIP, "OpenAI ViT-B/32", 63.32, 55.92, 42.29, 31.55, 69.33, 44.31),
  (OPEN_CLIP, "OpenAI ViT-B/16", 68.34, 61.88, 48.24, 49.95, 77.70, 55.31),
  (OPEN_CLIP, "OpenAI ViT-L/14", 75.54, 69.83, 59.59, 70.75, 87.84, 68.89),
  (OPEN_CLIP, "LAION-2B ViT-B/32", 66.56, 58.14, 53.66, 26.27, 76.43, 48.83),
  (OPEN_CLIP, "LAION-2B ViT-B/16", 70.23, 62.28, 56.08, 38.23, 80.61, 55.98),
  (OPEN_CLIP, "LAION-2B ViT-L/14", 75.25, 67.80, 63.28, 53.85, 87.42, 65.29),
  (OPEN_CLIP, "LAION-2B ViT-H/14", 77.96, 70.90, 66.57, 59.35, 89.34, 69.41),
  (OPEN_CLIP, "DataComp-1B ViT-L/14", 79.21, 72.05, 67.95, 69.59, 90.83, 74.25),
)
_TRAINED_ON_IMAGENET = (  # the same, of models whose last layer learned ImageNet's labels
  (FIGURE_13, "ResNet-101", 76.2, 64.3, 25.2, 2.7, 37.7, 32.6),
  (TESTBED, "ResNeXt-101 32x48d, Instagram, FixRes", 86.36, 77.98, 59.14, 68.41, 79.97, 57.85),
  (TESTBED, "EfficientNet-L2, Noisy Student", 88.32, 80.15, 47.64, 84.85, 74.67, 68.45),
)
_IMAGENET_ONLY = (
  (TABLE_11, "OpenAI RN50", 59.6),
  (TABLE_11, "OpenAI ViT-B/32", 63.2),
  (TABLE_11, "OpenAI ViT-B/16", 68.6),
  (TABLE_11, "OpenAI ViT-L/14", 75.3),
  (TABLE_11, "OpenAI ViT-L/14@336px", 76.2),
)
_RETRIEVAL_METRICS = (
  "image_retrieval_recall@1", "image_retrieval_recall@5", "text_retrieval_recall@1", "text_retrieval_recall@5",
)  # fmt: skip
_RETRIEVAL = (  # model, then _RETRIEVAL_METRICS of flickr30k, and of mscoco_captions
  ("OpenAI ViT-B/32", 58.78, 83.56, 78.90, 94.90, 30.44, 55.94, 50.12, 75.00),
  ("OpenAI ViT-B/16", 62.16, 85.72, 82.20, 96.60, 33.09, 58.42, 52.42, 76.70),
  ("OpenAI ViT-L/14", 64.96, 87.24, 85.20, 97.40, 36.51, 61.06, 56.34, 79.38),
  ("OpenAI ViT-L/14@336px", 66.90, 89.00, 87.70, 98.50, 37.09, 61.62, 57.94, 81.20),
  ("LAION-2B ViT-B/32", 66.78, 88.38, 84.10, 96.20, 39.34, 65.43, 56.32, 79.84),
  ("LAION-2B ViT-B/16", 69.84, 90.38, 86.30, 97.90, 42.31, 67.70, 59.44, 81.78),
  ("LAION-2B ViT-L/14", 75.52, 92.86, 89.50, 98.70, 46.51, 71.08, 63.36, 83.98),
  ("LAION-2B ViT-H/14", 77.64, 94.18, 90.70, 99.20, 49.48, 73.38, 65.92, 86.06),
  ("DataComp-1B ViT-L/14", 73.38, 91.74, 89.00, 98.60, 45.73, 70.03, 63.30, 84.14),
  ("SigLIP ViT-B/16", 74.68, 92.30, 89.10, 98.00, 47.78, 72.44, 65.74, 85.42),
)


@dataclass(frozen=True)
class Reference:
  """A published result.

  Attributes:
    model: its name for people.
    dataset: as CLIP_benchmark calls it.
    metric: as CLIP_benchmark calls it.
    value: a share of 0 to 1.
    source: the paper and its table, or the file and its commit.
    zero_shot: False if the model learned the labels of ImageNet.
  """

  model: str
  dataset: str
  metric: str
  value: float
  source: str
  zero_shot: bool = True


def _all() -> tuple[Reference, ...]:
  found = [Reference(model, IMAGENET, "acc1", value / 100, source) for source, model, value in _IMAGENET_ONLY]
  for rows, zero_shot in ((_SHIFTS, True), (_TRAINED_ON_IMAGENET, False)):
    for source, model, *values in rows:
      found += [
        Reference(model, dataset, "acc1", value / 100, source, zero_shot)
        for dataset, value in zip((IMAGENET, *SHIFTED), values, strict=True)
      ]
  keys = [(dataset, metric) for dataset in ("flickr30k", "mscoco_captions") for metric in _RETRIEVAL_METRICS]
  for model, *values in _RETRIEVAL:
    found += [
      Reference(model, dataset, metric, value / 100, OPEN_CLIP_RETRIEVAL)
      for (dataset, metric), value in zip(keys, values, strict=True)
    ]
  return tuple(found)


REFERENCES = _all()


def plain(dataset: str) -> str:
  """A data set's name without what says only how it is stored: `wds/imagenet_sketch` is `imagenet_sketch`."""
  name = dataset.rsplit("/", 1)[-1]
  return next((known for known in (IMAGENET, *SHIFTED) if known.replace("_", "-") == name.replace("_", "-")), name)


def references(dataset: str, metric: str) -> list[Reference]:
  """What zero-shot models reach, one value a model: that of its own paper where there is one.

  Args:
    dataset: its name, as CLIP_benchmark has it, with a folder in front or not.
    metric: its name.
  """
  found = {}
  for one in REFERENCES:
    if one.zero_shot and (one.dataset, one.metric) == (plain(dataset), metric):
      found.setdefault(one.model, one)
  return list(found.values())


def shifts(dataset: str) -> list[tuple[Reference, Reference]]:
  """Accuracies on ImageNet and on a set that is shifted from it, each pair from one source.

  Args:
    dataset: one of SHIFTED, as `plain` gives it.
  """
  on_imagenet = {(one.model, one.source): one for one in REFERENCES if one.dataset == IMAGENET}
  return [(on_imagenet[one.model, one.source], one) for one in REFERENCES if one.dataset == dataset and one.metric == "acc1"]
