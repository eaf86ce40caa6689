"""Data sets by the names CLIP_benchmark gives them: where they lie under a root, what is asked of them, in which words.

A set is in one of these layouts, looked for in this order: CLIP_benchmark's webdatasets (`test/nshards.txt`), TFDS
(`dataset_info.json`), lists of files (`metadata.csv`), folders of classes, and the files of SugarCrepe and Winoground.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable

from clip_jax.data import sources
from clip_jax.data.locations import is_remote
from clip_jax.data.sources.class_folders import ClassFolderSource
from clip_jax.data.sources.folder import METADATA
from clip_jax.data.storage import Storage
from clip_jax.errors import DataError, UsageError, did_you_mean
from clip_jax.evaluate import downloads, prompts, selection

CLASSIFICATION, RETRIEVAL, SELECTION = "zeroshot_classification", "zeroshot_retrieval", "image_caption_selection"

ROBUSTNESS = ("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet")
VTAB = (
  *("vtab/caltech101", "vtab/cifar100", "vtab/clevr_count_all", "vtab/clevr_closest_object_distance"),
  *("vtab/diabetic_retinopathy", "vtab/dmlab", "vtab/dsprites_label_orientation", "vtab/dsprites_label_x_position"),
  *("vtab/dtd", "vtab/eurosat", "vtab/kitti_closest_vehicle_distance", "vtab/flowers", "vtab/pets", "vtab/pcam"),
  *("vtab/resisc45", "vtab/smallnorb_label_azimuth", "vtab/smallnorb_label_elevation", "sun397", "vtab/svhn"),
)
# As CLIP_benchmark 1.6.2 lists them (Schuhmann et al. 2022, arXiv 2210.08402, appendix E).
SUITES = {
  "imagenet": ("imagenet1k", *ROBUSTNESS),
  "imagenet_robustness": ROBUSTNESS,
  "vtab": VTAB,
  "vtab+": (
    *("imagenet1k", *ROBUSTNESS, "fer2013", "voc2007", "voc2007_multilabel", "sun397", "cars", "fgvc_aircraft", "mnist"),
    *("stl10", "gtsrb", "country211", "renderedsst2", "vtab/cifar10", *(name for name in VTAB if name != "sun397")),
  ),
  "retrieval": ("mscoco_captions", "flickr8k", "flickr30k"),
  "sugar_crepe": tuple(
    f"sugar_crepe/{kind}" for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
  ),
}
MULTILABEL = ("voc2007_multilabel",)
SPLITS = {"test": ("test", "validation", "val"), "train": ("train",)}  # what else a split is called


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """A held-out set and what is asked of it.

  Attributes:
    name: as it stands in results.
    task: one of `CLASSIFICATION`, `RETRIEVAL` and `SELECTION`.
    source: a `Source`; of `SELECTION` a list of `selection.Item`.
    split: the part of the set.
    language: of the prompts.
    classes: names of classes in the order of their numbers, of a classification.
    templates: with `{c}` where a class name goes.
    multilabel: whether an image may be of several classes.
    described: where names and templates come from, for messages.
    train: opens the training split as the same kind of set, for probes.
  """

  name: str
  task: str
  source: object
  split: str = "test"
  language: str = "en"
  classes: tuple[str, ...] = ()
  templates: tuple[str, ...] = ()
  multilabel: bool = False
  described: str = ""
  train: Callable | None = None


def names_of(suite):
  """The sets of a suite.

  Raises:
    UsageError: there is no such suite.
  """
  if suite not in SUITES:
    there = f"There are: {', '.join(SUITES)}."
    raise UsageError(f"No suite is called {suite!r}. {did_you_mean(suite, SUITES, there)}")
  return SUITES[suite]


def open_set(name, root, split="test", language="en", alone=True, templates=(), storage=None):
  """Finds a data set under a root and opens it.

  Args:
    name: as CLIP_benchmark calls it, or any name of a folder.
    root: a folder, bucket or web address that holds the set as `NAME`, or as CLIP_benchmark's `wds_NAME` with "-" for "/"; or a path with
      `{dataset}` or `{dataset_cleaned}` in it.
    split: "test" or what the set calls it.
    language: of class names and templates.
    alone: whether the root itself may be the set.
    templates: instead of those that are known for the set.
    storage: a `Storage`.

  Returns:
    An `EvaluationSet`.

  Raises:
    UsageError: it is not there, or cannot be read.
  """
  storage = storage or Storage()
  cleaned = name.replace("/", "-")
  if "{dataset" in root:
    places = [root.replace("{dataset_cleaned}", cleaned).replace("{dataset}", name)]
  else:
    base = root.rstrip("/")
    places = list(dict.fromkeys(f"{base}/{folder}" for folder in (name, f"wds_{cleaned}", cleaned, cleaned.rpartition("-")[2])))
    places += [base] if alone else []
  for place in places:
    # A root with folders of other sets would look like one with folders of classes.
    local = downloads.fetch(place, split) if downloads.is_web(place) else place
    found = local and _open_at(local, name, split, storage, unsplit=place != root.rstrip("/"))
    if found:
      return _described(found, name, place, split, language, templates, lambda: open_set(name, root, "train", language, alone, templates, storage))
  raise UsageError(
    f"{name}: no data set in {', '.join(places)}. It would be a folder with {split}/nshards.txt and {split}/0.tar (CLIP_benchmark), "
    f"dataset_info.json (TFDS), {split}/CLASS/IMAGE.jpg, or metadata.csv (docs/evaluation.md)."
  )


def given(name, source, classes, templates, where):
  """A classification of a source by names that are given; `where` is what gives them, for messages."""
  for template in templates:
    prompts.check_template(template, where)
  return EvaluationSet(name, CLASSIFICATION, source, classes=tuple(classes), templates=tuple(templates), described=where)


def _open_at(place, name, split, storage, unsplit):
  # (source, task or None, class names or None, templates or None) of what lies at a place, or None.
  selected = selection.find(place, storage)
  if selected:
    return selected, SELECTION, None, None
  if not is_remote(place) and not os.path.isdir(os.path.expanduser(place)):
    return None
  for part in SPLITS.get(split, (split,)):
    if _text(storage, f"{place}/{part}/nshards.txt") is not None:
      return _webdataset(place, part, name, storage)
  version = _version(place, storage)
  if version:
    source = _tfds(version, split, storage)
    return source, None, source.classes and class_names(source.classes), None
  options = sources.Options(storage=storage)
  whole = [place] if split == "test" else []  # what has no splits is a test split, and never what a probe is trained on
  folders = [f"{place}/{part}" for part in SPLITS.get(split, (split,))]
  for folder in folders + whole:
    if any(_text(storage, f"{folder}/{file}") is not None for file in METADATA):
      return sources.create("folder", folder, options), None, None, None
  objectnet = whole and _objectnet(place, storage)
  if objectnet:
    return objectnet
  for folder in folders + whole * unsplit:
    with contextlib.suppress(DataError):
      source = sources.create("classes", folder, options)
      return source, CLASSIFICATION, class_names(source.folders), None
  return None


def _webdataset(place, split, name, storage):
  shards = _text(storage, f"{place}/{split}/nshards.txt").strip()
  if not shards.isdecimal() or not int(shards):
    raise DataError(f"{place}/{split}/nshards.txt holds {shards[:20]!r} instead of the number of shards.")
  kind = (_text(storage, f"{place}/dataset_type.txt") or "").strip().lower()
  multilabel = kind == "multilabel" or name in MULTILABEL
  options = sources.Options(storage=storage, multilabel=multilabel)
  source = sources.create("tar", f"{place}/{split}/{{0..{int(shards) - 1}}}.tar", options)
  if kind == "retrieval":
    return selection.Lines(source), RETRIEVAL, None, None
  lists = [_text(storage, f"{place}/{file}.txt") for file in ("classnames", "zeroshot_classification_templates")]
  names, templates = (tuple(line.strip() for line in text.splitlines() if line.strip()) if text else None for text in lists)
  return source, CLASSIFICATION, names, templates


def _objectnet(place, storage):
  # As it is unpacked: of its 313 classes the 113 that its own mapping finds in ImageNet, by the names it gives them.
  texts = [_text(storage, f"{place}/mappings/{name}.json") for name in ("folder_to_objectnet_label", "objectnet_to_imagenet_1k")]
  if None in texts:
    return None
  try:
    labels, known = map(json.loads, texts)
    names = {folder: label.lower() for folder, label in labels.items() if label in known}
  except (ValueError, AttributeError, TypeError) as error:
    raise DataError(f"{place}/mappings cannot be parsed ({error}).") from error
  source = ClassFolderSource(f"{place}/images", sources.Options(storage=storage), names)
  return source, CLASSIFICATION, tuple(names[folder] for folder in source.folders), None


def _version(place, storage):
  # The folder of the newest version of a TFDS data set, which may be below those of its name and its configuration.
  for below in ("", "*/", "*/*/"):
    with contextlib.suppress(DataError):
      return max(storage.expand(os.path.expanduser(f"{place}/{below}dataset_info.json")), key=_natural).rpartition("/")[0]
  return None


def _natural(path):
  return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def _tfds(place, split, storage):
  for part in SPLITS.get(split, (split,)):
    with contextlib.suppress(DataError):
      return sources.create("tfds", f"{place}#{part}", sources.Options(storage=storage))
  return sources.create("tfds", f"{place}#{split}", sources.Options(storage=storage))


def class_names(folders):
  """Class names that folders stand for: WordNet numbers those of ImageNet, numbers up to 999 its classes, and words words."""
  known = dict(zip(prompts.wordnet_ids(), prompts.classes("imagenet1k"), strict=True))
  if all(folder in known for folder in folders):
    return tuple(known[folder] for folder in folders)
  if len(folders) == len(known) and list(map(str, range(len(known)))) == [str(int(f)) if f.isdecimal() else f for f in folders]:
    return tuple(known.values())
  return tuple(folder.replace("_", " ") for folder in folders)


def _described(found, name, place, split, language, templates, train):
  source, task, names, own_templates = found
  if task is None:
    task = CLASSIFICATION if source[0].label is not None else RETRIEVAL
  common = dict(name=name, task=task, source=source, split=split, language=language, train=train)
  if task != CLASSIFICATION:
    return EvaluationSet(**common)
  if language != "en":  # what lies with the data is English
    names, own_templates = prompts.classes(name, language), prompts.templates(name, language)
    if not (names and own_templates):
      raise UsageError(f"{name}: its class names and templates are not known in the language {language!r}.")
  names = names or prompts.classes(name, language)
  if not names:
    raise UsageError(f"{place} has no classnames.txt, and the class names of {name} are not known.")
  templates = templates or own_templates or prompts.templates(name, language) or prompts.PLAIN
  for template in templates:
    prompts.check_template(template, place)
  return EvaluationSet(
    **common, classes=names, templates=tuple(templates), multilabel=name in MULTILABEL or isinstance(source[0].label, tuple), described=place
  )


def _text(storage, path):
  try:
    return storage.read(os.path.expanduser(path)).decode("utf-8-sig")
  except (DataError, UnicodeDecodeError):
    return None
