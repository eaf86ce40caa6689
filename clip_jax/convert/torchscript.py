"""TorchScript archives, such as OpenAI's releases of CLIP: their tensors, read without running anything they hold.

torch's own loader runs the `__setstate__` of a module while it loads it, and the language that is written in can write files.
Of weights less is wanted. `data.pkl` lists objects and their attributes; its opcodes are taken for notes on how to put dicts,
tuples and tensors together, and an archive that asks for more is refused. `data/0`, `data/1` and so on hold the numbers, and
the source of each class names its parameters and buffers. Neither needs torch.
"""

import dataclasses
import pickletools  # lists the opcodes of a pickle, and carries out none
import re
import zipfile
from typing import NamedTuple

import ml_dtypes
import numpy as np

from clip_jax.errors import DataError

DTYPES = {
  "torch.FloatStorage": "<f4", "torch.HalfStorage": "<f2", "torch.BFloat16Storage": ml_dtypes.bfloat16, "torch.DoubleStorage": "<f8",
  "torch.LongStorage": "<i8", "torch.IntStorage": "<i4", "torch.ShortStorage": "<i2", "torch.CharStorage": "i1",
  "torch.ByteStorage": "u1", "torch.BoolStorage": "?",
}  # fmt: skip
# Functions that do no more than say of what type their first argument is.
SAY_A_TYPE = {f"torch.jit._pickle.{name}" for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")}
SAY_A_TYPE |= {"torch.device"}
# Far over what any model has. A few bytes could name more objects than fit in memory, each of them part of the next in two ways.
MOST_TEXT, MOST_MODULES, DEEPEST, MOST_AXES = 32 << 20, 100_000, 100, 32


def is_archive(path):
  """Whether a file is a TorchScript archive, by the names in it."""
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith("constants.pkl") for name in archive.namelist())
  except Exception:  # it is no zip file, or one that is damaged in any of the ways that the module meets
    return False


