"""The layouts of SigLIP: `SiglipModel` in transformers, and open_clip's, whose image tower is timm's."""

from clip_jax.convert.layouts import huggingface, openai
from clip_jax.convert.layouts.tables import (
  CONVOLUTION,
  MATRIX,
  SAME,
  Row,
  attend,
  block,
  dense,
  leading,
  norm,
)


def _head(theirs, names):
  probe, attention, out, normed, mlp = names
  ours = "image/head"
  return [
    Row(f"{ours}/probe", [f"{theirs}.{probe}"], leading(2)),
    *attend(f"{ours}/attention", [f"{theirs}.{name}" for name in attention]),
    *dense(f"{ours}/attention/out", f"{theirs}.{out}"),
    *norm(f"{ours}/norm", f"{theirs}.{normed}"),
    *dense(f"{ours}/mlp_in", f"{theirs}.{mlp}.fc1"),
    *dense(f"{ours}/mlp_out", f"{theirs}.{mlp}.fc2"),
  ]


HUGGINGFACE = [
  *huggingface.TOWERS,
  Row("image/patch_bias", ["vision_model.embeddings.patch_embedding.bias"], SAME),
  *_head("vision_model.head", ("probe", ["attention.in_proj_"], "attention.out_proj", "layernorm", "mlp")),
  Row("text/projection", ["text_model.head.weight"], MATRIX),
  Row("text/projection_bias", ["text_model.head.bias"], SAME),
  Row("logit_scale", ["logit_scale"], leading(1)),
  Row("logit_bias", ["logit_bias"], leading(1)),
]

_TIMM_BLOCK = ("norm1", "norm2", ["attn.qkv"], "attn.proj", "mlp.fc1", "mlp.fc2")

OPEN_CLIP = [
  Row("image/patch_kernel", ["visual.trunk.patch_embed.proj.weight"], CONVOLUTION),
  Row("image/patch_bias", ["visual.trunk.patch_embed.proj.bias"], SAME),
  Row("image/pos_embed", ["visual.trunk.pos_embed"], leading(1)),
  *block("image/transformer", "visual.trunk.blocks", _TIMM_BLOCK),
  *norm("image/norm_post", "visual.trunk.norm"),
  *_head("visual.trunk.attn_pool", ("latent", ["q", "kv"], "proj", "norm", "mlp")),
  *openai.text("text."),
  Row("text/projection", ["text.text_projection.weight"], MATRIX),
  Row("text/projection_bias", ["text.text_projection.bias"], SAME),
]

# timm's image towers of SigLIP, without the image size their names end in: sizes, image sizes, and the activation that timm
# gives them. The published weights were trained with the tanh approximation; timm has the exact GELU for the older names.
TIMM = {
  "vit_base_patch16_siglip": ((16, 768, 12, 12, 3072), {224: "gelu", 256: "gelu", 384: "gelu", 512: "gelu"}),
  "vit_base_patch32_siglip": ((32, 768, 12, 12, 3072), {256: "gelu_tanh"}),
  "vit_large_patch16_siglip": ((16, 1024, 24, 16, 4096), {256: "gelu", 384: "gelu", 512: "gelu_tanh"}),
  "vit_so400m_patch14_siglip": ((14, 1152, 27, 16, 4304), {224: "gelu", 378: "gelu", 384: "gelu"}),
  "vit_so400m_patch16_siglip": ((16, 1152, 27, 16, 4304), {256: "gelu_tanh", 384: "gelu_tanh", 512: "gelu_tanh"}),
  "vit_giantopt_patch16_siglip": ((16, 1536, 40, 16, 6144), {256: "gelu_tanh", 384: "gelu_tanh"}),
}
