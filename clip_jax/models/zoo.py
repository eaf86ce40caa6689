"""Sizes of the published CLIP and SigLIP models, as data, by the names open_clip gives them.

Radford et al. 2021, tables 19 and 20 (B, L, RN; the L/14@336 text tower is that of L/14); Cherti et al. 2022 (H, g, bigG:
arXiv 2212.07143 and open_clip's configs); L/16 is open_clip's name for the towers of FLIP and CLIPA; Zhai et al. 2023
(SigLIP, arXiv 2303.15343) and Alabdulmohsin et al. 2023 (So400m, arXiv 2305.13035). Where nothing else is said a text tower has a
context of 77 tokens and CLIP's vocabulary of 49,408, and an MLP is four times as wide as its tower.

A plain name has the exact GELU, as most weights trained with open_clip; `-quickgelu` has OpenAI's approximation, as OpenAI's
own weights. Mixing them up runs without an error and is wrong.
"""

_B = dict(width=768, layers=12, heads=12)
_L = dict(width=1024, layers=24, heads=16)
_SO400M = dict(width=1152, layers=27, heads=16, mlp_width=4304)
_B_TEXT = dict(width=512, layers=12, heads=8)
_L_TEXT = dict(width=768, layers=12, heads=12)
_H_TEXT = dict(width=1024, layers=24, heads=16)
_BIGG_TEXT = dict(width=1280, layers=32, heads=20)


def _vit(image_size, embed_dim, text, **vision):
  return dict(image_size=image_size, embed_dim=embed_dim, activation="gelu", vision=vision, text=text)


def _resnet(image_size, embed_dim, stages, width, text_heads):
  text_width = 64 * text_heads
  return dict(
    image_size=image_size,
    embed_dim=embed_dim,
    activation="gelu",
    vision=dict(kind="resnet", stages=stages, width=width, heads=width // 2),
    text=dict(width=text_width, layers=12, heads=text_heads),
  )


def _siglip(image_size, patch_size, tower, context_length=64):
  return dict(
    image_size=image_size,
    embed_dim=tower["width"],
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    resize_mode="squash",
    tokenizer="spiece.model",
    logit_scale_init=10.0,
    logit_bias_init=-10.0,
    vision=dict(kind="siglip", patch_size=patch_size, **tower),
    text=dict(kind="siglip", context_length=context_length, vocab_size=32_000, **tower),
  )


_CLIP = {
  "ViT-B-32": _vit(224, 512, _B_TEXT, patch_size=32, **_B),
  "ViT-B-16": _vit(224, 512, _B_TEXT, patch_size=16, **_B),
  "ViT-L-16": _vit(224, 768, _L_TEXT, patch_size=16, **_L),
  "ViT-L-14": _vit(224, 768, _L_TEXT, patch_size=14, **_L),
  "ViT-L-14-336": _vit(336, 768, _L_TEXT, patch_size=14, **_L),
  "ViT-H-14": _vit(224, 1024, _H_TEXT, patch_size=14, width=1280, layers=32, heads=16),
  "ViT-g-14": _vit(224, 1024, _H_TEXT, patch_size=14, width=1408, layers=40, heads=16, mlp_width=6144),
  "ViT-bigG-14": _vit(224, 1280, _BIGG_TEXT, patch_size=14, width=1664, layers=48, heads=16, mlp_width=8192),
  "RN50": _resnet(224, 1024, (3, 4, 6, 3), 64, 8),
  "RN101": _resnet(224, 512, (3, 4, 23, 3), 64, 8),
  "RN50x4": _resnet(288, 640, (4, 6, 10, 6), 80, 10),
  "RN50x16": _resnet(384, 768, (6, 8, 18, 8), 96, 12),
  "RN50x64": _resnet(448, 1024, (3, 15, 36, 10), 128, 16),
}
_SIGLIP = {
  "ViT-B-16-SigLIP": _siglip(224, 16, _B),
  "ViT-B-16-SigLIP-256": _siglip(256, 16, _B),
  "ViT-B-16-SigLIP-384": _siglip(384, 16, _B),
  "ViT-B-16-SigLIP-512": _siglip(512, 16, _B),
  "ViT-L-16-SigLIP-256": _siglip(256, 16, _L),
  "ViT-L-16-SigLIP-384": _siglip(384, 16, _L),
  "ViT-SO400M-14-SigLIP": _siglip(224, 14, _SO400M, context_length=16),
  "ViT-SO400M-14-SigLIP-384": _siglip(384, 14, _SO400M),
}
# open_clip has no quickgelu twin of these two.
_GELU_ONLY = ("ViT-L-16", "ViT-g-14")

MODELS = {}
for _name, _sizes in _CLIP.items():
  MODELS[_name] = _sizes
  if _name not in _GELU_ONLY:
    MODELS[f"{_name}-quickgelu"] = {**_sizes, "activation": "quick_gelu"}
MODELS |= _SIGLIP
