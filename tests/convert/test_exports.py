"""Round trips through every layout, what comes with the weights, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import clip_jax
from clip_jax.convert import exports, sources
from clip_jax.convert.layouts import huggingface, siglip, tables
from clip_jax.errors import UsageError
from tests.convert import models

ROUND_TRIPS = [
  ("vit", {"activation": "gelu"}, "huggingface"),
  ("vit", {"activation": "quick_gelu"}, "open_clip"),
  ("vit", {"activation": "gelu_tanh", "norm_epsilon": 3e-6, "resize_mode": "squash"}, "huggingface"),
  ("vit", {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6), "activation": "gelu_tanh"}, "open_clip"),
  ("vit_bias", {}, "open_clip"),
  ("openai", {}, "openai"),
  ("resnet", {}, "openai"),
  ("resnet", {"activation": "gelu"}, "open_clip"),
]


@pytest.mark.parametrize("kind, changes, to", ROUND_TRIPS)
def test_a_round_trip_is_bit_identical_and_keeps_what_belongs_to_the_weights(tmp_path, kind, changes, to):
  config = models.model(kind, **changes)
  params, source = models.checkpoint(tmp_path / "ours", config)
  models.assert_same(source, params)
  out = tmp_path / ("theirs.pt" if to == "openai" else "theirs")
  found = exports.write(source, to, out, verified=True)
  assert max(found["image"], found["text"]) < 2e-6
  theirs = sources.find(out)
  assert theirs.layout == to and theirs.model == config
  exports.import_weights(theirs, tmp_path / "again")
  again = sources.find(tmp_path / "again")
  assert again.layout == "clip_jax" and again.model == config
  models.assert_same(again, params)


def test_the_processor_of_transformers_sees_images_and_captions_as_here(tmp_path):
  config = models.model("vit", text={**models.TEXT, "context_length": 12})
  _, source = models.checkpoint(tmp_path / "ours", config)
  exports.write(source, "huggingface", tmp_path / "theirs")
  ours, processor = clip_jax.load(tmp_path / "ours"), transformers.CLIPProcessor.from_pretrained(tmp_path / "theirs")
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 50, 3), np.uint8))
  captions = ["five o’clock", "“A” &amp; B", "ｗｉｄｅ ﬁsh\n\tsoup", "", "a very long caption " * 9, "Ünïcode 漢字 👍🏽"]
  seen = processor(text=captions, images=picture, padding="max_length", truncation=True, return_tensors="np")
  pixels = (ours.preprocess(picture) / 255 - np.array(config.image_mean)) / np.array(config.image_std)
  np.testing.assert_allclose(seen["pixel_values"][0], pixels.transpose(2, 0, 1), atol=1e-5)
  for theirs, row in zip(seen["input_ids"], ours.tokenize(captions), strict=True):
    end = np.argmax(row)  # there rows are filled up with the end token, which a causal tower does not see
    np.testing.assert_array_equal(theirs[: end + 1], row[: end + 1])
    assert (theirs[end:] == 49_407).all()


@pytest.fixture
def small_timm(monkeypatch):
  """The image tower of the small SigLIP, as if timm had it."""
  monkeypatch.setitem(siglip.TIMM, "vit_small_siglip", ((16, 48, 2, 4, 56), {40: "gelu_tanh"}))


@pytest.mark.parametrize("to", ["huggingface", "open_clip"])
def test_a_round_trip_of_siglip_with_its_tokenizer(tmp_path, small_timm, to):
  config = models.model("siglip")
  (tmp_path / "tokenizer").mkdir()
  tokenizer = models.small_tokenizer(tmp_path / "tokenizer")
  params, source = models.checkpoint(tmp_path / "ours", config, tokenizer)
  assert source.tokenizer == tokenizer
  found = exports.write(source, to, tmp_path / "theirs", verified=True)
  assert max(found["image"], found["text"]) < 2e-6
  theirs = sources.find(tmp_path / "theirs")
  assert theirs.model == config
  exports.import_weights(theirs, tmp_path / "again")
  again = sources.find(tmp_path / "again")
  models.assert_same(again, params)
  texts = ["a cat", "the red hat and a dog"]
  np.testing.assert_array_equal(again.tokenizer(texts), tokenizer(texts))


def test_siglip_is_refused_where_timm_would_compute_something_else(tmp_path, monkeypatch):
  config = models.model("siglip")
  _, source = models.checkpoint(tmp_path / "ours", config, models.small_tokenizer(tmp_path))
  with pytest.raises(UsageError, match="which has none of these sizes at 40 pixels"):
    exports.write(source, "open_clip", tmp_path / "out")
  monkeypatch.setitem(siglip.TIMM, "vit_small_siglip", ((16, 48, 2, 4, 56), {40: "gelu"}))
  with pytest.raises(UsageError, match="vit_small_siglip_40 has activation gelu, and this model has gelu_tanh"):
    exports.write(source, "open_clip", tmp_path / "out")
  with pytest.raises(UsageError, match="this model has SigLIP's"):
    exports.write(source, "openai", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_published_sizes_get_their_names_back(tmp_path):
  for name in ("ViT-B-32", "ViT-B-32-quickgelu", "RN50x4-quickgelu", "ViT-L-14-336"):
    unnamed = {**models.configs.to_dict(models.configs.model_from_dict({"name": name})), "name": ""}
    assert sources._with_name(models.configs.model_from_dict(unnamed)).name == name


def test_large_weights_are_split_as_on_the_hub(tmp_path):
  params, source = models.checkpoint(tmp_path / "ours", models.model())
  exports.write(source, "huggingface", tmp_path / "theirs", split_bytes=200_000)
  index = json.loads((tmp_path / "theirs/model.safetensors.index.json").read_text())
  files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
  assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
  assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
  assert index["metadata"]["total_size"] == sum(4 * np.size(value) for value in params.values())
  models.assert_same(sources.find(tmp_path / "theirs"), params)


def test_a_model_that_is_trained_in_bfloat16_is_written_and_compared_in_float32(tmp_path):
  _, source = models.checkpoint(tmp_path / "ours", models.model(compute_dtype="bfloat16"))
  found = exports.write(source, "stablehlo", tmp_path / "out", verified=True)
  assert max(found["image"], found["text"]) < 2e-6


def test_verification_finds_a_matrix_that_is_not_transposed_and_leaves_nothing(tmp_path, monkeypatch):
  _, source = models.checkpoint(tmp_path / "ours", models.model())
  wrong = [row._replace(how=tables.SAME) if row.ours.endswith("attention/out/kernel") else row for row in huggingface.CLIP]
  monkeypatch.setattr(huggingface, "CLIP", wrong)
  with pytest.raises(RuntimeError, match="computes something else in transformers"):
    exports.write(source, "huggingface", tmp_path / "out", verified=True)
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]


REFUSED = [
  ("vit", {}, "openai", "vision.heads to be 0, and this model has 4"),
  ("openai", {"activation": "gelu"}, "openai", "activation to be quick_gelu, and this model has gelu"),
  ("openai", {"norm_epsilon": 1e-6}, "openai", "norm_epsilon to be 1e-05, and this model has 1e-06"),
  ("openai", {"resize_mode": "squash"}, "openai", "resize_mode to be shortest, and this model has squash"),
  ("openai", {"image_mean": (0.5,) * 3}, "openai", "image_mean to be"),
  (
    "openai",
    {"vision": {**models.SIZES["openai"]["vision"], "mlp_width": 500}},
    "openai",
    "vision.mlp_width to be 512, and this model has 500",
  ),
  ("resnet", {}, "huggingface", "CLIPModel has no ResNet"),
  ("vit_bias", {}, "huggingface", "CLIPModel has no logit bias"),
  ("openai", {"logit_bias_init": -10.0}, "openai", "logit_bias_init to be None, and this model has -10.0"),
]


@pytest.mark.parametrize("kind, changes, to, message", REFUSED)
def test_what_a_target_cannot_express_is_refused_and_leaves_nothing(tmp_path, kind, changes, to, message):
  _, source = models.checkpoint(tmp_path / "ours", models.model(kind, **changes))
  with pytest.raises(UsageError) as error:
    exports.write(source, to, tmp_path / "out")
  assert message in str(error.value) and "\n" not in str(error.value)
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_what_is_there_already_is_not_touched(tmp_path):
  _, source = models.checkpoint(tmp_path / "ours", models.model())
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "precious").write_text("1")
  with pytest.raises(UsageError, match="exists already"):
    exports.write(source, "huggingface", tmp_path / "out")
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
  with pytest.raises(UsageError, match="is a checkpoint of clip_jax already"):
    exports.import_weights(source, tmp_path / "again")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_both_ways(tmp_path, value):
  config = models.model()
  params = models.random_params(config)
  params["text/projection"][3, 4] = value
  models.native.write(tmp_path / "ours", config, None, params.items())
  for to in ("huggingface", "stablehlo"):
    with pytest.raises(UsageError, match="text/projection holds values that are not finite"):
      exports.write(sources.find(tmp_path / "ours"), to, tmp_path / "out")
  _, whole = models.checkpoint(tmp_path / "whole", config)
  exports.write(whole, "open_clip", tmp_path / "theirs")
  state = {name: torch.from_numpy(np.array(t)) for name, t in _tensors(tmp_path / "theirs/open_clip_model.safetensors").items()}
  state["visual.proj"][0, 0] = value
  torch.save(state, tmp_path / "theirs/open_clip_pytorch_model.bin")
  (tmp_path / "theirs/open_clip_model.safetensors").unlink()
  with pytest.raises(UsageError, match="visual.proj holds values that are not finite"):
    exports.import_weights(sources.find(tmp_path / "theirs"), tmp_path / "imported")
  assert not (tmp_path / "out").exists() and not (tmp_path / "imported").exists()
  assert {path.name for path in tmp_path.iterdir()} == {"ours", "whole", "theirs"}


def test_an_import_that_fails_late_leaves_nothing(tmp_path, monkeypatch):
  _, source = models.checkpoint(tmp_path / "ours", models.model())
  monkeypatch.setattr(models.native, "CHUNK_BYTES", 10_000)  # so that much has been written by then
  params = {name: source.read(name) for name in source.shapes}
  last = list(params)[-1]

  def read(name):
    if name == last:
      raise UsageError("the last one is not finite")
    return params[name]

  broken = dataclasses.replace(source, layout="open_clip", read=read)
  with pytest.raises(UsageError, match="the last one"):
    exports.import_weights(broken, tmp_path / "new/imported")
  assert [path.name for path in tmp_path.iterdir()] == ["ours"]
  exports.import_weights(dataclasses.replace(source, layout="open_clip"), tmp_path / "new/imported")
  models.assert_same(sources.find(tmp_path / "new/imported"), params)


def _tensors(path):
  from safetensors.numpy import load_file

  return load_file(path)
