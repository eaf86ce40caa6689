"""What all scripts of launch/ have in common: arguments, flags, dry runs, help."""

import shlex

import pytest

from tests.launch.conftest import ROOT

RUN = ("b16", "configs/vitb16.py")
BUCKET = "gs://my-bucket/runs/b16"
# One that works of each script, without --dry-run.
WORKING = {
  "tpu_vm/create.sh": ("b16", "--zone=z", "--accelerator-type=v6e-8"),
  "tpu_vm/setup.sh": ("b16", BUCKET, "--zone=z"),
  "tpu_vm/run.sh": (*RUN, BUCKET, "--zone=z"),
  "tpu_vm/babysit.sh": (*RUN, BUCKET, "--zone=z", "--accelerator-type=v6e-8"),
  "tpu_vm/logs.sh": ("b16", "--zone=z"),
  "tpu_vm/stop.sh": ("b16", "--zone=z"),
  "gke/submit.sh": (*RUN, BUCKET, "--topology=v6e:4x4", "--image=i"),
  "gke/logs.sh": ("b16",),
  "gke/stop.sh": ("b16",),
  "slurm/submit.sh": (*RUN, "/shared/runs/b16"),
  "slurm/stop.sh": ("b16",),
  "skypilot/launch.sh": (*RUN, BUCKET),
  "docker/build.sh": ("tpu", "us-west4-docker.pkg.dev/my-project/clip"),
}
WITH_CONFIG = [script for script, words in WORKING.items() if "configs/vitb16.py" in words]


def refused(done):
  """The sentence with which a script refuses, and nothing else."""
  assert done.returncode == 2, (done.stdout, done.stderr)
  assert done.stdout == ""
  assert len(done.stderr.splitlines()) == 1
  return done.stderr


def test_there_is_no_script_that_is_not_tested_here():
  assert {str(path.relative_to(ROOT / "launch")) for path in ROOT.glob("launch/*/*.sh")} - {"tpu_vm/lib.sh", "tpu_vm/worker.sh"} == set(WORKING)


@pytest.mark.parametrize("script", WORKING)
def test_what_is_missing_unknown_or_too_much_is_told_in_one_sentence(world, script):
  words = WORKING[script]
  names = [name for name in words if not name.startswith("--")]
  assert "is missing" in refused(world.run(script))
  assert "one argument too many" in refused(world.run(script, *words, *names))
  assert "--zonne=x is not a flag" in refused(world.run(script, *words, "--zonne=x"))
  assert world.calls() == []


@pytest.mark.parametrize("script", WORKING)
def test_a_dry_run_calls_nothing(world, script):
  done = world.run(script, "--dry-run", *WORKING[script])
  assert done.returncode == 0, done.stderr
  assert world.calls() == []
  assert done.stdout


@pytest.mark.parametrize("script", WORKING)
def test_help_has_an_example_that_works(world, script):
  done = world.run(script, "--help")
  assert done.returncode == 0
  example = shlex.split(done.stdout.strip().splitlines()[-1])
  assert example[0] == f"launch/{script}"
  place = example.index("--") if "--" in example else len(example)
  done = world.run(script, *example[1:place], "--dry-run", *example[place:])
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", WITH_CONFIG)
def test_names_come_from_the_environment_too(world, script):
  name, config, workdir, *flags = WORKING[script]
  given = world.run(script, name, config, workdir, *flags, "--dry-run", "--", "--config.a.b=c d")
  env = {"NAME": name, "CONFIG": config, "WORKDIR": workdir}
  assert world.run(script, *flags, "--dry-run", "--", "--config.a.b=c d", **env).stdout == given.stdout
  assert world.run(script, name, *flags, "--dry-run", "--", "--config.a.b=c d", **{**env, "NAME": "other"}).stdout == given.stdout


