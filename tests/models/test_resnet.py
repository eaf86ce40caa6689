"""CLIP's ResNets against the same network in torch, at inference and in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from clip_jax import config as configs
from clip_jax.errors import ConfigError
from clip_jax.losses import grad_cache
from clip_jax.models.clip import CLIP, initial_params, normalize_pixels
from clip_jax.models.resnet import AttentionPool, BatchNorm, Bottleneck, ModifiedResNet
from tests.conftest import tiny
from tests.losses.reference import mesh_of
from tests.models.test_clip import model_config
from tests.models.torch_resnet import TorchResNet, randomize, to_params

STAGES, WIDTH, HEADS, EMBED_DIM, SIZE, ROWS = (1, 2, 1, 1), 16, 4, 24, 64, 6
UNOPTIMIZED = {"xla_backend_optimization_level": 0}  # compiling is nearly all of the time
VISION = {"kind": "resnet", "stages": STAGES, "width": WIDTH, "heads": HEADS}


def config_of(**changes):
  return model_config(vision=VISION, image_size=SIZE, embed_dim=EMBED_DIM, **changes)


def module_of(dtype=jnp.float32):
  return ModifiedResNet(STAGES, WIDTH, HEADS, EMBED_DIM, dtype)


def relative(got, want):
  want = np.float64(want)
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture(scope="module")
def network():
  network = randomize(TorchResNet(STAGES, WIDTH, HEADS, EMBED_DIM, SIZE)).train()
  # Running statistics somewhat like those of what comes in: otherwise activations grow until no softmax has a choice.
  with torch.no_grad():
    for seed in range(10):
      network(torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)))
  return network.eval()


@pytest.fixture(scope="module")
def params(network):
  return to_params(network.state_dict(), STAGES, HEADS)


@pytest.fixture(scope="module")
def pixels():
  return np.random.default_rng(1).integers(0, 256, (ROWS, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def images(pixels):
  config = config_of()
  return np.asarray(normalize_pixels(pixels, config.image_mean, config.image_std))


@pytest.fixture(scope="module")
def training(network, images):
  """Of one pass in torch, in float64: features, the new running statistics, and gradients of a scalar."""
  trained = TorchResNet(STAGES, WIDTH, HEADS, EMBED_DIM, SIZE).double().train()
  trained.load_state_dict(network.state_dict())
  features = trained(torch.tensor(np.float64(images).transpose(0, 3, 1, 2)))
  torch.sum(torch.sin(features)).backward()
  gradients = to_params({name: p.grad for name, p in trained.named_parameters()}, STAGES, HEADS)
  return features.detach().numpy(), to_params(trained.state_dict(), STAGES, HEADS), gradients


@pytest.fixture(scope="module")
def ours(params, images):
  """The same, of our module."""

  def scalar(params):
    features, collections = module_of().apply({"params": params}, images, train=True, mutable=["batch_stats"])
    return jnp.sin(features).sum(), (features, collections["batch_stats"])

  (_, aux), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True), compiler_options=UNOPTIMIZED)(params)
  return *aux, gradients


def test_features_equal_torchs_at_inference(network, params, pixels, images):
  # Parameters alone make a model: the running statistics are among them.
  variables = {"params": {"image": params, "logit_scale": 0.0}}
  got = jax.jit(lambda v, x: CLIP(config_of()).apply(v, x, method="encode_image"))(variables, pixels)
  with torch.no_grad():
    want = network(torch.tensor(images.transpose(0, 3, 1, 2)))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, torch.nn.functional.normalize(want), atol=1e-5)


def test_features_in_training_are_those_of_the_batchs_statistics(ours, training, params, images):
  assert relative(ours[0], training[0]) < 1e-5
  # And at inference not: a row is what it is by itself.
  encode = jax.jit(lambda x: module_of().apply({"params": params}, x))
  assert relative(encode(images), training[0]) > 0.1
  assert relative(encode(images[:3]), encode(images)[:3]) < 1e-5


def test_running_statistics_are_updated_as_torchs(ours, training, params):
  before, got, want = flatten_dict(params), flatten_dict(ours[1]), flatten_dict(training[1])
  assert got.keys() == {path for path in before if path[-1] in ("mean", "var")}
  for path, value in got.items():
    assert value.dtype == jnp.float32
    assert relative(value, want[path]) < 1e-5, path
    assert relative(before[path], want[path]) > 1e-2, path


def test_gradients_in_training_equal_torchs(ours, training):
  got, want = flatten_dict(ours[2]), flatten_dict(training[2])
  assert len(want) > 50
  for path, value in got.items():
    if path[-1] in ("mean", "var"):
      assert not np.any(value), path
      continue
    value, reference = np.asarray(value), want[path]
    if path[-1] == "qkv_bias":  # the keys' changes no softmax: its gradient is rounding
      value, reference = value[[0, 2]], reference[[0, 2]]
    assert relative(value, reference) < 1e-4, path


def test_the_variance_keeps_its_digits_far_from_zero():
  x = np.random.default_rng(0).normal(1000, 0.1, (8, 4, 4, 2)).astype(np.float32)
  params = {"scale": np.ones(2), "bias": np.zeros(2), "mean": np.full(2, 999.0), "var": np.ones(2)}
  norm = BatchNorm(jnp.float32)
  got, collections = norm.apply({"params": jax.tree.map(np.float32, params)}, x, True, mutable=["batch_stats"])
  x = np.float64(x)
  mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(got, (x - mean) / np.sqrt(variance + 1e-5), atol=2e-3)  # float32 holds 1000.1 to 6e-5
  want = 0.9 + 0.1 * variance * 128 / 127
  np.testing.assert_allclose(collections["batch_stats"]["var"], want, rtol=1e-6)


def test_bfloat16_is_close_and_its_statistics_are_float32(params, images, training):
  module = module_of(jnp.bfloat16)
  run = lambda params: module.apply({"params": params}, images, train=True, mutable=["batch_stats"])  # noqa: E731
  features, collections = jax.jit(run, compiler_options=UNOPTIMIZED)(params)
  assert features.dtype == jnp.bfloat16
  assert relative(np.float64(features), training[0]) < 0.08
  want = flatten_dict(training[1])
  for path, value in flatten_dict(collections["batch_stats"]).items():
    assert value.dtype == jnp.float32
    assert relative(value, want[path]) < 0.08, path


@pytest.mark.parametrize(
  "module, shape", [(Bottleneck(16, 2, jnp.float32), (2, 8, 8, 32)), (AttentionPool(4, 24, jnp.float32), (2, 2, 2, 64))]
)
def test_initial_values_are_the_released_codes(module, shape):
  train = [False] if isinstance(module, Bottleneck) else []
  init = jax.jit(lambda key: module.init(key, jnp.zeros(shape), *train), compiler_options=UNOPTIMIZED)
  variables = nn.unbox(init(jax.random.key(0)))
  for path, value in flatten_dict(variables["params"], sep="/").items():
    name = path.rpartition("/")[2]
    if isinstance(module, AttentionPool) and "bias" not in name:
      stddev = shape[-1] ** -0.5
    elif name == "kernel":
      stddev = (3 * value[..., 0].size) ** -0.5
    else:
      assert np.all(value == (name in ("scale", "var") and path != "norm_3/scale")), path
      continue
    # Five standard errors of a standard deviation.
    assert abs(np.std(value) / stddev - 1) < 5 / np.sqrt(2 * value.size), path


def test_a_new_model_has_no_variables_but_its_parameters(params):
  variables = jax.eval_shape(module_of().init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
  assert variables.keys() == {"params"}
  shapes = jax.tree.map(lambda x: x.shape, nn.unbox(variables["params"]))
  assert shapes == jax.tree.map(lambda x: x.shape, params)


def test_every_axis_of_every_parameter_is_named_for_the_sharding_rules():
  boxed = jax.eval_shape(lambda: initial_params(config_of(), jax.random.key(0)))
  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)  # noqa: E731
  for path, leaf in jax.tree_util.tree_leaves_with_path(boxed["image"], is_leaf=is_box):
    assert is_box(leaf) and len(leaf.names) == leaf.value.ndim and any(leaf.names), path


def test_microbatches_are_refused():
  model = {**tiny()["model"], "image_size": SIZE, "vision": VISION}
  configs.resolve(tiny(model=model))
  with pytest.raises(ConfigError, match="the gradient would not be that of the whole batch") as error:
    configs.resolve(tiny(model=model, train={"microbatches": 2}))
  assert str(error.value).startswith("config.train.microbatches=2 must be 1 with a ResNet")
  with pytest.raises(ValueError, match="not known from microbatches"):
    grad_cache.value_and_grad(None, None, microbatches=2, mesh=mesh_of(1, 1, 1), has_aux=True)
