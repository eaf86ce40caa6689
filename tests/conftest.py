"""Shared by all tests: eight CPU devices in this process, and small things to train on."""

import collections
import gc
import io
import os
import tarfile
from pathlib import Path

# Programs here are compiled once and run a few times on tiny arrays: most of the suite's time would be optimising them. XLA's older way
# to write fusions has the same products and sums and is compiled in a third of the time; and a program that is one module, not many
# for many threads, is a little faster still. Set before JAX starts, and for the processes that tests start.
QUICKLY = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICKLY])

from clip_jax.parallel import xla

# The same ones in this process as in those, or each would compile what the other has.
xla.set_flags()

import jax
import numpy as np
import pytest
from PIL import Image

jax.config.update("jax_platforms", "cpu")  # libtpu is installed, for programs that only compile
jax.config.update("jax_num_cpu_devices", 8)

# Most of the suite's time would be compiling the same small programs again; processes share them too.
COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Tracing makes millions of objects that are needed; to look through all of them for garbage was a tenth of the suite's time.
gc.set_threshold(20_000, 10, 10)


def tiny(**sections):
  """A config of a very small model; `section={"key": value}` changes or adds keys."""
  values = {
    "model": {
      "image_size": 16,
      "embed_dim": 16,
      "vision": {"patch_size": 8, "width": 32, "layers": 2, "heads": 4},
      "text": {"context_length": 12, "width": 16, "layers": 1, "heads": 4},
    },
    "train": {"global_batch_size": 16, "steps": 4},
    "optimizer": {"warmup_steps": 2, "learning_rate": 1e-3},
    "eval": {"batch_size": 16},
    "checkpoint": {"every": 2},
  }
  for section, changes in sections.items():
    values[section] = {**values.get(section, {}), **changes}
  return values


COLORS = {"red": (255, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
COLORS |= {"yellow": (255, 230, 0), "grey": (128, 128, 128), "pink": (255, 150, 190), "white": (255, 255, 255)}


def write_colors(path, copies=8):
  """A shard of plain colours with their names as captions and numbers as classes: a learnable set."""
  random = np.random.default_rng(0)
  with tarfile.open(path, "w") as tar:
    for copy in range(copies):
      for label, (name, color) in enumerate(COLORS.items()):
        noise = random.integers(-12, 13, (24, 24, 3))
        pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        members = {"png": buffer.getvalue(), "txt": f"the colour {name}".encode(), "cls": str(label).encode()}
        for extension, content in members.items():
          member = tarfile.TarInfo(f"{copy:03}{label:03}.{extension}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))


def pytest_collection_modifyitems(items):
  """Files with the most slow tests begin first, or one of them would keep one core busy, alone, for minutes at the end."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])  # stable: all else stays as it was


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_looked_through_again():
  """What is alive when a file begins, such as all of JAX, stays so, and garbage is looked for among what comes."""
  gc.collect()
  gc.freeze()


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
  """Path of a shard of 64 plain colours."""
  path = tmp_path_factory.mktemp("colors") / "colors.tar"
  write_colors(path)
  return str(path)
