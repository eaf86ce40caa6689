"""The layout of OpenAI's CLIP, which is also that of open_clip's `CLIP`."""

from clip_jax.convert.layouts.tables import CONVOLUTION, SAME, Row, attend, block, dense, norm

_BLOCK = ("ln_1", "ln_2", ["attn.in_proj_"], "attn.out_proj", "mlp.c_fc", "mlp.c_proj")

_TEXT = [
  Row("text/token_embedding", ["token_embedding.weight"], SAME),
  Row("text/pos_embed", ["positional_embedding"], SAME),
  *block("text/transformer", "transformer.resblocks", _BLOCK),
  *norm("text/norm_final", "ln_final"),
  Row("text/projection", ["text_projection"], SAME),
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
  *_TEXT,
]


def _conv_norm(ours_conv, theirs_conv, ours_norm, theirs_norm):
  return [
    Row(f"{ours_conv}/kernel", [f"{theirs_conv}.weight"], CONVOLUTION),
    *norm(ours_norm, theirs_norm),
    Row(f"{ours_norm}/mean", [f"{theirs_norm}.running_mean"], SAME),
    Row(f"{ours_norm}/var", [f"{theirs_norm}.running_var"], SAME),
  ]


_STAGES = [
  row
  for stage in range(4)
  for ours, theirs in [(f"image/stage_{stage}/block_{{i}}", f"visual.layer{stage + 1}.{{i}}")]
  for row in [
    *_conv_norm(f"{ours}/conv_1", f"{theirs}.conv1", f"{ours}/norm_1", f"{theirs}.bn1"),
    *_conv_norm(f"{ours}/conv_2", f"{theirs}.conv2", f"{ours}/norm_2", f"{theirs}.bn2"),
    *_conv_norm(f"{ours}/conv_3", f"{theirs}.conv3", f"{ours}/norm_3", f"{theirs}.bn3"),
    *_conv_norm(
      f"{ours}/shortcut/conv", f"{theirs}.downsample.0", f"{ours}/shortcut/norm", f"{theirs}.downsample.1"
    ),
  ]
]

RESNET = [
  *_conv_norm("image/stem/conv_1", "visual.conv1", "image/stem/norm_1", "visual.bn1"),
  *_conv_norm("image/stem/conv_2", "visual.conv2", "image/stem/norm_2", "visual.bn2"),
  *_conv_norm("image/stem/conv_3", "visual.conv3", "image/stem/norm_3", "visual.bn3"),
  *_STAGES,
  Row("image/pool/pos_embed", ["visual.attnpool.positional_embedding"], SAME),
  *attend("image/pool/attention", [f"visual.attnpool.{name}_proj" for name in "qkv"]),
  *dense("image/pool/attention/out", "visual.attnpool.c_proj"),
  *_TEXT,
]

# What may be in a file beside the weights, as regular expressions: buffers, and the sizes OpenAI wrote beside them.
IGNORED = (r"\.num_batches_tracked$", r"^(input_resolution|context_length|vocab_size)$", r"(^|\.)attn_mask$")
