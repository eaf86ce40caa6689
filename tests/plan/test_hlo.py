"""The account of a program's text: real programs of the compiler for processors, and texts written down as that for TPUs writes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from clip_jax.plan import hlo


def text_of(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_in_nested_loops_count_as_often_as_they_run():
  def inner(x, _):
    return x @ x, None

  def outer(x, _):
    return jax.lax.scan(inner, x, None, length=5)[0], None

  text = text_of(lambda x: jax.lax.scan(outer, x, None, length=3)[0], jnp.ones((16, 16)))
  assert hlo.account(text).product_flops == 15 * 2 * 16**3
  assert hlo.account(text, repeat=False).product_flops == 2 * 16**3
  assert hlo.account(text).unknown_loops == 0


@pytest.mark.parametrize(
  "equation, a, b, flops",
  [("ij,jk->ik", (4, 8), (8, 2), 2 * 4 * 8 * 2), ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 7, 4, 5), 2 * 2 * 4 * 3 * 7 * 5)],
)
def test_products_by_their_shapes(equation, a, b, flops):
  text = text_of(functools.partial(jnp.einsum, equation), jnp.ones(a), jnp.ones(b))
  assert hlo.account(text).product_flops == flops


def test_a_convolution_counts_what_does_not_fall_on_padding():
  call = functools.partial(jax.lax.conv, window_strides=(1, 1), padding="SAME")
  text = text_of(call, jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)))
  # Of three rows (columns) of a kernel, one misses the image at either end.
  assert hlo.account(text).product_flops == 2 * 2 * 5 * 3 * (3 * 8 - 2) ** 2


def test_collectives_in_loops_by_kind_count_and_size():
  mesh = Mesh(np.array(jax.devices()[:4]), ("x",))

  def body(i, x):
    return jax.lax.ppermute(x, "x", [(j, (j + 1) % 4) for j in range(4)])

  def run(x):
    return jax.lax.psum(jax.lax.fori_loop(0, 7, body, x), "x")

  sharded = jax.shard_map(run, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec())
  found = hlo.account(text_of(sharded, jnp.ones((64, 32)))).collectives
  assert found["collective-permute"] == [7, 7 * 16 * 32 * 4]
  assert found["all-reduce"] == [1, 16 * 32 * 4]


def test_of_sliced_arrays_the_slices_are_accessed():
  def run(x):
    def body(i, x):
      part = jax.lax.dynamic_slice_in_dim(x, 8 * i, 8)
      return jax.lax.dynamic_update_slice_in_dim(x, 2 * part, 8 * i, 0)

    return jax.lax.fori_loop(0, 64, body, x)

  size = 512 * 256 * 4
  accessed = hlo.account(text_of(run, jnp.ones((512, 256)))).bytes_accessed
  assert 2 * size <= accessed < 8 * size  # and not 64 times the whole


def test_a_transfer_that_is_spread_over_other_work_counts_once():
  # As libtpu 0.0.42 writes the gather of vitb16's step, shortened: parts of one chain inside of fusions.
  part = (
    "  ROOT %all-gather.{0} = f32[8,4]{{1,0}} all-gather(%param_0.{0}), channel_id=1, dimensions={{0}}, "
    'frontend_attributes={{chain_id="0"}}, metadata={{op_name="jit(step)/all_gather" stack_frame_id={1}}}'
  )
  parts = [(1, 7), (2, 7), (3, 8)]  # the third comes from another line of the program
  fusions = [
    f"%fused.{n} (param_0.{n}: f32[1,4]) -> f32[8,4] {{\n  %param_0.{n} = f32[1,4]{{1,0}} parameter(0)\n{part.format(n, frame)}\n}}\n"
    for n, frame in parts
  ]
  calls = [f"  %fusion.{n} = f32[8,4]{{1,0}} fusion(%p), kind=kCustom, calls=%fused.{n}" for n, _ in parts]
  entry = ["ENTRY %main (p: f32[1,4]) -> f32[8,4] {", "  %p = f32[1,4]{1,0} parameter(0)", *calls, "}"]
  assert hlo.account("\n".join([*fusions, *entry])).collectives == {"all-gather": [2, 2 * 8 * 4 * 4]}


@pytest.mark.parametrize(
  "kind, size",
  [
    # Axes from the fastest on: 512 lanes, 128 rows, 77 planes; whole tiles of 8 x 128 already.
    ("bf16[128,77,512]{2,0,1:T(8,128)(2,1)}", 77 * 128 * 512 * 2),
    # The same with 77 rows, which take 80.
    ("bf16[128,77,512]{2,1,0:T(8,128)(2,1)}", 128 * 80 * 512 * 2),
    ("bf16[128,77,512]{2,1,0}", 128 * 77 * 512 * 2),
    ("f32[5]{0:T(128)}", 128 * 4),
    ("f32[300]{0:T(512)}", 512 * 4),
    ("f32[]{:T(128)}", 128 * 4),
    ("f32[]", 4),
    ("s32[3,5]", 60),
    ("f32[8,8,3,32]{3,1,2,0:T(8,128)}", 8 * 3 * 8 * 128 * 4),
    ("f32[49408,16]{0,1:T(8,128)}", 16 * 49408 * 4),
    ("f32[49408,16]{1,0:T(8,128)S(1)}", 128 * 49408 * 4),
    ("u8[256,64,64,3]{0,2,3,1:T(32,128)(4,1)}", 64 * 3 * 64 * 256),
    ("pred[7,3]{1,0:T(8,128)(4,1)}", 8 * 128),
    ("f32[0,16]{1,0:T(8,128)}", 0),
    ("token[]", 0),
  ],
)
def test_arrays_take_whole_tiles(kind, size):
  (dtype, shape, layout), = hlo.ARRAY.findall(kind)
  assert hlo.padded_bytes(dtype, shape, layout) == size


def test_tiles_never_make_an_array_smaller_than_its_numbers():
  for kind in ("f32[9,130]{1,0:T(8,128)}", "bf16[9,130]{0,1:T(8,128)(2,1)}", "s8[9,130]{1,0:T(32,128)(4,1)}"):
    (dtype, shape, layout), = hlo.ARRAY.findall(kind)
    assert hlo.padded_bytes(dtype, shape, layout) > hlo.type_bytes(kind) == 9 * 130 * hlo.DTYPE_BYTES[dtype]


@pytest.mark.parametrize("layout, space", [("", 0), ("1,0:T(8,128)", 0), ("1,0:T(8,128)S(1)", 1), ("0:T(128)S(5)", 5), (":T(512)S(6)", 6)])
def test_an_array_lies_where_its_layout_says(layout, space):
  assert hlo.memory_space(layout) == space


def test_bytes_of_a_tuple_are_those_of_its_parts_where_they_lie():
  kind = "(f32[8,128]{1,0:T(8,128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/(pred[], s32[3]{0:S(5)}))"
  assert hlo.type_bytes(kind) == 4096 + 2048 + 1 + 12
  assert hlo.type_bytes(kind, 0) == 4096 + 1 and hlo.type_bytes(kind, 1) == 2048 and hlo.type_bytes(kind, 5) == 12


# As libtpu 0.0.42 writes the kernel of vitb16's attention, shortened.
KERNEL = (
  'custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[8,128]{1,0}}, '
  'metadata={op_name="jit(step)/attention" stack_frame_id=357}, backend_config={"flag_configs":[],"custom_call_config":{"body":"TUz",'
  '"cost_estimate":{"flops":"1000","transcendentals":"6","bytes_accessed":"300","remote_bytes_transferred":"0"},"needs_layout_passes":true}}'
)
WIDE = "f32[8,128]{1,0:T(8,128)}"  # 4,096 bytes
FAST = "f32[8,128]{1,0:T(8,128)S(1)}"  # as many in the chip's own memory


def program(*entry, others=""):
  """A program's text: what its entry computation does with %x, and other computations before it."""
  lines = [f"  %x = {WIDE} parameter(0)", *(f"  {line}" for line in entry)]
  return "\n".join(["HloModule step, is_scheduled=true", "", others, f"ENTRY %main (x: f32[8,128]) -> {WIDE} {{", *lines, "}", ""])


