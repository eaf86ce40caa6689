"""CLIP's modified ResNet in torch, from the paper's description, with the names that OpenAI's weights have."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class TorchResNet(nn.Module):
  """The image tower alone.

  Its state dict has the names of OpenAI's without the "visual." in front: `conv1.weight`, `bn1.running_mean`,
  `layer2.0.downsample.0.weight`, `attnpool.q_proj.weight`. A pooling has no parameters, so that of a shortcut is not
  part of its `downsample`.
  """

  def __init__(self, stages, width, heads, embed_dim, image_size):
    super().__init__()
    half = width // 2
    self.conv1, self.bn1 = conv(3, half, 3, stride=2), nn.BatchNorm2d(half)
    self.conv2, self.bn2 = conv(half, half, 3), nn.BatchNorm2d(half)
    self.conv3, self.bn3 = conv(half, width, 3), nn.BatchNorm2d(width)
    channels = width
    for i, blocks in enumerate(stages):
      layer = nn.Sequential()
      for j in range(blocks):
        layer.append(Bottleneck(channels, width * 2**i, 2 if i and not j else 1))
        channels = 4 * width * 2**i
      setattr(self, f"layer{i + 1}", layer)
    self.attnpool = AttentionPool(1 + (image_size // 32) ** 2, channels, heads, embed_dim)

  def forward(self, x):
    """[batch, 3, size, size] -> [batch, embed_dim], not normalised."""
    for i in (1, 2, 3):
      x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
    x = F.avg_pool2d(x, 2)
    for i in (1, 2, 3, 4):
      x = getattr(self, f"layer{i}")(x)
    return self.attnpool(x)


class Bottleneck(nn.Module):
  def __init__(self, channels, planes, stride):
    super().__init__()
    self.stride = stride
    self.conv1, self.bn1 = conv(channels, planes, 1), nn.BatchNorm2d(planes)
    self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
    self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
    self.downsample = None
    if stride > 1 or channels != 4 * planes:
      self.downsample = nn.Sequential(conv(channels, 4 * planes, 1), nn.BatchNorm2d(4 * planes))

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    y = F.relu(self.bn2(self.conv2(y)))
    y = self.bn3(self.conv3(F.avg_pool2d(y, self.stride)))
    if self.downsample is not None:
      x = self.downsample(F.avg_pool2d(x, self.stride))
    return F.relu(x + y)


class AttentionPool(nn.Module):
  def __init__(self, places, channels, heads, embed_dim):
    super().__init__()
    self.heads = heads
    self.positional_embedding = nn.Parameter(torch.randn(places, channels) * channels**-0.5)
    self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
    self.c_proj = nn.Linear(channels, embed_dim)

  def forward(self, x):
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positional_embedding
    query, key, value = (
      layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
      for layer, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
    )
    return self.c_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1))


def conv(channels, features, size, stride=1):
  return nn.Conv2d(channels, features, size, stride=stride, padding=size // 2, bias=False)


def randomize(model, seed=0):
  """Moves everything that is a constant in a new model, so that no scale, bias or running statistic is a no-op."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, nn.BatchNorm2d):
        module.weight.uniform_(0.5, 1.5, generator=generator)
        module.bias.normal_(0, 0.3, generator=generator)
        module.running_mean.normal_(0, 0.3, generator=generator)
        module.running_var.uniform_(0.2, 2.0, generator=generator)
      elif isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
      elif isinstance(module, nn.Linear):
        module.weight.normal_(0, module.in_features**-0.5, generator=generator)
        module.bias.normal_(0, 0.3, generator=generator)
  return model


def to_params(state, stages, heads):
  """Our tree for a state dict of `TorchResNet`, or for anything else by the same names, such as gradients.

  Args:
    state: name -> tensor. Running statistics may be missing.
    stages: blocks of each.
    heads: of the pooling.

  Returns:
    A nested dict of NumPy arrays: the "image" part of the parameters.
  """
  state = {name: value.detach().numpy() for name, value in state.items()}

  def convolution(name):
    return {"kernel": state[f"{name}.weight"].transpose(2, 3, 1, 0)}

  def norm(name):
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {ours: state[f"{name}.{theirs}"] for ours, theirs in names.items() if f"{name}.{theirs}" in state}

  def numbered(prefix=""):
    found = {f"conv_{i}": convolution(f"{prefix}conv{i}") for i in (1, 2, 3)}
    return found | {f"norm_{i}": norm(f"{prefix}bn{i}") for i in (1, 2, 3)}

  tree = {"stem": numbered()}
  for i, blocks in enumerate(stages):
    stage = tree[f"stage_{i}"] = {}
    for j in range(blocks):
      prefix = f"layer{i + 1}.{j}."
      block = stage[f"block_{j}"] = numbered(prefix)
      if f"{prefix}downsample.0.weight" in state:
        block["shortcut"] = {"conv": convolution(f"{prefix}downsample.0"), "norm": norm(f"{prefix}downsample.1")}

  width = state["attnpool.q_proj.bias"].size
  kernels = [state[f"attnpool.{name}_proj.weight"].T.reshape(width, heads, -1) for name in "qkv"]
  biases = [state[f"attnpool.{name}_proj.bias"].reshape(heads, -1) for name in "qkv"]
  out = {"kernel": state["attnpool.c_proj.weight"].T, "bias": state["attnpool.c_proj.bias"]}
  attention = {"qkv_kernel": np.stack(kernels, axis=1), "qkv_bias": np.stack(biases), "out": out}
  tree["pool"] = {"pos_embed": state["attnpool.positional_embedding"], "attention": attention}
  return tree
