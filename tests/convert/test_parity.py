"""Against the live PyTorch implementations of transformers: features, logits and gradients, both directions."""

import flax
import jax
import numpy as np
import pytest
import torch
import transformers

import clip_jax
from clip_jax import config as configs
from clip_jax.convert import exports, huggingface, sources, weights
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.train.step import embed_with, loss_with
from tests.conftest import tiny
from tests.convert import models

ROWS = 4


def inputs(config, seed=0):
  """Random pixels, and tokens that end with the largest id, as all of CLIP's do."""
  random = np.random.default_rng(seed)
  pixels = random.integers(0, 256, (ROWS, config.image_size, config.image_size, 3), np.uint8)
  tokens = random.integers(3, config.text.vocab_size - 2, (ROWS, config.text.context_length)).astype(np.int32)
  if config.text.kind == "clip":
    for row, end in zip(tokens, random.integers(2, config.text.context_length, ROWS), strict=True):
      row[0], row[end], row[end + 1 :] = 49_406, 49_407, 0
  return pixels, tokens


def for_torch(config, pixels, tokens):
  values = (pixels / 255 - np.float64(config.image_mean)) / np.float64(config.image_std)
  return {
    "pixel_values": torch.from_numpy(values.astype(np.float32).transpose(0, 3, 1, 2)),
    "input_ids": torch.from_numpy(tokens).long(),
  }


def theirs(config):
  """A model of transformers with random weights that are not its initial ones, and the class."""
  cls = transformers.SiglipModel if config.vision.kind == "siglip" else transformers.CLIPModel
  described = cls.config_class(**huggingface.config_of(config, None, "float32"))
  torch.manual_seed(0)
  twin = cls(described).eval()
  with torch.no_grad():
    for name, parameter in twin.named_parameters():
      spread = 0.05 if parameter.ndim > 1 else 0.1
      parameter.add_(spread * torch.randn_like(parameter))
      if name == "logit_scale":
        parameter.fill_(3.0)
  return twin, cls


CASES = [("vit", {"activation": "quick_gelu"}), ("vit", {"activation": "gelu"}), ("siglip", {})]


def config_of(kind, changes):
  if kind in models.SIZES:
    return models.model(kind, **{**changes, "tokenizer": "clip"} if kind != "siglip" else changes)
  return configs.model_from_dict({"name": kind, **changes})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return models.small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_theirs(folder, twin, config, tokenizer):
  twin.save_pretrained(folder)
  huggingface.write(folder, config, tokenizer, "float32")


@pytest.mark.parametrize("kind, changes", [*CASES, pytest.param("ViT-B-32-quickgelu", {}, marks=pytest.mark.slow)])
def test_a_model_of_transformers_computes_the_same_here_and_goes_back_bit_for_bit(tmp_path, tokenizer, kind, changes):
  config = config_of(kind, changes)
  twin, cls = theirs(config)
  write_theirs(tmp_path / "theirs", twin, config, tokenizer if kind == "siglip" else None)
  ours = clip_jax.load(tmp_path / "theirs")
  assert ours.config == config
  pixels, tokens = inputs(config)
  with torch.no_grad():
    want = twin(**for_torch(config, pixels, tokens))
  image, text = ours.encode_image(pixels), ours.encode_text(tokens)
  np.testing.assert_allclose(image, want.image_embeds, atol=1e-5)
  np.testing.assert_allclose(text, want.text_embeds, atol=1e-5)
  logits = ours.logit_scale * image @ text.T + ours.logit_bias
  np.testing.assert_allclose(logits, want.logits_per_image, atol=1e-5 * ours.logit_scale)
  exports.write(sources.find(tmp_path / "theirs"), "huggingface", tmp_path / "back")
  back, wanted = cls.from_pretrained(tmp_path / "back").state_dict(), twin.state_dict()
  assert back.keys() == wanted.keys()
  for name, value in wanted.items():
    assert torch.equal(back[name], value), name


@pytest.mark.parametrize("kind, changes", CASES)
def test_a_model_from_here_computes_the_same_in_transformers(tmp_path, tokenizer, kind, changes):
  config = config_of(kind, changes)
  params, source = models.checkpoint(tmp_path / "ours", config, tokenizer if kind == "siglip" else None)
  exports.write(source, "huggingface", tmp_path / "theirs")
  twin = transformers.AutoModel.from_pretrained(tmp_path / "theirs").eval()
  pixels, tokens = inputs(config)
  with torch.no_grad():
    got = twin(**for_torch(config, pixels, tokens))
  ours = clip_jax.load(tmp_path / "ours")
  np.testing.assert_allclose(ours.encode_image(pixels), got.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours.encode_text(tokens), got.text_embeds, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "siglip"])
def test_gradients_of_the_loss_agree(tmp_path, tokenizer, kind):
  config = config_of(kind, {})
  twin, _ = theirs(config)
  write_theirs(tmp_path, twin, config, tokenizer if kind == "siglip" else None)
  source = sources.find(tmp_path)
  pixels, tokens = inputs(config)
  loss = twin.train()(**for_torch(config, pixels, tokens), return_loss=True).loss
  loss.backward()

  run = tiny(model={**configs.to_dict(config)}, mesh={"data": 1}, loss={"name": "sigmoid" if kind == "siglip" else "softmax"})
  run = configs.resolve(run)
  mesh = meshes.create(run, jax.devices()[:1])
  embed, contrastive = embed_with(CLIP(config)), loss_with(run.loss, mesh)
  batch = {"images": pixels, "tokens": tokens}

  def whole(params):
    return contrastive(params, embed(params, batch), batch)

  value, gradients = jax.jit(jax.value_and_grad(whole))(source.params())
  np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
  rows, _ = weights.rows_of(huggingface.rows(config), source.shapes)
  found = {}
  for name, gradient in flax.traverse_util.flatten_dict(gradients, sep="/").items():
    found |= dict(zip(rows[name].theirs, rows[name].how.to(np.asarray(gradient)), strict=True))
  named = dict(twin.named_parameters())
  assert set(found) == set(named)
  five = [
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.encoder.layers.1.self_attn.q_proj.weight",
    "text_model.encoder.layers.0.mlp.fc1.weight",
    "text_model.embeddings.token_embedding.weight",
    "logit_scale",
  ]
  for name in five:
    want = named[name].grad.numpy()
    error = np.linalg.norm(found[name] - want) / np.linalg.norm(want)
    assert error < 1e-4, (name, error)
  # All the others, too, where there is a gradient: that of a key's bias is nothing but rounding.
  total = np.sqrt(sum(np.square(p.grad.numpy()).sum() for p in named.values()))
  for name, parameter in named.items():
    assert np.linalg.norm(found[name] - parameter.grad.numpy()) < 1e-4 * total, name
