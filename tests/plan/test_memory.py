"""Who takes the memory at its peak: programs written down, with known answers."""

import pytest

from clip_jax.plan import memory


def kib(n, space=""):
  """The type of an array of n KiB."""
  return f"f32[{256 * n}]{{0:T(256){space}}}"


FAST = "S(1)"  # the chip's own memory
SCALAR = "s32[]{:T(128)S(6)}"
ROWS = 'metadata={op_name="batch[\'images\']"}'


def program(*entry, donated="", others=""):
  """A text in the order of its execution."""
  header = "HloModule jit_step, is_scheduled=true" + (f", input_output_alias={{ {donated} }}" if donated else "")
  return "\n".join([header, "", others, "ENTRY %main (x: f32[1]) -> f32[1] {", *(f"  {line}" for line in entry), "}", ""])


def computation(name, *lines):
  return "\n".join([f"%{name} (p: f32[1]) -> f32[1] {{", *(f"  {line}" for line in lines), "}\n"])


def peak(*entry, **more):
  """KiB at the peak."""
  return sum(memory.at_peak(program(*entry, **more)).values()) / 1024


def test_arrays_that_are_not_needed_any_more_make_room():
  chain = [
    f"%x = {kib(1)} parameter(0), {ROWS}",
    f"%a = {kib(4)} broadcast(%x), dimensions={{0}}",
    f"%b = {kib(4)} reverse(%a), dimensions={{0}}",
    f"%c = {kib(4)} reverse(%b), dimensions={{0}}",
    f"%d = {kib(2)} reduce(%c, %x)",
  ]
  assert peak(*chain, f"ROOT %e = {kib(1)} reduce(%d, %x)") == 1 + 4 + 4
  # The first is needed until the end: it, the one that is read, and the one that is written.
  assert peak(*chain, f"ROOT %e = {kib(1)} reduce(%d, %a)") == 1 + 4 + 4 + 4


def test_order_matters_and_not_the_sum_of_all_arrays():
  early = [f"%x = {kib(1)} parameter(0)", f"%a = {kib(8)} iota()", f"%b = {kib(1)} reduce(%a, %x)", f"%c = {kib(8)} iota()"]
  assert peak(*early, f"%d = {kib(1)} reduce(%c, %x)", f"ROOT %e = {kib(1)} add(%b, %d)") == 1 + 8 + 1 + 1
  late = [f"%x = {kib(1)} parameter(0)", f"%a = {kib(8)} iota()", f"%c = {kib(8)} iota()", f"%b = {kib(1)} reduce(%a, %x)"]
  assert peak(*late, f"%d = {kib(1)} reduce(%c, %x)", f"ROOT %e = {kib(1)} add(%b, %d)") == 1 + 8 + 8 + 1


def test_arguments_and_results_stay_until_the_end():
  text = [f"%x = {kib(4)} parameter(0)", f"%y = {kib(2)} reduce(%x)", f"%z = {kib(8)} iota()", f"%w = {kib(1)} reduce(%z, %y)"]
  result = f"({kib(2)}, {kib(1)})"
  assert peak(*text, f"ROOT %out = {result} tuple(%y, %w)") == 4 + 2 + 8 + 1


def placed(*numbers):
  """Which arrays libtpu 0.0.42 says are one: numbers of operands, and behind them those of results."""
  group = '{"indices":[' + ",".join(f'"{number}"' for number in numbers) + "]}" if numbers else ""
  return f'backend_config={{"flag_configs":[],"aliasing_operands":{{"lists":[{group}]}}}}'


def test_results_in_the_place_of_donated_arguments_take_nothing():
  arguments = [f"%s = {kib(4)} parameter(0)", f"%g = {kib(4)} parameter(1)"]
  both = [f"%m = {kib(1)} reduce(%n)", f"ROOT %out = ({kib(4)}, {kib(1)}) tuple(%n, %m)"]
  assert peak(*arguments, f"%n = {kib(4)} add(%s, %g), {placed()}", *both) == 4 + 4 + 4 + 1
  update = f"%n = {kib(4)} add(%s, %g), {placed(0, 2)}"
  assert peak(*arguments, update, *both, donated="{0}: (0, {}, may-alias)") == 4 + 4 + 1
  # A single result is named by no number.
  assert peak(*arguments, f"ROOT {update}", donated="{}: (0, {}, may-alias)") == 4 + 4


