"""Who takes the memory at the peak of real programs for TPUs: the parts must sum to the compiler's peak, which it tells as one number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.models import size
from clip_jax.plan import compile as compiler
from clip_jax.plan import estimate, hlo, memory
from tests.plan import conftest


@pytest.fixture(scope="module")
def v5e():
  return Mesh(np.array(compiler.devices("v5e:2x2")), ("x",))


WIDTH = 8192  # arrays larger than the chip's own memory, of which the compiler's peak tells, too


def multiply(w, x):
  for _ in range(3):
    x = jnp.tanh(x @ w)
  return (x**2).sum()


def update(w, x):
  gradient = jax.grad(multiply)(w, x)
  return w - 0.1 * gradient, (gradient**2).sum()


def deep(w, x):
  def block(h, _):
    return h + jnp.tanh(jnp.tanh(h @ w) @ w), None

  return (jax.lax.scan(jax.checkpoint(block), x, None, length=6)[0] ** 2).sum()


FUNCTIONS = {
  "an update in place": (update, {"donate_argnums": 0}),
  "the gradient of a loop": (jax.grad(deep), {}),
  "a loop that adds": (lambda w, x: jax.lax.fori_loop(0, 5, lambda i, h: h + jnp.tanh(h @ w) @ w, x), {}),
  "results of two sizes": (lambda w, x: (jnp.tanh(x @ w), jnp.sin(x).sum(0)), {}),
  "a kernel with two places": (lambda w, x: jnp.sort(x, 1), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("function, more", FUNCTIONS.values(), ids=FUNCTIONS)
def test_the_peak_of_a_function_is_the_compilers(v5e, function, more):
  x = jax.ShapeDtypeStruct((4 * WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(v5e, PartitionSpec("x")))
  w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(v5e, PartitionSpec()))
  compiled = compiler.compile(jax.jit(function, **more), w, x, fresh=True)
  found = memory.at_peak(compiled.as_text())
  assert sum(found.values()) == pytest.approx(compiled.memory_analysis().peak_memory_in_bytes, rel=0.01)


# Each key that changes what a step keeps appears, and none in all of them; blocks that are unrolled and kept are below.
STEPS = {
  "a loop, zero1": {"train": {"scan": True}, "mesh": {"sharding": "zero1"}},
  # Parts of 128 columns, which are whole tiles: the compiler turns narrower ones around and back, in memory of its own.
  "full, fsdp": {"train": {"remat": "full"}, "mesh": {"fsdp": 2}},
  "full in a loop, micro-batches": {"train": {"remat": "full", "scan": True, "microbatches": 2}},
}


def of_state(step):
  """Bytes of a device's parameters and of its optimizer, in the tiles that the program's arguments have."""
  computations, entry = hlo.parse(step.compiled.as_text())
  padded = {"parameters": 0, "optimizer": 0}
  for one in computations[entry].values():
    if one.opcode == "parameter" and 'op_name="state.' in one.rest:
      part = "parameters" if 'op_name="state.params' in one.rest else "optimizer"
      padded[part] += sum(hlo.padded_bytes(*array) for array in hlo.ARRAY.findall(one.type))
  return padded


@pytest.mark.slow
@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS)
def test_the_parts_of_a_step_sum_to_the_compilers_peak(quickly, changes):
  train = {"global_batch_size": 2048, "steps": 4, **changes.get("train", {})}
  step = conftest.step("v5e:2x2", conftest.SMALL, **{**changes, "train": train})
  report = compiler.report(step.compiled)
  assert sum(report.memory.values()) == pytest.approx(report.peak_bytes, rel=0.05)
  described = {"parameters": step.state.params, "optimizer": (step.state.opt_state, step.state.ema, step.state.step)}
  padded = of_state(step)
  for part, tree in described.items():
    local = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert report.memory[part] == pytest.approx(padded[part], rel=0.02) and padded[part] >= local
    assert local == pytest.approx(padded[part], rel=0.06)  # small arrays have the larger part of a tile empty
  batch = 2048 // 4 * (64 * 64 * 3 + 32 * 4)
  assert batch <= report.memory["batch"] < 1.05 * batch
  assert report.memory["activations"] == max(report.memory.values())


# ViT-B/16 in all but its depth: blocks are alike, and each of an unrolled tower takes the compiler as long as the first.
SHALLOW = {"name": "ViT-B-16", "compute_dtype": "bfloat16", "vision": {"layers": 3}, "text": {"layers": 1}}


@pytest.mark.slow
def test_a_step_of_vit_b_16_with_fewer_layers_in_a_loop_and_unrolled(quickly):
  """Four times the 128 pairs a chip of the recipe, so that activations are still by far the most of it."""
  found = {}
  for scan in (False, True):
    train = {"global_batch_size": 2048, "steps": 4, "remat": "minimal", "scan": scan}
    step = conftest.step("v5e:2x2", SHALLOW, train=train)
    report = found[scan] = compiler.report(step.compiled)
    parameters = size.parameters(step.config.model)
    assert parameters > 50e6
    assert sum(report.memory.values()) == pytest.approx(report.peak_bytes, rel=0.05)
    assert report.memory["activations"] == max(report.memory.values()) > 4 * 2**30
    assert report.memory["parameters"] == pytest.approx(parameters * 4, rel=0.01)
    assert report.memory["optimizer"] == pytest.approx(2 * parameters * 4, rel=0.01)
    assert report.flops == pytest.approx(estimate.step_flops(step.config) / 4, rel=0.03)
    assert report.unknown_loops == 0
    assert (hlo.account(step.compiled.as_text(), repeat=False).product_flops < report.product_flops) == scan  # few turns, and yet a loop
  # The same work is done, whichever way it is written.
  assert found[True].product_flops == pytest.approx(found[False].product_flops, rel=1e-3)
  assert 1 / 1.5 < found[True].bytes_accessed / found[False].bytes_accessed < 1.5
