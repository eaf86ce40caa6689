"""How large a model is: parameters, and multiply-accumulates of a forward pass, from its sizes alone.

Written out rather than counted on the model, so that it takes no time; tests hold it to the model and to published figures.
"""


def parameters(model):
  """Number of parameters, without the running statistics of batch norm, as published counts have it.

  Args:
    model: a resolved `clip_jax.config.Model`.
  """
  text = model.text
  count = text.width * (text.vocab_size + text.context_length + model.embed_dim) + 2 * text.width
  count += _blocks(text)
  count += 1 + (model.logit_bias_init is not None)  # the logit scale and bias
  if text.kind == "siglip":
    count += model.embed_dim
  return count + (_resnet(model)[0] if model.vision.kind == "resnet" else _vit_parameters(model))


def forward_macs(model):
  """Multiply-accumulates of one image and of one text; a FLOP count is twice as large.

  Args:
    model: a resolved `clip_jax.config.Model`.

  Returns:
    A pair of ints. Matrix products and convolutions count, attention's included; what is done number by number does not.
  """
  text = model.text
  of_text = _block_macs(text, text.context_length) + text.width * model.embed_dim
  return (_resnet(model)[1] if model.vision.kind == "resnet" else _vit_macs(model)), of_text


def _blocks(tower):
  # Attention's four matrices, the two of the MLP, their biases, and two norms.
  width, mlp = tower.width, tower.mlp_width
  return tower.layers * (4 * width * width + 2 * width * mlp + 9 * width + mlp)


def _block_macs(tower, length):
  width, mlp = tower.width, tower.mlp_width
  return tower.layers * length * (4 * width * width + 2 * width * mlp + 2 * length * width)


def _patches(model):
  return (model.image_size // model.vision.patch_size) ** 2


def _vit_parameters(model):
  vision, patches = model.vision, _patches(model)
  width, mlp = vision.width, vision.mlp_width
  count = 3 * vision.patch_size**2 * width + patches * width + _blocks(vision) + 2 * width
  if vision.kind == "siglip":  # the bias of patches, the query, and the head: attention, a norm and an MLP
    return count + 2 * width + 4 * width * width + 2 * width * mlp + 7 * width + mlp
  return count + 4 * width + width * model.embed_dim  # the class token and its position, the first norm, the projection


def _vit_macs(model):
  vision, patches = model.vision, _patches(model)
  width, mlp = vision.width, vision.mlp_width
  macs = patches * 3 * vision.patch_size**2 * width
  if vision.kind == "siglip":  # the head has one query for all patches
    pooled = 2 * width * width + patches * (2 * width * width + 2 * width) + 2 * width * mlp
    return macs + _block_macs(vision, patches) + pooled
  return macs + _block_macs(vision, patches + 1) + width * model.embed_dim


def _resnet(model):
  """Parameters and multiply-accumulates of the image tower."""
  vision, side = model.vision, model.image_size // 2
  count = macs = 0

  def convolution(size, into, out, side):
    nonlocal count, macs
    count += size * size * into * out + 2 * out  # with the norm after it
    macs += size * size * into * out * side * side

  width = vision.width
  convolution(3, 3, width // 2, side)
  convolution(3, width // 2, width // 2, side)
  convolution(3, width // 2, width, side)
  side, into = side // 2, width
  for stage, blocks in enumerate(vision.stages):
    planes = width * 2**stage
    for j in range(blocks):
      stride = 2 if stage and j == 0 else 1
      convolution(1, into, planes, side)
      convolution(3, planes, planes, side)
      side //= stride  # by average pooling, before the last convolution
      convolution(1, planes, 4 * planes, side)
      if stride > 1 or into != 4 * planes:
        convolution(1, into, 4 * planes, side)
      into = 4 * planes
  places = side * side + 1
  count += places * into + 3 * (into * into + into) + into * model.embed_dim + model.embed_dim
  macs += into * into * (1 + 2 * places) + 2 * places * into + into * model.embed_dim
  return count, macs
