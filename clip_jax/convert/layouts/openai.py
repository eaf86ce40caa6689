"""The layout of OpenAI's CLIP, which is also that of open_clip's `CLIP`."""

from clip_jax.convert.layouts.tables import CONVOLUTION, SAME, Row, attend, block, dense, norm

_BLOCK = ("ln_1", "ln_2", ["attn.in_proj_"], "attn.out_proj", "mlp.c_fc", "mlp.c_proj")


def text(prefix=""):
  """The rows of a text tower but its projection, and of scale and bias; open_clip has it with a prefix, too."""
  return [
    Row("text/token_embedding", [f"{prefix}token_embedding.weight"], SAME),
    Row("text/pos_embed", [f"{prefix}positional_embedding"], SAME),
    *block("text/transformer", f"{prefix}transformer.resblocks", _BLOCK),
    *norm("text/norm_final", f"{prefix}ln_final"),
    Row("logit_scale", ["logit_scale"], SAME),
    Row("logit_bias", ["logit_bias"], SAME),
  ]


VIT = [
  Row("image/patch_kernel", ["visual.conv1.weight"], CONVOLUTION),
  Row("image/class_embedding", ["visual.class_embedding"], SAME),
  Row("image/pos_embed", ["visual.positional_embedding"], SAME),
  *norm("image/norm_pre", "visual.ln_pre"),
  *block("image/transformer", "visual.transformer.resblocks", _BLOCK),
  *norm("image/norm_post", "visual.ln_post"),
  Row("image/projection", ["visual.proj"], SAME),
  *text(),
  Row("text/projection", ["text_projection"], SAME),
]


def _convolution(ours, theirs):
  return Row(f"{ours}/kernel", [f"{theirs}.weight"], CONVOLUTION)


def _batch_norm(ours, theirs):
  return [
    *norm(ours, theirs),
    Row(f"{ours}/mean", [f"{theirs}.running_mean"], SAME),
    Row(f"{ours}/var", [f"{theirs}.running_var"], SAME),
  ]


def _three(ours, theirs):
  # Stem and bottleneck alike: three convolutions, each with its norm.
  return [
    row
    for i in (1, 2, 3)
    for row in (_convolution(f"{ours}/conv_{i}", f"{theirs}.conv{i}"), *_batch_norm(f"{ours}/norm_{i}", f"{theirs}.bn{i}"))
  ]


def _stage(stage):
  ours, theirs = f"image/stage_{stage}/block_{{i}}", f"visual.layer{stage + 1}.{{i}}"
  return [
    *_three(ours, theirs),
    _convolution(f"{ours}/shortcut/conv", f"{theirs}.downsample.0"),
    *_batch_norm(f"{ours}/shortcut/norm", f"{theirs}.downsample.1"),
  ]


RESNET = [
  *_three("image/stem", "visual"),
  *(row for stage in range(4) for row in _stage(stage)),
  Row("image/pool/pos_embed", ["visual.attnpool.positional_embedding"], SAME),
  *attend("image/pool/attention", [f"visual.attnpool.{name}_proj" for name in "qkv"]),
  *dense("image/pool/attention/out", "visual.attnpool.c_proj"),
  *text(),
  Row("text/projection", ["text_projection"], SAME),
]

# What may be in a file beside the weights, as regular expressions: buffers, and the sizes OpenAI wrote beside them.
IGNORED = (r"\.num_batches_tracked$", r"^(input_resolution|context_length|vocab_size)$", r"(^|\.)attn_mask$")
