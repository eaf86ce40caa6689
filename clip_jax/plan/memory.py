"""What lies in a device's memory when a compiled program needs most of it, from the program's text.

The compiler for TPUs tells its peak as one number. Its text has the order in which instructions run, the layout of every array, and
what each was written for; so who lives when can be followed here, and the sum at the peak be held against the compiler's.
"""

import collections
import dataclasses
import re

from clip_jax.plan import hlo

# Of the step's arguments, by what JAX calls them.
ARGUMENTS = (("state.params", "parameters"), ("state.opt_state", "optimizer"), ("state.ema", "optimizer"), ("state", "optimizer"), ("batch", "batch"))
# Of everything else, by the scopes its instruction was traced in. The first match counts.
SCOPES = (
  ("contrastive_loss", "loss"),
  ("rematted_computation", "activations"),  # computed again for the backward pass, and written inside its scope
  ("transpose(", "gradients"),
  ("jvp(", "activations"),
  ("CLIP", "activations"),
)
PARTS = ("parameters", "optimizer", "batch", "activations", "gradients", "loss", "temporaries")


def at_peak(text):
  """Who takes how much of a device's main memory at the time when most of it is in use.

  Args:
    text: `compiled.as_text()` of a training step, in the order of its execution ("is_scheduled=true").

  Returns:
    A dict from each of `PARTS` to bytes: the state's parameters and what the optimizer keeps for them, the batch, results of the towers'
    forward pass, gradients (of activations and of parameters), the loss, and what belongs to none of these.
  """
  computations, entry = hlo.parse(text)
  header = text[: text.index("\n")]
  donated = {int(output or 0): int(argument) for output, argument in re.findall(r"\{(\d*)\}: \((\d+), \{\}", header)}
  found = _Lives(computations).peak(entry, donated)
  return {part: found.get(part, 0) for part in PARTS}


@dataclasses.dataclass
class _Buffer:
  """An array in main memory."""

  size: int  # bytes
  first: int  # instruction that writes it
  last: int  # instruction that needs it
  part: str  # of `PARTS`
  argument: int | None = None  # which one of the program it is


class _Lives:
  """Follows the buffers of each computation. A value is a buffer, None (nothing in main memory), or a list of values."""

  def __init__(self, computations):
    self._computations, self._known = computations, {}
    self._home = {name: computation for computation in computations.values() for name in computation}

  def peak(self, name, donated=None):
    """A dict from part to bytes at the peak of a computation; of others than the entry without what it is given and gives back.

    Args:
      name: of the computation.
      donated: of the entry computation, which output takes the place of which argument.
    """
    if name in self._known:
      return self._known[name]
    instructions = list(self._computations[name].values())
    values, buffers, inner = {}, [], {}
    for place, instruction in enumerate(instructions):
      values[instruction.name] = self._value(instruction, place, values, buffers, donated)
      inner[place] = self._inside(instruction)
      if instruction.root:
        _give_back(values[instruction.name], len(instructions), buffers, donated)
    self._known[name] = _sum_at_peak(buffers, inner, len(instructions))
    return self._known[name]

  def _value(self, instruction, place, values, buffers, donated):
    opcode, given = instruction.opcode, [values.get(name) for name in instruction.operands]
    if opcode == "tuple":
      return given
    if opcode == "get-tuple-element":
      return _at(given[0], [int(re.search(r"index=(\d+)", instruction.rest)[1])])
    if opcode in ("bitcast", "opt-barrier"):
      return given[0]
    for buffer in _buffers(given):
      buffer.last = place
      if opcode == "copy" and donated and buffer.argument in donated.values():
        buffer.argument = None  # it was copied because its place is needed
    if opcode in ("while", "dynamic-update-slice"):  # in place
      return given[0]
    if opcode.endswith("-done"):
      # Of a transfer in the background, (operands, result, ...); of a copy, (result, operand, ...).
      return _at(given[0], [int(opcode != "copy-done")])
    part, shared = self._part(instruction), self._shared(instruction)

    def make(path, size):
      if path in shared:
        operand, inside = shared[path]
        return _at(given[operand], inside)
      if not size or (opcode == "parameter" and donated is None):
        return None
      buffers.append(_Buffer(size, place, place, part, hlo.parameter_number(instruction) if opcode == "parameter" else None))
      return buffers[-1]

    return _tree(instruction.type, make)

  def _inside(self, instruction):
    """What the computations that an instruction calls need beside their arguments; of branches the one that needs most."""
    names = []
    if instruction.opcode == "while":
      names = [hlo.called(instruction, "body")]
    elif instruction.opcode == "conditional":
      names = re.findall(r"%([\w.-]+)", hlo.attribute(instruction, "branch_computations"))
    elif instruction.opcode == "call":
      names = [hlo.called(instruction, "to_apply")]
    return max((self.peak(name) for name in names), key=lambda found: sum(found.values()), default={})

  def _shared(self, instruction):
    """Which places of a result lie where an operand does: a dict from path to (number of the operand, path in it)."""
    opcode, shared = instruction.opcode, {}
    if opcode.endswith("-start") and instruction.type.startswith("("):
      operand = 1 if opcode == "copy-start" else 0
      of_one = len(instruction.operands) == 1 and not instruction.type.startswith("((")
      return {(operand,) if of_one else (operand, n): (n, ()) for n in range(len(instruction.operands))}
    _, said, aliases = instruction.rest.partition("output_to_operand_aliasing={")
    for output, operand, inside in re.findall(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}", aliases) if said else ():
      shared[_path(output)] = int(operand), _path(inside)
    shared |= self._placed(instruction)
    inner = self._computations.get(hlo.called(instruction, "calls")) if opcode == "fusion" else None
    if inner:
      # The compiler writes a slice into its array where that array is not needed any more.
      root = next(one for one in inner.values() if one.root)
      results = [((), root)] if root.opcode != "tuple" else [((n,), inner[name]) for n, name in enumerate(root.operands)]
      for path, result in results:
        update = _behind(result, inner, ("bitcast", "copy"))
        if update.opcode == "dynamic-update-slice":
          array = _behind(inner[update.operands[0]], inner, ("bitcast",))
          if array.opcode == "parameter":
            shared.setdefault(path, (hlo.parameter_number(array), ()))
    return shared

  def _placed(self, instruction):
    """As `_shared`, what the compiler for TPUs says: arrays in one place, by their numbers, the operands' first and then the results'."""
    home = self._home[instruction.name]
    arrays = [(n, path) for n, name in enumerate(instruction.operands) if name in home for path in _paths(home[name].type)]
    results, placed = _paths(instruction.type), {}
    said = re.search(r'"aliasing_operands":\{"lists":\[([^}]*\})+\]', instruction.rest)
    for group in re.findall(r'"indices":\[([^\]]*)\]', said[0]) if said else ():
      operand, *others = _path(group)
      if operand < len(arrays):
        placed |= {results[n - len(arrays)]: arrays[operand] for n in others if len(arrays) <= n < len(arrays) + len(results)}
    return placed

  def _part(self, instruction):
    scope = self._scope(instruction)  # of an argument, or a copy of one, its name
    argument = next((part for start, part in ARGUMENTS if scope.startswith(start)), None)
    return argument or next((part for within, part in SCOPES if within in scope), "temporaries")

  def _scope(self, instruction, seen=()):
    """The scopes an instruction was traced in; of one that the compiler added, those of what it holds, or of who uses it first."""
    own = re.search(r'op_name="([^"]*)"', instruction.rest)
    if own and "/" not in own[1] and instruction.opcode != "parameter":
      own = None  # a name of the compiler's
    if own or instruction.name in seen or len(seen) > 8:
      return own[1] if own else ""
    seen, home = (*seen, instruction.name), self._home[instruction.name]
    inner = self._computations.get(hlo.called(instruction, "calls"), {})
    near = [*reversed(inner.values()), *(home[name] for name in instruction.operands[:1] if name in home)]
    if not instruction.operands or instruction.opcode == "tuple":
      near = [user for user in home.values() if instruction.name in user.operands][:1]
    return next((scope for one in near if (scope := self._scope(one, seen))), "")


