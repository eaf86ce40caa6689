"""Every wrong config is one clear sentence, before anything compiles."""

import copy
import importlib
from pathlib import Path

import pytest

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from tests.conftest import tiny

RECIPES = sorted(p.stem for p in (Path(__file__).parents[1] / "configs").glob("[a-z]*.py") if p.stem != "base")


def changed(path, value):
  values = copy.deepcopy(tiny())
  *groups, key = path.split(".")
  group = values
  for name in groups:
    group = group.setdefault(name, {})
  group[key] = value
  return values


RESNET = {"kind": "resnet", "stages": (1, 1, 1, 1), "width": 8, "heads": 4}
WRONG = [
  ("optimizer.learn_rate", 1e-3, "config.optimizer.learn_rate is not a key of optimizer. Did you mean learning_rate?"),
  ("optimiser", {}, "Did you mean optimizer?"),
  ("model.vision.wdith", 3, "config.model.vision.wdith is not a key of model.vision. Did you mean width?"),
  ("train.zzz", 1, "Its keys are global_batch_size"),
  ("train.global_batch_size", "big", "config.train.global_batch_size is 'big'; expected a whole number."),
  ("train.global_batch_size", 1.5, "expected a whole number"),
  ("train.global_batch_size", True, "expected a whole number"),
  ("train.global_batch_size", 0, "must be at least 1"),
  ("train.steps", 0, "asks for 0 steps"),
  ("optimizer.learning_rate", "fast", "expected a number"),
  ("optimizer.learning_rate", -1.0, "must lie between 0 and 1,000"),
  ("data.allow_truncated", "no", "expected True or False"),
  ("data.crop_scale", (0.9, 0.5), "two shares, 0 < low <= high <= 1"),
  ("data.crop_scale", 0.9, "config.data.crop_scale is 0.9"),
  ("data.source", "zip", "config.data.source='zip' must be one of 'auto', 'tar'"),
  ("data.order", "random", "must be one of 'global', 'blocks'"),
  ("data.mixture", (("a/*.tar", 0.0),), r"config.data.mixture[0]=('a/*.tar', 0.0) must be a name and a positive weight"),
  ("data.mixture", (("a/*.tar", 1.0), ("a/*.tar", 2.0)), "names a path twice"),
  ("data.mixture", (("a/*.tar", 0.12345678), ("b/*.tar", 1.0)), "in no simple proportion"),
  ("data.mixture", (("a/*.tar", "1"),), "expected a number"),
  ("data.captions", (("txt", -1.0),), "must be a name and a positive weight"),
  ("data.max_aspect", 0.5, "must lie between 1 and"),
  ("data.max_caption", 0, "must lie between 1 and"),
  ("data.max_bad_share", 2.0, "between 0 and 1"),
  ("model", 3, "config.model is 3; expected a group with keys name"),
  ("model.name", "ViT-B-61", "Did you mean ViT-B-16?"),
  ("model.vision.heads", 5, "config.model.vision.heads=5 does not divide config.model.vision.width=32"),
  ("model.image_size", 30, "config.model.image_size=30 is not a multiple of config.model.vision.patch_size=8"),
  ("model.text.context_length", 78, "between 3 and 77, the context of CLIP's tokenizer"),
  ("model.text.vocab_size", 1000, "smaller than the tokenizer's 49,408"),
  ("model.embed_dim", None, "config.model.embed_dim is not set"),
  ("model.activation", "relu", "'quick_gelu', 'gelu'"),
  ("model.compute_dtype", "float16", "'float32', 'bfloat16'"),
  ("model.image_std", (0.2, 0.2, 0.0), "image_std positive"),
  ("model.vision.layers", 0, "must be at least 1"),
  ("model.vision.patch_drop", 1.0, "config.model.vision.patch_drop=1.0 must be at least 0 and less than 1"),
  ("model.text.train_length", 13, "must lie between 3 and config.model.text.context_length=12"),
  ("model.text.reduction", "syntax", "'truncate', 'random', 'block'"),
  ("model.logit_scale_init", 0.0, "config.model.logit_scale_init=0.0 must be positive"),
  ("model.logit_bias_init", -10.0, "the softmax loss has no use for one"),
  ("loss.name", "sigmoid", "the sigmoid loss learns a bias (SigLIP starts it at -10)"),
  ("loss.name", "infonce", "config.loss.name='infonce' must be one of 'softmax', 'sigmoid'"),
  ("loss.method", "tree", "'auto', 'gather', 'ring'"),
  ("loss.chunk", 0, "config.loss.chunk=0 must be at least 1 column"),
  ("loss.dtype", "float16", "'float32', 'bfloat16'"),
  ("loss.label_smoothing", 1.0, "config.loss.label_smoothing=1.0 must be at least 0 and less than 1"),
  ("loss.max_logit_scale", 0.0, "config.loss.max_logit_scale=0.0 must be positive"),
  ("train.attention", "flash", "config.train.attention='flash' must be one of 'auto', 'xla', 'pallas', 'cudnn'"),
  ("optimizer.beta1", 1.0, "config.optimizer.beta1=1.0 must lie between 0 and"),
  ("optimizer.gradient_clip_norm", 0.0, "config.optimizer.gradient_clip_norm=0.0 must lie between"),
  ("mesh.sharding", "zero", "config.mesh.sharding='zero' must be one of 'fsdp', 'zero1'"),
  ("mesh.rules", (("width", "fsdp"),), "config.mesh.rules[0][0]='width' must be one of 'embed', 'heads', 'mlp', 'vocab'"),
  ("mesh.rules", (("embed", ("fsdp", "model")),), "config.mesh.rules[0][1]='model' must be one of 'data', 'fsdp', 'tensor'"),
  ("mesh.rules", (("embed", 3),), "config.mesh.rules[0][1] is 3; expected a string"),
  ("mesh.overrides", (("(", ("data",)),), "config.mesh.overrides[0][0]='(' is not a regular expression"),
  ("mesh.overrides", ((".", ("model",)),), "config.mesh.overrides[0][1]='model' must be one of 'data', 'fsdp', 'tensor'"),
  ("train.remat", "some", "config.train.remat='some' must be one of 'none', 'minimal', 'attention', 'full', 'offload'"),
  ("train.microbatches", 0, "config.train.microbatches=0 must lie between 1"),
  ("train.init_tower", "vision", "config.train.init_tower='vision' must be one of 'both', 'image', 'text'"),
  ("optimizer.freeze", "(image", "config.optimizer.freeze='(image' is not a regular expression"),
  ("optimizer.lr_multipliers", (("image", -1.0),), "lr_multipliers[0][1]=-1.0 must be at least 0"),
  ("optimizer.lr_multipliers", (("image", 0.1, 2),), "config.optimizer.lr_multipliers[0] is ('image', 0.1, 2)"),
  ("optimizer.lr_multipliers", (("[", 0.1),), "lr_multipliers[0][0]='[' is not a regular expression"),
  ("optimizer.lr_multipliers", (("image", float("inf")),), "lr_multipliers[0][1]=inf must be at least 0, and finite"),
  ("optimizer.decay_multipliers", (("image", -1.0),), "decay_multipliers[0][1]=-1.0 must be at least 0"),
  ("optimizer.decay_multipliers", (("[", 0.1),), "decay_multipliers[0][0]='[' is not a regular expression"),
  ("optimizer.name", "sgd", "config.optimizer.name='sgd' must be one of 'adamw', 'lion', 'adafactor', 'muon'"),
  ("optimizer.mu_dtype", "float16", "config.optimizer.mu_dtype='float16' must be one of 'float32', 'bfloat16'"),
  ("optimizer.schedule", "step", "config.optimizer.schedule='step' must be one of 'cosine', 'linear', 'rsqrt', 'constant'"),
  ("optimizer.warmup_samples", -1, "config.optimizer.warmup_samples=-1 must be at least 0"),
  ("optimizer.cooldown_steps", -1, "config.optimizer.cooldown_steps=-1 must lie between 0"),
  ("optimizer.timescale", 0, "config.optimizer.timescale=0 must lie between 1"),
  ("optimizer.cooldown_steps", 2, "cooldown_steps=2 is for the schedules 'rsqrt' and 'constant'; 'cosine' goes down to the end by itself."),
  ("optimizer.cooldown_samples", 17, "cooldown_steps=2 is for the schedules 'rsqrt' and 'constant'"),
  ("optimizer", {"schedule": "linear", "cooldown_steps": 2}, "'linear' goes down to the end by itself."),
  ("optimizer.end_learning_rate", 0.1, "end_learning_rate=0.1 must lie between 0 and config.optimizer.learning_rate=0.001"),
  ("optimizer", {"schedule": "rsqrt", "end_learning_rate": 1e-4}, "end_learning_rate=0.0001 is never reached: 'rsqrt' needs"),
  ("optimizer.ema_decay", 1.0, "config.optimizer.ema_decay=1.0 must be more than 0 and less than 1"),
  ("optimizer.beta1", 1.5, "config.optimizer.beta1=1.5 must lie between 0 and 0.999999"),
  ("optimizer.layer_decay", 0.0, "config.optimizer.layer_decay=0.0 must be more than 0 and at most 1"),
  ("model.resize_mode", "longest", "'shortest', 'squash'"),
  ("model.norm_epsilon", 0.0, "config.model.norm_epsilon=0.0 must be positive"),
  ("model.vision.kind", "swin", "config.model.vision.kind='swin' must be one of 'vit', 'siglip', 'resnet'"),
  ("model.vision.kind", "siglip", "config.model.embed_dim=16 must be config.model.vision.width=32"),
  ("model.vision.stages", (1, 1, 1, 1), "config.model.vision.stages is for a ResNet"),
  ("model.vision", {"kind": "resnet", "stages": (1, 1), "width": 8, "heads": 4}, "must be four numbers of blocks"),
  ("model.vision", {**RESNET, "layers": 3}, "config.model.vision.layers has no meaning for a ResNet"),
  ("model.vision", {**RESNET, "width": 9}, "config.model.vision.width=9 must be even"),
  ("model.vision", {**RESNET, "heads": 7}, "heads=7 does not divide 32 * config.model.vision.width=256"),
  ("model.vision", RESNET, "config.model.image_size=16 is not a multiple of 32"),
  ("model.vision", {"kind": "resnet", "width": 8, "heads": 4}, "config.model.vision.stages is not set"),
  ("model.text.kind", "bert", "'clip', 'siglip'"),
  ("model.text", {"kind": "siglip", "width": 16, "layers": 1, "heads": 2, "train_length": 8}, "that are read at the end token"),
  ("eval.retrieval", {"coco": {"pth": "x"}}, "config.eval.retrieval.coco.pth is not a key"),
  ("eval.zero_shot", {"pets": {"path": "x"}}, "needs at least one class name"),
  ("eval.zero_shot", {"pets": {"classes": ("cat",), "templates": ("a photo",)}}, "must hold {} once"),
]


