"""The same images and texts through a model here and through what it was exported as."""

import contextlib
import dataclasses
import functools
import io
from pathlib import Path

import jax
import numpy as np

from clip_jax.convert import containers, onnx, open_clip, stablehlo
from clip_jax.data.pipeline import tokenizer_for
from clip_jax.errors import MissingExtraError
from clip_jax.models.clip import CLIP

# Largest difference of two unit vectors that rounding in float32 explains, with room; a wrong table gives 0.1 and more.
TOLERANCE = 1e-4
TEXTS = ("a photo of a cat", "two dogs on a beach at sunset", "42", "an oil painting of the harbour, 1887")


def compare(source, target, path):
  """Runs four images and four texts through both.

  Args:
    source: the `Source` that was exported.
    target: "openai", "open_clip", "huggingface", "stablehlo" or "onnx".
    path: what was written.

  Returns:
    A dict of the largest absolute differences: "image" and "text" of features of unit length, "logits" of the
    scaled similarities, and "with", the implementation that ran.

  Raises:
    MissingExtraError: torch, or what else is needed to run the twin, is not installed.
    RuntimeError: the twin computes something else.
  """
  model = dataclasses.replace(source.model, compute_dtype="float32")  # as the others compute
  images = np.random.default_rng(0).integers(0, 256, (len(TEXTS), model.image_size, model.image_size, 3), np.uint8)
  tokens = (source.tokenizer or tokenizer_for(model))(TEXTS)
  params = jax.tree.map(lambda x: np.asarray(x, np.float32), source.params())
  ours = _outputs(*jax.jit(CLIP(model).apply)({"params": params}, images, tokens)[:2], params)
  if target == "stablehlo":
    name, (image, text) = f"jax.export {jax.__version__}", stablehlo.run(path, images, tokens)
  else:
    pixels = (images / 255 - np.float64(model.image_mean)) / np.float64(model.image_std)
    pixels = pixels.astype(np.float32).transpose(0, 3, 1, 2)
    run = onnx.run if target == "onnx" else functools.partial(_in_torch, target, model)
    name, image, text = run(path, pixels, tokens)
  theirs = _outputs(_unit(image), _unit(text), params)
  found = {key: float(np.abs(ours[key] - theirs[key]).max()) for key in ours}
  # Lengths, too: numbers that overflow on both sides would agree on nothing.
  lengths = [np.linalg.norm(side[key], axis=-1) for side in (ours, theirs) for key in ("image", "text")]
  if not max(found["image"], found["text"], np.abs(np.array(lengths) - 1).max()) <= TOLERANCE:
    raise RuntimeError(f"The exported model computes something else in {name}: {found}. Please report it.")
  return found | {"with": name}


def _in_torch(target, model, path, pixels, tokens):
  torch = containers.import_torch("--verify")
  run = {"huggingface": _transformers, "open_clip": _open_clip, "openai": _plain}[target]
  with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # libraries that show their own progress
    name, image, text = run(torch, model, path, torch.from_numpy(pixels), torch.from_numpy(tokens).long())
  return name, image.numpy(), text.numpy()


def _outputs(image, text, params):
  image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
  logits = np.exp(np.float64(params["logit_scale"])) * image @ text.T + np.float64(params.get("logit_bias", 0))
  return {"image": image, "text": text, "logits": logits}


def _unit(rows):
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _transformers(torch, model, path, pixels, tokens):
  try:
    import transformers
  except ImportError as error:
    raise MissingExtraError("--verify of a Hugging Face folder", "torch", "transformers") from error
  cls = transformers.SiglipModel if model.vision.kind == "siglip" else transformers.CLIPModel
  twin = cls.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
  output = twin(input_ids=tokens, pixel_values=pixels)
  return f"transformers {transformers.__version__}", output.image_embeds, output.text_embeds


def _open_clip(torch, model, path, pixels, tokens):
  try:
    import open_clip as library
  except (ImportError, RuntimeError):  # the latter where torchvision does not go with torch
    return _plain(torch, model, path, pixels, tokens)
  twin = library.create_model(f"local-dir:{path}", precision="fp32").eval()
  return f"open_clip {library.__version__}", twin.encode_image(pixels), twin.encode_text(tokens)


def _plain(torch, model, path, pixels, tokens):
  """open_clip's and OpenAI's layout, from the written file, in torch's own functions: for where their packages are not."""
  path = Path(path)
  tensors = containers.Torch(path) if path.is_file() else containers.Safetensors(path / f"{open_clip.WEIGHTS}.safetensors")
  tensors = {name: torch.from_numpy(np.array(tensors.read(name), np.float32)) for name in tensors.shapes}
  twin = _Plain(torch, model, tensors)
  towers = {"vit": twin.vit, "resnet": twin.resnet, "siglip": twin.timm}
  return f"torch {torch.__version__}", towers[model.vision.kind](pixels), twin.text(tokens)