def looped(*body, turns=5):
  """A program that runs something with %x for a number of turns."""
  state = f"(s32[]{{:T(128)}}, {WIDE})"
  others = "\n".join([
    f"%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{\n  %p = {state} parameter(0)",
    "  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0",
    f"  %x = {WIDE} get-tuple-element(%p), index=1",
    *(f"  {line}" for line in body),
    f"  ROOT %out = {state} tuple(%i, %y)\n}}\n",
    f"%condition (q: (s32[], f32[8,128])) -> pred[] {{\n  %q = {state} parameter(0)",
    "  ROOT %less = pred[]{:T(512)S(6)} constant(true)\n}\n",
  ])  # fmt: skip
  return program(
    "%zero = s32[]{:T(128)} constant(0)",
    f"%init = {state} tuple(%zero, %x)",
    f"%loop = {state} while(%init), condition=%condition, body=%body, "
    f'backend_config={{"known_trip_count":{{"n":"{turns}"}},"known_init_step":{{"init":"0","step":"1"}}}}',
    f"ROOT %last = {WIDE} get-tuple-element(%loop), index=1",
    others=others,
  )


def test_a_kernel_counts_what_it_says_of_itself():
  text = program(f"ROOT %y = {WIDE} {KERNEL}")
  computations, entry = hlo.parse(text)
  kernel = computations[entry]["y"]
  assert hlo.kernel_estimate(kernel, "flops") == 1000 and hlo.kernel_estimate(kernel, "bytes_accessed") == 300
  found = hlo.account(text)
  assert (found.product_flops, found.bytes_accessed) == (1000, 300)


