"""What processes agree on, in real ones."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_jax.parallel import agreement

CODE = """
import sys
import jax
from clip_jax.errors import UsageError
from clip_jax.parallel import agreement, distributed
distributed.initialize()
me = jax.process_index()
print([agreement.everyone(mine) for mine in (True, me == 1, False)])
def find():
  assert me == 0
  return {"steps": [3, 5], "losses": [0.1, float("nan")]}
print(agreement.of_first(find))
agreement.require_same(lambda: {"the version of jax": "1", "é": [1, {"a": None}]})
for facts in ({"same": 1, "config.train.seed": me}, {"same": 1} | ({"more": "x" * 5000} if me else {})):
  try:
    agreement.require_same(lambda: facts)
  except UsageError as error:
    print(str(error)[:200])
"""


def test_processes_compare_what_they_hold_to_be_true_and_all_are_told_the_difference():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    address = f"localhost:{found.getsockname()[1]}"
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={**environment, "JAX_PROCESS_ID": str(number)},
    )
    for number in range(2)
  ]  # fmt: skip
  ends = [process.communicate(timeout=120) for process in processes]
  assert [process.returncode for process in processes] == [0, 0], ends
  said = [[line for line in out.splitlines() if "Gloo" not in line] for out, _ in ends]
  assert said[0] == said[1]
  votes, found, seed, more = said[0]
  assert found == "{'steps': [3, 5], 'losses': [0.1, nan]}"
  assert votes == "[True, False, False]"
  assert "config.train.seed is 0 on process 0, and 1 on process 1 of 2" in seed
  assert more.startswith("The processes of this run do not agree: more is None on process 0, and 'xxx")


@pytest.mark.parametrize("mine", [True, False, np.bool_(True)])
def test_one_process_agrees_with_itself(mine):
  assert agreement.everyone(mine) is bool(mine)
  assert agreement.of_first(lambda: mine) is mine
  agreement.require_same(lambda: {"anything": object()})
