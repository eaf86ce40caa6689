"""Sizes of the published CLIP models, as data.

Radford et al. 2021, tables 19 and 20 (B and L); the L/14@336 text tower is that of L/14, and so is that of
L/16, which is open_clip's name for the towers of FLIP and CLIPA. Text towers
have a context of 77 tokens and CLIP's vocabulary of 49,408; the MLP is four times as wide as its tower.
"""

_B_TEXT = dict(width=512, layers=12, heads=8)
_L_TEXT = dict(width=768, layers=12, heads=12)
_B_VISION = dict(width=768, layers=12, heads=12)
_L_VISION = dict(width=1024, layers=24, heads=16)

# `parameters` is the published count of what the sizes give, in millions; a test builds each model.
MODELS = {
  "ViT-B-32": dict(image_size=224, embed_dim=512, vision=dict(patch_size=32, **_B_VISION), text=_B_TEXT),
  "ViT-B-16": dict(image_size=224, embed_dim=512, vision=dict(patch_size=16, **_B_VISION), text=_B_TEXT),
  "ViT-L-16": dict(image_size=224, embed_dim=768, vision=dict(patch_size=16, **_L_VISION), text=_L_TEXT),
  "ViT-L-14": dict(image_size=224, embed_dim=768, vision=dict(patch_size=14, **_L_VISION), text=_L_TEXT),
  "ViT-L-14-336": dict(image_size=336, embed_dim=768, vision=dict(patch_size=14, **_L_VISION), text=_L_TEXT),
}

MLP_RATIO = 4
CONTEXT_LENGTH = 77
VOCAB_SIZE = 49_408