class Archive:
  """The parameters and buffers of an archive, by the names that torch gives them in a state dict.

  Attributes:
    shapes: a dict of names and shapes.
  """

  def __init__(self, path):
    """Reads what there is, and where; no numbers yet.

    Args:
      path: the file.

    Raises:
      DataError: it is damaged, or would have to be run.
    """
    self._path = path
    try:
      self._zip = zipfile.ZipFile(path)
      (data,) = [name for name in self._zip.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
      self._root = data.removesuffix("data.pkl")
      if f"{self._root}byteorder" in self._zip.namelist() and self._text("byteorder") != b"little":
        raise DataError("its numbers are of a machine with another order of bytes")
      self._tensors = _state(_objects(self._text("data.pkl")), self._classes())
      for name, tensor in self._tensors.items():
        if self._zip.getinfo(self._member(tensor)).file_size < tensor.storage.count * tensor.storage.dtype.itemsize:
          raise DataError(f"{name} is cut off")
    except Exception as error:  # of whatever kind damage leads to
      raise self._unreadable(error) from error
    self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

  def read(self, name):
    """One tensor, as a NumPy array.

    Raises:
      DataError: its bytes are damaged.
    """
    tensor = self._tensors[name]
    dtype, count = tensor.storage.dtype, tensor.storage.count
    try:
      if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
      with self._zip.open(self._member(tensor)) as file:
        numbers = np.frombuffer(file.read(count * dtype.itemsize), dtype, count)[tensor.offset :]
      strides = [step * dtype.itemsize for step in tensor.strides]
      return np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides).copy()
    except Exception as error:
      raise self._unreadable(error) from error

  def _unreadable(self, error):
    reason = str(error) if isinstance(error, DataError) else f"the archive is damaged ({type(error).__name__})"
    return DataError(f"{self._path} cannot be read as weights: {reason}.")

  def _member(self, tensor):
    return f"{self._root}data/{tensor.storage.key}"

  def _text(self, name):
    with self._zip.open(self._root + name) as file:
      content = file.read(MOST_TEXT + 1)  # unpacked, whatever the archive says of its length
    if len(content) > MOST_TEXT:
      raise DataError(f"{name} has more than {MOST_TEXT >> 20} MiB")
    return content

  def _classes(self):
    # A function from the name of a class to its bases and its source.
    files = {}

    def find(kind):
      module, _, name = kind.rpartition(".")
      file = f"code/{module.replace('.', '/')}.py"
      if file not in files:
        parts = re.split(r"^class (\w+)(?:\((\w*)\))?:", self._text(file).decode(), flags=re.MULTILINE)
        files[file] = {name: (bases, source) for name, bases, source in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
      return files[file][name]

    return find


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  count: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple
  strides: tuple


@dataclasses.dataclass(frozen=True)
class _Global:
  name: str  # of a class or function; nothing is looked up by it


@dataclasses.dataclass(eq=False)
class _Object:
  kind: str  # its class
  attributes: object = None


def _objects(content):
  # The object that a pickle describes.
  stack, marks, memo = [], [], {}

  def pop(count):
    items = stack[len(stack) - count :]
    if len(items) < count:
      raise ValueError("the stack is empty")
    del stack[len(stack) - count :]
    return items

  for opcode, argument, _ in pickletools.genops(content):
    name = opcode.name
    if name in ("NONE", "NEWTRUE", "NEWFALSE"):
      stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
    elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
      stack.append(argument)
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
      stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
    elif name == "MARK":
      marks.append(len(stack))
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
      stack.append(tuple(pop(int(name[5:]) if name[5:] else len(stack) - marks.pop())))
    elif name in ("APPEND", "APPENDS"):
      items = pop(1 if name == "APPEND" else len(stack) - marks.pop())
      stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
      items = pop(2 if name == "SETITEM" else len(stack) - marks.pop())
      stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif name in ("BINPUT", "LONG_BINPUT"):
      memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      stack.append(memo[argument])
    elif name == "GLOBAL":
      stack.append(_Global(argument.replace(" ", ".")))
    elif name == "BINPERSID":
      stack.append(_storage(*stack.pop()))
    elif name in ("NEWOBJ", "REDUCE"):
      stack.append(_made(name, *pop(2)))
    elif name == "BUILD":
      state = stack.pop()
      stack[-1].attributes = state
    elif name not in ("PROTO", "STOP"):
      raise DataError(f"it has the opcode {name}, which is none that torch writes")
  return stack.pop()


def _key(value):
  if not isinstance(value, str | int | float):
    raise DataError("a dict in it has keys that are neither texts nor numbers")
  return value


def _made(how, function, arguments):
  # What a class or a function would give.
  name = function.name
  if how == "NEWOBJ" and name.startswith("__torch__.") and not arguments:
    return _Object(name)
  if how == "REDUCE" and name == "torch._utils._rebuild_tensor_v2":
    return _tensor(*arguments[:4])
  if how == "REDUCE" and name == "collections.OrderedDict" and not arguments:
    return {}
  if how == "REDUCE" and name in SAY_A_TYPE:
    return arguments[0]
  raise DataError(f"it asks for {name}, which is none of what weights are made of")


def _storage(word, kind, key, _, count):
  if word != "storage" or not isinstance(kind, _Global) or not isinstance(key, str) or type(count) is not int or count < 0:
    raise ValueError("no storage")
  if kind.name not in DTYPES:
    raise DataError(f"it has numbers of {kind.name}, of which no weights are made")
  return _Storage(key, np.dtype(DTYPES[kind.name]), count)


def _tensor(storage, offset, shape, strides):
  numbers = (offset, *shape, *strides)
  if not isinstance(storage, _Storage) or len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
    raise ValueError("no tensor")
  last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
  if len(shape) > MOST_AXES or 0 not in shape and last >= storage.count:
    raise DataError("one of its tensors reaches beyond its numbers")
  return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _state(root, class_of):
  # The state dict of a module, as torch gives it: parameters, buffers, and those of the modules in it.
  found, waiting, seen = {}, [("", root, 0)], 0
  while waiting:
    prefix, module, depth = waiting.pop()
    bases, source = class_of(module.kind)
    if bases != "Module":
      continue  # a value of a class of its own, which has none
    seen += 1
    if depth > DEEPEST or seen > MOST_MODULES:
      raise DataError("its modules contain each other without end")
    if not isinstance(module.attributes, dict) or re.search(r"^  def __setstate__\(", source, re.MULTILINE):
      raise DataError(f"only code in it (the __setstate__ of {module.kind}) could tell its weights, and is not run")
    for group in ("__parameters__", "__buffers__"):
      listed = re.search(rf"^  {group} = \[(.*)\]$", source, re.MULTILINE)
      for name in re.findall(r'"([^"]+)"', listed[1]) if listed else []:
        if isinstance(module.attributes.get(name), _Tensor):
          found[prefix + name] = module.attributes[name]
    inside = [(f"{prefix}{name}.", value, depth + 1) for name, value in module.attributes.items() if isinstance(value, _Object)]
    waiting += reversed(inside)
  return found
