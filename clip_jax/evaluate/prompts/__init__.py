"""Class names and prompt templates of known data sets, as data files (`README.md` beside them says where they are from)."""

import functools
import json
from importlib import resources

from clip_jax.errors import UsageError, did_you_mean

PLACE = "{c}"  # of the class name in a template
PLAIN = ("a photo of a {c}.",)
# Sets that are described like another one.
SAME_TEMPLATES = dict.fromkeys(("imagenetv2", "imagenet_sketch", "imagenet-a", "imagenet-r", "objectnet"), "imagenet1k")
SAME_TEMPLATES |= dict.fromkeys(("imagenet2012", "imagenet_v2", "imagenet_a", "imagenet_r"), "imagenet1k")  # in TFDS
SAME_TEMPLATES |= {"oxford_iiit_pet": "pets", "oxford_flowers102": "flowers", "cars196": "cars"}
SAME_TEMPLATES |= {"svhn_cropped": "svhn", "patch_camelyon": "pcam"}
SAME_CLASSES = dict.fromkeys(("imagenetv2", "imagenet_sketch"), "imagenet1k") | {"vtab/caltech101": "caltech101_vtab"}


def languages():
  """Languages there are prompts in."""
  return sorted(file.name.removesuffix(".json") for file in resources.files(__name__).iterdir() if file.name.endswith(".json"))


def templates(name, language="en"):
  """The templates of a known data set, or None.

  Args:
    name: as CLIP_benchmark calls it; what is before a slash does not count.
    language: of the prompts.

  Raises:
    UsageError: there are no prompts in that language.
  """
  return _find("templates", SAME_TEMPLATES.get(name, name), language)


def classes(name, language="en"):
  """The class names of a known data set in the order of their numbers, or None; `name` and `language` as in `templates`."""
  return _find("classes", SAME_CLASSES.get(name, name), language)


def wordnet_ids():
  """What the folders of ImageNet-1k are called, in the order of its classes."""
  return _read("en")["wordnet_ids"]["imagenet1k"]


def fill(template, name):
  """A prompt. `{}` in a template is a place for the class name, too."""
  return template.replace(PLACE, name).replace("{}", name)


def check_template(template, where):
  """Checks that a template has a place for a class name.

  Raises:
    UsageError: it has none.
  """
  if PLACE not in template and "{}" not in template:
    raise UsageError(f"{where}: the template {template!r} has no {PLACE}, where a class name goes.")


def _find(kind, name, language):
  known = _read(language)[kind]
  found = known.get(name, known.get(name.rpartition("/")[2]))
  return tuple(found) if found else None


@functools.cache
def _read(language):
  if language not in languages():
    there = f"There are: {', '.join(languages())}."
    raise UsageError(f"No prompts in the language {language!r}. {did_you_mean(language, languages(), there)}")
  return json.loads((resources.files(__name__) / f"{language}.json").read_text(encoding="utf-8"))
