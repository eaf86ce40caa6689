"""The towers against a plain NumPy float64 forward pass, and what must hold of any CLIP."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.models.clip import CLIP, l2_normalize
from tests.conftest import tiny


def model_config(**changes):
  return configs.resolve(tiny(model={**tiny()["model"], **changes})).model


def random_params(config, seed=0):
  """Parameters far from their initial values, so that no bias or scale is a no-op."""
  size, context = config.image_size, config.text.context_length
  module = CLIP(config)
  images, tokens = jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, context), jnp.int32)
  params = nn.unbox(jax.jit(module.init)(jax.random.key(seed), images, tokens)["params"])
  leaves, tree = jax.tree.flatten(params)
  random = np.random.default_rng(seed)
  moved = [np.asarray(x) + 0.1 * random.normal(size=x.shape).astype(np.float32) for x in leaves]
  return module, jax.tree.unflatten(tree, moved)


def inputs(config, rows=3, seed=0):
  random = np.random.default_rng(seed)
  images = random.integers(0, 256, (rows, config.image_size, config.image_size, 3), np.uint8)
  tokens = np.zeros((rows, config.text.context_length), np.int32)
  for row, length in zip(tokens, random.integers(1, config.text.context_length - 1, rows), strict=True):
    row[0], row[1:length], row[length] = 49_406, random.integers(1, 40_000, length - 1), 49_407
  return images, tokens


class Reference:
  """CLIP's forward pass from the paper and OpenAI's released sizes, one operation at a time."""

  def __init__(self, config, params):
    self.config = config
    self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(self, x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + self.config.norm_epsilon) * p["scale"] + p["bias"]

  def activation(self, x):
    if self.config.activation == "quick_gelu":
      return x / (1 + np.exp(-1.702 * x))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

  def attention(self, x, p, heads, causal):
    length, width = x.shape
    size = width // heads
    mixed = np.zeros_like(x)
    for h in range(heads):
      q, k, v = (x @ p["qkv_kernel"][:, i, h] + p["qkv_bias"][i, h] for i in range(3))
      for row in range(length):
        seen = range(row + 1) if causal else range(length)
        weights = np.exp([q[row] @ k[j] / math.sqrt(size) for j in seen])
        weights /= weights.sum()
        mixed[row, h * size : (h + 1) * size] = sum(w * v[j] for w, j in zip(weights, seen, strict=True))
    return mixed @ p["out"]["kernel"] + p["out"]["bias"]

  def blocks(self, x, p, tower, causal):
    for i in range(tower.layers):
      b = p[f"block_{i}"]
      x = x + self.attention(self.norm(x, b["norm_1"]), b["attention"], tower.heads, causal)
      hidden = self.norm(x, b["norm_2"]) @ b["mlp_in"]["kernel"] + b["mlp_in"]["bias"]
      x = x + self.activation(hidden) @ b["mlp_out"]["kernel"] + b["mlp_out"]["bias"]
    return x

  def image(self, pixels):
    p, patch = self.params["image"], self.config.vision.patch_size
    x = (pixels / 255 - self.config.image_mean) / self.config.image_std
    grid = range(0, self.config.image_size, patch)
    tokens = [p["class_embedding"]]
    for top in grid:
      for left in grid:
        square = x[top : top + patch, left : left + patch]
        tokens.append(np.einsum("ijc,ijcw->w", square, p["patch_kernel"]))
    x = self.norm(np.stack(tokens) + p["pos_embed"], p["norm_pre"])
    x = self.blocks(x, p["transformer"], self.config.vision, causal=False)
    return self.unit(self.norm(x[0], p["norm_post"]) @ p["projection"])

  def text(self, tokens):
    p = self.params["text"]
    x = p["token_embedding"][tokens] + p["pos_embed"]
    x = self.norm(self.blocks(x, p["transformer"], self.config.text, causal=True), p["norm_final"])
    return self.unit(x[list(tokens).index(49_407)] @ p["projection"])

  @staticmethod
  def unit(x):
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 4e-2)])
def test_towers_equal_the_float64_reference(activation, dtype, tolerance):
  config = model_config(activation=activation, compute_dtype=dtype)
  module, params = random_params(config)
  images, tokens = inputs(config)
  image, text, scale = jax.jit(module.apply)({"params": params}, images, tokens)
  reference = Reference(config, params)
  assert image.dtype == text.dtype == jnp.float32
  np.testing.assert_allclose(image, [reference.image(x) for x in images], atol=tolerance)
  np.testing.assert_allclose(text, [reference.text(x) for x in tokens], atol=tolerance)
  np.testing.assert_allclose(scale, np.exp(params["logit_scale"]), rtol=1e-6)


def test_text_after_the_end_token_does_not_matter():
  config = model_config()
  module, params = random_params(config)
  _, tokens = inputs(config)
  changed = tokens.copy()
  for row in changed:
    row[np.argmax(row) + 1 :] = 7
  run = jax.jit(lambda params, t: module.apply({"params": params}, t, method="encode_text"))
  encode = lambda t: np.asarray(run(params, t))  # noqa: E731
  np.testing.assert_allclose(encode(tokens), encode(changed), atol=1e-6)
  changed[:, 1] += 1
  assert np.abs(encode(tokens) - encode(changed)).max() > 1e-3


def test_gradients_reach_every_parameter_but_unused_words():
  config = model_config()
  module, params = random_params(config)
  images, tokens = inputs(config, rows=4)

  def loss(params):
    image, text, scale = module.apply({"params": params}, images, tokens)
    logits = scale * image @ text.T
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))

  gradients = jax.jit(jax.grad(loss))(params)
  for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.abs(gradient).max() > 0, path
  used = np.zeros(config.text.vocab_size, bool)
  used[np.unique(tokens)] = True
  assert not np.abs(gradients["text"]["token_embedding"][~used]).any()


def test_initial_values_are_the_papers():
  config = model_config(vision={"patch_size": 8, "width": 256, "layers": 2, "heads": 4}, image_size=32)
  images, tokens = inputs(config)
  params = nn.unbox(jax.jit(CLIP(config).init)(jax.random.key(0), images, tokens)["params"])
  np.testing.assert_allclose(params["logit_scale"], math.log(1 / 0.07), rtol=1e-6)
  block = params["image"]["transformer"]["block_1"]
  expected = {
    "qkv": (block["attention"]["qkv_kernel"], 256**-0.5),
    "out": (block["attention"]["out"]["kernel"], 256**-0.5 / 2),  # two layers: (2 * 2) ** -0.5
    "mlp_in": (block["mlp_in"]["kernel"], 512**-0.5),
    "mlp_out": (block["mlp_out"]["kernel"], 256**-0.5 / 2),
    "token_embedding": (params["text"]["token_embedding"], 0.02),
    "text pos_embed": (params["text"]["pos_embed"], 0.01),
    "image pos_embed": (params["image"]["pos_embed"], 256**-0.5),
    "patch_kernel": (params["image"]["patch_kernel"], (3 * 8 * 8 * 3) ** -0.5),
  }
  for name, (value, stddev) in expected.items():
    # Five standard errors of a standard deviation.
    assert abs(np.std(value) / stddev - 1) < 5 / math.sqrt(2 * value.size), name
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    name = path[-1].key
    if "bias" in name:
      assert not np.any(value), path
    if name == "scale":
      assert np.all(value == 1), path


def test_every_axis_of_every_parameter_is_named_for_the_sharding_rules():
  config = model_config()
  images, tokens = inputs(config)
  boxed = jax.eval_shape(CLIP(config).init, jax.random.key(0), images, tokens)["params"]
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
    assert is_box(leaf) and len(leaf.names) == leaf.value.ndim, path
    assert leaf.value.ndim == 0 or any(leaf.names), path


def test_a_zero_vector_normalises_to_zero_with_a_finite_gradient():
  assert not np.any(l2_normalize(jnp.zeros((2, 4))))
  assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 4)))).all()
