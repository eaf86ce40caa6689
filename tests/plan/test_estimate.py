"""The estimate from sizes alone, against sums by hand, real states, the compiler for processors, and stored answers of that for TPUs."""

import json
import math
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.config import recipes
from clip_jax.models import size
from clip_jax.parallel import mesh as meshes
from clip_jax.plan import chips, estimate, hlo, memory, planner
from clip_jax.train import state as states
from clip_jax.train import step as steps
from tests.conftest import tiny
from tests.plan import conftest

ROOT = Path(__file__).parents[2]


def small(topology="v5e:2x2", model=None, **sections):
  """A config, and the shape of its mesh."""
  config, where = conftest.resolved(topology, model, **sections)
  return config, meshes.abstract(config, where.devices)


def train(**changes):
  return {"train": {"global_batch_size": 16, "steps": 4, **changes}}


# The towers of `tests.conftest.tiny`: two blocks of width 32 over 5 tokens, and one of width 16 over 12; MLPs four times as wide.
TOWERS = ((2, 32, 5), (1, 16, 12))


def by_hand(of_block):
  """FLOPs of a batch of 16 for multiply-accumulates of a block as a function of width and tokens."""
  return 2 * 16 * sum(layers * of_block(width, tokens) for layers, width, tokens in TOWERS)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("freeze", ["", "^image/"])
def test_a_step_that_computes_nothing_twice_has_the_flops_that_count_for_mfu(loss, freeze):
  model = {**tiny()["model"], "logit_bias_init": -10.0 if loss == "sigmoid" else None}
  config, _ = small(model=model, **train(), loss={"name": loss}, optimizer={"freeze": freeze})
  assert estimate.step_flops(config) == 16 * size.training_flops(config.model, 16, loss, freeze)


RECOMPUTED = {
  "minimal": lambda width, tokens: 2 * tokens**2 * width,  # scores, and the values they weigh
  "attention": lambda width, tokens: 2 * tokens**2 * width + tokens * width**2 + 4 * tokens * width**2,  # its output, and the MLP's first product
  # And queries, keys and values. The MLP's second product is only added to what goes on: no gradient needs it.
  "full": lambda width, tokens: 2 * tokens**2 * width + (3 + 1 + 4) * tokens * width**2,
}


@pytest.mark.parametrize("remat, of_block", RECOMPUTED.items())
def test_recomputation_adds_the_products_of_blocks_that_are_not_kept(remat, of_block):
  once, _ = small(**train())
  again, _ = small(**train(remat=remat))
  assert estimate.step_flops(again) - estimate.step_flops(once) == by_hand(of_block)


def test_micro_batches_add_a_forward_pass_however_many_there_are():
  once, _ = small(**train())
  patches = 2 * 16 * 4 * (3 * 8 * 8) * 32
  projections = 2 * 16 * (32 * 16 + 16 * 16)
  forward = by_hand(lambda width, tokens: 12 * tokens * width**2 + 2 * tokens**2 * width) + patches + projections
  for microbatches in (2, 4):
    parts, _ = small(**train(microbatches=microbatches))
    assert estimate.step_flops(parts) - estimate.step_flops(once) == forward


def test_a_frozen_tower_is_not_computed_again():
  once, _ = small(**train(), optimizer={"freeze": "^image/"})
  again, _ = small(**train(remat="full"), optimizer={"freeze": "^image/"})
  assert estimate.step_flops(again) - estimate.step_flops(once) == 2 * 16 * RECOMPUTED["full"](16, 12)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"remat": "full", "scan": True, "microbatches": 2}], ids=str)
def test_the_compiler_for_processors_counts_the_same_products(changes):
  config, _ = conftest.resolved(planner.HERE, train={"global_batch_size": 32, "steps": 4, **changes})
  mesh = meshes.create(config)
  compiled = steps.create(config, mesh).lower(states.describe(config, mesh)[0], steps.inputs(config, mesh)).compile()
  found = hlo.account(compiled.as_text())
  assert found.unknown_loops == 0
  # Gradients of the first patches and of tokens have no product in the text that the estimate has, and the loss a few of its own.
  assert estimate.step_flops(config) == pytest.approx(found.product_flops * mesh.size, rel=0.005)


