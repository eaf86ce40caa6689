"""Reads a compiled program's text: what its loops repeat, which the compiler's own account counts once."""

import collections
import dataclasses
import math
import re

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
DTYPE_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# What moves no data of its own, and the custom calls of TPUs that do not.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
# Groups of one device each, which have nothing to tell each other.
ALONE = r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\]<=)"
ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  rest: str  # the attributes, and of a constant its value
  root: bool


@dataclasses.dataclass
class Account:
  """What a program does on one device, loops multiplied out.

  Attributes:
    product_flops: of matrix products and convolutions, two for a multiplication and its addition, and of kernels, by their own word.
    bytes_accessed: of the device's main memory, read and written by instructions, those inside of fusions not counted. What lies in
      the chip's own fast memory does not count.
    collectives: a dict from kind to [how many, bytes]: the larger of what a device gives and gets each time.
    unknown_loops: loops whose number of turns is not in the text; they are counted once.
  """

  product_flops: float = 0.0
  bytes_accessed: float = 0.0
  collectives: dict = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0


def account(text, repeat=True):
  """Adds up a program.

  Args:
    text: `compiled.as_text()`.
    repeat: whether loop bodies count as often as they run; otherwise once, as the compiler does.

  Returns:
    An `Account`.
  """
  computations, entry = parse(text)
  total, chains = Account(), set()

  def visit(name, times, inside):
    computation = computations[name]
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in ("dot", "convolution"):
        total.product_flops += times * _product_flops(instruction, computation)
      elif kind == "custom-call":
        total.product_flops += times * kernel_estimate(instruction, "flops")
      elif kind in COLLECTIVES and not re.search(ALONE, instruction.rest) and _first_of_chain(instruction, chains):
        # Of TPUs: a sum of which each keeps a part is one operation, written as a fusion of two.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        count, size = total.collectives.get(kind, (0, 0))
        total.collectives[kind] = [count + times, size + times * _moved(instruction, computation)]
      if not inside:
        total.bytes_accessed += times * _bytes(instruction, computation, computations)
      if instruction.opcode == "while":
        turns = _turns(instruction, computations)
        total.unknown_loops += turns is None
        visit(called(instruction, "body"), times * (turns or 1) if repeat else times, inside)
      elif instruction.opcode == "conditional":
        for branch in re.findall(r"%([\w.-]+)", attribute(instruction, "branch_computations")):
          visit(branch, times, inside)
      elif inner := called(instruction, "calls"):
        visit(inner, times, True)
      elif instruction.opcode == "call":
        visit(called(instruction, "to_apply"), times, inside)

  visit(entry, 1, False)
  return total


def parse(text):
  """A program's computations.

  Args:
    text: `compiled.as_text()`.

  Returns:
    A dict from name to a dict of `Instruction` by name, and the name of the entry computation.
  """
  computations, entry, current = collections.defaultdict(dict), None, None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
    if header:
      current = header[2]
      entry = current if header[1] else entry
    elif current and (found := re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*)", line)):
      kind, rest = _split_type(found[3])
      opcode, _, rest = rest.partition("(")
      inner, rest = _until_closed(rest)
      instruction = Instruction(
        found[2], kind, opcode, tuple(re.findall(r"%([\w.-]+)", inner)), f"{inner}){rest}", bool(found[1])
      )
      computations[current][instruction.name] = instruction
  return computations, entry


def type_bytes(kind, space=None):
  """Bytes of an HLO type, the parts of a tuple together, without padding.

  Args:
    kind: such as "f32[8,128]{1,0:T(8,128)S(1)}".
    space: count only what lies there; 0 is the device's main memory.
  """
  arrays = ARRAY.findall(kind)
  return sum(DTYPE_BYTES.get(dtype, 0) * math.prod(_sizes(shape)) for dtype, shape, layout in arrays if space in (None, memory_space(layout)))


