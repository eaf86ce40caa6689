"""A tiny CLIP far from its initial values, its embeddings one example at a time, and shards."""

import functools
import io
import tarfile

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.data.tokenizer import ClipTokenizer
from clip_jax.evaluate.encode import Encoder
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from tests.conftest import tiny

MODEL = configs.resolve(tiny()).model
SIZE = MODEL.image_size
BATCH = 8
MESHES = [(1, 1), (2, 1), (8, 1), (1, 2), (2, 4)]  # data, fsdp


def init():
  images = np.zeros((1, SIZE, SIZE, 3), np.uint8)
  tokens = np.zeros((1, MODEL.text.context_length), np.int32)
  return CLIP(MODEL).init(jax.random.key(0), images, tokens)["params"]


def random_params():
  """Parameters on the host, larger than initial ones, which embed everything almost alike."""
  random = np.random.default_rng(0)
  shapes = nn.unbox(jax.eval_shape(init))
  return jax.tree.map(lambda x: np.float32(random.normal(0, 0.3, x.shape)), shapes)


@pytest.fixture(scope="session")
def params():
  return random_params()


@functools.cache
def encoder(data=1, fsdp=1):
  """The encoder on a mesh of the first devices, kept with what it has compiled."""
  config = configs.resolve(tiny(mesh={"data": data, "fsdp": fsdp}, eval={"batch_size": BATCH}))
  return Encoder(MODEL, meshes.create(config, jax.devices()[: data * fsdp]), BATCH)


def placed(params, mesh):
  """The parameters laid over a mesh as in training."""
  return jax.device_put(params, rules.shardings_of(jax.eval_shape(init), mesh))


def tokenize(captions):
  return ClipTokenizer(MODEL.text.context_length)(captions)


class OneAtATime:
  """The embeddings that all others are compared with, in float64."""

  def __init__(self, params):
    def apply(method):
      jitted = jax.jit(lambda params, x: CLIP(MODEL).apply({"params": params}, x, method=method))
      return lambda x: jitted(params, x)

    self._image, self._text = apply("encode_image"), apply("encode_text")

  def images(self, images):
    return np.concatenate([self._image(image[None]) for image in images]).astype(np.float64)

  def texts(self, captions):
    return np.concatenate([self._text(row[None]) for row in tokenize(captions)]).astype(np.float64)


@pytest.fixture(scope="session")
def one_at_a_time(params):
  return OneAtATime(params)


class Given:
  """Stands in for an `Encoder`: the embeddings are given."""

  model, tokenizer, chunk = MODEL, ClipTokenizer(MODEL.text.context_length), BATCH

  def __init__(self, images, texts, scale=100.0):
    self._images, self._texts, self._scale = np.float32(images), np.float32(texts), scale

  def logit_scale(self, params):
    return self._scale

  def chunks(self, params, count, load, beside):
    assert count == len(self._images)
    for start in range(0, count, self.chunk):
      rows = range(start, min(start + self.chunk, count))
      known = np.stack([load(i)[1] for i in rows])
      assert known.dtype == beside.dtype and known.shape[1:] == beside.shape
      yield start, self._images[start : start + self.chunk], known

  def images(self, params, count, load):
    assert count == len(self._images)
    return self._images

  def texts(self, params, tokens):
    assert len(tokens) == len(self._texts)
    return self._texts


def pictures(count, seed=0):
  """Images of the model's size: the evaluation transform leaves them as they are."""
  return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def png(pixels):
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "png")
  return buffer.getvalue()


def write_shard(path, records):
  """Writes a tar of records, each a dict of extension to bytes."""
  with tarfile.open(path, "w") as tar:
    for number, record in enumerate(records):
      for extension, content in record.items():
        member = tarfile.TarInfo(f"{number:05}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return str(path)
