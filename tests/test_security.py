"""What nobody has to take on trust: no code from data, no file by a name from an archive, no markup from a caption."""

import ast
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import dataset, inspection
from clip_jax.data.pipeline import train_batches
from clip_jax.report import data_page, page
from tests.conftest import tiny
from tests.report.test_page import Tags, evaluation_line, examples, make, training_line

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("clip_jax", "configs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES += [ROOT / "main.py", ROOT / "setup.py"]

# No code from data.

PICKLES = {"pickle", "cPickle", "_pickle", "pickle5", "dill", "cloudpickle", "joblib", "jsonpickle", "hickle", "marshal", "shelve"}
# Modules imported by a function from a text count as imports; a name that is put together at run time is for people to look at.
IMPORTERS = {"importlib.import_module", "__import__", "importlib.__import__"}
RUNS_TEXT = {f"{prefix}{name}" for prefix in ("", "builtins.") for name in ("eval", "exec", "compile")} | {"code.interact"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}
# `extract` of a tar or zip makes a path of a member's name.
UNPACKS = {"extract", "extractall", "unpack_archive"}


def dotted(node, names):
  """`np.random.x` as "numpy.random.x", whatever it was imported as; None where it is no chain of names."""
  if isinstance(node, ast.Name):
    return names.get(node.id, node.id)
  if isinstance(node, ast.Attribute):
    before = dotted(node.value, names)
    return f"{before}.{node.attr}" if before else None
  return None


def imported(tree):
  """What names stand for, and (line, module) of each import."""
  names, modules = {}, []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      modules += [(node.lineno, alias.name) for alias in node.names]
      names |= {alias.asname or alias.name.partition(".")[0]: alias.name if alias.asname else alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      modules += [(node.lineno, node.module or "")] + [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
      names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
  return names, modules


def is_literal(call, keyword, value):
  return any(given.arg == keyword and isinstance(given.value, ast.Constant) and given.value.value is value for given in call.keywords)


def wrong_call(call, names):
  """What is wrong with a call, or None."""
  name = dotted(call.func, names) or ""
  last = call.func.attr if isinstance(call.func, ast.Attribute) else name.rpartition(".")[2]
  given = {keyword.arg for keyword in call.keywords}
  if name in IMPORTERS and call.args and isinstance(call.args[0], ast.Constant) and str(call.args[0].value).partition(".")[0] in PICKLES:
    return f"imports {call.args[0].value}"
  if name in RUNS_TEXT or name in SHELLS:
    return name
  if name in ("torch.jit.load", "torch.hub.load"):  # the first runs what an archive has as `__setstate__`
    return name
  if name.startswith("torch.") and last == "load" and not is_literal(call, "weights_only", True):
    return "torch.load without weights_only=True"
  if last in ("read_pickle", "load_pickle"):
    return last
  if "allow_pickle" in given and not is_literal(call, "allow_pickle", False):
    return "allow_pickle"
  if name in ("numpy.load", "numpy.save") and len(call.args) > 2:  # allow_pickle is the third
    return f"{name} with allow_pickle by position"
  if name.startswith("yaml.") and not last.startswith("safe_") and last not in ("SafeLoader", "SafeDumper"):
    return name
  if "shell" in given and not is_literal(call, "shell", False):
    return "shell=True"
  return last if last in UNPACKS else None


def violations(source):
  """(line, what) of everything that could run code, or make a path, of what a file holds."""
  tree = ast.parse(source)
  names, modules = imported(tree)
  found = {(line, f"imports {module}") for line, module in modules if module.partition(".")[0] in PICKLES}
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and (what := wrong_call(node, names)):
      found.add((node.lineno, what))
  return sorted(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_unpickles_runs_text_starts_a_shell_or_unpacks_by_name(path):
  assert violations(path.read_text(encoding="utf-8")) == []


def test_all_files_are_looked_at():
  assert len(FILES) > 100 and {"main.py", "containers.py", "base.py", "startup.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize(
  "planted",
  [
    "import pickle",
    "import os, cloudpickle as safe",
    "def f():\n  from joblib import load",
    "from shelve import open",
    "import importlib\nimportlib.import_module('dill')",
    "__import__('marshal')",
    "import torch\ntorch.load('a.pt')",
    "import torch\ntorch.load('a.pt', weights_only=False)",
    "import torch\ntorch.load('a.pt', weights_only=flag)",
    "from torch import load as read\nread('a.pt')",
    "import torch.serialization\ntorch.serialization.load('a.pt')",
    "import torch\ntorch.hub.load('a/b', 'c')",
    "import torch\ntorch.jit.load('a.pt')",
    "from torch import jit\njit.load('a.pt', map_location='cpu')",
    "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
    "import numpy as np\nnp.load('a.npy', None, True)",
    "import pandas\npandas.read_pickle('a')",
    "eval('1')",
    "exec(open('a').read())",
    "from builtins import exec as run\nrun('1')",
    "compile('1', 'a', 'eval')",
    "import yaml\nyaml.load('a: 1')",
    "import yaml\nyaml.unsafe_load('a: 1')",
    "from yaml import full_load\nfull_load('a: 1')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "from subprocess import Popen\nPopen('ls', shell=flag)",
    "import os\nos.system('ls')",
    "from os import popen\npopen('ls')",
    "import tarfile\nwith tarfile.open('a') as tar:\n  tar.extractall('b')",
    "import zipfile\nzipfile.ZipFile('a').extract('b')",
    "import shutil\nshutil.unpack_archive('a')",
  ],
)
def test_what_is_forbidden_is_found(planted):
  assert len(violations(planted)) >= 1


@pytest.mark.parametrize(
  "allowed",
  [
    "import torch\ntorch.load('a.pt', weights_only=True)",
    "import numpy as np\nnp.load('a.npy')\nnp.load('a.npy', allow_pickle=False)",
    "import re\nre.compile('a')",
    "model.eval()",
    "import ast\nast.literal_eval('1')",
    "import importlib\nimportlib.import_module(f'configs.{name}')",
    "import yaml\nyaml.safe_load('a: 1')",
    "import subprocess\nsubprocess.run(['ls'], check=True, shell=False)",
    "import os\nos.execv('a', ['a'])",
    "import jax\njax.jit(f).lower(x).compile()",
  ],
)
def test_what_is_allowed_is_not_found(allowed):
  assert violations(allowed) == []


def test_a_torchscript_archive_runs_nothing_when_it_is_imported(tmp_path):
  """Its language has files: what a module does when its state is set happens while it is loaded."""
  torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'clip_jax[torch]'")
  from tests.convert.test_torchscript import TellsATuple

  torch.jit.script(TellsATuple()).save(tmp_path / "hostile.pt")
  done = cli("import", "hostile.pt", "out", cwd=tmp_path, codes=(2,))
  assert "__setstate__" in done.stderr and done.stderr.count("\n") == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.pt"]


# No file by a name from an archive.


def jpeg(number):
  content = io.BytesIO()
  pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
  Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(content, "jpeg")
  return content.getvalue()


def write_tar(path, names, bad=(), caption="caption"):
  """A shard with a record, and a caption, of each name; the images of bad ones are none."""
  with tarfile.open(path, "w") as tar:
    for number, name in enumerate(names):
      members = {"jpg": b"no image" if name in bad else jpeg(number), "txt": f"{caption} {number}".encode()}
      for kind, content in members.items():
        member = tarfile.TarInfo(f"{name}.{kind}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def hostile(tmp_path, monkeypatch):
  """A folder deep enough to climb out of, with a shard whose names try to, and a cache elsewhere."""
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setenv("HOME", str(tmp_path / "cache"))  # where libraries keep theirs, too
  room = tmp_path / "room" / "inner" / "innermost"
  room.mkdir(parents=True)
  (tmp_path / "absolute").mkdir()
  names = ["../../evil", f"{tmp_path}/absolute/evil", "a/../../../evil", "~/evil", "c:\\evil", "$HOME/evil", "-rf", "dataset_info"]
  write_tar(room / "a.tar", names + [f"{number:03}" for number in range(8)])
  return room


def below(folder):
  return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def cli(*arguments, cwd, codes=(0,), environment=()):
  variables = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **dict(environment)}
  done = subprocess.run(
    [sys.executable, "-m", "clip_jax.cli", *map(str, arguments)], cwd=cwd, env=variables, text=True, capture_output=True, timeout=300, check=False
  )
  assert done.returncode in codes, done.stderr
  return done


LOOKS = {
  "index": ["index", "a.tar"],
  "bench": ["bench", "a.tar", "--threads", "1", "--seconds", "0.1", "--data", "max_bad_share=1.0"],
  "inspect": ["inspect", "a.tar", "--html", "page.html"],
}


@pytest.mark.parametrize("verb", LOOKS)
def test_verbs_that_look_at_a_shard_write_what_they_say_they_do(hostile, tmp_path, verb):
  before = below(tmp_path)
  cli("data", *LOOKS[verb], cwd=hostile)
  new = {path for path in below(tmp_path) - before if path.partition("/")[0] != "cache"}
  expected = {"index": {"a.tar.index.npz"}, "bench": set(), "inspect": {"page.html"}}[verb]
  assert {path.removeprefix("room/inner/innermost/") for path in new} - {"a.tar.index.npz"} == expected - {"a.tar.index.npz"}


@pytest.mark.parametrize("form", ["array_record", "tar"])
def test_a_data_set_is_prepared_inside_of_its_folder_with_names_of_our_own(hostile, tmp_path, form):
  pytest.importorskip("apache_beam", reason="apache-beam is not installed: pip install 'clip_jax[beam]'")
  before = below(tmp_path)
  found = json.loads(cli("data", "convert", "a.tar", "out", "--format", form, "--near-distance", "none", "--json", cwd=hostile).stdout)
  assert found["records"] >= 8
  new = {path for path in below(tmp_path) - before if path.partition("/")[0] != "cache"}
  inside = "room/inner/innermost/out"
  assert {path for path in new if path != inside and not path.startswith(f"{inside}/")} <= {"room/inner/innermost/a.tar.index.npz"}
  assert not [path for path in below(tmp_path) if "evil" in path or "-rf" in path]
  if form == "tar":
    for shard in found["shards"]:
      with tarfile.open(hostile / "out" / shard["name"]) as tar:
        assert all(name.partition(".")[0].isdigit() and len(name.partition(".")[0]) == 11 for name in tar.getnames())


def test_training_reads_hostile_names_and_writes_nothing(hostile, tmp_path):
  config = configs.resolve(tiny(data={"path": str(hostile / "a.tar"), "max_bad_share": 1.0}))
  before = below(tmp_path)
  batches = list(train_batches(dataset.create(config), config, rows=np.arange(16), start=0))
  assert len(batches) == 4
  new = {path for path in below(tmp_path) - before if path.partition("/")[0] != "cache"}
  assert new <= {"room/inner/innermost/a.tar.index.npz"}


# No markup from a caption.

EVIL = """<script>alert(1)</script>"'&"""
EVIL_NAME = EVIL.replace("/", "")  # what a file may be called


def test_a_report_shows_hostile_texts_and_runs_its_own_script_only(tmp_path):
  """Captions, also as texts of images; names of sets, records and the work directory; what is in the script's reach."""
  workdir = tmp_path / EVIL_NAME
  workdir.mkdir()
  lines = [training_line(1), evaluation_line(1, set_=EVIL)]
  config = {"model": {"name": EVIL}, "data": {"path": EVIL}}
  make(workdir, lines, config, examples=examples(caption=EVIL), environment={"device": EVIL})
  bad = {"index": 1, "source": EVIL, "key": f"{EVIL_NAME}/{EVIL}.jpg", "error": EVIL, "substitute": 2}
  (workdir / "bad_records.jsonl").write_text(json.dumps(bad) + "\n")
  html = page.write(workdir).read_text(encoding="utf-8")
  assert "<script>alert" not in html and html.count("<script") == html.count("</script") == 1
  assert html.partition("<script>")[2].partition("</script>")[0] == (page.TEMPLATES / "report.js").read_text(encoding="utf-8")
  tags = Tags(html)
  assert EVIL in tags.attributes("alt") and f"{EVIL_NAME}/{EVIL}.jpg" in tags.text
  known = {"hidden", "alt", "class", "title", "aria-label", "style", "src", "id", "role", "scope", "colspan"}
  drawn = [attributes for tag, attributes in tags.tags if tag in ("img", "th", "td", "span")]
  assert drawn and set().union(*drawn) <= known  # a quote in a text begins no attribute


def test_the_page_about_a_data_set_shows_hostile_texts_and_has_no_script(tmp_path, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  shard = tmp_path / f"{EVIL_NAME}.tar"
  write_tar(shard, [f"{EVIL_NAME}{number}" for number in range(4)], bad=[f"{EVIL_NAME}3"], caption=EVIL)
  config = configs.resolve(tiny(data={"source": "tar", "path": str(shard), "max_bad_share": 1.0}))
  found = inspection.inspect(config, 100, 8)
  data_page.write(tmp_path / "page.html", found, configs.to_dict(config)["data"])
  html = (tmp_path / "page.html").read_text(encoding="utf-8")
  assert "<script" not in html and "</script" not in html
  tags = Tags(html)
  assert f"{EVIL} 0" in tags.text and f"{EVIL_NAME}.tar/{EVIL_NAME}3.jpg" in tags.text