AVERAGE = {"ema_decay": 0.9, "mu_dtype": "bfloat16"}


@pytest.mark.parametrize(
  "changes, optimizer",
  [({}, {}), ({"fsdp": 8}, AVERAGE), ({"sharding": "zero1"}, {}), ({"fsdp": 4, "tensor": 2}, AVERAGE)],
  ids=str,
)
def test_the_state_takes_what_a_real_one_does_on_a_device(changes, optimizer):
  config, _ = conftest.resolved(planner.HERE, mesh=changes, optimizer=optimizer)
  mesh = meshes.create(config)
  described, create = states.describe(config, mesh)
  state = jax.jit(create, out_shardings=states.shardings_of(described))()

  def local(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

  found = estimate.memory(config, meshes.abstract(config, 8))
  assert set(found) == set(memory.PARTS)
  assert found["parameters"] == local(state.params)
  assert found["optimizer"] == local((state.opt_state, state.ema))
  assert estimate.memory(config, mesh) == found  # with devices and without
  if changes:
    replicated, _ = conftest.resolved(planner.HERE, optimizer=optimizer)
    whole = estimate.memory(replicated, meshes.abstract(replicated, 8))
    assert found["optimizer"] < whole["optimizer"]
    assert (found["parameters"] < whole["parameters"]) == ("sharding" not in changes)


def test_the_batch_is_pixels_of_a_byte_and_tokens_of_four():
  config, mesh = small(**train())
  assert estimate.memory(config, mesh)["batch"] == 16 // 4 * (16 * 16 * 3 + 12 * 4)


REMATS = ("none", "minimal", "attention", "full")  # from what keeps most to what keeps least
SIZES = st.fixed_dictionaries({
  "width": st.sampled_from([16, 64, 256]),
  "layers": st.integers(1, 3),
  "length": st.integers(3, 64),
  "image_size": st.sampled_from([16, 32, 64]),
  "batch": st.sampled_from([64, 256, 4096]),
  "scan": st.booleans(),
  "mesh": st.sampled_from([{}, {"fsdp": 4}, {"tensor": 2}, {"sharding": "zero1"}]),
  "attention": st.sampled_from(["auto", "xla"]),
})  # fmt: skip


def peak(sizes, **changes):
  model = {
    "image_size": sizes["image_size"],
    "embed_dim": 16,
    "vision": {"patch_size": 8, "width": sizes["width"], "layers": sizes["layers"], "heads": 4},
    "text": {"context_length": sizes["length"], "width": 32, "layers": sizes["layers"], "heads": 4},
  }
  values = {"global_batch_size": sizes["batch"], "steps": 1, "scan": sizes["scan"], "attention": sizes["attention"], **changes}
  config, mesh = small(model=model, train=values, mesh=sizes["mesh"])
  found = estimate.memory(config, mesh)
  assert all(size >= 0 and math.isfinite(size) for size in found.values())
  return sum(found.values()), found["parameters"]


@settings(deadline=None, max_examples=25)
@given(SIZES)
def test_to_recompute_more_never_takes_more_memory(sizes):
  found = [peak(sizes, remat=remat)[0] for remat in REMATS]
  assert found == sorted(found, reverse=True)


@settings(deadline=None, max_examples=25)
@given(SIZES, st.sampled_from(REMATS))
def test_more_micro_batches_never_take_more_memory_beyond_a_sum_of_gradients(sizes, remat):
  (whole, parameters), *parts = [peak(sizes, remat=remat, microbatches=count) for count in (1, 2, 4, 8)]
  assert [found for found, _ in parts] == sorted((found for found, _ in parts), reverse=True)
  assert parts[0][0] <= whole + parameters  # gradients of one microbatch are added to those of the others


def test_where_activations_are_most_of_it_micro_batches_take_them_away():
  config, mesh = small(model=conftest.SMALL, train={"global_batch_size": 8192, "steps": 1})
  parts, _ = small(model=conftest.SMALL, train={"global_batch_size": 8192, "steps": 1, "microbatches": 4})
  assert estimate.memory(parts, mesh)["activations"] == pytest.approx(estimate.memory(config, mesh)["activations"] / 4, rel=0.01)


def test_a_frozen_tower_keeps_no_activations():
  def activations(layers, freeze):
    model = {**conftest.SMALL, "vision": {**conftest.SMALL["vision"], "layers": layers}}
    config, mesh = small(model=model, train={"global_batch_size": 4096, "steps": 1}, optimizer={"freeze": freeze})
    return estimate.memory(config, mesh)["activations"]

  assert activations(2, "^image/") == activations(4, "^image/") > 0
  assert activations(2, "") > activations(2, "^image/") and activations(4, "") > activations(2, "")
  assert activations(2, "^(image|text)/") == 0


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP"])
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}, {"tensor": 2}], ids=str)
def test_other_kinds_of_towers_have_finite_positive_numbers(name, mesh):
  loss = {"name": "sigmoid"} if "SigLIP" in name else {}
  config, shape = small(model={"name": name, "compute_dtype": "bfloat16"}, **train(), mesh=mesh, loss=loss)
  found = estimate.memory(config, shape)
  assert all(math.isfinite(value) and value >= 0 for value in found.values()) and found["activations"] > 0
  numbers = [estimate.step_flops(config), *(size for _, size in estimate.collectives(config, shape).values())]
  assert all(math.isfinite(number) and number > 0 for number in numbers)


