"""The data files of class names and templates: counts the papers tell, and what a template is."""

import pytest

from clip_jax.errors import UsageError
from clip_jax.evaluate import datasets, prompts


def test_imagenet_has_a_thousand_classes_and_eighty_templates_in_several_languages():
  assert {"ar", "cn", "en", "it", "jp"} == set(prompts.languages())
  for language in prompts.languages():
    assert len(prompts.classes("imagenet1k", language)) == 1_000, language
  assert len(prompts.templates("imagenet1k")) == len(prompts.templates("imagenet1k", "cn")) == 80
  assert prompts.templates("imagenet1k")[0] == "a bad photo of a {c}."
  names = prompts.classes("imagenet1k")
  assert names[:2] == ("tench", "goldfish") and len(prompts.wordnet_ids()) == 1_000
  assert dict(zip(prompts.wordnet_ids(), names, strict=True))["n02123045"] == "tabby cat"


# Radford et al. 2021, table 9: classes of the sets whose names are known.
@pytest.mark.parametrize("name, count", [
  ("flowers", 102), ("pets", 37), ("vtab/pets", 37), ("gtsrb", 43), ("country211", 211), ("mnist", 10), ("fer2013", 7),
  ("eurosat", 10), ("pcam", 2), ("vtab/caltech101", 102), ("imagenetv2", 1_000),
])  # fmt: skip
def test_classes_of_known_sets(name, count):
  assert len(prompts.classes(name)) == count
  assert prompts.templates(name)


def test_every_template_has_a_place_and_every_set_of_a_suite_has_templates():
  for language in prompts.languages():
    for name in ("imagenet1k", *prompts._read(language)["templates"]):
      for template in prompts.templates(name, language):
        assert prompts.PLACE in template, (language, name, template)
  for name in datasets.SUITES["vtab+"]:
    assert prompts.templates(name), name
  assert len(datasets.SUITES["vtab+"]) == 36 and len(datasets.SUITES["vtab"]) == 19


def test_a_prompt():
  assert prompts.fill("a {c}, really {c}", "cat {x}") == "a cat {x}, really cat {x}"
  assert prompts.fill("a photo of a {}.", "dog") == "a photo of a dog."
  with pytest.raises(UsageError, match=r"'a photo' has no \{c\}"):
    prompts.check_template("a photo", "--template")


def test_unknown_names_and_languages():
  assert prompts.templates("my own set") is None and prompts.classes("my own set") is None
  with pytest.raises(UsageError, match=r"No prompts in the language 'es'.*There are: ar, cn, en, it, jp"):
    prompts.templates("imagenet1k", "es")
