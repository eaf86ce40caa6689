"""Real compilations for TPU slices with libtpu."""

import importlib.util
import platform

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import config as configs
from clip_jax.errors import UsageError
from clip_jax.losses import global_batch
from clip_jax.models import size
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules
from clip_jax.plan import compile as compiler
from clip_jax.plan import hlo
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.plan.conftest import step


@pytest.fixture(scope="module")
def v5e():
  return compiler.devices("v5e:2x4")


def report(name, method, devices, batch, dtype="float32"):
  train, evaluation = {"global_batch_size": batch, "steps": 1}, {"batch_size": len(devices)}
  mesh = meshes.create(configs.resolve(tiny(train=train, eval=evaluation)), devices)
  loss = global_batch.create(configs.Loss(name=name, method=method, dtype=dtype), mesh)
  rows, whole = rules.batch_sharding(mesh), rules.replicated(mesh)
  x = jax.ShapeDtypeStruct((batch, 512), jnp.float32, sharding=rows)
  s = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
  call = jax.value_and_grad(lambda image, text, scale: loss(image, text, scale, -10.0), (0, 1, 2))
  # JAX cannot read back from its cache what was compiled for chips that are not there.
  return compiler.report(compiler.compile(jax.jit(call, out_shardings=(whole, (rows, rows, whole))), x, x, s, fresh=True))


@pytest.mark.slow
@pytest.mark.parametrize("name, products", [("softmax", 4), ("sigmoid", 3)])
def test_the_ring_stays_small_and_needs_few_products(v5e, quickly, name, products):
  found = report(name, "ring", v5e, 32_768, "bfloat16")
  # Less than all texts in float32 beside what a chip has of them: 64 MiB. Temporaries are tiles of 16 MiB.
  assert 0 < found.temporary_bytes <= 48 * 2**20 and found.peak_bytes <= 72 * 2**20
  assert found.product_flops == products * 2 * 4096 * 32_768 * 512
  assert found.flops >= found.product_flops and found.unknown_loops == 0
  # The texts once a pass; with softmax two passes. Then the gradients, one more hop than there are shards.
  passes = {"softmax": 2, "sigmoid": 1}[name]
  expected = passes * 32_768 * 512 * 2 + 9 * 4096 * 512 * 4
  assert expected <= found.collectives["collective-permute"][1] < 1.05 * expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_the_ring_stays_small_where_the_compiler_makes_it_fast(v5e, name):
  """A quarter of 32,768 pairs, which is compiled in a quarter of the time, in a quarter of what those may take on a chip: 32 and 128 MiB."""
  found = report(name, "ring", v5e, 8192, "bfloat16")
  assert found.temporary_bytes <= 8 * 2**20 and found.peak_bytes <= 32 * 2**20


@pytest.mark.slow
def test_gather_gathers_columns_once_and_scatters_their_gradients(v5e, quickly):
  found = report("softmax", "gather", v5e, 32_768, "bfloat16").collectives
  columns = 32_768 * 512
  assert columns * 2 <= found["all-gather"][1] < 1.1 * columns * 2
  assert columns * 4 <= found["reduce-scatter"][1] < 1.1 * columns * 4
  assert found["all-reduce"][1] < 0.01 * columns * 4  # of what each column has seen


@pytest.mark.slow
def test_the_rings_transfers_run_while_products_do(v5e):
  mesh = meshes.create(configs.resolve(tiny(train={"global_batch_size": 4096, "steps": 1}, eval={"batch_size": 8})), v5e)
  loss = global_batch.create(configs.Loss(method="ring", dtype="bfloat16", chunk=256), mesh)
  x = jax.ShapeDtypeStruct((4096, 512), jnp.float32, sharding=rules.batch_sharding(mesh))
  text = compiler.compile(jax.jit(jax.grad(lambda image, text: loss(image, text, 10.0), (0, 1))), x, x, fresh=True).as_text()
  assert "is_scheduled=true" in text  # the order of instructions is that of execution
  computations, _ = hlo.parse(text)

  def multiplies(instruction):
    called = instruction.rest.partition("calls=%")[2].partition(",")[0]
    inner = [instruction, *computations.get(called, {}).values()]
    return any(i.opcode in ("dot", "convolution") or "convolution" in i.name for i in inner)

  overlapped = 0
  for computation in computations.values():
    order = list(computation.values())
    places = {i.name: n for n, i in enumerate(order)}
    # Of the embeddings and their gradients; statistics are a few bytes.
    for done in (i for i in order if i.opcode == "collective-permute-done" and "[256,512]" in i.type):
      between = order[places[done.operands[0]] + 1 : places[done.name]]
      assert any(multiplies(i) for i in between), done.name
      overlapped += 1
  assert overlapped == 3  # texts in either pass, and their gradients


