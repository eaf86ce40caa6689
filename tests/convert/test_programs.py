"""StableHLO and ONNX: programs that run without this project, at any batch size."""

import json
import subprocess
import sys

import numpy as np
import pytest

import clip_jax
from clip_jax import config as configs
from clip_jax.convert import exports, stablehlo, weights
from clip_jax.convert.sources import Source
from clip_jax.errors import MissingExtraError, UsageError
from tests.convert import models

ALONE = """
import json, sys
sys.modules["clip_jax"] = None  # importing it is an error
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
about = json.load(open("model.json"))
size, context = about["model"]["image_size"], about["model"]["text"]["context_length"]
for tower, shape, dtype in (("image", (size, size, 3), np.uint8), ("text", (context,), np.int32)):
  program = jax.export.deserialize(bytearray(open(tower + ".stablehlo", "rb").read()))
  assert set(program.platforms) == {"cpu", "cuda", "tpu"}
  for batch in (1, 3):
    x = np.arange(batch * np.prod(shape)).reshape(batch, *shape) % 251
    np.save(f"{tower}{batch}.npy", program.call(x.astype(dtype)))
"""


def test_stablehlo_runs_alone_at_any_batch_size(tmp_path):
  config = models.model()
  _, source = models.checkpoint(tmp_path / "ours", config)
  exports.write(source, "stablehlo", tmp_path / "out")
  subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path / "out", check=True)
  ours = clip_jax.load(tmp_path / "ours")
  for batch in (1, 3):
    shape = (batch, config.image_size, config.image_size, 3)
    pixels = (np.arange(np.prod(shape)).reshape(shape) % 251).astype(np.uint8)
    tokens = (np.arange(batch * 77).reshape(batch, 77) % 251).astype(np.int32)
    np.testing.assert_allclose(np.load(tmp_path / f"out/image{batch}.npy"), ours.encode_image(pixels), atol=2e-6)
    np.testing.assert_allclose(np.load(tmp_path / f"out/text{batch}.npy"), ours.encode_text(tokens), atol=2e-6)
  about = json.loads((tmp_path / "out/model.json").read_text())
  assert about["logit_scale"] == pytest.approx(ours.logit_scale) and about["model"]["activation"] == config.activation


def test_a_tower_that_no_serialized_program_can_hold_is_refused(tmp_path):
  config = configs.model_from_dict({"name": "ViT-H-14"})

  def read(name):
    raise AssertionError("nothing should be read")

  source = Source("memory", "clip_jax", config, None, weights.shapes_of(config), read)
  with pytest.raises(UsageError, match=r"the image tower of memory has 2\.4 GiB of weights, and a serialized program holds 2"):
    stablehlo.write(tmp_path, source)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime_at_any_batch_size(tmp_path):
  onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'clip_jax[onnx]')")
  config = models.model()
  _, source = models.checkpoint(tmp_path / "ours", config)
  found = exports.write(source, "onnx", tmp_path / "out", verified=True)
  assert max(found["image"], found["text"]) < 2e-6 and found["with"].startswith("onnxruntime")
  ours = clip_jax.load(tmp_path / "ours")
  session = onnxruntime.InferenceSession(tmp_path / "out/text.onnx")
  for batch in (1, 5):
    tokens = ours.tokenize(["a cat", "two red dogs", "x", "", "1 2 3"][:batch])
    got = session.run(["text_embeds"], {"input_ids": tokens.astype(np.int64)})[0]
    np.testing.assert_allclose(got, ours.encode_text(tokens), atol=2e-6)
  assert (tmp_path / "out/preprocessor_config.json").is_file() and not (tmp_path / "out/twin").exists()


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
  _, source = models.checkpoint(tmp_path / "ours", models.model("openai"))
  for module, to, extra in (("torch", "openai", "torch"), ("onnxscript", "onnx", "onnx")):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'clip_jax\[{extra}\]'"):
      exports.write(source, to, tmp_path / "out")
    monkeypatch.undo()
  assert not (tmp_path / "out").exists()