def test_the_place_of_a_donated_argument_is_free_until_its_result_is_there():
  text = [
    f"%s = {kib(8)} parameter(0)",
    f"%c = {kib(8)} copy(%s)",
    f"%t = {kib(8)} iota()",
    f"%u = {kib(1)} reduce(%t)",
    f"%n = {kib(8)} add(%c, %u)",
    f"ROOT %out = ({kib(8)}) tuple(%n)",
  ]
  assert peak(*text) == 8 + 8 + 1 + 8
  assert peak(*text, donated="{0}: (0, {}, may-alias)") == 8 + 1 + 8


def test_an_argument_that_is_handed_back_counts_once():
  assert peak(f"%s = {kib(4)} parameter(0)", f"ROOT %out = ({kib(4)}) tuple(%s)", donated="{0}: (0, {}, may-alias)") == 4
  assert peak(f"%s = {kib(4)} parameter(0)", f"ROOT %out = ({kib(4)}) tuple(%s)") == 4


def loop(carried, *body, root):
  state = f"({SCALAR}, {carried})"
  inside = [f"%p = {state} parameter(0)", f"%i = {SCALAR} get-tuple-element(%p), index=0", f"%h = {carried} get-tuple-element(%p), index=1", *body]
  return computation("body", *inside, f"ROOT %r = {state} tuple(%i, {root})"), [
    f"%x = {carried} parameter(0)",
    f"%zero = {SCALAR} constant(0)",
    f"%copy = {carried} copy(%x)",
    f"%init = {state} tuple(%zero, %copy)",
    f"%loop = {state} while(%init), condition=%condition, body=%body",
    f"%y = {carried} get-tuple-element(%loop), index=1",
  ]


def test_a_loop_needs_what_its_body_does_once_and_keeps_what_it_carries_in_place():
  body, entry = loop(kib(4), f"%t = {kib(2)} reduce(%h)", f"%u = {kib(3)} reduce(%h, %t)", f"%n = {kib(4)} add(%h, %u)", root="%n")
  # The argument, what is carried, and at most two of the body's arrays; %n lies where what is carried does.
  assert peak(*entry, f"ROOT %z = {kib(1)} reduce(%y)", others=body) == 4 + 4 + 2 + 3
  # After the loop its arrays are free again.
  assert peak(*entry, f"%a = {kib(6)} iota()", f"ROOT %z = {kib(1)} reduce(%y, %a)", others=body) == 4 + 4 + 6 + 1


def test_a_loop_in_a_loop_adds_to_what_is_there_around_it():
  inner = computation("deep", f"%q = ({kib(1)}) parameter(0)", f"%v = {kib(7)} iota()", f"%w = {kib(1)} reduce(%v)", f"ROOT %o = ({kib(1)}) tuple(%w)")
  lines = [f"%t = {kib(1)} reduce(%h)", f"%s = ({kib(1)}) tuple(%t)", f"%l = ({kib(1)}) while(%s), condition=%c, body=%deep"]
  body, entry = loop(kib(4), *lines, f"%g = {kib(1)} get-tuple-element(%l), index=0", f"%n = {kib(4)} add(%h, %g)", root="%n")
  assert peak(*entry, f"ROOT %z = {kib(1)} reduce(%y)", others=inner + body) == 4 + 4 + 1 + 7


def test_of_a_conditional_the_branch_that_needs_most_counts():
  def branch(name, size):
    return computation(
      name, f"%p{name} = {kib(4)} parameter(0)", f"%t{name} = {kib(size)} iota()",
      f"%o{name} = {kib(2)} add(%p{name}, %t{name})", f"ROOT %r{name} = ({kib(2)}) tuple(%o{name})",
    )  # fmt: skip

  entry = [
    f"%x = {kib(4)} parameter(0)",
    f"%which = {SCALAR} parameter(1)",
    f"%c = ({kib(2)}) conditional(%which, %x, %x, %x), branch_computations={{%small, %large, %middle}}",
    f"ROOT %y = {kib(2)} get-tuple-element(%c), index=0",
  ]
  assert peak(*entry, others=branch("small", 1) + branch("large", 9) + branch("middle", 5)) == 4 + 2 + 9