@pytest.mark.parametrize("path, value, message", WRONG, ids=[f"{p}={v!r}"[:40] for p, v, _ in WRONG])
def test_a_wrong_config_is_one_clear_sentence(path, value, message):
  with pytest.raises(ConfigError) as error:
    configs.resolve(changed(path, value))
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "mesh, batch, message",
  [
    ({}, 12, "config.train.global_batch_size=12 cannot be split over 8 devices; 8 and 16 can."),
    ({}, 3, "cannot be split over 8 devices; 8 can."),
    ({"data": 3}, 24, "cannot be laid over 8 devices"),
    ({"data": -1, "fsdp": -1}, 16, "only one of data, fsdp and tensor can be -1"),
    ({"data": 0}, 16, "cannot be laid over 8 devices"),
    ({"tensor": 8}, 16, "config.mesh.tensor=8 must divide the heads of both towers"),
  ],
)
def test_mesh_and_batch_must_fit_the_devices(mesh, batch, message):
  config = configs.resolve(tiny(mesh=mesh, train={"global_batch_size": batch, "steps": 1}))
  with pytest.raises(ConfigError) as error:
    configs.check_devices(config, 8)
  assert message in str(error.value)


def test_the_batch_must_fit_the_microbatches_too():
  config = configs.resolve(tiny(train={"global_batch_size": 32, "steps": 1, "microbatches": 3}))
  with pytest.raises(ConfigError) as error:
    configs.check_devices(config, 8)
  assert "global_batch_size=32 cannot be split over 8 devices times 3 microbatches; 24 and 48 can." in str(error.value)


