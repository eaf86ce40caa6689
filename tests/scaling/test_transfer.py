"""Rates and initial sizes scaled by width: which parameters, by how much, and that activations then move alike at all widths."""

import jax
import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.errors import UsageError
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.scaling import sweep, transfer
from clip_jax.train import optimizer as optimizers
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny

WIDTHS = (64, 128, 256)


def config_of(width, scaled, layers=2, **train):
  """A model of two towers of a width, with heads of 16."""
  model = {
    "image_size": 16,
    "embed_dim": 32,
    "vision": {"patch_size": 4, "width": width, "layers": layers, "heads": width // 16},
    "text": {"context_length": 8, "width": width, "layers": layers, "heads": width // 16},
  }
  values = tiny(
    model=model,
    train={"global_batch_size": 16, "steps": 100, **train},
    optimizer={"learning_rate": 4e-3, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.1, "epsilon": 1e-12},
    mesh={"data": 1},
  )
  ratio = width / WIDTHS[0]
  for key, value in (transfer.width_scaling(ratio, ratio) if scaled else {}).items():
    section, name = key.split(".")
    values[section][name] = value
  return configs.resolve(values)


def moved(width, scaled, count=3):
  """How far embeddings, before they are normalised, are from where they began after some steps: root mean squares."""
  config = config_of(width, scaled, layers=1)
  mesh = meshes.create(config, jax.devices()[:1])
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (16, 16, 16, 3), np.uint8)
  tokens = np.zeros((16, 8), np.int32)
  tokens[:, :6] = random.integers(1, 500, (16, 6))
  tokens[:, 6] = 49_407
  state, train_step = states.create(config, mesh), steps.create(config, mesh)
  batch = rules.to_global({"images": images, "tokens": tokens}, mesh, 16)

  model = CLIP(config.model)
  encode = jax.jit(lambda params: [
    model.apply({"params": params}, x, normalize=False, method=way) for x, way in ((images, model.encode_image), (tokens, model.encode_text))
  ])  # fmt: skip

  def embedded(params):
    return [np.asarray(one, np.float64) for one in encode(params)]

  before = embedded(state.params)
  for _ in range(count):
    state, _ = train_step(state, batch)
  return [float(np.sqrt(np.mean((new - old) ** 2))) for new, old in zip(embedded(state.params), before, strict=True)]


def slopes(scaled):
  """Of image and text, by what power of the width it grows."""
  found = np.log([moved(width, scaled) for width in WIDTHS])
  return np.polyfit(np.log(WIDTHS), found, 1)[0]


@pytest.mark.slow
def test_activations_move_alike_at_three_widths_and_not_without_the_scaling():
  """The coordinate check of Yang et al. 2022, appendix D.1."""
  scaled, plain = slopes(True), slopes(False)
  print(f"slopes with the width: scaled {scaled}, as it is {plain}")
  assert np.all(np.abs(scaled) < 0.2)
  assert np.all(plain > 0.4)


def test_what_is_scaled_and_by_how_much():
  config = config_of(128, True)  # twice the base
  rate, decay = optimizers.multiplier(config), optimizers.first_match(config.optimizer.decay_multipliers)
  shapes = jax.eval_shape(lambda: states.initial_params(config.model, jax.random.key(0)))
  names = [rules.path_name(path).removesuffix("/value") for path, _ in jax.tree_util.tree_leaves_with_path(states.nn.unbox(shapes))]
  slower = {name for name in names if rate(name) == 0.5}
  # Every parameter with two axes as long as the width, or one and the embedding's, and no other.
  wide = {name for name in names if name.endswith(("kernel", "projection")) and not name.endswith("patch_kernel")}
  assert slower == wide and len(wide) == 2 * (4 * 2 + 1)
  assert {name for name in names if decay(name) == 2} == wide
  assert {rate(name) for name in set(names) - wide} == {1.0}


def test_new_parameters_start_at_another_size_by_their_factor_and_others_as_they_were():
  plain, scaled = config_of(256, False, layers=1), config_of(256, True, layers=1)
  mesh = meshes.create(plain, jax.devices()[:1])
  before, after = (jax.device_get(states.create(config, mesh).params) for config in (plain, scaled))
  ratios = jax.tree.map(lambda a, b: np.median(np.where(a == 0, np.float32(1), b / np.where(a == 0, np.float32(1), a))), before, after)
  found = {rules.path_name(path): float(ratio) for path, ratio in jax.tree_util.tree_leaves_with_path(ratios)}
  others = {name: ratio for name, ratio in found.items() if ratio != 1}
  assert others == pytest.approx({"image/class_embedding": 2.0, "image/pos_embed": 2.0, "image/projection": 0.5, "text/projection": 0.5})


MODELS = {
  "narrow": {"model.vision.width": 64, "model.vision.heads": 2, "model.text.width": 32, "model.text.heads": 1},
  "wide": {"model.vision.width": 128, "model.vision.heads": 4, "model.text.width": 32, "model.text.heads": 1},
}


def test_a_sweep_of_rates_has_every_combination(tmp_path):
  runs = transfer.lr_sweep("configs/quickstart.py", (1e-3, 2e-3), MODELS, 12_800, batches=(64, 128), base="narrow")
  assert [run.name for run in runs][:4] == ["narrow_b64_lr0.001", "narrow_b64_lr0.002", "narrow_b128_lr0.001", "narrow_b128_lr0.002"]
  assert len(runs) == 8
  plans = [sweep.plan(run, tmp_path) for run in runs]
  assert {(one.config.train.global_batch_size, one.config.optimizer.learning_rate, one.config.train.samples) for one in plans} == {
    (batch, rate, 12_800) for batch in (64, 128) for rate in (1e-3, 2e-3)
  }
  factors = {one.run.arch: optimizers.multiplier(one.config)("image/transformer/block_0/mlp_in/kernel") for one in plans}
  assert factors == {"narrow": 1.0, "wide": 0.5}
  assert {optimizers.multiplier(one.config)("text/transformer/block_0/mlp_in/kernel") for one in plans} == {1.0}  # its width is the same


@pytest.mark.parametrize(
  "models, base, message",
  [
    (MODELS, "widest", "'widest' is not one of the models, narrow, wide"),
    ({"narrow": MODELS["narrow"], "wide": {"model.vision.width": 128}}, "narrow", "model.vision.heads of wide must be among its changes"),
    ({"narrow": MODELS["narrow"], "wide": MODELS["wide"] | {"model.vision.heads": 2}}, "narrow", r"The heads of wide have another size .*128/2 and 64/2"),
  ],
)
def test_what_cannot_be_scaled_is_said(models, base, message):
  with pytest.raises(UsageError, match=message):
    transfer.lr_sweep("configs/quickstart.py", (1e-3,), models, 12_800, base=base)
