"""Files that hold named tensors: safetensors, one or split as on the Hub, and what torch saves.

safetensors are read and written without torch, tensor by tensor. Whatever torch saved is read with `weights_only`, or, if
it is a TorchScript archive, by `torchscript.py`: neither runs code from the file, which torch's own loader of archives does.
"""

import json
import math
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from clip_jax.convert import torchscript
from clip_jax.errors import DataError, MissingExtraError
from clip_jax.files import write_json

CODES = {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype(ml_dtypes.bfloat16): "BF16"}
SPLIT_BYTES = 5 * 10**9  # files of more are split on the Hub


class Safetensors:
  """The tensors of one safetensors file.

  Attributes:
    shapes: a dict of names and shapes.
  """

  def __init__(self, path):
    """Reads the header.

    Args:
      path: the file.

    Raises:
      DataError: it is cut off, or its header is not one.
    """
    self._path = Path(path)
    try:
      with safetensors.safe_open(self._path, framework="np") as file:
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
      raise DataError(f"{path} does not exist.") from error
    except (safetensors.SafetensorError, OSError) as error:
      raise DataError(f"{path} is not a whole safetensors file ({error}).") from error

  def read(self, name):
    """One tensor, as a NumPy array."""
    # Opened for each: the file is mapped into memory, and what has been read of it counts until it is closed.
    try:
      with safetensors.safe_open(self._path, framework="np") as file:
        return file.get_tensor(name)
    except (safetensors.SafetensorError, OSError, TypeError, KeyError) as error:
      raise DataError(f"{self._path}: {name} cannot be read ({error}).") from error


class Split:
  """The tensors of a folder whose `*.index.json` says which file each is in."""

  def __init__(self, index):
    """Reads the index, and the headers of the files it names.

    Args:
      index: its path.

    Raises:
      DataError: it or one of the files cannot be read, or a tensor is not where it should be.
    """
    index = Path(index)
    try:
      places = json.loads(index.read_text())["weight_map"]
      names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
      raise DataError(f"{index} cannot be read as the index of a split model.") from error
    files = {name: Safetensors(index.parent / Path(name).name) for name in names}
    lost = [name for name, file in places.items() if name not in files[file].shapes]
    if lost:
      raise DataError(f"{index}: {lost[0]} is not in {places[lost[0]]}.")
    self._files = {name: files[file] for name, file in places.items()}
    self.shapes = {name: file.shapes[name] for name, file in self._files.items()}

  def read(self, name):
    """One tensor, as a NumPy array."""
    return self._files[name].read(name)


class Torch:
  """The tensors of a file that torch saved: a state dict, a training checkpoint, or a TorchScript archive.

  Attributes:
    shapes: a dict of names and shapes.
    scripted: whether it is an archive, as OpenAI's releases are.
  """

  def __init__(self, path):
    """Loads the file; of an archive only what is in it.

    Args:
      path: the file.

    Raises:
      MissingExtraError: torch is not installed, and it is no archive.
      DataError: it cannot be read, or code from it would have to be run.
    """
    self.scripted = torchscript.is_archive(path)
    if self.scripted:
      archive = torchscript.Archive(path)
      shapes, self._source = archive.shapes, archive.read
    else:
      tensors = _loaded(path)
      shapes = {name: tuple(value.shape) for name, value in tensors.items()}
      self._source = lambda name: _as_numpy(tensors[name])
    if not shapes:
      raise DataError(f"{path} holds no tensors: a state dict, or a checkpoint with a state_dict in it, would be right.")
    self._names = {_plain(name): name for name in shapes}
    self.shapes = {plain: shapes[name] for plain, name in self._names.items()}

  def read(self, name):
    """One tensor, as a NumPy array."""
    array = self._source(self._names[name])
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array


def import_torch(feature):
  """torch, or an error that names the extra."""
  try:
    import torch
  except ImportError as error:
    raise MissingExtraError(feature, "torch", "torch") from error
  return torch


def _loaded(path):
  # The tensors of what torch has pickled, by name.
  torch = import_torch(f"Reading {Path(path).name}")
  try:
    loaded = torch.load(str(path), map_location="cpu", weights_only=True)
  except FileNotFoundError as error:
    raise DataError(f"{path} does not exist.") from error
  except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ValueError, KeyError ...
    reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
    if "weights_only" in reason or "Unsupported" in str(error) or "GLOBAL" in str(error):
      reason = "it holds more than tensors, which would run code from the file"
    raise DataError(f"{path} cannot be read as weights: {reason}.") from error
  for key in ("state_dict", "model", "module"):
    if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
      loaded = loaded[key]
  return {name: value for name, value in loaded.items() if torch.is_tensor(value)} if isinstance(loaded, dict) else {}


def _as_numpy(tensor):
  tensor = tensor.detach()
  if str(tensor.dtype) == "torch.bfloat16":
    tensor = tensor.float()  # NumPy has none; the numbers are the same
  return tensor.contiguous().numpy()


def _plain(name):
  # What DistributedDataParallel and torch.compile put in front.
  return name.removeprefix("module.").removeprefix("_orig_mod.")


def write_safetensors(path, tensors, read):
  """Writes a file tensor by tensor: one is in memory at a time.

  Args:
    path: where.
    tensors: a dict of names and (shape, dtype).
    read: a function from a name to its array; asked in the order of the dict.
  """
  header, offset = {"__metadata__": {"format": "pt"}}, 0
  for name, (shape, dtype) in tensors.items():
    size = math.prod(shape) * dtype.itemsize
    header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
  encoded = json.dumps(header, separators=(",", ":")).encode()
  encoded += b" " * (-len(encoded) % 8)  # the format aligns the data
  with Path(path).open("wb") as file:
    file.write(struct.pack("<Q", len(encoded)))
    file.write(encoded)
    for name in tensors:
      np.ascontiguousarray(read(name)).tofile(file)


def write_split(folder, stem, tensors, read, limit=SPLIT_BYTES):
  """Writes a model's tensors as the Hub has them: in one file, or in several with an index.

  Args:
    folder: where.
    stem: "model", for `model.safetensors`, or `model-00001-of-00003.safetensors` and `model.safetensors.index.json`.
    tensors: a dict of names and (shape, dtype).
    read: a function from a name to its array.
    limit: bytes a file may have, unless a single tensor has more.
  """
  groups, size = [{}], 0
  for name, (shape, dtype) in tensors.items():
    nbytes = math.prod(shape) * dtype.itemsize
    if groups[-1] and size + nbytes > limit:
      groups.append({})
      size = 0
    groups[-1][name] = (shape, dtype)
    size += nbytes
  if len(groups) == 1:
    write_safetensors(Path(folder) / f"{stem}.safetensors", tensors, read)
    return
  places = {}
  for number, group in enumerate(groups, 1):
    name = f"{stem}-{number:05}-of-{len(groups):05}.safetensors"
    write_safetensors(Path(folder) / name, group, read)
    places |= dict.fromkeys(group, name)
  total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": places}
  write_json(Path(folder) / f"{stem}.safetensors.index.json", index)