def test_a_custom_call_that_says_nothing_of_itself_is_only_memory():
  text = program(f'ROOT %y = {WIDE} custom-call(%x), custom_call_target="Sort", backend_config={{"flag_configs":[]}}')
  found = hlo.account(text)
  assert (found.product_flops, found.bytes_accessed) == (0, 2 * 4096)


def test_kernels_in_loops_count_as_often_as_they_run():
  text = looped(f"%y = {WIDE} {KERNEL}", turns=7)
  found = hlo.account(text)
  assert (found.product_flops, found.bytes_accessed, found.unknown_loops) == (7 * 1000, 7 * 300, 0)
  once = hlo.account(text, repeat=False)
  assert (once.product_flops, once.bytes_accessed) == (1000, 300)


def test_what_lies_in_the_chips_own_memory_is_not_accessed_in_its_main_memory():
  def accessed(*body):
    return hlo.account(program(*body)).bytes_accessed

  assert accessed(f"ROOT %y = {WIDE} negate(%x)") == 2 * 4096
  assert accessed(f"%y = {FAST} negate(%x)", f"ROOT %z = {WIDE} negate(%y)") == 4096 + 4096
  assert accessed(f"%y = {FAST} negate(%x)", f"%z = {FAST} add(%y, %y)", f"ROOT %o = {WIDE} negate(%z)") == 4096 + 4096


def test_fusions_do_not_access_what_lies_in_the_chips_own_memory():
  inner = f"%fused (p: f32[8,128]) -> f32[8,128] {{\n  %p = {FAST} parameter(0)\n  ROOT %n = {WIDE} negate(%p)\n}}\n"
  text = program(f"%y = {FAST} copy(%x)", f"ROOT %z = {WIDE} fusion(%y), kind=kLoop, calls=%fused", others=inner)
  assert hlo.account(text).bytes_accessed == 4096 + 4096


def test_a_copy_in_the_background_reads_once_and_writes_once():
  text = program(
    f"%start = ({FAST}, {WIDE}, u32[]{{:S(2)}}) copy-start(%x)",
    f"%y = {FAST} copy-done(%start)",
    f"%back = ({WIDE}, {FAST}, u32[]{{:S(2)}}) copy-start(%y)",
    f"ROOT %z = {WIDE} copy-done(%back)",
  )
  assert hlo.account(text).bytes_accessed == 4096 + 4096


def test_places_without_contents_move_nothing():
  text = program(
    f'%room = {WIDE} custom-call(), custom_call_target="AllocateBuffer", backend_config={{"flag_configs":[]}}',
    f"ROOT %y = {WIDE} negate(%x)",
  )
  assert hlo.account(text).bytes_accessed == 2 * 4096