def test_a_copy_to_the_chips_own_memory_takes_none_of_the_main_memory():
  there = [f"%x = {kib(4)} parameter(0)", f"%s = ({kib(4, FAST)}, {kib(4)}, u32[]{{:S(2)}}) copy-start(%x)", f"%f = {kib(4, FAST)} copy-done(%s)"]
  assert peak(*there, f"ROOT %y = {kib(1)} reduce(%f)") == 4 + 1
  # Back from there it does, from when it begins.
  back = [f"%b = ({kib(4)}, {kib(4, FAST)}, u32[]{{:S(2)}}) copy-start(%f)", f"%t = {kib(2)} iota()", f"%u = {kib(1)} reduce(%t)"]
  assert peak(*there, *back, f"%d = {kib(4)} copy-done(%b)", f"ROOT %y = {kib(1)} reduce(%d, %u)") == 4 + 4 + 2 + 1


def test_an_argument_that_is_being_copied_away_counts_once_while_it_is():
  start = f"%s = (({kib(4)}), {kib(1, FAST)}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:256]}}"
  text = [f"%x = {kib(4)} parameter(0)", start, f"%t = {kib(2)} iota()", f"%f = {kib(1, FAST)} slice-done(%s)"]
  assert peak(*text, f"ROOT %y = {kib(1)} reduce(%f, %t)") == 4 + 2 + 1


@pytest.mark.parametrize(
  "start, done, size",
  [
    (f"({kib(1)}, {kib(4)}) all-gather-start(%a), dimensions={{0}}", "all-gather-done", 4),
    (f"({kib(1)}, {kib(1)}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%a)", "collective-permute-done", 1),
    (f"(({kib(1)}), {kib(4)}, s32[]{{:S(2)}}) async-start(%a), calls=%wrapped", "async-done", 4),
  ],
  ids=["all-gather", "collective-permute", "async"],
)
def test_a_transfer_in_the_background_holds_what_it_reads_and_what_it_writes(start, done, size):
  text = [
    f"%x = {kib(1)} parameter(0)",
    f"%a = {kib(1)} reverse(%x)",
    f"%s = {start}",
    f"%t = {kib(8)} iota()",
    f"%u = {kib(1)} reduce(%t)",
    f"%d = {kib(size)} {done}(%s)",
  ]
  # The argument, what is sent and what is coming; beside them something large and what becomes of it.
  assert peak(*text, f"ROOT %y = {kib(1)} reduce(%d, %u)") == 1 + 1 + size + 8 + 1
  # What came is there as long as somebody reads it, and what was sent is not.
  more = [f"%v = {kib(16)} iota()", f"ROOT %y = {kib(1)} reduce(%d, %v)"]
  assert peak(*text, *more) == 1 + size + 16 + 1


def test_several_arrays_in_one_transfer_are_all_followed():
  pair = f"({kib(4)}, {kib(6)})"
  text = [
    f"%x = {kib(1)} parameter(0)",
    f"%p = {kib(2)} broadcast(%x)",
    f"%q = {kib(3)} broadcast(%x)",
    f"%s = (({kib(2)}, {kib(3)}), {pair}) all-gather-start(%p, %q), dimensions={{0}}",
    f"%d = {pair} all-gather-done(%s)",
    f"%a = {kib(4)} get-tuple-element(%d), index=0",
    f"%b = {kib(6)} get-tuple-element(%d), index=1",
    f"%c = {kib(1)} reduce(%b)",
  ]
  assert peak(*text, f"ROOT %y = {kib(1)} reduce(%a, %c)") == 1 + 2 + 3 + 4 + 6
  large = f"%t = {kib(16)} iota()"
  assert peak(*text, large, f"ROOT %y = {kib(1)} reduce(%a, %t, %c)") == 1 + 4 + 1 + 16 + 1
  assert peak(*text, large, f"ROOT %y = {kib(1)} reduce(%b, %t, %c)") == 1 + 6 + 1 + 16 + 1


