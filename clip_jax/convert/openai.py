"""OpenAI's files: what their loader takes for granted, and the sizes it reads off the shapes."""

import re

from clip_jax import config as configs
from clip_jax.config.schema import CLIP_MEAN, CLIP_STD
from clip_jax.convert.layouts import openai
from clip_jax.errors import UsageError

IGNORED = openai.IGNORED
SIZES = ("input_resolution", "context_length", "vocab_size")  # that OpenAI wrote beside the weights


def rows(model):
  """The table of the layout of CLIP's own towers.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Raises:
    UsageError: its towers are not CLIP's.
  """
  if model.text.kind != "clip" or model.vision.kind not in ("vit", "resnet"):
    raise UsageError("this layout holds CLIP's own towers, and this model has SigLIP's; huggingface can express it.")
  return openai.RESNET if model.vision.kind == "resnet" else openai.VIT


def check_expressible(model):
  """Checks that OpenAI's loader would build this model: it hard-codes all that cannot be read off a shape.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Raises:
    UsageError: it would build another; the message says in what.
  """
  rows(model)
  vision, text = model.vision, model.text
  resnet = vision.kind == "resnet"
  vision_heads = vision.width * 32 // 64 if resnet else vision.width // 64
  for what, given, assumed in (
    ("activation", model.activation, "quick_gelu"),
    ("norm_epsilon", model.norm_epsilon, 1e-5),
    ("vision.heads", vision.heads, vision_heads),
    ("text.heads", text.heads, text.width // 64),
    ("vision.mlp_width", vision.mlp_width, None if resnet else 4 * vision.width),
    ("text.mlp_width", text.mlp_width, 4 * text.width),
    ("image_mean", tuple(model.image_mean), CLIP_MEAN),
    ("image_std", tuple(model.image_std), CLIP_STD),
    ("resize_mode", model.resize_mode, "shortest"),
    ("tokenizer", model.tokenizer, "clip"),
    ("logit_bias_init", model.logit_bias_init, None),
  ):
    if given != assumed:
      raise UsageError(f"OpenAI's loader takes {what} to be {assumed}, and this model has {given}; open_clip can express it.")


def sizes_from(shapes):
  """The sizes that can be read off a file.

  Args:
    shapes: a dict of the names and shapes of its tensors.

  Returns:
    A dict of the keys of a `clip_jax.config.Model`, without heads, activation and what else leaves no trace; None if
    these are not CLIP's own towers.
  """
  try:
    context, text_width = shapes["positional_embedding"]
    values = {
      "embed_dim": shapes["text_projection"][1],
      "text": {
        "context_length": context,
        "vocab_size": shapes["token_embedding.weight"][0],
        "width": text_width,
        "layers": _count(shapes, r"transformer\.resblocks\.(\d+)\."),
        "mlp_width": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
      },
    }
    if "visual.attnpool.positional_embedding" in shapes:
      side = round((shapes["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
      width = shapes["visual.layer1.0.conv1.weight"][0]
      stages = tuple(_count(shapes, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
      return values | {"image_size": 32 * side, "vision": {"kind": "resnet", "width": width, "stages": stages}}
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    vision = {
      "kind": "vit",
      "width": width,
      "patch_size": patch,
      "layers": _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
      "mlp_width": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
    }
    return values | {"image_size": patch * side, "vision": vision}
  except (KeyError, ValueError, IndexError):
    return None


def model_from(shapes, where):
  """The model that OpenAI's loader would build from a file.

  Args:
    shapes: a dict of the names and shapes of its tensors.
    where: the file, for messages.

  Raises:
    UsageError: these are not CLIP's own towers.
  """
  sizes = sizes_from(shapes)
  if sizes is None:
    raise UsageError(f"{where} does not hold the tensors of CLIP's towers, such as positional_embedding and visual.conv1.weight.")
  vision, text = sizes["vision"], sizes["text"]
  vision["heads"] = vision["width"] // (2 if vision["kind"] == "resnet" else 64)
  text["heads"] = text["width"] // 64
  return configs.model_from_dict(sizes | {"activation": "quick_gelu"})


def _count(shapes, pattern):
  return 1 + max(int(match.group(1)) for match in map(re.compile(pattern).match, shapes) if match)