def test_a_flag_may_have_its_value_behind_it_and_no_other_flag_instead(world):
  one = world.run("tpu_vm/create.sh", "b16", "--zone", "z", "--accelerator-type", "v6e-8", "--dry-run")
  assert one.stdout == world.run("tpu_vm/create.sh", "b16", "--zone=z", "--accelerator-type=v6e-8", "--dry-run").stdout
  assert "--zone needs a value" in refused(world.run("tpu_vm/create.sh", "b16", "--accelerator-type=v6e-8", "--zone", "--dry-run"))
  assert "--zone needs a value" in refused(world.run("tpu_vm/create.sh", "b16", "--accelerator-type=v6e-8", "--zone"))
  assert world.calls() == []


@pytest.mark.parametrize(
  ("script", "change", "said"),
  [
    ("tpu_vm/run.sh", {0: "B16"}, "NAME=B16 must be small letters"),
    ("tpu_vm/run.sh", {0: "b" * 41}, "40 characters at most"),
    ("tpu_vm/run.sh", {1: "configs/vitb17.py"}, "CONFIG=configs/vitb17.py is not a recipe"),
    ("tpu_vm/run.sh", {2: "s3://bucket/run"}, "WORKDIR=s3://bucket/run must be a path, or gs://BUCKET/PATH"),
    ("tpu_vm/run.sh", {2: "gs://bucket"}, "WORKDIR=gs://bucket must be a path, or gs://BUCKET/PATH"),
    ("tpu_vm/create.sh", {2: "--accelerator-type=v9-8"}, "--accelerator-type=v9-8 is not in launch/accelerators.txt"),
    ("tpu_vm/create.sh", {2: "--accelerator-type=v6e"}, "is not a type and a number"),
    ("tpu_vm/create.sh", {3: "--node-count=0"}, "--node-count=0 must be a whole number, 1 or more"),
    ("tpu_vm/create.sh", {3: "--provisioning-model=spot"}, "--provisioning-model=spot is not known here"),
    ("tpu_vm/create.sh", {3: "--provisioning-model=flex-start"}, "needs --max-run-duration"),
    ("tpu_vm/create.sh", {3: "--spot", 4: "--reserved"}, "exclude each other"),
    ("tpu_vm/babysit.sh", {4: "--keep"}, "--accelerator-type is missing"),
    ("gke/submit.sh", {3: "--topology=4x4"}, "--topology=4x4 is not KIND:SHAPE"),
    ("gke/submit.sh", {3: "--topology=v9:4x4"}, "v9 is not in launch/accelerators.txt"),
    ("gke/submit.sh", {3: "--topology=h100:12"}, "has 12 chips, which hosts of 8 do not add up to"),
    ("gke/submit.sh", {3: "--topology=h100:16", 5: "--slices=2"}, "--slices=2 is of TPUs"),
    ("gke/submit.sh", {3: "--topology=v5e:2x2", 5: "--slices=2"}, "several hosts only"),
    ("gke/submit.sh", {2: "/runs/b16"}, "needs --volume-claim=CLAIM"),
    ("gke/submit.sh", {2: "runs/b16"}, "must be gs://BUCKET/PATH, or a path in a folder that is mounted"),
    ("gke/submit.sh", {5: "--volume-claim=runs"}, "exclude each other"),
    ("gke/submit.sh", {4: "--spot"}, "--image is missing"),
    ("slurm/submit.sh", {2: BUCKET}, "must be a folder that all nodes see"),
    ("slurm/submit.sh", {3: "--nodes=two"}, "--nodes=two must be a whole number"),
    ("skypilot/launch.sh", {2: "/runs/b16"}, "must be gs://BUCKET/PATH"),
    ("docker/build.sh", {0: "gpu"}, "KIND=gpu is not tpu or cuda"),
    ("docker/build.sh", {1: "My-Project"}, "REPOSITORY=My-Project is not like"),
  ],
)
def test_what_is_wrong_is_told_in_one_sentence(world, script, change, said):
  words = dict(enumerate(WORKING[script])) | change
  assert said in refused(world.run(script, *(words[place] for place in sorted(words))))
  assert world.calls() == []
