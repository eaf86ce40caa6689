"""Small models of each kind with random parameters, as checkpoints, for the tests of conversion."""

import numpy as np

from clip_jax import config as configs
from clip_jax.convert import native, sources, weights

TEXT = dict(width=32, layers=2, heads=2)
# Heads, widths and depths differ between and within the towers, so that no two can be confused.
SIZES = {
  "vit": dict(image_size=32, embed_dim=24, vision=dict(patch_size=8, width=48, layers=3, heads=4), text=TEXT),
  "vit_bias": dict(
    image_size=32, embed_dim=24, logit_bias_init=-10.0, vision=dict(patch_size=8, width=48, layers=1, heads=4), text=TEXT
  ),
  "openai": dict(
    image_size=32, embed_dim=24, vision=dict(patch_size=8, width=128, layers=2, heads=2), text=dict(TEXT, width=64, heads=1)
  ),
  "resnet": dict(
    image_size=64, embed_dim=24, vision=dict(kind="resnet", stages=(1, 2, 1, 1), width=8, heads=4), text=dict(TEXT, width=64, heads=1)
  ),
  "siglip": dict(
    **dict(image_size=40, embed_dim=48, activation="gelu_tanh", norm_epsilon=1e-6),
    **dict(logit_scale_init=10.0, logit_bias_init=-10.0),
    **dict(image_mean=(0.5,) * 3, image_std=(0.5,) * 3, resize_mode="squash", tokenizer="tokenizer.json"),
    vision=dict(kind="siglip", patch_size=16, width=48, layers=2, heads=4, mlp_width=56),
    text=dict(kind="siglip", context_length=9, vocab_size=300, width=32, layers=3, heads=2),
  ),
}  # fmt: skip


def small_tokenizer(folder):
  """A tokenizer of 300 ids as SigLIP 2 has it, read from a folder: bytes and a few merges, <eos> after the text."""
  import json

  from tokenizers import Tokenizer, models, processors, trainers

  from clip_jax.data import tokenizer_folders

  rust = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
  trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
  )
  rust.train_from_iterator(["a cat and a dog", "the red hat"], trainer)
  end = rust.token_to_id("<eos>")
  rust.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", end)])
  rust.save(str(folder / "tokenizer.json"))
  config = dict(tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return tokenizer_folders.read(folder, SIZES["siglip"]["text"]["context_length"])


def model(kind="vit", **changes):
  """A resolved model of one of the small sizes."""
  return configs.model_from_dict({**SIZES[kind], **changes})


def random_params(config, seed=0):
  """Parameters by path, far from their initial values, so that no bias or scale is a no-op."""
  random, made = np.random.default_rng(seed), {}
  for name, shape in weights.shapes_of(config).items():
    value = np.asarray(0.1 * random.standard_normal(shape.shape), np.float32)
    if name.endswith("/scale"):
      value += 1
    elif name.endswith("/var"):
      value = np.abs(value) + 0.5
    made[name] = np.asarray(3, np.float32) if name == "logit_scale" else value
  return made


def checkpoint(path, config, tokenizer=None, seed=0):
  """Writes a checkpoint; returns its parameters and the `Source` that reads it."""
  params = random_params(config, seed)
  native.write(path, config, tokenizer, params.items())
  return params, sources.find(path)


def assert_same(source, params):
  """Bit for bit."""
  assert set(source.shapes) == set(params)
  for name, value in params.items():
    np.testing.assert_array_equal(source.read(name), value, err_msg=name)
