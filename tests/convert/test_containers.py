"""Files of tensors against the libraries that define them, and files that are damaged or hostile."""

import json
import pickle
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.convert import containers
from clip_jax.errors import DataError, MissingExtraError, UsageError

DTYPES = [np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16)]


@settings(deadline=None, max_examples=30)
@given(
  shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6),
  dtype=st.sampled_from(DTYPES),
  limit=st.integers(1, 200),
  seed=st.integers(0, 99),
)
def test_what_is_written_the_library_reads(tmp_path_factory, shapes, dtype, limit, seed):
  random, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("tensors")
  arrays = {f"t{i}.é": random.standard_normal(shape).astype(dtype) for i, shape in enumerate(shapes)}
  described = {name: (array.shape, array.dtype) for name, array in arrays.items()}
  containers.write_safetensors(folder / "all.safetensors", described, arrays.__getitem__)
  containers.write_split(folder, "model", described, arrays.__getitem__, limit)
  ours = containers.Safetensors(folder / "all.safetensors")
  library = safetensors.numpy.load_file(folder / "all.safetensors")
  index = folder / "model.safetensors.index.json"
  split = containers.Split(index) if index.exists() else containers.Safetensors(folder / "model.safetensors")
  assert ours.shapes == split.shapes == {name: array.shape for name, array in arrays.items()}
  for name, array in arrays.items():
    for got in (ours.read(name), library[name], split.read(name)):
      assert got.dtype == dtype
      np.testing.assert_array_equal(got, array)


def test_torch_reads_it_too(tmp_path):
  from safetensors.torch import load_file

  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  containers.write_safetensors(tmp_path / "a.safetensors", {"x": ((3, 2), array.dtype)}, lambda name: array.T)
  np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["x"].numpy(), array.T)


STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16) / 3}


@pytest.mark.parametrize(
  "wrapped",
  [
    lambda state: state,
    lambda state: {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}},
    lambda state: {"model": {f"_orig_mod.{k}": v for k, v in state.items()}},
  ],
)
@pytest.mark.parametrize("old", [False, True])
def test_state_dicts_and_training_checkpoints_of_torch(tmp_path, wrapped, old):
  torch.save(wrapped(STATE), tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
  tensors = containers.Torch(tmp_path / "w.pt")
  assert tensors.shapes == {"a.weight": (2, 3), "b": (2,)} and not tensors.scripted
  np.testing.assert_array_equal(tensors.read("a.weight"), STATE["a.weight"].numpy())
  np.testing.assert_array_equal(tensors.read("b"), STATE["b"].float().numpy())


def test_torchscript_archives(tmp_path):
  class Part(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.weight = torch.nn.Parameter(torch.arange(4.0).half())

    def forward(self, x):
      return x * self.weight

  torch.jit.script(Part()).save(tmp_path / "a.pt")
  tensors = containers.Torch(tmp_path / "a.pt")
  assert tensors.scripted and tensors.shapes == {"weight": (4,)}
  np.testing.assert_array_equal(tensors.read("weight"), np.arange(4, dtype=np.float16))


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
  torch.save(STATE, tmp_path / "w.pt")
  monkeypatch.setitem(sys.modules, "torch", None)
  with pytest.raises(MissingExtraError, match=r"Reading w.pt needs the package torch, .* pip install 'clip_jax\[torch\]'"):
    containers.Torch(tmp_path / "w.pt")


class Hostile:
  def __reduce__(self):
    import os

    return os.system, ("touch HOSTILE",)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch, zipped):
  monkeypatch.chdir(tmp_path)
  content = {"state_dict": {"a": torch.ones(2)}, "extra": Hostile()}
  if zipped:
    torch.save(content, "hostile.pt")
  else:
    with open("hostile.pt", "wb") as file:
      pickle.dump({"a": Hostile()}, file)
  with pytest.raises(DataError) as error:
    containers.Torch(tmp_path / "hostile.pt")
  message = str(error.value)
  assert "hostile.pt cannot be read as weights" in message and "\n" not in message
  assert not (tmp_path / "HOSTILE").exists()


def header(length, text=b""):
  return struct.pack("<Q", length) + text


ONE = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
DAMAGED = {
  "empty": b"",
  "cut off in the length": b"\x10\0\0",
  "a length beyond the file": header(10**15, ONE),
  "a length that cuts the header": header(len(ONE) - 3, ONE + bytes(8)),
  "no JSON": header(4, b"{abc"),
  "not an object": header(2, b"[]"),
  "data cut off": header(len(ONE), ONE + bytes(4)),
  "data left over": header(len(ONE), ONE + bytes(12)),
  "offsets and shape that differ": header(len(ONE), ONE.replace(b"[2]", b"[3]") + bytes(8)),
  "an unknown type": header(len(ONE), ONE.replace(b"F32", b"F99") + bytes(8)),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_safetensors_are_one_sentence(tmp_path, what):
  path = tmp_path / "model.safetensors"
  path.write_bytes(DAMAGED[what])
  with pytest.raises(DataError, match="model.safetensors is not a whole safetensors file") as error:
    containers.Safetensors(path)
  assert "\n" not in str(error.value)


@settings(deadline=None, max_examples=100)
@given(cut=st.integers(0, 400), flip=st.one_of(st.none(), st.integers(0, 120)), value=st.integers(0, 255))
def test_any_damage_is_an_error_for_people_or_reads_whole(tmp_path_factory, cut, flip, value):
  folder = tmp_path_factory.mktemp("damaged")
  safetensors.numpy.save_file({"x": np.ones((4, 4), np.float32), "y": np.ones(3, np.float16)}, folder / "a.safetensors")
  content = bytearray((folder / "a.safetensors").read_bytes())
  if flip is not None:
    content[flip] = value
  (folder / "a.safetensors").write_bytes(content[: len(content) - min(cut, len(content))] if cut else content)
  try:
    tensors = containers.Safetensors(folder / "a.safetensors")
    for name, shape in tensors.shapes.items():
      assert tensors.read(name).shape == shape
  except UsageError as error:
    assert "\n" not in str(error)


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(1, 2000), old=st.booleans())
def test_torch_files_that_are_cut_off(tmp_path_factory, cut, old):
  path = tmp_path_factory.mktemp("cut") / "w.pt"
  torch.save(STATE, path, _use_new_zipfile_serialization=not old)
  content = path.read_bytes()
  path.write_bytes(content[: max(len(content) - cut, 0)])
  with pytest.raises(DataError, match="w.pt") as error:
    containers.Torch(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "content, message",
  [
    ("{", "cannot be read as the index"),
    ('{"weight_map": {"x": "a.safetensors", "lost": "a.safetensors"}}', "lost is not in a.safetensors"),
    ('{"weight_map": {"x": "b.safetensors"}}', "b.safetensors does not exist"),
    ('{"weight_map": {"x": "../a.safetensors"}}', None),  # only ever read from the folder itself
  ],
)
def test_a_damaged_index(tmp_path, content, message):
  safetensors.numpy.save_file({"x": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
  (tmp_path / "model.safetensors.index.json").write_text(content)
  if message is None:
    assert containers.Split(tmp_path / "model.safetensors.index.json").shapes == {"x": (2,)}
    return
  with pytest.raises(DataError, match=message):
    containers.Split(tmp_path / "model.safetensors.index.json")