def memory_space(layout):
  """Where an array with a layout lies: 0 the device's main memory, 1 a TPU core's vector memory, 5 the host's."""
  found = re.search(r"S\((\d+)\)", layout)
  return int(found[1]) if found else 0


def padded_bytes(dtype, shape, layout):
  """Bytes that an array takes in memory: whole tiles.

  Args:
    dtype: such as "bf16".
    shape: its sizes as text, such as "128,77".
    layout: such as "1,0:T(8,128)(2,1)": axes from the one that changes fastest, and the tile over the first of them.
  """
  sizes = _sizes(shape)
  order, _, rest = layout.partition(":")
  sizes = [sizes[int(axis)] for axis in order.split(",") if axis] or sizes
  tile = re.search(r"T\(([\d,]+)\)", rest)
  if tile:
    tile = [int(size) for size in reversed(tile[1].split(","))]
    sizes += [1] * (len(tile) - len(sizes))
    sizes[: len(tile)] = [-(-size // whole) * whole for size, whole in zip(sizes, tile, strict=False)]
  return math.prod(sizes) * DTYPE_BYTES.get(dtype, 0)


def kernel_estimate(instruction, key):
  """What a custom call says that it takes, "flops" or "bytes_accessed"; 0 where it does not say."""
  found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"(\d+)"', instruction.rest)
  return int(found[1]) if found else 0


def _shapes(kind):
  for dtype, shape, _ in ARRAY.findall(kind):
    yield dtype, _sizes(shape)


def _sizes(shape):
  return [int(d) for d in re.findall(r"\d+", shape)]


def _split_type(text):
  if text.startswith("("):
    inner, rest = _until_closed(text[1:])
    return f"({inner})", rest.lstrip()
  kind, _, rest = text.partition(" ")
  return kind, rest


def _until_closed(text):
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def attribute(instruction, name):
  """The value of an attribute as text, such as "{0,1}"; an empty string if the instruction has none of that name."""
  found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", instruction.rest)
  return found[1] if found else ""


def called(instruction, name):
  """The name of the computation that an attribute names, such as "body" or "calls"."""
  return attribute(instruction, name).lstrip("%")


def _first_of_chain(instruction, chains):
  """Whether a transfer has not been met yet: the compiler for TPUs writes one that it spreads over other work many times."""
  chain = re.search(r'chain_id="\w+"', instruction.rest)
  if not chain:
    return True
  source = re.search(r"metadata=\{([^}]*)\}", instruction.rest)
  key = instruction.opcode, chain[0], source and source[1]
  new = key not in chains
  chains.add(key)
  return new


def _turns(instruction, computations):
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.rest)
  if known:
    return int(known[1])
  # Loops of JAX count from 0 while less than a constant.
  condition = computations[called(instruction, "condition")]
  limits = [i for i in condition.values() if i.opcode == "constant" and i.type.startswith("s32[]")]
  less = any("direction=LT" in i.rest for i in condition.values())
  return int(limits[0].rest.partition(")")[0]) if less and len(limits) == 1 else None


def _product_flops(instruction, computation):
  output = next(_shapes(instruction.type))[1]
  left, right = (next(_shapes(computation[name].type))[1] for name in instruction.operands[:2])
  if instruction.opcode == "dot":
    contracted = re.findall(r"\d+", attribute(instruction, "lhs_contracting_dims"))
    return 2 * math.prod(output) * math.prod(left[int(d)] for d in contracted)
  of_left, of_right, of_output = re.split(r"_|->", attribute(instruction, "dim_labels"))
  window = re.search(r"window=\{([^}]*)\}", instruction.rest)
  window = dict(part.split("=") for part in window[1].split()) if window else {}
  flops = 2 * output[of_output.index("b")] * output[of_output.index("f")] * right[of_right.index("i")]
  for d in (d for d in of_output if d.isdigit()):
    sizes = left[of_left.index(d)], right[of_right.index(d)], output[of_output.index(d)]
    flops *= _window_products(*sizes, int(d), window)
  return flops


def _window_products(size, kernel, output, d, window):
  """Products of one spatial dimension of a convolution: those that fall on padding or gaps cost nothing."""

  def value(name, default):
    return window[name].split("x")[d] if name in window else default

  stride, low = int(value("stride", 1)), int(value("pad", "0_0").split("_")[0])
  gaps, spread = int(value("lhs_dilate", 1)), int(value("rhs_dilate", 1))
  last = (size - 1) * gaps
  places = (o * stride + k * spread - low for o in range(output) for k in range(kernel))
  return sum(0 <= place <= last and place % gaps == 0 for place in places)


def _moved(instruction, computation):
  given = sum(type_bytes(computation[name].type) for name in instruction.operands)
  if instruction.opcode == "all-gather-start" or instruction.opcode == "collective-permute-start":
    return max(given, type_bytes(instruction.type) - given)
  return max(given, type_bytes(instruction.type))


def _bytes(instruction, computation, computations):
  """Read and written by one instruction; of arrays that are only sliced, the slices."""
  if instruction.opcode in FREE or instruction.opcode.endswith("-done") or _free_call(instruction):
    return 0
  if kernel := kernel_estimate(instruction, "bytes_accessed"):
    return kernel
  types = [computation[name].type for name in dict.fromkeys(instruction.operands) if name in computation]
  sizes, output = [type_bytes(kind, 0) for kind in types], type_bytes(instruction.type, 0)
  kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
  if kind in ("slice", "dynamic-slice"):
    # The result stands behind the operands in the type of one that is started.
    result = ARRAY.findall(instruction.type)[len(types) if started else 0]
    return _moved_between(result, types[0], result)
  if kind == "dynamic-update-slice":
    update = ARRAY.findall(types[1])[0]
    return _moved_between(update, types[1], ARRAY.findall(types[0])[0])
  if kind == "copy" and started:
    return output  # its type is (result, operand)
  if instruction.opcode != "fusion":
    return sum(sizes) + output - (sum(sizes) if started and instruction.type.startswith("(") else 0)
  inner = computations[called(instruction, "calls")]
  read = sum(_read(name, inner, computations) for name in _parameters(inner))
  for update in (i for i in inner.values() if i.opcode == "dynamic-update-slice"):
    output -= type_bytes(update.type, 0) - type_bytes(inner[update.operands[1]].type, 0)
  return read + max(output, 0)


def _moved_between(array, source, target):
  """Bytes of an array, for each of its two places that is in the device's main memory."""
  size = math.prod(_sizes(array[1])) * DTYPE_BYTES.get(array[0], 0)
  return size * ((memory_space(source) == 0) + (memory_space(target[2]) == 0))


def _free_call(instruction):
  return instruction.opcode == "custom-call" and any(f'"{name}"' in instruction.rest for name in FREE_CALLS)


def _read(name, computation, computations):
  """How much of an array the instructions of a fusion read, fusions inside of it included."""
  whole, read = type_bytes(computation[name].type, 0), 0
  if not whole:
    return 0
  for user in (i for i in computation.values() if name in i.operands):
    place = user.operands.index(name)
    if user.opcode == "dynamic-slice" and not place:
      read += type_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and not place:
      read += type_bytes(computation[user.operands[1]].type)
    elif user.opcode == "fusion":
      inner = computations[called(user, "calls")]
      read += _read(_parameters(inner)[place], inner, computations)
    else:
      return whole
  return min(read, whole)


def _parameters(computation):
  """Names of a computation's parameters, in their order."""
  found = [i for i in computation.values() if i.opcode == "parameter"]
  return [i.name for i in sorted(found, key=parameter_number)]


def parameter_number(instruction):
  """Which argument of its computation a parameter stands for."""
  return int(instruction.rest.partition(")")[0])
