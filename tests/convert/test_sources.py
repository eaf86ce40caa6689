"""Where weights come from: what is recognised, what is asked for, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch

from clip_jax import config as configs
from clip_jax.convert import exports, sources
from clip_jax.errors import UsageError
from tests.convert import models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """The parameters of a small model, and a folder with it in every layout."""
  folder = tmp_path_factory.mktemp("made")
  params, source = models.checkpoint(folder / "ours", models.model("openai"))
  exports.write(source, "openai", folder / "openai.pt")
  exports.write(source, "open_clip", folder / "open_clip")
  exports.write(source, "huggingface", folder / "huggingface")
  return params, folder


def state(folder):
  return safetensors.numpy.load_file(folder / "open_clip/open_clip_model.safetensors")


def test_an_archive_of_openai_in_half_precision(tmp_path, made):
  params, folder = made
  root = torch.nn.Module()
  for name, value in torch.load(folder / "openai.pt", weights_only=True).items():
    *path, last = name.split(".")
    at = root
    for part in path:
      if not hasattr(at, part):
        setattr(at, part, torch.nn.Module())
      at = getattr(at, part)
    at.register_buffer(last, value.half() if value.is_floating_point() else value)
  root.forward = lambda x: x
  torch.jit.save(torch.jit.trace_module(root, {"forward": torch.ones(1)}), tmp_path / "ViT.pt")
  source = sources.find(tmp_path / "ViT.pt")
  assert source.layout == "openai" and source.model == models.model("openai")
  assert source.model.activation == "quick_gelu"
  for name, value in params.items():
    np.testing.assert_array_equal(source.read(name), np.asarray(value, np.float16).astype(np.float32))


# One of the small models under a name, so that a file of tensors can be said to be it.
@pytest.fixture
def known(monkeypatch):
  from clip_jax.models import zoo

  small = configs.to_dict(models.model("openai", activation="gelu"))
  keep = {key: small[key] for key in ("image_size", "embed_dim", "activation")}
  towers = {
    tower: {key: value for key, value in small[tower].items() if value is not None and key not in ("patch_drop", "reduction")}
    for tower in ("vision", "text")
  }
  monkeypatch.setitem(zoo.MODELS, "Small", {**keep, **towers})
  monkeypatch.setitem(zoo.MODELS, "Small-quickgelu", {**keep, **towers, "activation": "quick_gelu"})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in s.items()}}])
def test_a_file_of_tensors_must_be_said_to_be_a_model(tmp_path, made, known, wrap):
  params, folder = made
  tensors = {name: torch.from_numpy(value) for name, value in state(folder).items()}
  torch.save(wrap(tensors), tmp_path / "epoch_1.pt")
  with pytest.raises(UsageError) as error:
    sources.find(tmp_path / "epoch_1.pt")
  assert "say which model they are of with --model. Of these shapes are: Small, Small-quickgelu." in str(error.value)
  source = sources.find(tmp_path / "epoch_1.pt", "Small")
  assert (source.model.name, source.model.activation) == ("Small", "gelu")
  models.assert_same(source, params)
  with pytest.raises(UsageError, match="Did you mean Small"):
    sources.find(tmp_path / "epoch_1.pt", "Smal")


def test_open_clips_custom_text_prefix(tmp_path, made, known):
  params, folder = made
  tensors = {
    (name if name.startswith("visual") or name == "logit_scale" else f"text.{name}"): value
    for name, value in state(folder).items()
  }
  tensors["text.attn_mask"] = np.zeros((77, 77), np.float32)  # a buffer of old versions
  safetensors.numpy.save_file(tensors, tmp_path / "custom.safetensors")
  models.assert_same(sources.find(tmp_path / "custom.safetensors", "Small"), params)
  with pytest.raises(UsageError, match="Of these shapes are: Small"):
    sources.find(tmp_path / "custom.safetensors")


def changed(folder, **changes):
  path = folder / "open_clip_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  for name, value in changes.items():
    if value is None:
      del tensors[name]
    else:
      tensors[name] = value
  safetensors.numpy.save_file(tensors, path)


TENSORS = [
  ({"visual.proj": None, "ln_final.bias": None}, "2 missing: visual.proj, ln_final.bias"),
  ({"visual.extra": np.ones(3, np.float32)}, "1 not known: visual.extra"),
  ({"visual.proj": np.ones((5, 24), np.float32)}, "visual.proj is [5, 24] instead of [128, 24]"),
  (
    {"visual.transformer.resblocks.2.ln_1.weight": np.ones(128, np.float32)},
    "1 not known: visual.transformer.resblocks.2.ln_1.weight",
  ),
]


@pytest.mark.parametrize("changes, message", TENSORS)
def test_tensors_that_do_not_fit_are_listed_by_name(tmp_path, made, changes, message):
  shutil.copytree(made[1] / "open_clip", tmp_path / "w")
  changed(tmp_path / "w", **changes)
  with pytest.raises(UsageError) as error:
    sources.find(tmp_path / "w")
  assert message in str(error.value) and "\n" not in str(error.value)


def test_whole_numbers_are_no_weights(tmp_path, made):
  shutil.copytree(made[1] / "open_clip", tmp_path / "w")
  changed(tmp_path / "w", **{"ln_final.bias": np.ones(64, np.int32)})
  with pytest.raises(UsageError, match="ln_final.bias holds int32"):
    sources.find(tmp_path / "w").params()


def edited(folder, file, path, value):
  """Changes one key of a JSON file; DELETE takes it away."""
  content = json.loads((folder / file).read_text())
  at = content
  for key in path[:-1]:
    at = at[key]
  if value is ...:
    at.pop(path[-1])
  else:
    at[path[-1]] = value
  (folder / file).write_text(json.dumps(content))


OPEN_CLIP = [
  (["model_cfg", "multimodal_cfg"], {"width": 3}, "multimodal_cfg={'width': 3} makes it a model that this project does not have"),
  (["model_cfg", "vision_cfg", "pool_type"], "avg", "vision_cfg.pool_type='avg' makes it a model"),
  (["model_cfg", "vision_cfg", "no_ln_pre"], True, "vision_cfg.no_ln_pre=True makes it a model"),
  (["model_cfg", "vision_cfg", "timm_model_name"], "vit_tiny_224", "of models with timm's towers SigLIP can be read"),
  (["model_cfg", "text_cfg", "hf_model_name"], "roberta", "text_cfg.hf_model_name='roberta' makes it a model"),
  (["model_cfg", "text_cfg", "norm_kwargs"], {"eps": 1e-6}, "norm_epsilon is 1e-05 for images and 1e-06 for text"),
  (["model_cfg", "text_cfg", "act_kwargs"], {"approximate": "fast"}, None),
  (["model_cfg", "vision_cfg", "image_size"], [32, 64], "are not square"),
  (["preprocess_cfg", "interpolation"], "bilinear", "interpolation 'bilinear' cannot be read"),
  (["preprocess_cfg", "resize_mode"], "longest", "resize_mode='longest' must be one of"),
  (["model_cfg", "vision_cfg", "layers"], 3, "missing: visual.transformer.resblocks.2"),
  (["model_cfg", "embed_dim"], ..., "embed_dim is not set"),
]


@pytest.mark.parametrize("path, value, message", OPEN_CLIP, ids=[p[-1] for p, _, _ in OPEN_CLIP])
def test_what_open_clip_has_and_this_project_has_not_is_refused(tmp_path, made, path, value, message):
  shutil.copytree(made[1] / "open_clip", tmp_path / "w")
  edited(tmp_path / "w", "open_clip_config.json", path, value)
  if message is None:  # quick_gelu is set, which wins there, too
    assert sources.find(tmp_path / "w").model.activation == "quick_gelu"
    return
  with pytest.raises(UsageError) as error:
    sources.find(tmp_path / "w")
  assert message in str(error.value) and "\n" not in str(error.value)


HUGGING_FACE = [
  ("config.json", ["model_type"], "blip", "model_type 'blip' cannot be read; clip and siglip can"),
  ("config.json", ["vision_config", "hidden_act"], "gelu", "hidden_act is gelu for images and quick_gelu for text"),
  ("config.json", ["text_config", "layer_norm_eps"], 1e-6, "layer_norm_eps is 1e-05 for images and 1e-06 for text"),
  ("config.json", ["text_config", "eos_token_id"], 7, "eos_token_id 7 is not the end token"),
  ("config.json", ["vision_config", "num_channels"], 4, "num_channels is 4; three can be read"),
  ("config.json", ["vision_config", "num_hidden_layers"], 3, "missing: vision_model.encoder.layers.2"),
  ("config.json", ["text_config", "num_attention_heads"], 5, "heads=5 does not divide"),
  ("preprocessor_config.json", ["resample"], 2, "resample is 2; what can be read is a bicubic resize"),
  ("preprocessor_config.json", ["do_normalize"], False, "do_normalize is False"),
  ("preprocessor_config.json", ["size"], {"shortest_edge": 48}, "images are resized to ['32', '48'] for a model of 32"),
  ("preprocessor_config.json", ["do_center_crop"], False, "do_center_crop is False"),
]


@pytest.mark.parametrize("file, path, value, message", HUGGING_FACE, ids=[p[-1] for _, p, _, _ in HUGGING_FACE])
def test_what_transformers_has_and_this_project_has_not_is_refused(tmp_path, made, file, path, value, message):
  shutil.copytree(made[1] / "huggingface", tmp_path / "w")
  edited(tmp_path / "w", file, path, value)
  with pytest.raises(UsageError) as error:
    sources.find(tmp_path / "w")
  assert message in str(error.value) and "\n" not in str(error.value)


def test_what_a_config_leaves_out_has_the_defaults_of_transformers(tmp_path, made):
  # Old folders on the Hub say only what differs; transformers' own classes are the reference.
  import transformers

  from clip_jax.convert import huggingface

  for kind, cls in (("clip", transformers.CLIPConfig), ("siglip", transformers.SiglipConfig)):
    config = cls()
    for group, values in huggingface.DEFAULTS[kind].items():
      theirs = getattr(config, group)
      for key, value in values.items():
        have = getattr(theirs, key)
        assert have == value or (key == "projection_size" and have == theirs.hidden_size), (kind, group, key)
  assert transformers.CLIPConfig().projection_dim == 512


@pytest.mark.parametrize("old", [{"size": 32, "crop_size": 32}, {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}])
def test_old_and_new_ways_to_write_a_size(tmp_path, made, old):
  shutil.copytree(made[1] / "huggingface", tmp_path / "w")
  for key, value in old.items():
    edited(tmp_path / "w", "preprocessor_config.json", [key], value)
  assert sources.find(tmp_path / "w").model == models.model("openai")


@pytest.mark.parametrize(
  "missing, layout, message",
  [
    ("config.json", "huggingface", "holds no checkpoint"),
    ("preprocessor_config.json", "huggingface", "preprocessor_config.json is missing"),
    ("model.safetensors", "huggingface", "holds no weights; model.safetensors.index.json or model.safetensors"),
    ("open_clip_config.json", "open_clip", "holds no checkpoint"),
    ("open_clip_model.safetensors", "open_clip", "holds no weights; open_clip_model.safetensors"),
  ],
)
def test_a_folder_that_is_not_whole(tmp_path, made, missing, layout, message):
  shutil.copytree(made[1] / layout, tmp_path / "w")
  (tmp_path / "w" / missing).unlink()
  with pytest.raises(UsageError) as error:
    sources.find(tmp_path / "w")
  assert message in str(error.value)


def test_nothing_there(tmp_path):
  with pytest.raises(UsageError, match="nowhere does not exist"):
    sources.find(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text("{broken")
  with pytest.raises(UsageError, match="cannot be read as JSON"):
    sources.find(tmp_path)


def test_a_hugging_face_file_without_its_folder(tmp_path, made):
  shutil.copy(made[1] / "huggingface/model.safetensors", tmp_path / "model.safetensors")
  with pytest.raises(UsageError, match="give the Hugging Face folder it is from"):
    sources.find(tmp_path / "model.safetensors")


def test_torchs_weights_in_a_hub_folder(tmp_path, made):
  params, folder = made
  for layout, ours, theirs in (
    ("open_clip", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ("huggingface", "model.safetensors", "pytorch_model.bin"),
  ):
    shutil.copytree(folder / layout, tmp_path / layout)
    tensors = safetensors.numpy.load_file(tmp_path / layout / ours)
    (tmp_path / layout / ours).unlink()
    saved = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if layout == "huggingface":
      saved["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(saved, tmp_path / layout / theirs)
    models.assert_same(sources.find(tmp_path / layout), params)
