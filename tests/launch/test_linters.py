"""launch/ as linters see it, and the table of documented flags as the installed gcloud does."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from clip_jax.plan import chips
from tests.launch import documented
from tests.launch.conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch")])
OTHERS = [*sorted(pathlib.Path(__file__).parent.glob("*.sh")), LAUNCH.parent / ".ci/run"]


def tool(name):
  """The path of a linter, beside this Python or on the PATH; without it the test is skipped."""
  found = shutil.which(name, path=str(pathlib.Path(sys.executable).parent)) or shutil.which(name)
  if not found:
    pytest.skip(f"{name} is not installed")
  return found


def test_shellcheck_finds_nothing():
  done = subprocess.run([tool("shellcheck"), "--external-sources", *SCRIPTS, *OTHERS], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_hadolint_finds_nothing():
  done = subprocess.run([tool("hadolint"), *sorted(LAUNCH.glob("docker/Dockerfile.*"))], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_what_is_called_is_executable_and_strict():
  for script in SCRIPTS:
    text = script.read_text()
    called = text.startswith("#!")
    assert called or script.name in ("common.sh", "lib.sh"), script
    assert not called or "set -euo pipefail" in text, script
    assert not called or script.suffix == ".sbatch" or script.stat().st_mode & 0o100, script


def test_nothing_is_used_that_the_bash_of_macos_lacks():
  for script in SCRIPTS:
    if script.name in ("worker.sh", "train.sbatch"):  # which run on Linux
      continue
    text = script.read_text()
    assert not re.search(r"declare -A|mapfile|readarray|\$\{\w+@|\$\{\w+\^|\$\{\w+,,|&>>|wait -n|\|&", text), script
    # Its "${array[@]}" of an empty array is an error under set -u; those that may be empty are guarded.
    for name in ("more", "way", "track", "given"):
      assert not re.search(rf'(?<!\+)"\$\{{{name}\[@\]}}"', text), (script, name)


def test_yaml_parses():
  for path in LAUNCH.rglob("*.yaml"):
    if path.parent.name != "gke":  # templates, which test_gke.py fills in
      assert yaml.safe_load(path.read_text())


def test_accelerators_are_those_that_plans_know():
  rows = [line.split() for line in (LAUNCH / "accelerators.txt").read_text().splitlines() if not line.startswith("#")]
  known = {chip.topology: chip for chip in chips.CHIPS if chip.slices and chip.accelerator}
  assert {row[0] for row in rows if row[1] != "-"} == set(known)
  for kind, accelerator, *_ in rows:
    assert accelerator == (known[kind].accelerator if kind in known else "-")
    assert chips.of_topology(f"{kind}:1")


def test_the_documented_flags_are_those_of_the_gcloud_that_is_installed():
  gcloud = shutil.which("gcloud")
  if not gcloud:
    pytest.skip("gcloud is not installed")
  path = pathlib.Path(gcloud).resolve().parents[1] / "data/cli/gcloud_completions.py"
  if not path.exists():
    pytest.skip(f"this gcloud does not come with {path.name}")
  spec = importlib.util.spec_from_file_location("completions", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name, command in documented.COMMANDS.items():
    program, *words = name.split()
    if program != "gcloud":
      continue
    node = module.STATIC_COMPLETION_CLI_TREE
    wide = dict(node["flags"])
    for word in words:
      assert word in node["commands"], name
      node = node["commands"][word]
    flags = wide | node["flags"]
    for flag in command.values:
      assert flags.get(flag, "bool") != "bool", (name, flag)
    for flag in command.switches:
      assert flags.get(flag) == "bool", (name, flag)