def _sum_at_peak(buffers, inner, end):
  steps = collections.Counter()
  for buffer in buffers:
    steps[buffer.first] += buffer.size
    steps[buffer.last + 1] -= buffer.size
  now, most, when = 0, -1, 0
  for place in range(end):
    now += steps[place]
    total = now + sum(inner.get(place, {}).values())
    if total > most:
      most, when = total, place
  found = collections.Counter(inner.get(when, {}))
  for buffer in buffers:
    if buffer.first <= when <= buffer.last:
      found[buffer.part] += buffer.size
  return dict(found)


def _give_back(value, end, buffers, donated):
  # Results are written where arguments lie that are not needed any more; of a loop's body, where the loop keeps them.
  places = {buffer.argument for buffer in buffers} - {None}
  for number, output in enumerate(value if isinstance(value, list) else [value]):
    for buffer in _buffers(output):
      buffer.last = end - 1
      if donated is None or (donated.get(number) in places and buffer.argument is None):
        buffer.size = 0
  for buffer in buffers:
    if buffer.argument is not None:  # who called keeps it until the end
      buffer.last = end - 1


def _tree(kind, make):
  """A value of a type: `make(path, bytes)` for each of its arrays, with the bytes that it takes of main memory."""
  tokens = re.finditer(rf"[()]|{hlo.ARRAY.pattern}", kind)

  def parts(path):
    found = []
    for token in tokens:
      if token[0] == ")":
        break
      here = (*path, len(found))
      if token[0] == "(":
        found.append(parts(here))
      else:
        layout = token[3] or ""
        here = here if kind.startswith("(") else ()
        found.append(make(here[1:], 0 if hlo.memory_space(layout) else hlo.padded_bytes(token[1], token[2], layout)))
    return found

  found = parts(())
  return found[0] if found else None


def _paths(kind):
  """Where in a type its arrays are."""
  found = []
  _tree(kind, lambda path, size: found.append(path))
  return found


def _path(text):
  return tuple(int(number) for number in re.findall(r"\d+", text))


def _behind(instruction, computation, opcodes):
  while instruction.opcode in opcodes and instruction.operands[0] in computation:
    instruction = computation[instruction.operands[0]]
  return instruction


def _buffers(value):
  if isinstance(value, list):
    for one in value:
      yield from _buffers(one)
  elif value is not None:
    yield value


def _at(value, path):
  for number in path:
    value = value[number] if isinstance(value, list) else value
  return value
