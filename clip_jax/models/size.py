"""How large a model is: parameters, multiply-accumulates and training FLOPs, from its sizes alone.

Written out rather than counted on the model, so that it takes no time; tests hold it to the model, to published figures and
to what compilers count. Each tower is one list of its parts, and every count is a sum over it.
"""

import re
from typing import NamedTuple

# Products of [batch, batch, embed] that a loss takes, forward and backward together: docs/losses.md.
LOSS_PRODUCTS = {"softmax": 4, "sigmoid": 3}


class Part(NamedTuple):
  """A parameter of a tower, or the products of attention that have none, in the order of the forward pass.

  Attributes:
    path: of the parameter, or None.
    size: numbers it has.
    macs: multiply-accumulates of the product that it is a factor of, for one example.
    beside: how many of the parts right before it the other factor does not depend on: they lie on another branch.
  """

  path: str | None
  size: int
  macs: int = 0
  beside: int = 0


def parameters(model):
  """Number of parameters, without the running statistics of batch norm, as published counts have it.

  Args:
    model: a resolved `clip_jax.config.Model`.
  """
  towers = sum(part.size for tower in (image_parts, text_parts) for part in tower(model))
  return towers + 1 + (model.logit_bias_init is not None)  # the logit scale and bias


def forward_macs(model):
  """Multiply-accumulates of one image and of one text; a FLOP count is twice as large.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Returns:
    A pair of ints. Matrix products and convolutions count, attention's included; what is done number by number does not. As in
    published figures, examples are whole, and the zeros around an image count as pixels.
  """
  return tuple(sum(part.macs for part in tower(model)) for tower in (image_parts, text_parts))


def training_flops(model, batch, loss="softmax", freeze=""):
  """FLOPs of one pair in training: both towers forward and backward, and its share of the loss.

  They are the FLOPs of the model and not those of a way to compute it, as in MFU (Chowdhery et al. 2022, PaLM, arXiv 2204.02311,
  appendix B): what a step computes twice, for `train.remat` or `train.microbatches`, counts once. Only products count, two for a
  multiplication and its addition. The backward pass of a product is two products: one for each factor that has a gradient. Pixels
  have none, nor has what is frozen with all that is below it. Patches and tokens that training leaves out do not count;
  causal attention does in full, because it is computed in full; what a convolution multiplies with the zeros around an image does not.

  Args:
    model: a resolved `clip_jax.config.Model`.
    batch: the global batch: each image is compared with all of its texts.
    loss: "softmax" or "sigmoid".
    freeze: `config.optimizer.freeze`, a regular expression that finds parameters without a gradient by their path.

  Returns:
    An int.
  """
  frozen = re.compile(freeze or "(?!)").search  # the latter matches nothing
  macs = LOSS_PRODUCTS[loss] * batch * model.embed_dim
  for tower in (image_parts, text_parts):
    trained = []
    for part in tower(model, training=True):
      below = any(trained[: len(trained) - part.beside])
      own = below if part.path is None else not frozen(part.path)  # of attention both factors come from below
      macs += part.macs * (1 + own + below)
      trained.append(part.path is not None and own)
  return 2 * macs


def image_parts(model, training=False):
  """The parts of the image tower.

  Args:
    model: a resolved `clip_jax.config.Model`.
    training: count what a training step computes for one image: without the patches that it leaves out, and without products with
      the zeros around images.

  Yields:
    `Part`s, whose paths are those of the parameters.
  """
  yield from (_resnet if model.vision.kind == "resnet" else _vit)(model, training)


def text_parts(model, training=False):
  """The parts of the text tower.

  Args:
    model: a resolved `clip_jax.config.Model`.
    training: count what a training step computes for one text: `text.train_length` tokens, where that is set.

  Yields:
    `Part`s, whose paths are those of the parameters.
  """
  text = model.text
  width, length = text.width, (training and text.train_length) or text.context_length
  yield Part("text/token_embedding", text.vocab_size * width)
  yield Part("text/pos_embed", text.context_length * width)
  yield from _blocks("text/transformer", text, length)
  yield from _norm("text/norm_final", width)
  yield Part("text/projection", width * model.embed_dim, width * model.embed_dim)
  if text.kind == "siglip":
    yield Part("text/projection_bias", model.embed_dim)


