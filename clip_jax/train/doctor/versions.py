"""Whether what is installed goes together. Nothing of it is imported: with wrong versions that may fail."""

import importlib.metadata
import platform

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from clip_jax.train.doctor.check import Check

# What makes JAX run on something else than the processor, and the extra of JAX that pins its version.
PLUGINS = {"libtpu": "tpu", "jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13", "jax-rocm7-plugin": "rocm7-local"}
SHOWN = ("jax", "jaxlib", *PLUGINS, "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions():
  """Checks this Python and its packages."""
  try:
    python, needed = importlib.metadata.metadata("clip_jax")["Requires-Python"], importlib.metadata.requires("clip_jax")
  except importlib.metadata.PackageNotFoundError:  # it lies in the path without having been installed
    python, needed = "", ()
  try:
    pinned = importlib.metadata.requires("jax")
  except importlib.metadata.PackageNotFoundError:
    pinned = ()
  return judge(platform.python_version(), installed(), python or "", needed or (), pinned or ())


def installed():
  """The versions of all packages, by their names in canonical form."""
  # Of a package that is there twice, Python imports the first.
  found = {}
  for package in importlib.metadata.distributions():
    if package.name:
      found.setdefault(canonicalize_name(package.name), package.version)
  return found


def judge(python, found, needed_python, needed, pinned):
  """Compares versions with what is asked for.

  Args:
    python: the version of Python.
    found: a dict from the canonical names of installed packages to their versions.
    needed_python: the versions of Python that clip_jax accepts, such as ">=3.11".
    needed: what clip_jax requires, as its metadata say it.
    pinned: what jax requires.

  Returns:
    A `Check`. It is wrong where something is missing, too old, or another version than goes with jax; a libtpu that does not go
    with jax is a warning, because it may work.
  """
  core = _unmet(needed, "", found)
  jax = [] if any(requirement.name == "jax" for requirement in core) else _unmet(pinned, "", found)
  plugins = [pair for name, extra in PLUGINS.items() if name in found for pair in _plugin(name, extra, pinned, found)]
  problems, advice = [], []
  if not SpecifierSet(needed_python).contains(python, prereleases=True):
    problems.append(f"Python {python} is not {needed_python}")
    advice.append(f"Make the virtual environment anew with Python {needed_python}.")
  unmet = [*core, *jax, *(requirement for requirement, _ in plugins)]
  problems += [_problem(requirement, found) for requirement in unmet]
  wanted = {str(_plain(requirement)) for requirement in (*core, *jax)} | {source for _, source in plugins}
  if wanted:
    advice.append("pip install " + " ".join(f"'{one}'" for one in sorted(wanted)))
  if problems:
    serious = len(problems) > len(plugins) or any(requirement.name != "libtpu" for requirement, _ in plugins)
    return Check("versions", "wrong" if serious else "warning", "; ".join(problems) + ".", " ".join(advice))
  shown = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
  return Check("versions", "ok", f"Python {python}, {shown}.")


def _unmet(requirements, extra, found):
  # Those that hold on this platform with an extra ("" for none), and that nothing installed meets.
  unmet = []
  for requirement in map(Requirement, requirements):
    if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
      version = found.get(canonicalize_name(requirement.name))
      if version is None or not requirement.specifier.contains(version, prereleases=True):
        unmet.append(requirement)
  return unmet


def _plugin(name, extra, pinned, found):
  # What is asked of an installed plugin and not met, with what to install instead.
  jax = found.get("jax")
  return [(one, f"jax[{extra}]=={jax}") for one in _unmet(pinned, extra, found) if canonicalize_name(one.name) == name]


def _plain(requirement):
  # What pip is to be asked for.
  plain = Requirement(requirement.name)
  plain.specifier, plain.extras = requirement.specifier, requirement.extras
  return plain


def _problem(requirement, found):
  version = found.get(canonicalize_name(requirement.name))
  state = f"{requirement.name} {version} is installed" if version else f"{requirement.name} is missing"
  return f"{state}, and {_plain(requirement)} is needed"
