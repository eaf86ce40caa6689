"""What launch/README.md says can be done can be done: its commands are taken by the scripts and programs, its links and names are there."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.launch import documented
from tests.launch.conftest import ROOT

README = (ROOT / "launch/README.md").read_text()
PROGRAMS = ("gcloud", "kubectl", "xpk", "gcluster", "sky")


def commands():
  """All command lines: those of blocks, and those of code in text and tables that begin with a program."""
  blocks = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
  inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
  for line in [line for block in blocks for line in block.splitlines()] + inline:
    program, *rest = line.split(" ")
    if (program.startswith("launch/") and rest) or (program in PROGRAMS and len(rest) > 1):
      yield shlex.split(line.replace("NAME", "b16").replace("=ZONE", "=us-west4-a").replace(":TAG", ":1"))


OURS = sorted({shlex.join(words) for words in commands() if words[0].startswith("launch/")})
OTHERS = sorted({shlex.join(words) for words in commands() if not words[0].startswith("launch/")})


def test_there_are_commands_for_every_launcher():
  assert len(OURS) > 10 and len(OTHERS) > 25
  for folder in ("tpu_vm", "gke", "slurm", "skypilot", "docker"):
    assert any(line.startswith(f"launch/{folder}/") for line in OURS)


@pytest.mark.parametrize("line", OURS)
def test_a_command_is_one_that_its_script_takes(world, line):
  world.cloud(configured={"compute/zone": "us-west4-a"})  # as step 1 says
  script, *rest = [word for word in shlex.split(line) if word != "--dry-run"]
  done = world.shell(["bash", str(world.root / script), "--dry-run", *rest])
  assert done.returncode == 0, done.stderr
  assert all(words[:3] == ["gcloud", "config", "get"] for words in world.calls())


@pytest.mark.parametrize("line", OTHERS)
def test_a_command_of_others_has_documented_flags(line):
  documented.check(shlex.split(line))


def test_overrides_are_keys_of_the_config():
  from clip_jax.config import recipes

  for key, value in set(re.findall(r"--config\.([a-z_.]+)=('[^']*'|[^\s'`]+)", README)) - {("data.path", "gs://...")}:
    recipe = recipes.load(["--config=configs/vitb16.py", f"--config.{key}={value.strip(chr(39))}"])
    assert recipe is not None


def test_links_and_names_of_files_are_there():
  anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)}
  for target in re.findall(r"\]\(([^)]+)\)", README):
    if target.startswith("#"):
      assert target[1:] in anchors, target
    elif not target.startswith("https://"):
      assert (ROOT / "launch" / target.partition("#")[0]).exists(), target
  for name in set(re.findall(r"(?<![\w/.-])(?:launch|tpu_vm|gke|slurm|skypilot|docker)/[\w./-]+\.(?:sh|yaml|txt|sbatch)", README)):
    assert (ROOT / name).exists() or (ROOT / "launch" / name).exists(), name
  for script in ("create.sh", "setup.sh", "run.sh", "logs.sh", "stop.sh", "babysit.sh"):
    assert script in README and (ROOT / "launch/tpu_vm" / script).exists()


def test_what_messages_refer_to_is_in_it():
  said = "".join(path.read_text() for path in (ROOT / "launch").rglob("*.sh"))
  for title in set(re.findall(r'launch/README\.md, \\?"([^"\\]+)\\?"', said)):
    assert f"**3. {title}.**" in README or f"## {title}" in README, title
  for quoted in re.findall(r"^\| `([^`]+)`", README[README.index("## When something is wrong") :], re.M):
    if quoted.startswith(("was refused for", "is on this")):
      assert quoted in said, quoted


def test_it_is_short_enough_to_be_read():
  assert len(README.splitlines()) <= 250


def test_the_local_launcher_is_called_as_it_is_written():
  done = subprocess.run([sys.executable, "-m", "clip_jax.launch.local", "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
  assert done.returncode == 0
  for flag in ("--processes", "--devices-per-process"):
    assert flag in done.stdout and flag in README
