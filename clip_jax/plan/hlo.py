"""Reads a compiled program's text: what its loops repeat, which the compiler's own account counts once."""

import collections
import dataclasses
import math
import re

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
DTYPE_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# What moves no data of its own.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota")


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
    product_flops: of matrix products and convolutions, two for a multiplication and its addition.
    bytes_accessed: read and written by instructions, those inside of fusions not counted.
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
      elif kind in COLLECTIVES and _first_of_chain(instruction, chains):
        # Of TPUs: a sum of which each keeps a part is one operation, written as a fusion of two.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        count, size = total.collectives.get(kind, (0, 0))
        total.collectives[kind] = [count + times, size + times * _moved(instruction, computation)]
      if not inside:
        total.bytes_accessed += times * _bytes(instruction, computation, computations)
      if instruction.opcode == "while":
        turns = _turns(instruction, computations)
        total.unknown_loops += turns is None
        visit(_called(instruction, "body"), times * (turns or 1) if repeat else times, inside)
      elif instruction.opcode == "conditional":
        for branch in re.findall(r"%([\w.-]+)", _attribute(instruction, "branch_computations")):
          visit(branch, times, inside)
      elif called := _called(instruction, "calls"):
        visit(called, times, True)
      elif instruction.opcode == "call":
        visit(_called(instruction, "to_apply"), times, inside)

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


def type_bytes(kind):
  """Bytes of an HLO type, the parts of a tuple together."""
  return sum(DTYPE_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in _shapes(kind))


def _shapes(kind):
  for dtype, dimensions in re.findall(r"(\w+)\[([\d,<=]*)\]", kind):
    yield dtype, [int(d) for d in re.findall(r"\d+", dimensions)]


def _split_type(text):
  if text.startswith("("):
    inner, rest = _until_closed(text[1:])
    return inner, rest.lstrip()
  kind, _, rest = text.partition(" ")
  return kind, rest


def _until_closed(text):
  depth = 1
  for i, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[:i], text[i + 1 :]
  return text, ""


def _attribute(instruction, name):
  found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", instruction.rest)
  return found[1] if found else ""


def _called(instruction, name):
  return _attribute(instruction, name).lstrip("%")


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
  condition = computations[_called(instruction, "condition")]
  limits = [i for i in condition.values() if i.opcode == "constant" and i.type.startswith("s32[]")]
  less = any("direction=LT" in i.rest for i in condition.values())
  return int(limits[0].rest.partition(")")[0]) if less and len(limits) == 1 else None


def _product_flops(instruction, computation):
  output = next(_shapes(instruction.type))[1]
  left, right = (next(_shapes(computation[name].type))[1] for name in instruction.operands[:2])
  if instruction.opcode == "dot":
    contracted = re.findall(r"\d+", _attribute(instruction, "lhs_contracting_dims"))
    return 2 * math.prod(output) * math.prod(left[int(d)] for d in contracted)
  of_left, of_right, of_output = re.split(r"_|->", _attribute(instruction, "dim_labels"))
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
  if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
    return 0
  sizes = [type_bytes(computation[name].type) for name in instruction.operands if name in computation]
  output = type_bytes(instruction.type)
  if instruction.opcode == "dynamic-slice":
    return 2 * output
  if instruction.opcode == "dynamic-update-slice":
    return 2 * sizes[1]
  if instruction.opcode != "fusion":
    return sum(sizes) + output
  inner = computations[_called(instruction, "calls")]
  read = sum(_read(name, inner, computations) for name in _parameters(inner))
  for update in (i for i in inner.values() if i.opcode == "dynamic-update-slice"):
    output -= type_bytes(update.type) - type_bytes(inner[update.operands[1]].type)
  return read + max(output, 0)


def _read(name, computation, computations):
  """How much of an array the instructions of a fusion read, fusions inside of it included."""
  whole, read = type_bytes(computation[name].type), 0
  for user in (i for i in computation.values() if name in i.operands):
    place = user.operands.index(name)
    if user.opcode == "dynamic-slice" and not place:
      read += type_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and not place:
      read += type_bytes(computation[user.operands[1]].type)
    elif user.opcode == "fusion":
      inner = computations[_called(user, "calls")]
      read += _read(_parameters(inner)[place], inner, computations)
    else:
      return whole
  return min(read, whole)


def _parameters(computation):
  """Names of a computation's parameters, in their order."""
  found = [i for i in computation.values() if i.opcode == "parameter"]
  return [i.name for i in sorted(found, key=lambda i: int(i.rest.partition(")")[0]))]
