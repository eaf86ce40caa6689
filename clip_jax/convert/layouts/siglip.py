"""The layouts of SigLIP: `SiglipModel` in transformers, and open_clip's, whose image tower is timm's."""

from clip_jax.convert.layouts import huggingface
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
  Row("image/patch_kernel", ["vision_model.embeddings.patch_embedding.weight"], CONVOLUTION),
  Row("image/patch_bias", ["vision_model.embeddings.patch_embedding.bias"], SAME),
  Row("image/pos_embed", ["vision_model.embeddings.position_embedding.weight"], SAME),
  *block("image/transformer", "vision_model.encoder.layers", huggingface.BLOCK),
  *norm("image/norm_post", "vision_model.post_layernorm"),
  *_head("vision_model.head", ("probe", ["attention.in_proj_"], "attention.out_proj", "layernorm", "mlp")),
  Row("text/token_embedding", ["text_model.embeddings.token_embedding.weight"], SAME),
  Row("text/pos_embed", ["text_model.embeddings.position_embedding.weight"], SAME),
  *block("text/transformer", "text_model.encoder.layers", huggingface.BLOCK),
  *norm("text/norm_final", "text_model.final_layer_norm"),
  Row("text/projection", ["text_model.head.weight"], MATRIX),
  Row("text/projection_bias", ["text_model.head.bias"], SAME),
  Row("logit_scale", ["logit_scale"], leading(1)),
  Row("logit_bias", ["logit_bias"], leading(1)),
]

_TIMM_BLOCK = ("norm1", "norm2", ["attn.qkv"], "attn.proj", "mlp.fc1", "mlp.fc2")
_TEXT_BLOCK = ("ln_1", "ln_2", ["attn.in_proj_"], "attn.out_proj", "mlp.c_fc", "mlp.c_proj")

OPEN_CLIP = [
  Row("image/patch_kernel", ["visual.trunk.patch_embed.proj.weight"], CONVOLUTION),
  Row("image/patch_bias", ["visual.trunk.patch_embed.proj.bias"], SAME),
  Row("image/pos_embed", ["visual.trunk.pos_embed"], leading(1)),
  *block("image/transformer", "visual.trunk.blocks", _TIMM_BLOCK),
  *norm("image/norm_post", "visual.trunk.norm"),
  *_head("visual.trunk.attn_pool", ("latent", ["q", "kv"], "proj", "norm", "mlp")),
  Row("text/token_embedding", ["text.token_embedding.weight"], SAME),
  Row("text/pos_embed", ["text.positional_embedding"], SAME),
  *block("text/transformer", "text.transformer.resblocks", _TEXT_BLOCK),
  *norm("text/norm_final", "text.ln_final"),
  Row("text/projection", ["text.text_projection.weight"], MATRIX),
  Row("text/projection_bias", ["text.text_projection.bias"], SAME),
  Row("logit_scale", ["logit_scale"], SAME),
  Row("logit_bias", ["logit_bias"], SAME),
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