@pytest.mark.slow
def test_a_million_pairs_on_256_chips():
  found = report("softmax", "ring", compiler.devices("v5e:16x16"), 2**20, "bfloat16")
  assert found.temporary_bytes <= 32 * 2**20 and found.peak_bytes <= 128 * 2**20


@pytest.mark.slow
def test_a_step_with_micro_batches_compiles_and_gathers_only_embeddings(v5e, quickly):
  config = configs.resolve(tiny(train={"global_batch_size": 256, "steps": 1, "microbatches": 4}, eval={"batch_size": 8}))
  mesh = meshes.create(config, v5e)
  sharding = rules.batch_sharding(mesh)
  batch = {
    "images": jax.ShapeDtypeStruct((256, 16, 16, 3), jnp.uint8, sharding=sharding),
    "tokens": jax.ShapeDtypeStruct((256, 12), jnp.int32, sharding=sharding),
  }
  found = compiler.report(compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], batch, fresh=True))
  assert 0 < found.argument_bytes < found.peak_bytes
  assert found.collectives.get("all-gather", [0, 0])[1] <= 256 * 16 * 4 * 2


@pytest.mark.slow
def test_a_step_of_vit_b_16_with_fewer_layers_has_the_products_that_are_counted_for_mfu(quickly):
  # Attention as XLA has it: what the kernel for TPU multiplies does not stand in the text.
  train = {"global_batch_size": 64, "steps": 1, "attention": "xla"}
  # The towers have another depth each, so that neither is counted for the other; a block takes the compiler as long as the first.
  model = {"name": "ViT-B-16", "compute_dtype": "bfloat16", "vision": {"layers": 2}, "text": {"layers": 1}}
  config = configs.resolve({**tiny(train=train), "model": model})
  devices = compiler.devices("v5e:2x2")
  mesh = meshes.create(config, devices)
  sharding = rules.batch_sharding(mesh)
  batch = {
    "images": jax.ShapeDtypeStruct((64, 224, 224, 3), jnp.uint8, sharding=sharding),
    "tokens": jax.ShapeDtypeStruct((64, 77), jnp.int32, sharding=sharding),
  }
  found = compiler.report(compiler.compile(steps.create(config, mesh), states.describe(config, mesh)[0], batch, fresh=True))
  assert 64 * size.training_flops(config.model, 64) == pytest.approx(found.product_flops * len(devices), rel=1e-3)


def test_what_does_not_fit_is_said(v5e):
  mesh = Mesh(np.array(v5e), ("x",))
  x = jax.ShapeDtypeStruct((8 * 4096, 2**21), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
  with pytest.raises(compiler.OutOfMemoryError, match="RESOURCE_EXHAUSTED"):
    compiler.compile(jax.jit(lambda x: x * 2 + x[::-1]), x)


def test_where_there_is_no_compiler_for_tpus_the_machine_is_named_that_it_runs_on(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
  monkeypatch.setattr(platform, "machine", lambda: "arm64")
  with pytest.raises(UsageError, match="Linux on x86-64 alone, and this is .* on arm64") as error:
    compiler.devices("v5e:2x2")
  assert "\n" not in str(error.value)


def test_a_topology_that_does_not_exist_is_one_sentence():
  with pytest.raises(UsageError) as error:
    compiler.devices("v9z:2x2")
  assert "'v9z:2x2' cannot be compiled for; v5e:16x16 can" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["gather", "ring"])
def test_a_step_for_a_single_chip_compiles(method, quickly):
  """The compiler ends its process over a sum that is scattered among one device."""
  found = step("v5e:1x1", loss={"method": method}, train={"global_batch_size": 16, "steps": 1})
  assert compiler.report(found.compiled).product_flops > 0