def _vit(model, training):
  vision, siglip = model.vision, model.vision.kind == "siglip"
  width, mlp = vision.width, vision.mlp_width
  patches = (model.image_size // vision.patch_size) ** 2
  kernel = 3 * vision.patch_size**2 * width
  yield Part("image/patch_kernel", kernel, patches * kernel)  # of all patches; some are left out afterwards
  yield Part("image/patch_bias" if siglip else "image/class_embedding", width)
  yield Part("image/pos_embed", (patches + (not siglip)) * width)
  kept = max(round(patches * (1 - vision.patch_drop)), 1) if training else patches
  if siglip:
    yield from _blocks("image/transformer", vision, kept)
    yield from _norm("image/norm_post", width)
    yield from _pooling("image/head/attention", width, kept, width, probe="image/head/probe")
    yield from _norm("image/head/norm", width)
    yield from _mlp("image/head", width, mlp, 1)
  else:
    yield from _norm("image/norm_pre", width)
    yield from _blocks("image/transformer", vision, kept + 1)
    yield from _norm("image/norm_post", width)
    yield Part("image/projection", width * model.embed_dim, width * model.embed_dim)


def _blocks(path, tower, length):
  width = tower.width
  for i in range(tower.layers):
    block = f"{path}/block_{i}"
    yield from _norm(f"{block}/norm_1", width)
    yield Part(f"{block}/attention/qkv_kernel", 3 * width * width, 3 * length * width * width)
    yield Part(f"{block}/attention/qkv_bias", 3 * width)
    yield Part(None, 0, 2 * length * length * width)  # scores, and the values they weigh
    yield from _affine(f"{block}/attention/out", width, width, length)
    yield from _norm(f"{block}/norm_2", width)
    yield from _mlp(block, width, tower.mlp_width, length)


def _pooling(path, width, length, features, probe=None):
  # Attention with one query. Keys and values come first here: they do not depend on a learned query, the probe.
  yield Part(f"{path}/qkv_kernel", 2 * width * width, 2 * length * width * width)
  if probe:
    yield Part(probe, width)
  yield Part(f"{path}/qkv_kernel", width * width, width * width, beside=0 if probe else 1)
  yield Part(f"{path}/qkv_bias", 3 * width)
  yield Part(None, 0, 2 * length * width)
  yield from _affine(f"{path}/out", width, features, 1)


def _mlp(path, width, hidden, length):
  yield from _affine(f"{path}/mlp_in", width, hidden, length)
  yield from _affine(f"{path}/mlp_out", hidden, width, length)


def _affine(path, into, out, length):
  yield Part(f"{path}/kernel", into * out, length * into * out)
  yield Part(f"{path}/bias", out)


def _norm(path, width):
  yield Part(f"{path}/scale", width)
  yield Part(f"{path}/bias", width)


def _resnet(model, training):
  width, side = model.vision.width, model.image_size // 2

  def convolution(path, number, size, into, out, side, stride=1, beside=0):
    # A kernel of 3 covers one pixel outside at each end of the image; with a stride of 2, at one end.
    places = (3 * side - 2 // stride) ** 2 if training and size == 3 else (size * side) ** 2
    yield Part(f"{path}/conv{number}/kernel", size * size * into * out, places * into * out, beside)
    yield from _norm(f"{path}/norm{number}", out)

  yield from convolution("image/stem", "_1", 3, 3, width // 2, side, stride=2)
  yield from convolution("image/stem", "_2", 3, width // 2, width // 2, side)
  yield from convolution("image/stem", "_3", 3, width // 2, width, side)
  side, into = side // 2, width
  for stage, blocks in enumerate(model.vision.stages):
    planes = width * 2**stage
    for j in range(blocks):
      path, stride = f"image/stage_{stage}/block_{j}", 2 if stage and j == 0 else 1
      yield from convolution(path, "_1", 1, into, planes, side)
      yield from convolution(path, "_2", 3, planes, planes, side)
      side //= stride  # by average pooling, before the last convolution
      yield from convolution(path, "_3", 1, planes, 4 * planes, side)
      if stride > 1 or into != 4 * planes:
        yield from convolution(f"{path}/shortcut", "", 1, into, 4 * planes, side, beside=9)  # of the block's input
      into = 4 * planes
  yield Part("image/pool/pos_embed", (side * side + 1) * into)
  yield from _pooling("image/pool/attention", into, side * side + 1, model.embed_dim)
