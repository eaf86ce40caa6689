"""Runs that something can be done to, and one that nothing happened to."""

import pytest

from tests.end_to_end.runs import finish, starter


@pytest.fixture(scope="module")
def start(colors, tmp_path_factory):
  """A function that starts `faulty_main.py`: workdir, overrides, devices, environment -> a running process."""
  return starter(colors, tmp_path_factory.mktemp("cache"), ("-m", "tests.faults.faulty_main"))


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
  """The work directory of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  finish(start(workdir))
  return workdir
