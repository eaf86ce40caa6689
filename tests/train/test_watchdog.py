"""Processes that hang in each way there is: what is said, and that they end."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEGIN = """
import ctypes, threading, time
from clip_jax.train.watchdog import Watchdog
dog = Watchdog(1.0)
dog.keys = lambda: [f"shard.tar/{i}" for i in range(20)]
"""


def run(body):
  begun = time.monotonic()
  done = subprocess.run([sys.executable, "-c", BEGIN + body], cwd=ROOT, capture_output=True, text=True, timeout=120)
  return done.returncode, done.stderr, time.monotonic() - begun


def test_a_step_that_hangs_is_said_with_all_stacks_and_the_last_records_and_then_ends():
  code, said, _ = run("""
def stuck_in_the_data():
  time.sleep(100)
with dog:
  threading.Thread(target=stuck_in_the_data, daemon=True).start()
  dog.alive("step 12")
  time.sleep(100)
""")
  assert code == 1
  assert re.search(r"No progress for 1 s in step 12. All threads:", said)
  assert "in stuck_in_the_data" in said and said.count("most recent call first") >= 3
  assert "The records asked for last: shard.tar/0, " in said and "shard.tar/7, and 12 more." in said
  assert re.search(r"No progress for 2 s in step 12: the process ends; the last checkpoint is whole.", said)


def test_if_what_hangs_is_what_would_name_the_records_it_ends_all_the_same():
  code, said, _ = run("""
dog.keys = lambda: time.sleep(100)
with dog:
  time.sleep(100)
""")
  assert code == 1 and "they cannot be named" in said


def test_a_library_that_holds_pythons_lock_cannot_stop_it():
  code, said, seconds = run("""
with dog:
  time.sleep(0.3)
  ctypes.PyDLL(None).sleep(60)
""")
  assert code == 1 and "Timeout" in said and seconds < 45


def test_signs_of_life_keep_it_quiet_and_one_hang_is_told_once():
  code, said, _ = run("""
with dog:
  for i in range(8):
    dog.alive()
    time.sleep(0.3)
  dog.alive("evaluation of x")
  time.sleep(1.6)
  dog.alive("step 3")
  time.sleep(0.5)
time.sleep(2.5)
print("over")
""")
  assert code == 0 and said.count("No progress") == 1 and "in evaluation of x" in said


@pytest.mark.parametrize("seconds", [None, 0])
def test_without_a_time_nobody_watches(seconds):
  code, said, _ = run(f"""
with Watchdog({seconds}):
  assert threading.active_count() == 1
""")
  assert (code, said) == (0, "")
