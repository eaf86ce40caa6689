"""Signals, and what is made of them. That processes agree is tested with real ones, in tests/faults."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from clip_jax import config as configs
from clip_jax.parallel import mesh as meshes
from clip_jax.train import stopping
from tests.conftest import tiny


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_before_the_first_step_a_signal_stops_at_once_and_after_it_is_remembered(number, capsys):
  before = signal.getsignal(number)
  with pytest.raises(stopping.Stopped), stopping.Signals():
    os.kill(os.getpid(), number)
  assert f"{number.name}: stopping before the first step." in capsys.readouterr().err
  with stopping.Signals() as signals:
    signals.training()
    assert signals.received is None
    os.kill(os.getpid(), number)
    assert signals.received == number
  assert "the same command goes on" in capsys.readouterr().err
  assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once_and_a_second_sigterm_does_not():
  code = """
import os, signal, sys
from clip_jax.train import stopping
with stopping.Signals() as signals:
  signals.training()
  for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
sys.exit(75)
"""
  ends = {("SIGINT", "SIGINT"): 1, ("SIGTERM", "SIGTERM"): 75, ("SIGTERM", "SIGINT"): 75, ("SIGTERM", "SIGINT", "SIGINT"): 1}
  for names, want in ends.items():
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == want, (names, done.stderr)
    assert ("Left at once" in done.stderr) == (want == 1)


def test_one_process_does_what_it_wishes_and_asks_no_device():
  votes = stopping.Votes(meshes.create(configs.resolve(tiny(mesh={"data": 1})), jax.devices()[:1]))
  with jax.transfer_guard("disallow"):
    assert votes.cast(stop=False, save=False, busy=False) == set()
    for _ in range(2):
      assert votes.cast(stop=False, save=True, busy=False) == {"save"}
    assert votes.cast(stop=True, save=True, busy=False) == {"stop", "save"}
    assert votes.cast(stop=True, save=True, busy=True) == {"stop"}


def test_a_signal_whose_exception_was_lost_stops_before_the_first_step():
  """Python drops what is raised in a finalizer, or in a callback of its garbage collector."""
  code = """
import os, signal, sys
from clip_jax.train import stopping

class Late:
  def __del__(self):
    os.kill(os.getpid(), signal.SIGTERM)

with stopping.Signals() as signals:
  Late()
  print("goes on")
  try:
    signals.training()
  except stopping.Stopped:
    sys.exit(75)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
  assert done.returncode == 75 and done.stdout == "goes on\n", done.stderr