class _Plain:
  def __init__(self, torch, model, tensors):
    self.torch, self.f, self.model, self.t = torch, torch.nn.functional, model, tensors

  def affine(self, x, name):
    return self.f.linear(x, self.t[f"{name}.weight"], self.t[f"{name}.bias"])

  def norm(self, x, name):
    return self.f.layer_norm(x, x.shape[-1:], self.t[f"{name}.weight"], self.t[f"{name}.bias"], self.model.norm_epsilon)

  def act(self, x):
    if self.model.activation == "quick_gelu":
      return x * self.torch.sigmoid(1.702 * x)
    return self.f.gelu(x, approximate="tanh" if self.model.activation == "gelu_tanh" else "none")

  def attention(self, query, x, heads, weight, bias, out, mask=None):
    query, x = query.transpose(0, 1), x.transpose(0, 1)  # torch's function has the length first
    width = x.shape[-1]
    mixed, _ = self.f.multi_head_attention_forward(
      query, x, x, width, heads, weight, bias, None, None, False, 0.0, self.t[f"{out}.weight"], self.t[f"{out}.bias"],
      training=False, need_weights=False, attn_mask=mask,
    )  # fmt: skip
    return mixed.transpose(0, 1)

  def block(self, x, tower, prefix, names, mask=None):
    norm_1, norm_2, qkv, out, into, out_of = names
    weight, bias = self.t[f"{prefix}.{qkv}weight"], self.t[f"{prefix}.{qkv}bias"]
    normed = self.norm(x, f"{prefix}.{norm_1}")
    x = x + self.attention(normed, normed, tower.heads, weight, bias, f"{prefix}.{out}", mask)
    hidden = self.act(self.affine(self.norm(x, f"{prefix}.{norm_2}"), f"{prefix}.{into}"))
    return x + self.affine(hidden, f"{prefix}.{out_of}")

  def patches(self, pixels, name):
    weight, bias = self.t[f"{name}.weight"], self.t.get(f"{name}.bias")
    return self.f.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)

  _CLIP = ("ln_1", "ln_2", "attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
  _TIMM = ("norm1", "norm2", "attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2")

  def vit(self, pixels):
    x = self.patches(pixels, "visual.conv1")
    token = self.t["visual.class_embedding"].expand(len(x), 1, -1)
    x = self.torch.cat([token, x], 1) + self.t["visual.positional_embedding"]
    x = self.norm(x, "visual.ln_pre")
    for i in range(self.model.vision.layers):
      x = self.block(x, self.model.vision, f"visual.transformer.resblocks.{i}", self._CLIP)
    return self.norm(x[:, 0], "visual.ln_post") @ self.t["visual.proj"]

  def timm(self, pixels):
    x = self.patches(pixels, "visual.trunk.patch_embed.proj") + self.t["visual.trunk.pos_embed"]
    for i in range(self.model.vision.layers):
      x = self.block(x, self.model.vision, f"visual.trunk.blocks.{i}", self._TIMM)
    x, pool = self.norm(x, "visual.trunk.norm"), "visual.trunk.attn_pool"
    weight, bias = (self.torch.cat([self.t[f"{pool}.{n}.{kind}"] for n in ("q", "kv")]) for kind in ("weight", "bias"))
    query = self.t[f"{pool}.latent"].expand(len(x), -1, -1)
    x = self.attention(query, x, self.model.vision.heads, weight, bias, f"{pool}.proj")
    x = x + self.affine(self.act(self.affine(self.norm(x, f"{pool}.norm"), f"{pool}.mlp.fc1")), f"{pool}.mlp.fc2")
    return x[:, 0]

  def text(self, tokens):
    siglips = self.model.text.kind == "siglip"
    prefix = "text." if siglips else ""
    x = self.t[f"{prefix}token_embedding.weight"][tokens] + self.t[f"{prefix}positional_embedding"]
    length = tokens.shape[1]
    mask = None if siglips else self.torch.full((length, length), float("-inf")).triu(1)
    for i in range(self.model.text.layers):
      x = self.block(x, self.model.text, f"{prefix}transformer.resblocks.{i}", self._CLIP, mask)
    x = self.norm(x, f"{prefix}ln_final")
    if siglips:
      return self.affine(x[:, -1], "text.text_projection")
    return x[self.torch.arange(len(x)), tokens.argmax(-1)] @ self.t["text_projection"]

  def conv(self, x, name, bn, stride=1, relu=True):
    weight = self.t[f"{name}.weight"]
    x = self.f.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    kinds = ("running_mean", "running_var", "weight", "bias")
    x = self.f.batch_norm(x, *(self.t[f"{bn}.{kind}"] for kind in kinds))
    return self.f.relu(x) if relu else x

  def resnet(self, pixels):
    x = pixels
    for i, stride in ((1, 2), (2, 1), (3, 1)):
      x = self.conv(x, f"visual.conv{i}", f"visual.bn{i}", stride)
    x = self.f.avg_pool2d(x, 2)
    for stage, blocks in enumerate(self.model.vision.stages, 1):
      for j in range(blocks):
        x = self.bottleneck(x, f"visual.layer{stage}.{j}", 2 if stage > 1 and j == 0 else 1)
    x, pool = x.flatten(2).transpose(1, 2), "visual.attnpool"
    x = self.torch.cat([x.mean(1, keepdim=True), x], 1) + self.t[f"{pool}.positional_embedding"]
    weight, bias = (self.torch.cat([self.t[f"{pool}.{n}_proj.{kind}"] for n in "qkv"]) for kind in ("weight", "bias"))
    return self.attention(x[:, :1], x, self.model.vision.heads, weight, bias, f"{pool}.c_proj")[:, 0]

  def bottleneck(self, x, name, stride):
    y = self.conv(self.conv(x, f"{name}.conv1", f"{name}.bn1"), f"{name}.conv2", f"{name}.bn2")
    y = self.conv(self.f.avg_pool2d(y, stride), f"{name}.conv3", f"{name}.bn3", relu=False)
    if f"{name}.downsample.0.weight" in self.t:
      x = self.conv(self.f.avg_pool2d(x, stride), f"{name}.downsample.0", f"{name}.downsample.1", relu=False)
    return self.f.relu(x + y)
