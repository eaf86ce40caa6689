"""TorchScript archives against torch's own loader, and archives that would do more than hold weights."""

import io
import pickletools
import re
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.convert import containers
from clip_jax.errors import DataError


class Block(torch.nn.Module):
  def __init__(self, dtype=torch.float32):
    super().__init__()
    base = torch.arange(24.0).to(dtype)
    self.turned = torch.nn.Parameter(base.reshape(4, 6).t())
    self.part = torch.nn.Parameter(base[5:17].reshape(3, 4)[:, ::2])  # of the same numbers
    self.register_buffer("wide", torch.ones(1, dtype=dtype).expand(5))
    self.register_buffer("scalar", torch.tensor(7))
    self.register_buffer("mask", torch.tensor([True, False]))
    self.register_buffer("nothing", torch.zeros(3, 0))
    self.register_buffer("passing", torch.ones(2), persistent=False)
    self.register_parameter("absent", None)
    self.no_weight = torch.ones(3)  # an attribute, which torch keeps, but in no state dict
    self.sizes: list[int] = [1, 2]
    self.names: dict[str, float] = {"a": 0.5}
    self.where = torch.device("cpu")

  def forward(self, x):
    return x * self.turned.sum() + self.part.sum() + self.wide.sum() + self.scalar + self.no_weight[0] + self.sizes[0] + self.names["a"]


class Tower(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.first, self.small = Block(), Block(torch.float16)
    self.brain, self.large = Block(torch.bfloat16), Block(torch.float64)
    self.again = self.first
    self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.LayerNorm([2, 6, 6]))
    self.layers[0].weight.requires_grad_(False)

  def forward(self, x):
    return self.again(self.first(self.small(self.brain(self.large(self.layers(x))))))


def saved(path, traced=False):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    module = torch.jit.trace(Tower().eval(), torch.ones(1, 3, 8, 8)) if traced else torch.jit.script(Tower())
    module.save(str(path))
  return path


@pytest.mark.parametrize("traced", [False, True])
def test_tensors_are_those_of_torchs_own_loader_bit_by_bit(tmp_path, traced):
  path = saved(tmp_path / "a.pt", traced)
  expected = torch.jit.load(str(path)).state_dict()  # ours
  tensors = containers.Torch(path)
  assert tensors.scripted and tensors.shapes == {name: tuple(value.shape) for name, value in expected.items()}
  assert len(tensors.shapes) > 30 or traced
  for name, value in expected.items():
    wanted = (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
    got = tensors.read(name)
    assert got.dtype == wanted.dtype and got.flags.c_contiguous and got.flags.writeable
    np.testing.assert_array_equal(got, wanted)


def test_torch_is_not_needed(tmp_path, monkeypatch):
  path = saved(tmp_path / "a.pt")
  monkeypatch.setitem(sys.modules, "torch", None)
  assert containers.Torch(path).read("first.scalar") == 7


# Archives that would do more.


class Part(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.weight = torch.nn.Parameter(torch.ones(3))

  def forward(self, x):
    return x * self.weight


class TellsATuple(Part):
  @torch.jit.export
  def __getstate__(self) -> tuple[torch.Tensor, bool]:
    return self.weight, self.training

  @torch.jit.export
  def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
    self.weight, self.training = state[0], state[1]
    file = torch.from_file("EVIL", True, 16, dtype=torch.uint8)
    file.fill_(65)
    print(file)  # or the compiler would leave it out


class TellsADict(Part):
  @torch.jit.export
  def __getstate__(self) -> dict[str, torch.Tensor]:
    return {"weight": self.weight + 1}  # what would be read if its code were passed over

  @torch.jit.export
  def __setstate__(self, state: dict[str, torch.Tensor]) -> None:
    self.training = False
    self.weight = state["weight"] - 1
    file = torch.from_file("EVIL", True, 16, dtype=torch.uint8)
    file.fill_(65)
    print(file)


@pytest.mark.parametrize("kind", [TellsATuple, TellsADict])
@pytest.mark.parametrize("inside", [False, True])
def test_a_module_that_sets_its_own_state_is_not_run(tmp_path, monkeypatch, kind, inside):
  monkeypatch.chdir(tmp_path)
  module = torch.nn.Sequential(torch.nn.Linear(3, 3), kind()) if inside else kind()
  torch.jit.script(module).save("hostile.pt")
  with pytest.raises(DataError, match=rf"hostile.pt cannot be read as weights: only code in it \(the __setstate__ of __torch__.*{kind.__name__}") as error:
    containers.Torch("hostile.pt")
  assert "\n" not in str(error.value)
  assert [path.name for path in Path().iterdir()] == ["hostile.pt"]
  torch.jit.load("hostile.pt")  # what it is about
  assert Path("EVIL").exists()


CODE = "class A(Module):\n  __parameters__ = [\"w\", ]\n  __buffers__ = []\n  w : Tensor\n"


def archive(path, data, code=CODE, numbers=bytes(8), **more):
  """Writes one by hand."""
  with zipfile.ZipFile(path, "w") as file:
    for name, content in {"data.pkl": data, "code/__torch__.py": code, "constants.pkl": b"", "data/0": numbers, **more}.items():
      file.writestr(f"a/{name}", content)
  return path


def module(content, kind="__torch__ A"):
  """A pickle of an object whose attribute `w` is what some opcodes make."""
  return f"\x80\x02c{kind.replace(' ', chr(10))}\n)\x81}}X\x01\0\0\0w".encode("latin-1") + content + b"sb."


def tensor(count=2, offset=0, shape=(2,), strides=(1,), kind="torch FloatStorage", key="0"):
  """Opcodes of a tensor."""
  def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()

  def number(value):
    return b"J" + value.to_bytes(4, "little", signed=True)

  def glob(value):
    return b"c" + value.replace(" ", "\n").encode() + b"\n"

  storage = b"(" + text("storage") + glob(kind) + text(key) + text("cpu") + number(count) + b"tQ"
  sizes = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides))
  return glob("torch._utils _rebuild_tensor_v2") + b"(" + storage + number(offset) + sizes + b"\x89" + glob("collections OrderedDict") + b")RtR"


