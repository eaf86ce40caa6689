"""Products and biases as this platform runs them, against float64 NumPy."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.errors import UsageError
from clip_jax.models import products
from clip_jax.models.products import add_bias, matmul
from clip_jax.models.transformer import Dense, How

# Of a result's largest entry: float32 sums; bfloat16 has eight bits, and a bias may cancel most of a rounded product.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}


def close(got, want, dtype):
  assert got.dtype == dtype
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 7, 24, 40), (1, 1, 8, 3), (64, 16, 8)])
def test_product_bias_and_gradients_equal_float64(shape, dtype):
  *leading, inner, outer = shape
  random = np.random.default_rng(0)
  rounded = [jnp.asarray(random.normal(size=s), dtype) for s in ((*leading, inner), (inner, outer), (outer,), (*leading, outer))]
  x, kernel, bias, gradient = rounded
  got, pull = jax.vjp(jax.jit(lambda x, kernel, bias: add_bias(matmul(x, kernel), bias)), x, kernel, bias)
  of_x, of_kernel, of_bias = jax.jit(pull)(gradient)

  x, kernel, bias, gradient = (np.asarray(a, np.float64) for a in rounded)
  close(got, x @ kernel + bias, dtype)
  close(of_x, gradient @ kernel.T, dtype)
  close(of_kernel, x.reshape(-1, inner).T @ gradient.reshape(-1, outer), dtype)
  close(of_bias, gradient.reshape(-1, outer).sum(0), dtype)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU makes of products can be seen on CPU alone")
def test_no_product_in_half_precision_is_converted_on_cpu():
  # It would run at a third of the speed; this is what the shapes of products.py are for.
  def loss(x, kernel, bias):
    return jnp.square(add_bias(matmul(x, kernel), bias).astype(jnp.float32)).sum()

  x, kernel, bias = (jnp.ones(shape, jnp.bfloat16) for shape in ((4, 50, 64), (64, 256), (256,)))
  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, kernel, bias).compile().as_text()
  types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
  factors = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", text)
  # Forward, and the gradients of x, of the kernel and of the bias.
  assert [(types[a], types[b]) for a, b in factors] == [("bf16", "bf16")] * 4


@pytest.mark.parametrize("name, error", [("int8", 0.02), ("fp8", 0.08)])
def test_eight_bits_are_near_and_the_gradient_of_the_kernel_is_exact(name, error):
  random = np.random.default_rng(1)
  x, kernel, gradient = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((4, 8, 96), (96, 64), (4, 8, 64)))
  x = x.at[0, 0].mul(100.0)  # a scale of its own: one large row leaves the others as they are
  layer = Dense(64, (None, None), 1.0, jnp.float32, how=How(product=products.quantized(name)))
  got, pull = jax.vjp(lambda x, kernel: layer.apply({"params": {"kernel": kernel, "bias": jnp.zeros(64)}}, x), x, kernel)
  of_x, of_kernel = pull(gradient)
  rows = np.linalg.norm(got - x @ kernel, axis=-1) / np.linalg.norm(x @ kernel, axis=-1)
  assert rows.min() > 0 and rows.max() < error
  want = np.asarray(gradient @ kernel.T)
  assert 0 < np.linalg.norm(of_x - want) / np.linalg.norm(want) < error
  close(of_kernel, np.asarray(x, np.float64).reshape(-1, 96).T @ np.asarray(gradient, np.float64).reshape(-1, 64), "float32")


def test_eight_bits_without_qwix_name_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "qwix", None)
  with pytest.raises(UsageError, match=re.escape("config.train.quantization='int8' needs the package qwix, which is not installed: pip install 'clip_jax[quantization]'.")):
    products.quantized("int8")
