"""Matrix products and biases, written as each platform runs them fastest.

TPU and GPU take them as they are. XLA:CPU needs help (docs/benchmarks.md, "XLA:CPU"): it runs the gradients of a product with
two leading axes at about 0.6 of the speed of the same product with one, and of bfloat16 products only those are fast
that have row-major factors and a float32 result, the others being converted to float32 first.
"""

import jax
import jax.numpy as jnp

from clip_jax.errors import MissingExtraError


def matmul(x, kernel):
  """[..., in] @ [in, out] -> [..., out]."""
  return jax.lax.platform_dependent(x, kernel, cpu=_matmul_on_cpu, default=jnp.matmul)


def add_bias(x, bias):
  """[..., features] + [features], of one dtype."""
  return jax.lax.platform_dependent(x, bias, cpu=_add_bias_on_cpu, default=jnp.add)


def quantized(name):
  """The product of activations and a kernel in 8 bits, for training.

  Products forward, and those that give the gradient of activations, are of numbers rounded to 8 bits, with a scale for each row
  and column; the gradient of a kernel, a sum over all tokens of a batch, keeps its precision. Wortsman et al. 2023 (Stable
  and low-precision training for large-scale vision-language models, arXiv 2304.13013), section 2: SwitchBack, for CLIP.

  Args:
    name: "int8" or "fp8" (e4m3 forward, e5m2 for gradients).

  Returns:
    A function from [..., in] and [in, out] to [..., out].

  Raises:
    UsageError: qwix is not installed.
  """
  try:
    import qwix
  except ImportError as error:
    raise MissingExtraError(f"config.train.quantization={name!r}", "quantization", "qwix") from error
  forward, backward = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}[name]
  exact = dict(use_original_residuals=True, dlhs_residual_qtype=forward, drhs_grad_qtype=None)
  rule = qwix.QtRule(
    module_path=".*", weight_qtype=forward, act_qtype=forward, bwd_qtype=backward, additional_qt_config=exact
  )
  provider = qwix.QtProvider([rule])
  return lambda x, kernel: provider.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _matmul_on_cpu(x, kernel):
  # On TPU flattening would copy, because lengths such as 197 do not fill tiles.
  flat = x.reshape(-1, x.shape[-1])
  product = flat @ kernel if x.dtype == jnp.float32 else _half(flat, kernel)
  return product.reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _half(x, kernel):
  """[rows, in] @ [in, out] -> [rows, out] in half precision, summed in float32."""
  return _dot(x, kernel, 1, 0)


def _half_forward(x, kernel):
  return _half(x, kernel), (x, kernel)


def _half_backward(kept, gradient):
  x, kernel = kept
  return _dot(gradient, kernel, 1, 1), _dot(_transposed(x), gradient, 1, 0)


_half.defvjp(_half_forward, _half_backward)


def _dot(a, b, axis_a, axis_b):
  return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)


def _transposed(x):
  # In memory, too. XLA would make a transpose part of the product, and then convert the product to float32; an axis more, and a
  # barrier, hide it. (What a reshape makes counts as row-major when the compiler decides which products to convert.)
  return jax.lax.optimization_barrier(x.T[:, :, None]).reshape(x.T.shape)


def _add_bias_on_cpu(x, bias):
  return x + bias if x.dtype == jnp.float32 else _add_in_half(x, bias)


@jax.custom_vjp
def _add_in_half(x, bias):
  return x + bias


def _add_in_half_forward(x, bias):
  return x + bias, None


def _add_in_half_backward(_, gradient):
  # The sum of the rows as a product: XLA:CPU adds them one number at a time otherwise.
  rows = gradient.reshape(-1, gradient.shape[-1])
  return gradient, _dot(jnp.ones((8, len(rows)), rows.dtype), rows, 1, 0)[0]


_add_in_half.defvjp(_add_in_half_forward, _add_in_half_backward)
