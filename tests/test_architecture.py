"""Who may import whom, read from the source: docs/architecture.md says why."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports from lower floors and from its own room. The lowest may import each other.
FLOORS = (
  {"config", "errors", "files", "parallel"},
  {"models", "losses", "data"},
  {"evaluate", "convert"},
  {"train"},
  {"plan", "scaling", "report", "inference", "benchmark", "embedding", "launch"},
  {"cli", "main"},
)
# Importing any part of a package runs the package itself; the others are tables that everybody may read.
IMPORT_NOTHING = ("clip_jax", "clip_jax.models", "clip_jax.models.zoo", "clip_jax.plan", "clip_jax.plan.chips")
INSIDE_FUNCTIONS = {"torch", "tensorflow", "apache_beam", "wandb", "libtpu"}
INSIDE_FUNCTIONS |= {"transformers", "open_clip", "qwix", "onnxruntime", "onnxscript", "sentencepiece"}
OF_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "clu", "chex"}


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(*folders):
  files = [f for folder in folders for f in sorted((ROOT / folder).rglob("*.py"))]
  return {module_name(f): ast.parse(f.read_text(), str(f)) for f in [*files, ROOT / "main.py"]}


MODULES = parse("clip_jax")


def imports(tree, modules=MODULES, top_only=False):
  """What a module imports: of `from clip_jax.data import order` the module, not its package."""
  found = set()

  def visit(node):
    if isinstance(node, ast.Import):
      found.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: relative import"
      names = (f"{node.module}.{alias.name}" for alias in node.names)
      found.update(name if name in modules else node.module for name in names)
    if not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
      for child in ast.iter_child_nodes(node):
        visit(child)

  visit(tree)
  return found


def room(module):
  return module.removeprefix("clip_jax.").partition(".")[0]


def floor(module):
  """From 0 up; what has no floor, such as recipes and tests, is above all."""
  return next((i for i, rooms in enumerate(FLOORS) if room(module) in rooms), len(FLOORS))


def forbidden(module, imported):
  """Whether a module of the project may not import another one."""
  if imported in IMPORT_NOTHING or room(module) == room(imported):
    return False
  return floor(imported) > floor(module) or floor(imported) == floor(module) > 0


def packages(names):
  return {name.partition(".")[0] for name in names}


def ours(names):
  return {name for name in names if packages([name]) <= {"clip_jax", "configs", "main", "tests"}}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - set(IMPORT_NOTHING)))
def test_a_module_imports_only_from_lower_floors_and_its_own_room(module):
  assert floor(module) < len(FLOORS), f"give {room(module)} a floor"
  upwards = {name for name in ours(imports(MODULES[module])) if forbidden(module, name)}
  assert not upwards


@pytest.mark.parametrize(
  "module, imported, wrong",
  [
    ("clip_jax.models.clip", "clip_jax.train.state", True),
    ("clip_jax.models.clip", "clip_jax.losses.softmax", True),  # the same floor, another room
    ("clip_jax.parallel.rules", "clip_jax.models.clip", True),
    ("clip_jax.train.loop", "main", True),
    ("clip_jax.cli", "configs.base", True),
    ("clip_jax.parallel.mesh", "clip_jax.config", False),
    ("clip_jax.config", "clip_jax.models.zoo", False),
    ("clip_jax.models.clip", "clip_jax.models.text", False),
    ("main", "clip_jax.train", False),
  ],
)
def test_the_rule_itself(module, imported, wrong):
  assert forbidden(module, imported) == wrong


def test_imports_are_seen_wherever_they_are_and_told_apart_from_those_inside_functions():
  source = """
import jax.numpy as jnp
try:
  from clip_jax.data import order, nothing
except ImportError:
  pass
def f():
  import torch
  from clip_jax import train
"""
  top = {"jax.numpy", "clip_jax.data.order", "clip_jax.data"}
  assert imports(ast.parse(source), top_only=True) == top
  assert imports(ast.parse(source)) == top | {"torch", "clip_jax.train"}


@pytest.mark.parametrize("module", IMPORT_NOTHING)
def test_what_everybody_may_import_imports_nothing(module):
  assert imports(MODULES[module], top_only=module == "clip_jax") <= {"dataclasses"}


def test_data_reaches_no_jax():
  seen, waiting = set(), {m for m in MODULES if room(m) == "data"}
  assert waiting
  while waiting:
    module = waiting.pop()
    seen.add(module)
    found = imports(MODULES[module])
    assert not packages(found) & OF_JAX, module
    waiting |= ours(found) - seen


def test_large_optional_packages_are_imported_by_the_functions_that_need_them():
  for module, tree in MODULES.items():
    assert not packages(imports(tree, top_only=True)) & INSIDE_FUNCTIONS, module
    assert "tensorflow" not in packages(imports(tree)), module


def test_recipes_import_nothing_but_their_base():
  recipes = {name: tree for name, tree in parse("configs").items() if name.startswith("configs.")}
  assert "configs.base" in recipes
  for name, tree in recipes.items():
    # A sweep is made of runs, which are a class of ours.
    known = {"clip_jax.scaling.sweep", "clip_jax.scaling.transfer"} if name.startswith("configs.scaling.") else {"configs"}
    assert ours(imports(tree)) <= known, name


def undocumented(tree):
  """Public functions, classes and methods without a docstring."""
  for node in tree.body:
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
      continue
    # `setup` is Flax's name for a method, as `__call__` is Python's: the class says what it does.
    if node.name != "setup" and not ast.get_docstring(node):
      yield node.name
    if isinstance(node, ast.ClassDef):
      yield from (f"{node.name}.{name}" for name in undocumented(node))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_everything_public_has_a_docstring(module):
  assert ast.get_docstring(MODULES[module]) or not MODULES[module].body, module
  assert not list(undocumented(MODULES[module]))


def test_a_missing_docstring_is_seen():
  source = """
class A:
  "It has one."
  def b(self): pass
  def _c(self): pass
def d():
  def e(): pass
def _f(): pass
"""
  assert list(undocumented(ast.parse(source))) == ["A.b", "d"]