def test_tensor_parallel_devices_share_their_part_of_the_batch():
  config = configs.resolve(tiny(mesh={"tensor": 4}, train={"global_batch_size": 6, "steps": 1}))
  configs.check_devices(config, 8)  # two shards of three


def test_sizes_come_from_the_name_and_can_be_changed():
  values = {"model": {"name": "ViT-B-16", "text": {"context_length": 32}}, "train": {"steps": 1}}
  model = configs.resolve(values).model
  assert (model.vision.width, model.vision.mlp_width, model.vision.patch_size) == (768, 3072, 16)
  assert (model.text.context_length, model.text.width, model.embed_dim) == (32, 512, 512)


def test_a_name_says_more_than_sizes():
  model = {name: configs.model_from_dict({"name": name}) for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "RN50")}
  assert (model["ViT-B-32"].activation, model["ViT-B-32-quickgelu"].activation) == ("gelu", "quick_gelu")
  siglip = model["ViT-B-16-SigLIP"]
  assert (siglip.norm_epsilon, siglip.image_mean, siglip.resize_mode) == (1e-6, (0.5, 0.5, 0.5), "squash")
  assert (siglip.logit_scale_init, siglip.logit_bias_init, siglip.text.context_length) == (10, -10, 64)
  assert (model["RN50"].vision.kind, model["RN50"].vision.mlp_width) == ("resnet", None)
  changed = configs.model_from_dict({"name": "ViT-B-32", "activation": "quick_gelu", "image_size": 256})
  assert (changed.activation, changed.image_size) == ("quick_gelu", 256)


