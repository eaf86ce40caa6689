"""The whole procedure against PyTorch's: a model of transformers, Pillow's preprocessing, OpenAI's recipe, one image at a time."""

import json

import instant_clip_tokenizer
import numpy as np
import pytest
import torch
from PIL import Image

from clip_jax import benchmark, cli
from clip_jax.convert import exports, native, sources
from clip_jax.evaluate.zero_shot import ZeroShot
from tests.convert import models

CLASSES = ("Apple", "a dog on ice", "green tea", "lamp", "moon", "running shoe", "snow", "tabby cat")
TEMPLATES = ("a photo of a {c}.", "art of the {c}", "itap of my {c}, small")
IMAGES = 1_040


def draw(folder):
  """Pictures of any shape in folders of classes: blobs of random colours, as PNG and JPEG."""
  random = np.random.default_rng(0)
  for i in range(IMAGES):
    height, width = random.integers(20, 90, 2)
    small = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    path = folder / "test" / CLASSES[i % len(CLASSES)].replace(" ", "_") / f"{i:04}.{'png' if i % 3 else 'jpg'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    small.save(path)


def preprocess(path, size):
  """As OpenAI's `_transform`: the shorter side to the size, bicubic, the middle cut out, RGB."""
  image = Image.open(path)
  width, height = image.size
  short = min(width, height)
  image = image.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
  left, top = (round((side - size) / 2) for side in image.size)
  image = image.crop((left, top, left + size, top + size)).convert("RGB")
  pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
  mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
  return (pixels - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


@torch.no_grad()
def in_torch(folder, pictures, dtype=torch.float32):
  """Logits and the classifier."""
  import transformers

  twin = transformers.AutoModel.from_pretrained(folder).eval().to(dtype)
  size, tokenizer = twin.config.vision_config.image_size, instant_clip_tokenizer.Tokenizer()
  columns = []
  for name in CLASSES:
    tokens = tokenizer.tokenize_batch([template.replace("{c}", name) for template in TEMPLATES], context_length=77)
    text = twin.text_projection(twin.text_model(torch.from_numpy(tokens.astype(np.int64))).pooler_output)
    mean = (text / text.norm(dim=-1, keepdim=True)).mean(dim=0)
    columns.append(mean / mean.norm())
  classifier = torch.stack(columns, dim=1)
  rows = []
  for path in pictures:
    image = twin.visual_projection(twin.vision_model(preprocess(path, size)[None].to(dtype)).pooler_output)
    rows.append(twin.logit_scale.exp() * (image / image.norm(dim=-1, keepdim=True)) @ classifier)
  return torch.cat(rows).numpy(), classifier.T.numpy()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  folder = tmp_path_factory.mktemp("torch")
  draw(folder / "set")
  # Larger weights than random ones of a model that begins, or all pictures would be of the same class.
  model = models.model("vit")
  params = {name: np.asarray(value * (4 if value.ndim > 1 else 1), np.float32) for name, value in models.random_params(model, seed=3).items()}
  native.write(folder / "ours", model, None, params.items())
  source = sources.find(folder / "ours")
  exports.write(source, "huggingface", folder / "theirs")
  pictures = sorted((folder / "set").rglob("*.*g"))
  labels = np.array([CLASSES.index(path.parent.name.replace("_", " ")) for path in pictures])
  exact, _ = in_torch(folder / "theirs", pictures, torch.float64)
  return folder, labels, exact, *in_torch(folder / "theirs", pictures)


def test_logits_and_accuracies_are_those_of_pytorch(both, capsys):
  folder, labels, exact, logits, classifier = both
  # The same weights as Hugging Face has them, from the command line.
  arguments = ["eval", str(folder / "theirs"), "--dataset", "set", "--data-root", str(folder), "--template", *TEMPLATES]
  assert cli.main([*arguments, "--output", str(folder / "out.csv"), "--batch-size", "3", "--json"]) == 0
  (row,) = json.loads(capsys.readouterr().out)["rows"]
  order = np.argsort(-logits, axis=1)
  assert row["items"] == len(labels) == IMAGES
  assert row["metrics"]["acc1"] == np.mean(order[:, 0] == labels)
  assert row["metrics"]["acc5"] == np.mean((order[:, :5] == labels[:, None]).any(axis=1))
  recalls = [np.mean(order[labels == i, 0] == i) for i in range(len(CLASSES))]
  assert row["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-15)
  # Something to be right and wrong about: the model does not always say the same.
  assert 0.02 < row["metrics"]["acc1"] < 0.5 and len(set(order[:, 0])) >= 4

  held_out = benchmark.open_sets(benchmark.Request(("set",), str(folder), templates=TEMPLATES))[0][0]
  model = benchmark.Loaded(sources.find(folder / "theirs"), 16)
  weights = ZeroShot(held_out, model.encoder).classifier(model.params)
  np.testing.assert_allclose(weights, classifier, rtol=0, atol=2e-6)
  evaluate = ZeroShot(held_out, model.encoder)
  parts = model.encoder.chunks(model.params, IMAGES, evaluate._load, np.int32(0))
  ours = model.encoder.logit_scale(model.params) * np.concatenate([rows for _, rows, _ in parts]) @ weights.T
  # As close to float64 as PyTorch's own float32 is.
  errors = [np.abs(found - exact).max() for found in (ours, logits)]
  print(f"logits up to {np.abs(exact).max():.1f}; error {errors[0]:.1e}, of PyTorch {errors[1]:.1e}")
  assert errors[0] < 2 * errors[1] < 2e-4