def test_an_archive_by_hand(tmp_path):
  path = archive(tmp_path / "a.pt", module(tensor()), numbers=np.array([1, 2], "<f4").tobytes())
  np.testing.assert_array_equal(containers.Torch(path).read("w"), [1, 2])


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"cos\nsystem\nX\x0a\0\0\0touch EVIL\x85R", "it asks for os.system, which is none of what weights are made of"),
    (b"cbuiltins\neval\n)\x81", "it asks for builtins.eval"),
    (b"c__torch__\nA\n)R", "it asks for __torch__.A"),
    (b"(X\x0a\0\0\0touch EVILios\nsystem\n", "it has the opcode INST"),
    (b"\x82\x01", "it has the opcode EXT1"),
    (b"(lp0\n", "it has the opcode LIST"),
    (b"}}Ns", "keys that are neither"),
    (tensor(count=3), "w is cut off"),
    (tensor(shape=(3,)), "reaches beyond its numbers"),
    (tensor(offset=1), "reaches beyond its numbers"),
    (tensor(strides=(2,)), "reaches beyond its numbers"),
    (tensor(shape=(2**31 - 1,) * 40, strides=(0,) * 40), "reaches beyond its numbers"),
    (tensor(offset=-1), "the archive is damaged"),
    (tensor(strides=(-1,)), "the archive is damaged"),
    (tensor(strides=(1, 1)), "the archive is damaged"),
    (tensor(key="9"), "the archive is damaged"),
    (tensor(key="../data.pkl"), "the archive is damaged"),
    (tensor(kind="torch QInt8Storage"), "numbers of torch.QInt8Storage"),
    (b"u", "the archive is damaged"),
    (b"h\x07", "the archive is damaged"),
    (b"", "the archive is damaged"),
    (b"N", "holds no tensors"),
  ],
)
def test_what_is_no_weight_is_refused_with_a_sentence(tmp_path, monkeypatch, content, message):
  monkeypatch.chdir(tmp_path)
  archive("a.pt", module(content))
  with pytest.raises(DataError, match=f"a.pt .*{re.escape(message)}") as error:
    containers.Torch("a.pt")
  assert "\n" not in str(error.value) and not Path("EVIL").exists()


def test_other_archives_that_are_refused(tmp_path):
  for more, message in (
    ({"byteorder": "big"}, "another order of bytes"),
    ({"code": "class B(Module):\n"}, "damaged"),
    ({"code": CODE.replace("(Module)", "")}, "holds no tensors"),
    ({"code": CODE + "#" * (33 << 20)}, "more than 32 MiB"),
  ):
    with pytest.raises(DataError, match=message):
      containers.Torch(archive(tmp_path / "a.pt", module(tensor()), **more))


def test_modules_that_contain_each_other_come_to_an_end(tmp_path):
  new, name = b"c__torch__\nA\n)\x81", b"X\x01\0\0\0"
  itself = b"\x80\x02" + new + b"q\0}" + name + b"wh\0sb."
  doubled = b"\x80\x02" + new + b"}bq\0"
  for level in range(1, 60):  # each holds the one before twice, so that there are 2**59 names
    before = b"h" + bytes([level - 1])
    doubled += new + b"}(" + name + b"a" + before + name + b"b" + before + b"ubq" + bytes([level])
  for data in (itself, doubled + b"."):
    with pytest.raises(DataError, match="contain each other without end"):
      containers.Torch(archive(tmp_path / "a.pt", data))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The bytes of an archive; small, so that damage hits what matters."""
  content = io.BytesIO()
  torch.jit.save(torch.jit.script(torch.nn.Sequential(Part(), Part())), content)
  return content.getvalue()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_damage_is_a_sentence_or_does_not_matter(whole, tmp_path_factory, data):
  path = tmp_path_factory.mktemp("damaged") / "a.pt"
  content = bytearray(whole)
  for _ in range(data.draw(st.integers(1, 3))):
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
  path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 1, len(content) // 2]))])
  try:
    tensors = containers.Torch(path)
    found = {name: tensors.read(name) for name in tensors.shapes}
  except DataError as error:
    assert "a.pt" in str(error) and "\n" not in str(error)
  else:
    assert all(name.endswith(".weight") and value.tolist() == [1, 1, 1] for name, value in found.items())


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_opcodes_are_a_sentence_or_weights(tmp_path_factory, data):
  """Where no checksum speaks first."""
  path = tmp_path_factory.mktemp("damaged") / "a.pt"
  content = bytearray(module(tensor()))
  for _ in range(data.draw(st.integers(1, 3))):
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4) | st.sampled_from([bytes([i]) for i in pickle_opcodes()]))
  archive(path, bytes(content))
  try:
    tensors = containers.Torch(path)
    assert all(tensors.read(name).shape == shape for name, shape in tensors.shapes.items())
  except DataError as error:
    assert "a.pt" in str(error) and "\n" not in str(error)


def pickle_opcodes():
  return [ord(opcode.code) for opcode in pickletools.opcodes]