def test_slices_are_written_into_their_array():
  fused = computation(
    "fused", f"%a = {kib(8)} parameter(0)", f"%b = {kib(1)} parameter(1)", f"%at = {SCALAR} parameter(2)",
    f"%n = {kib(1)} negate(%b)", f"ROOT %w = {kib(8)} dynamic-update-slice(%a, %n, %at)",
  )  # fmt: skip
  start = [f"%x = {kib(1)} parameter(0)", f"%i = {SCALAR} parameter(1)", f'%room = {kib(8)} custom-call(), custom_call_target="AllocateBuffer"']
  first = f"%one = {kib(8)} fusion(%room, %x, %i), kind=kLoop, calls=%fused"
  second = f"%two = {kib(8)} dynamic-update-slice(%one, %x, %i)"
  assert peak(*start, first, f"ROOT %y = {kib(1)} reduce(%one)", others=fused) == 1 + 8 + 1
  assert peak(*start, first, second, f"ROOT %y = {kib(1)} reduce(%two)", others=fused) == 1 + 8 + 1


def test_one_of_several_results_of_a_fusion_may_be_a_written_slice():
  fused = computation(
    "fused", f"%b = {kib(1)} parameter(1)", f"%a = {kib(8)} parameter(0)", f"%at = {SCALAR} parameter(2)", f"%n = {kib(3)} broadcast(%b)",
    f"%w = {kib(8)} dynamic-update-slice(%a, %b, %at)", f"%c = {kib(8)} bitcast(%w)", f"ROOT %t = ({kib(3)}, {kib(8)}) tuple(%n, %c)",
  )  # fmt: skip
  text = [
    f"%x = {kib(1)} parameter(0)",
    f"%i = {SCALAR} parameter(1)",
    f"%room = {kib(8)} iota()",
    f"%f = ({kib(3)}, {kib(8)}) fusion(%room, %x, %i), kind=kLoop, calls=%fused",
    f"%n = {kib(3)} get-tuple-element(%f), index=0",
    f"%w = {kib(8)} get-tuple-element(%f), index=1",
  ]
  assert peak(*text, f"ROOT %y = {kib(1)} reduce(%n, %w)", others=fused) == 1 + 8 + 3 + 1


def test_a_kernel_that_says_so_writes_over_what_it_is_given():
  text = [f"%x = {kib(4)} parameter(0)", f"%a = {kib(4)} reverse(%x)"]
  call = 'custom-call(%a, %x), custom_call_target="tpu_custom_call"'
  assert peak(*text, f"%k = {kib(4)} {call}", f"ROOT %y = {kib(1)} reduce(%k)") == 4 + 4 + 4
  assert peak(*text, f"%k = {kib(4)} {call}, output_to_operand_aliasing={{{{}}: (0, {{}})}}", f"ROOT %y = {kib(1)} reduce(%k)") == 4 + 4 + 1


def test_results_that_the_compiler_put_where_an_operand_lies_take_nothing():
  text = [f"%x = {kib(4)} parameter(0)", f"%a = {kib(4)} reverse(%x)"]
  last = f"ROOT %y = {kib(1)} reduce(%b)"
  assert peak(*text, f"%b = {kib(4)} add(%x, %a), {placed()}", last) == 4 + 4 + 4
  assert peak(*text, f"%b = {kib(4)} add(%x, %a), {placed(1, 2)}", last) == 4 + 4 + 1
  # Equal operands are named, too.
  assert peak(*text, f"%b = {kib(4)} add(%x, %a, %a), {placed(1, 2)}", last) == 4 + 4 + 4
  assert peak(*text, f"%b = {kib(4)} add(%x, %a, %a), {placed(1, 2, 3)}", last) == 4 + 4 + 1
  of_two = f"%f = ({kib(2)}, {kib(4)}) fusion(%x, %a), kind=kLoop, calls=%none, {placed(1, 3)}"
  second = f"%b = {kib(4)} get-tuple-element(%f), index=1"
  assert peak(*text, of_two, second, last) == 4 + 4 + 2


def test_each_result_of_a_fusion_lives_as_long_as_it_is_read():
  text = [
    f"%x = {kib(1)} parameter(0)",
    f"%f = ({kib(4)}, {kib(2)}) fusion(%x), kind=kLoop, calls=%none",
    f"%a = {kib(4)} get-tuple-element(%f), index=0",
    f"%b = {kib(2)} get-tuple-element(%f), index=1",
    f"%c = {kib(1)} reduce(%a)",
    f"%t = {kib(5)} iota()",
  ]
  assert peak(*text, f"ROOT %y = {kib(1)} reduce(%b, %c, %t)") == 1 + 2 + 1 + 5 + 1


