"""The layout of `CLIPModel` in Hugging Face's transformers."""

from clip_jax.convert.layouts.tables import CONVOLUTION, MATRIX, SAME, Row, block, norm

_BLOCK = (
  *("layer_norm1", "layer_norm2", [f"self_attn.{name}_proj" for name in "qkv"]),
  *("self_attn.out_proj", "mlp.fc1", "mlp.fc2"),
)

# What `SiglipModel` has, too.
TOWERS = [
  Row("image/patch_kernel", ["vision_model.embeddings.patch_embedding.weight"], CONVOLUTION),
  Row("image/pos_embed", ["vision_model.embeddings.position_embedding.weight"], SAME),
  *block("image/transformer", "vision_model.encoder.layers", _BLOCK),
  *norm("image/norm_post", "vision_model.post_layernorm"),
  Row("text/token_embedding", ["text_model.embeddings.token_embedding.weight"], SAME),
  Row("text/pos_embed", ["text_model.embeddings.position_embedding.weight"], SAME),
  *block("text/transformer", "text_model.encoder.layers", _BLOCK),
  *norm("text/norm_final", "text_model.final_layer_norm"),
]

CLIP = [
  *TOWERS,
  Row("image/class_embedding", ["vision_model.embeddings.class_embedding"], SAME),
  *norm("image/norm_pre", "vision_model.pre_layrnorm"),  # spelled so
  Row("image/projection", ["visual_projection.weight"], MATRIX),
  Row("text/projection", ["text_projection.weight"], MATRIX),
  Row("logit_scale", ["logit_scale"], SAME),
]

IGNORED = (r"\.position_ids$",)