def test_a_step_takes_as_long_as_its_slowest_part():
  v5e = chips.of_topology("v5e:16x16")
  # 197e12 operations a second; 819e9 bytes of memory; 400e9 bytes of links, both directions together; 25 gigabits of network.
  found = estimate.seconds(v5e, 197e12, 819e9 / 2, {"all-reduce": [3, 100e9], "all-gather": [1, 40e9], "collective-permute": [9, 10e9]}, 3.125e9 * 4)
  assert found == pytest.approx({"compute": 1, "memory": 0.5, "interconnect": (2 * 100 + 40 + 10) / 200, "network": 4})
  assert estimate.seconds(v5e, 197e12, 819e9, {}) == pytest.approx({"compute": 1, "memory": 1, "interconnect": 0})
  # Nothing is said of links that are not published.
  l4 = chips.of_kind("NVIDIA L4")
  assert estimate.seconds(l4, 242e12, 300e9, {"all-reduce": [1, 1e9]}, 1e9) == pytest.approx({"compute": 2, "memory": 1})


def test_gradients_and_embeddings_cross_between_slices_in_shares():
  config, _ = small(topology="v5e:4x4", train={"global_batch_size": 64, "steps": 1}, mesh={"dcn_data": 2}, eval={"batch_size": 32})
  parameters = size.parameters(config.model)
  # Of 2 slices half of everything goes to the other one: gradients there and back, embeddings and their gradients; 4 bytes each.
  assert estimate.network_bytes(config, 16) == pytest.approx((2 * 4 * parameters + 4 * 4 * 64 * 16) / 2 / 16)
  alone, _ = small(topology="v5e:4x4")
  assert estimate.network_bytes(alone, 16) == 0


def stored():
  """Rows of benchmarks/step_tpu_aot.py: what the compiler for TPUs said of recipes, which take minutes each."""
  for row in json.loads((ROOT / "benchmarks" / "results" / "step_tpu_aot.json").read_text()):
    changes = {"train.global_batch_size": row["batch"], **row["changes"]}
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    where = planner.target(row["topology"])
    config = planner.resolved(recipes.load([f"--config={ROOT}/configs/{row['config']}.py", *flags]), where)
    yield row, config, where, meshes.abstract(config, where.devices)


def test_estimates_are_near_what_the_compiler_said_of_recipes():
  fitting = 0
  for row, config, where, mesh in stored():
    found = sum(estimate.memory(config, mesh).values()) / 2**30
    if row["error"]:
      assert found > where.capacity / 2**30, row  # so nothing the compiler refused is advised
      continue
    fitting += 1
    assert found == pytest.approx(row["peak_hbm_gib"], rel=0.25), row
    # The compiler counts what is no product, too, and computes more again, or less, where it sees fit.
    assert estimate.step_flops(config) / mesh.size == pytest.approx(row["flops"], rel=0.06), row
  assert fitting >= 8
