"""open_clip's hub folders: what `open_clip_config.json` says of a model, and writing it."""

import math
from pathlib import Path

from clip_jax import config as configs
from clip_jax.config.schema import CLIP_MEAN, CLIP_STD
from clip_jax.convert import huggingface, openai
from clip_jax.convert.layouts import siglip
from clip_jax.data import tokenizer_folders
from clip_jax.errors import UsageError
from clip_jax.files import read_json, write_json

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model"
IGNORED = openai.IGNORED

# Keys that change nothing in what a trained model computes, or that are read below.
_TOP = {"embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "vision_cfg", "text_cfg"}
_TOP |= {"nonscalar_logit_scale", "cast_dtype", "output_dict"}
_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_VISION |= {"patch_dropout", "output_tokens", "timm_model_name", "timm_model_pretrained", "timm_drop", "timm_drop_path"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_TEXT |= {"hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "output_tokens", "pad_id", "eos_id"}
# What open_clip does where nothing is said; another value is another model.
_USUAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
_SIGLIP = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
_SIGLIP_VISION = {"timm_pool": "map", "timm_proj": "none"}


def rows(model):
  """The table of the layout that a model has in open_clip.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Raises:
    UsageError: open_clip has no such model.
  """
  if (model.vision.kind, model.text.kind) != ("siglip", "siglip"):
    return openai.rows(model)
  if model.logit_bias_init is None:
    raise UsageError("SigLIP has a logit bias in open_clip, and this model has none.")
  return siglip.OPEN_CLIP


def read(folder):
  """What a hub folder says of its model.

  Args:
    folder: with `open_clip_config.json`.

  Returns:
    A resolved `clip_jax.config.Model`, and its `FileTokenizer`, or None if it has CLIP's own.

  Raises:
    UsageError: the file is missing, or the model has something that this project does not.
  """
  folder = Path(folder)
  path = folder / CONFIG
  config = read_json(path)
  cfg, preprocess = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
  vision, text = cfg.get("vision_cfg") or {}, cfg.get("text_cfg") or {}
  siglips = bool(vision.get("timm_model_name"))
  _refuse_unknown(path, "", cfg, _TOP)
  _refuse_unknown(path, "vision_cfg.", vision, _VISION, _SIGLIP_VISION if siglips else {})
  _refuse_unknown(path, "text_cfg.", text, _TEXT, _SIGLIP if siglips else {})
  if preprocess.get("interpolation", "bicubic") != "bicubic":
    raise UsageError(f"{path}: interpolation {preprocess['interpolation']!r} cannot be read; bicubic can.")
  tower, image_size, of_images = _vision(path, cfg, vision)
  of_text = {"activation": _activation(path, cfg, text), "norm_epsilon": _epsilon(path, text)}
  for key, value in of_images.items():
    if value != of_text[key]:
      raise UsageError(f"{path}: {key} is {value} for images and {of_text[key]} for text; one for both can be read.")
  files = _tokenizer(folder, text) if siglips else None
  bias = cfg.get("init_logit_bias")
  values = {
    "image_size": image_size,
    "embed_dim": cfg.get("embed_dim"),
    **of_text,
    "image_mean": preprocess.get("mean", CLIP_MEAN),
    "image_std": preprocess.get("std", CLIP_STD),
    "resize_mode": preprocess.get("resize_mode", "shortest"),
    "tokenizer": files.kind if files else "clip",
    "logit_bias_init": None if bias is None else float(bias),
    "vision": tower,
    "text": {
      "kind": "siglip" if siglips else "clip",
      "context_length": text.get("context_length", 77),
      "vocab_size": text.get("vocab_size", 49_408),
      "heads": text.get("heads", 8),
      **_tower(text, 512, 12),
    },
  }
  if siglips:
    values["logit_scale_init"] = 10.0
  return configs.model_from_dict(values), files


def _vision(path, cfg, vision):
  """The image tower, its image size, and what it must have in common with the text tower."""
  size = vision.get("image_size", 224)
  sides = set(size) if isinstance(size, list) else {size}
  if len(sides) != 1:
    raise UsageError(f"{path}: images of {size} pixels are not square.")
  if vision.get("timm_model_name"):
    tower = _timm_tower(path, vision["timm_model_name"])
    return tower, tower.pop("image_size"), {"activation": tower.pop("activation"), "norm_epsilon": 1e-6}
  tower, head_width = _tower(vision, 768, 12), vision.get("head_width", 64)
  if isinstance(tower["layers"], list):
    heads = 32 * tower["width"] // head_width
    return {"kind": "resnet", "width": tower["width"], "stages": tower["layers"], "heads": heads}, sides.pop(), {}
  tower |= {"kind": "vit", "heads": tower["width"] // head_width, "patch_size": vision.get("patch_size", 16)}
  return tower, sides.pop(), {"activation": _activation(path, cfg, vision), "norm_epsilon": _epsilon(path, vision)}


def _tower(group, width, layers):
  width = group.get("width", width)
  return {"width": width, "layers": group.get("layers", layers), "mlp_width": int(width * group.get("mlp_ratio", 4.0))}


def _refuse_unknown(path, prefix, given, known, required=None):
  required = required or {}
  for key, value in required.items():
    if given.get(key) != value:
      raise UsageError(f"{path}: {prefix}{key} is {given.get(key)!r}; of models with timm's towers SigLIP can be read, where it is {value!r}.")
  for key, value in given.items():
    if key not in known and key not in required and value not in _USUAL.get(key, (None, False, 0, "")):
      raise UsageError(f"{path}: {prefix}{key}={value!r} makes it a model that this project does not have.")


def _activation(path, cfg, group):
  if cfg.get("quick_gelu"):
    return "quick_gelu"
  kwargs = group.get("act_kwargs") or {}
  known = {(): "gelu", (("approximate", "none"),): "gelu", (("approximate", "tanh"),): "gelu_tanh"}
  activation = known.get(tuple(kwargs.items()))
  if activation is None:
    raise UsageError(f"{path}: act_kwargs {kwargs} cannot be read; {{'approximate': 'tanh'}} can.")
  return activation


def _epsilon(path, group):
  kwargs = group.get("norm_kwargs") or {}
  if set(kwargs) - {"eps"}:
    raise UsageError(f"{path}: norm_kwargs {kwargs} cannot be read; eps can.")
  return kwargs.get("eps", 1e-5)


def _tokenizer(folder, text):
  files = tokenizer_folders.read(folder, text.get("context_length", 77))
  clean = (text.get("tokenizer_kwargs") or {}).get("clean")
  if clean != "canonicalize":
    raise UsageError(f"{folder}/{CONFIG}: tokenizer_kwargs clean={clean!r} cannot be read; 'canonicalize' can.")
  return files.canonicalizing()  # by open_clip itself, before the tokenizer sees a text


def write(folder, model, files):
  """Writes what a hub folder has beside the weights.

  Args:
    folder: an empty folder.
    model: a resolved `clip_jax.config.Model` that `rows` accepts.
    files: its `FileTokenizer`, or None if it has CLIP's own.

  Raises:
    UsageError: open_clip cannot express the model.
  """
  if files is not None and model.text.kind == "clip":
    raise UsageError("open_clip reads CLIP's towers with CLIP's own tokenizer, and this model has another; huggingface can express it.")
  preprocess = {
    "mean": list(model.image_mean),
    "std": list(model.image_std),
    "interpolation": "bicubic",
    "resize_mode": model.resize_mode,
  }
  write_json(Path(folder) / CONFIG, {"model_cfg": config_of(model), "preprocess_cfg": preprocess})
  if files is not None:
    huggingface.write_tokenizer(folder, files, model.text.context_length)


def config_of(model):
  """The `model_cfg` of a model that `rows` accepts.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Raises:
    UsageError: open_clip cannot express it.
  """
  vision, text = model.vision, model.text
  act = {"act_kwargs": {"approximate": "tanh"}} if model.activation == "gelu_tanh" else {}
  norm = {"norm_kwargs": {"eps": model.norm_epsilon}} if model.norm_epsilon != 1e-5 else {}
  text_cfg = {
    "context_length": text.context_length,
    "vocab_size": text.vocab_size,
    "width": text.width,
    "heads": text.heads,
    "layers": text.layers,
    "mlp_ratio": _ratio(text.mlp_width, text.width),
    **act,
    **norm,
  }
  config = {"embed_dim": model.embed_dim, "quick_gelu": model.activation == "quick_gelu"}
  if model.logit_bias_init is not None:
    config["init_logit_bias"] = model.logit_bias_init
  if vision.kind == "siglip":
    vision_cfg = {
      "image_size": model.image_size,
      "timm_model_name": _timm_name(model),
      "timm_model_pretrained": False,
      **_SIGLIP_VISION,
    }
    text_cfg |= _SIGLIP | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}
    return config | {"custom_text": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
  size = {"image_size": model.image_size, "width": vision.width}
  if vision.kind == "resnet":
    head_width = vision.width * 32 // vision.heads
    vision_cfg = size | {"layers": list(vision.stages), "patch_size": None, "head_width": head_width}
    if vision.width * 32 // head_width != vision.heads:
      raise UsageError(f"open_clip cannot express vision.heads={vision.heads} of a ResNet of width {vision.width}.")
  else:
    vision_cfg = size | {
      "layers": vision.layers,
      "patch_size": vision.patch_size,
      "head_width": vision.width // vision.heads,
      "mlp_ratio": _ratio(vision.mlp_width, vision.width),
      **act,
      **norm,
    }
  return config | {"vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _timm_tower(path, name):
  stem, _, size = name.rpartition("_")
  sizes, activations = siglip.TIMM.get(stem, (None, {}))
  if not size.isdigit() or int(size) not in activations:
    raise UsageError(f"{path}: timm_model_name {name!r} cannot be read; SigLIP's can, such as vit_base_patch16_siglip_224.")
  tower = dict(zip(("patch_size", "width", "layers", "heads", "mlp_width"), sizes, strict=True))
  return tower | {"kind": "siglip", "activation": activations[int(size)], "image_size": int(size)}


def _timm_name(model):
  vision = model.vision
  wanted = (vision.patch_size, vision.width, vision.layers, vision.heads, vision.mlp_width)
  towers = ((f"{stem}_{model.image_size}", sizes, has.get(model.image_size)) for stem, (sizes, has) in siglip.TIMM.items())
  name, has = next(((name, has) for name, sizes, has in towers if sizes == wanted and has), (None, None))
  if name is None:
    raise UsageError(
      f"open_clip takes SigLIP's image tower from timm, which has none of these sizes at {model.image_size} pixels; "
      "huggingface can express it."
    )
  for what, given, assumed in (("activation", model.activation, has), ("norm_epsilon", model.norm_epsilon, 1e-6)):
    if given != assumed:
      raise UsageError(
        f"open_clip takes SigLIP's image tower from timm, whose {name} has {what} {assumed}, and this model has {given}; "
        "huggingface can express it."
      )
  return name


def _ratio(mlp_width, width):
  # open_clip takes the whole part of width * ratio.
  ratio = mlp_width / width
  return ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, math.inf)