def test_steps_win_over_samples_and_samples_round_down():
  assert configs.resolve(tiny(train={"steps": None, "samples": 100, "global_batch_size": 32})).train.steps == 3
  train = configs.resolve(tiny(train={"steps": 7, "samples": 100, "global_batch_size": 32})).train
  assert (train.steps, train.samples) == (7, 224)
  with pytest.raises(ConfigError, match="both unset"):
    configs.resolve({"model": {"name": "ViT-B-16"}})


def test_the_model_of_a_card_round_trips():
  model = configs.resolve(tiny()).model
  saved = configs.to_dict(configs.resolve(tiny()))["model"]
  assert configs.model_from_dict(saved) == model


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves(recipe):
  config = configs.resolve(importlib.import_module(f"configs.{recipe}").get_config())
  assert config.train.steps > 0


@pytest.mark.parametrize("name", ["flip_vitl16", "clipa_vitl16"])
def test_the_second_stage_of_a_recipe_sees_whole_images(name):
  recipe = importlib.import_module(f"configs.{name}")
  first, second = (configs.resolve(recipe.get_config(stage)) for stage in ("pretrain", "tune"))
  patches = [
    (c.model.image_size // c.model.vision.patch_size) ** 2 * (1 - c.model.vision.patch_drop) for c in (first, second)
  ]
  assert patches == ([98, 196] if name == "flip_vitl16" else [36, 196])
  assert second.train.samples < first.train.samples / 10
  assert second.optimizer.learning_rate < first.optimizer.learning_rate / 10
  with pytest.raises(ValueError, match="'third' is not a stage"):
    recipe.get_config("third")


def test_the_sigmoid_recipe_starts_as_siglip():
  config = configs.resolve(importlib.import_module("configs.siglip_vitb16").get_config())
  assert (config.model.logit_scale_init, config.model.logit_bias_init) == (10.0, -10.0)
  assert (config.loss.name, config.loss.max_logit_scale) == ("sigmoid", None)


@pytest.mark.parametrize("name, rate", [("vitb32", 5e-4), ("vitb16", 5e-4), ("vitl14", 4e-4), ("rn50", 5e-4)])
def test_recipes_are_the_papers(name, rate):
  config = configs.resolve(importlib.import_module(f"configs.{name}").get_config())
  # Radford et al. 2021, tables 18 and 20.
  assert config.train.global_batch_size == 32_768
  assert config.train.samples == pytest.approx(32 * 400e6, rel=1e-5)
  assert config.optimizer.learning_rate == rate
  second, epsilon = (0.999, 1e-8) if name == "rn50" else (0.98, 1e-6)
  assert (config.optimizer.beta1, config.optimizer.beta2, config.optimizer.epsilon) == (0.9, second, epsilon)
  assert config.model.activation == "quick_gelu"  # as OpenAI's released weights
  assert (config.optimizer.weight_decay, config.optimizer.warmup_steps) == (0.2, 2000)


def test_the_lit_recipe_locks_the_image_tower_it_starts_from():
  config = configs.resolve(importlib.import_module("configs.lit_vitb16").get_config())
  assert (config.train.init_tower, config.optimizer.freeze) == ("image", "^image/")


def test_the_base_config_and_the_schema_agree_on_every_default():
  base = importlib.import_module("configs.base").get_config()
  base.train.steps, base.model.name = 1, "ViT-B-16"
  from_base = configs.to_dict(configs.resolve(base))
  # Named differences: the recipes are for accelerators, the schema's default is for anything.
  assert from_base["model"].pop("compute_dtype") == "bfloat16"
  plain = configs.to_dict(configs.resolve({"model": {"name": "ViT-B-16"}, "train": {"steps": 1}}))
  assert plain["model"].pop("compute_dtype") == "float32"
  assert from_base == plain