def test_whose_memory_it_is_is_read_from_what_it_was_written_for():
  def named(scope):
    return f'metadata={{op_name="{scope}" stack_frame_id=1}}'

  def path(group):
    return f"{group}['text']['projection']"

  text = program(
    f"%p = {kib(1)} parameter(0), {named(path('state.params'))}",
    f"%m = {kib(2)} parameter(1), {named(path('state.opt_state[1].mu'))}",
    f"%e = {kib(3)} parameter(2), {named(path('state.ema'))}",
    f"%n = {SCALAR} parameter(3), {named('state.step')}",
    f"%x = {kib(4)} parameter(4), {named('batch[images]')}",
    f"%a = {kib(5)} fusion(%x), calls=%none, {named('jit(step)/jvp(CLIP)/CLIP.encode_image/image/dot_general')}",
    f"%l = {kib(6)} fusion(%a), calls=%none, {named('jit(step)/jvp(contrastive_loss)/shard_map/dot_general')}",
    f"%b = {kib(7)} fusion(%l), calls=%none, {named('jit(step)/transpose(jvp(contrastive_loss))/shard_map/dot_general')}",
    f"%r = {kib(8)} fusion(%a), calls=%none, {named('jit(step)/transpose(jvp(CLIP))/rematted_computation/mlp_in/dot_general')}",
    f"%g = {kib(9)} fusion(%r, %b), calls=%none, {named('jit(step)/transpose(jvp(CLIP))/CLIP.encode_image/image/dot_general')}",
    f"%u = {kib(10)} fusion(%g, %l), calls=%none, {named('jit(step)/mul')}",
    f"%k = {kib(11)} copy(%a)",  # of the compiler's own: what it copies
    f"ROOT %y = {kib(1)} fusion(%a, %l, %b, %r, %g, %u, %k), calls=%none",
  )
  found = {part: size / 1024 for part, size in memory.at_peak(text).items()}
  expected = {"parameters": 1, "optimizer": 5, "batch": 4, "activations": 5 + 8 + 11, "gradients": 9, "loss": 6 + 7, "temporaries": 10}
  rest = found.pop("activations"), expected.pop("activations")
  assert list(memory.PARTS) == list(memory.at_peak(text)) and found == expected
  assert rest[0] - rest[1] == 1  # the result, which is told by the first thing that it is made of


def test_names_that_the_compiler_gives_say_nothing_and_who_uses_an_array_does():
  state, scope = f"({SCALAR}, {kib(8)})", "jit(step)/jvp(CLIP)/CLIP.encode_image/image/transformer/while"
  entry = [
    f"%x = {kib(1)} parameter(0), {ROWS}",
    f'%room = {kib(8)} custom-call(), custom_call_target="AllocateBuffer", metadata={{op_name="broadcast.170"}}',
    f"%zero = {SCALAR} constant(0)",
    f"%init = {state} tuple(%zero, %room)",
    f'%loop = {state} while(%init), condition=%condition, body=%body, metadata={{op_name="{scope}"}}',
    f"%kept = {kib(8)} get-tuple-element(%loop), index=1",
    f"ROOT %y = {kib(1)} reduce(%kept)",
  ]
  found = memory.at_peak(program(*entry, others=computation("body", f"ROOT %p = {state} parameter(0)")))
  assert found["activations"] >= 8 * 1024 and found["temporaries"] == 0


def test_what_a_loop_needs_inside_is_told_apart_too():
  scope = 'metadata={op_name="jit(step)/jvp(CLIP)/while/body/mul"}'
  body, entry = loop(kib(4), f"%t = {kib(2)} negate(%h), {scope}", f"%n = {kib(4)} add(%h, %t)", root="%n")
  found = memory.at_peak(program(*entry, f"ROOT %z = {kib(1)} reduce(%y)", others=body))
  assert found["activations"] == 2 * 1024 and sum(found.values()) == (4 + 4 + 2) * 1024
