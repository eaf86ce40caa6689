"""Hugging Face folders: what their JSON files say of a model, and writing them.

Left out of a `config.json`, a key has the default of transformers' `CLIPConfig` or `SiglipConfig`, which the tables here repeat.
"""

import json
from pathlib import Path

from clip_jax import config as configs
from clip_jax.config.schema import CLIP_MEAN, CLIP_STD
from clip_jax.convert.layouts import huggingface, siglip
from clip_jax.data import tokenizer, tokenizer_folders
from clip_jax.errors import UsageError
from clip_jax.files import read_json, write_json

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
IGNORED = huggingface.IGNORED
BICUBIC = 3  # in Pillow's numbering

# What transformers fills in: config_group -> key -> value.
_TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
DEFAULTS = {
  "clip": {
    "vision_config": dict(_TOWER, image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
    "text_config": dict(
      _TOWER, hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49_408,
      max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49_407,
    ),
  },
  "siglip": {
    "vision_config": dict(
      _TOWER, image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=True
    ),
    "text_config": dict(
      _TOWER, vocab_size=32_000, max_position_embeddings=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
      projection_size=None,
    ),
  },
}  # fmt: skip


def rows(model):
  """The table of the layout that a model has in transformers.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Raises:
    UsageError: transformers has no such model.
  """
  kinds = model.vision.kind, model.text.kind
  if kinds == ("siglip", "siglip"):
    if model.logit_bias_init is None:
      raise UsageError("transformers' SiglipModel has a logit bias, and this model has none.")
    return siglip.HUGGINGFACE
  if kinds == ("vit", "clip"):
    if model.logit_bias_init is not None:
      raise UsageError("transformers' CLIPModel has no logit bias, and this model has one; open_clip can express it.")
    return huggingface.CLIP
  reason = "CLIPModel has no ResNet" if "resnet" in kinds else "a tower of CLIP and one of SigLIP do not go together there"
  raise UsageError(f"transformers cannot express this model: {reason}.")


def read(folder):
  """What a folder says of its model.

  Args:
    folder: with `config.json`, `preprocessor_config.json` and maybe a tokenizer's files.

  Returns:
    A resolved `clip_jax.config.Model`, and its `FileTokenizer`, or None if it has CLIP's own.

  Raises:
    UsageError: a file is missing, or the model has something that this project does not.
  """
  folder = Path(folder)
  config = read_json(folder / "config.json")
  kind = config.get("model_type")
  if kind not in DEFAULTS:
    raise UsageError(f"{folder}/config.json: model_type {kind!r} cannot be read; clip and siglip can.")
  vision, text = (
    defaults | (config.get(group) or config.get(f"{group}_dict") or {}) for group, defaults in DEFAULTS[kind].items()
  )
  for key in ("hidden_act", "layer_norm_eps"):
    if vision[key] != text[key]:
      raise UsageError(f"{folder}/config.json: {key} is {vision[key]} for images and {text[key]} for text; one for both can be read.")
  activation = {theirs: ours for ours, theirs in ACTIVATIONS.items()}.get(vision["hidden_act"])
  if activation is None:
    raise UsageError(f"{folder}/config.json: hidden_act {vision['hidden_act']!r} is not one of {', '.join(ACTIVATIONS.values())}.")
  if kind == "siglip" and not vision["vision_use_head"]:
    raise UsageError(f"{folder}/config.json: vision_use_head is false; SigLIP's pooling head is needed.")
  if vision.get("num_channels", 3) != 3:
    raise UsageError(f"{folder}/config.json: num_channels is {vision['num_channels']}; three can be read.")
  embed_dim = config.get("projection_dim", 512) if kind == "clip" else text["projection_size"] or text["hidden_size"]
  values = {
    "image_size": vision["image_size"],
    "embed_dim": embed_dim,
    "activation": activation,
    "norm_epsilon": vision["layer_norm_eps"],
    **_preprocessing(folder, kind, vision["image_size"]),
    "vision": {"kind": "vit" if kind == "clip" else kind, "patch_size": vision["patch_size"], **_tower(vision)},
    "text": {
      "kind": kind,
      "context_length": text["max_position_embeddings"],
      "vocab_size": text["vocab_size"],
      **_tower(text),
    },
  }
  if kind == "siglip":
    values |= {"logit_scale_init": 10.0, "logit_bias_init": -10.0}
  files = _tokenizer(folder, kind, text)
  values["tokenizer"] = files.kind if files else "clip"
  return configs.model_from_dict(values), files


def _tower(group):
  return {
    "width": group["hidden_size"],
    "layers": group["num_hidden_layers"],
    "heads": group["num_attention_heads"],
    "mlp_width": group["intermediate_size"],
  }


def _preprocessing(folder, kind, image_size):
  path = folder / "preprocessor_config.json"
  if path.is_file():
    given = read_json(path)
  elif (folder / "processor_config.json").is_file():
    given = read_json(folder / "processor_config.json").get("image_processor", {})
  else:
    raise UsageError(f"{path} is missing: it says how images are resized and normalised.")
  mean, std = (CLIP_MEAN, CLIP_STD) if kind == "clip" else ((0.5,) * 3, (0.5,) * 3)
  size = given.get("size", {"shortest_edge": image_size} if kind == "clip" else image_size)
  if isinstance(size, dict) and "shortest_edge" in size:
    mode, sizes = "shortest", {size["shortest_edge"]}
  elif isinstance(size, dict):
    mode, sizes = "squash", {size.get("height"), size.get("width")}
  else:
    mode, sizes = ("shortest" if kind == "clip" else "squash"), {size}
  if mode == "shortest":
    crop = given.get("crop_size", image_size)
    sizes |= set(crop.values()) if isinstance(crop, dict) else {crop}
  wrong = [
    key
    for key, right in (
      ("do_resize", True), ("do_normalize", True), ("do_rescale", True), ("resample", BICUBIC),
      *([("do_center_crop", True)] if mode == "shortest" else []),
    )
    if given.get(key, right) != right
  ]  # fmt: skip
  if wrong or sizes != {image_size}:
    what = f"{wrong[0]} is {given[wrong[0]]}" if wrong else f"images are resized to {sorted(map(str, sizes))} for a model of {image_size}"
    raise UsageError(f"{path}: {what}; what can be read is a bicubic resize to the model's size, rescaled and normalised.")
  return {
    "resize_mode": mode,
    "image_mean": given.get("image_mean", mean),
    "image_std": given.get("image_std", std),
  }


def _tokenizer(folder, kind, text):
  context = text["max_position_embeddings"]
  if kind == "siglip":
    return tokenizer_folders.read(folder, context)
  if is_clips_tokenizer(folder) and text["vocab_size"] == 49_408:
    if text["eos_token_id"] not in (2, 49_407):  # 2 is what old conversions say; they are read at the largest id
      raise UsageError(f"{folder}/config.json: eos_token_id {text['eos_token_id']} is not the end token of CLIP's tokenizer, 49407.")
    return None
  files = tokenizer_folders.read(folder, context)
  if files.end_id != text["vocab_size"] - 1 or text["eos_token_id"] not in (2, files.end_id):
    raise UsageError(
      f"{folder}: the text is read at the token with the largest id, which must be the end token; it is {files.end_id} of "
      f"{text['vocab_size']:,} here, and eos_token_id is {text['eos_token_id']}."
    )
  return files


def is_clips_tokenizer(folder):
  """Whether a folder has the vocabulary of CLIP's own tokenizer, or none at all."""
  folder = Path(folder)
  if (folder / "vocab.json").is_file():
    return read_json(folder / "vocab.json") == tokenizer.vocabulary()[0]
  if (folder / "tokenizer.json").is_file():
    return read_json(folder / "tokenizer.json").get("model", {}).get("vocab") == tokenizer.vocabulary()[0]
  return not (folder / "spiece.model").is_file()


def write(folder, model, files, dtype):
  """Writes what a Hugging Face folder has beside the weights.

  Args:
    folder: an empty folder.
    model: a resolved `clip_jax.config.Model` that `rows` accepts.
    files: its `FileTokenizer`, or None if it has CLIP's own.
    dtype: name of the type of the weights.

  Raises:
    UsageError: transformers cannot express the model.
  """
  siglips = model.vision.kind == "siglip"
  if not siglips and files is None and model.text.vocab_size != 49_408:
    raise UsageError("transformers reads text at the end token 49407 of CLIP's vocabulary; this model's has another size.")
  size, folder = model.image_size, Path(folder)
  squash = model.resize_mode == "squash"
  processor, image = ("SiglipProcessor", "SiglipImageProcessor") if siglips else ("CLIPProcessor", "CLIPImageProcessor")
  square = {"height": size, "width": size}
  preprocessor = {
    "image_processor_type": image,
    "processor_class": processor,
    "do_convert_rgb": True,
    "do_resize": True,
    "size": square if squash else {"shortest_edge": size},
    "resample": BICUBIC,
    "do_center_crop": not squash,
    "crop_size": square,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(model.image_mean),
    "image_std": list(model.image_std),
  }
  write_json(folder / "config.json", config_of(model, files, dtype))
  write_json(folder / "preprocessor_config.json", preprocessor)
  write_tokenizer(folder, files, model.text.context_length, processor)


def config_of(model, files, dtype):
  """The content of `config.json`.

  Args:
    model: a resolved `clip_jax.config.Model` that `rows` accepts.
    files: its `FileTokenizer`, or None if it has CLIP's own.
    dtype: name of the type of the weights.
  """

  def tower(group, kind):
    return {
      "model_type": kind,
      "hidden_size": group.width,
      "intermediate_size": group.mlp_width,
      "num_hidden_layers": group.layers,
      "num_attention_heads": group.heads,
      "hidden_act": ACTIVATIONS[model.activation],
      "layer_norm_eps": model.norm_epsilon,
      "attention_dropout": 0.0,
    }

  siglips = model.vision.kind == "siglip"
  kind = "siglip" if siglips else "clip"
  vision = tower(model.vision, f"{kind}_vision_model") | {
    "image_size": model.image_size,
    "patch_size": model.vision.patch_size,
    "num_channels": 3,
  }
  text = tower(model.text, f"{kind}_text_model") | {
    "vocab_size": model.text.vocab_size,
    "max_position_embeddings": model.text.context_length,
  }
  if siglips:
    text |= {"projection_size": model.embed_dim, "pad_token_id": files.pad_id if files else 1}
  else:
    end = files.end_id if files else tokenizer.ClipTokenizer.end_token
    text |= {"projection_dim": model.embed_dim, "eos_token_id": end}
    if files is None:
      text |= {"bos_token_id": tokenizer.ClipTokenizer.start_token, "pad_token_id": end}
    vision["projection_dim"] = model.embed_dim
  config = {
    "architectures": ["SiglipModel" if siglips else "CLIPModel"],
    "model_type": kind,
    "dtype": dtype,
    "vision_config": vision,
    "text_config": text,
  }
  return config if siglips else config | {"projection_dim": model.embed_dim}


def write_tokenizer(folder, files, context_length, processor=None):
  """Writes a tokenizer's files as transformers reads them.

  Args:
    folder: where.
    files: a `FileTokenizer`, or None for CLIP's own.
    context_length: tokens a row.
    processor: name of the processor class that it goes with.
  """
  folder = Path(folder)
  more = {"processor_class": processor} if processor else {}
  if files is not None:
    (folder / files.kind).write_bytes(files.transformers_content())
    write_json(folder / "tokenizer_config.json", files.transformers_config() | more)
    return
  vocabulary, merges = tokenizer.vocabulary()
  start, end = tokenizer.START, tokenizer.END
  (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
  lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  (folder / "tokenizer.json").write_text(tokenizer.for_transformers(), encoding="utf-8")
  special = dict(bos_token=start, eos_token=end, unk_token=end, pad_token=end)
  write_json(folder / "special_tokens_map.json", special)
  # The class that takes tokenizer.json as it is written: CLIPTokenizer would leave its cleaning of captions out.
  config = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=context_length)
  write_json(folder / "tokenizer_config.json", config | special | more)


def model_card(model, name):
  """A README.md for the Hub.

  Args:
    model: a resolved `clip_jax.config.Model`.
    name: what the folder is called.
  """
  siglips = model.vision.kind == "siglip"
  cls = "SiglipModel" if siglips else "CLIPModel"
  padding = '"max_length"' if siglips else "True"
  return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, clip_jax]
---

# {name}

{model.name or "A model"}, exported by clip_jax for Hugging Face transformers. Images of {model.image_size} pixels, texts of
{model.text.context_length} tokens, embeddings of {model.embed_dim} numbers, activation `{ACTIVATIONS[model.activation]}`.

```python
from PIL import Image
from transformers import AutoProcessor, {cls}

model, processor = {cls}.from_pretrained("{name}"), AutoProcessor.from_pretrained("{name}")
inputs = processor(text=["a cat", "a dog"], images=Image.open("cat.png"), padding={padding}, truncation=True, return_tensors="pt")
print(model(**inputs).logits_per_image)
```

What it was trained on, and under which licence it may be used, is for its authors to say here.
"""
