"""Several processes of one run on one machine.

python -m clip_jax.launch.local --processes 4 --devices-per-process 2 -- main.py --config=configs/vitb16.py --workdir=DIR

What follows -- is a Python program with its arguments, or -m and a module; each process runs all of it. Every line that one writes is
passed on behind its number. On processors a process has as many devices as it is told; of GPUs each has as many of its own.

When one fails or is killed, the others are ended. When all stopped early with everything saved (exit code 75), they are started again.
SIGTERM and SIGINT are passed on once, and nothing is started after them; at the second one all end at once.

Exit codes: 0 all done, 75 stopped by a signal with everything saved, 2 wrong usage, 1 anything else.
"""

import argparse
import collections
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from clip_jax.errors import EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE, UsageError
from clip_jax.files import tell
from clip_jax.parallel import clusters

LOOK = 0.1  # seconds between looks
# How long the others may take to see by themselves that one is gone, and after that, to end when asked.
NOTICE, GRACE = 5.0, 10.0
# All end together; one that takes longer than this after the first waits for something that will not come.
STRAGGLER = 600.0
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Group:
  """The processes of one start of a run."""

  def __init__(self, command, count, devices, gpus=()):
    """Starts them.

    Args:
      command: what each of them runs, a list.
      count: how many there are.
      devices: of each of them.
      gpus: names of this machine's GPUs, as CUDA_VISIBLE_DEVICES has them; none if processes have devices of the processor.
    """
    address = f"127.0.0.1:{_free_port()}"
    self.processes, self._threads = [], []
    for number in range(count):
      variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number), "PYTHONUNBUFFERED": "1"}
      if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * devices : (number + 1) * devices])
      else:
        variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
      # In a session of its own, so that Ctrl-C reaches it once, through us; and it does not outlive us.
      process = subprocess.Popen(
        command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=_die_with_parent,
      )  # fmt: skip
      self.processes.append(process)
      for stream, out in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
        self._threads.append(threading.Thread(target=_pass_on, args=(number, stream, out), daemon=True))
        self._threads[-1].start()

  def codes(self):
    """The exit code of each, None of those that run."""
    return [process.poll() for process in self.processes]

  def send(self, number):
    """Sends a signal to those that run."""
    for process in self.processes:
      if process.poll() is None:
        process.send_signal(number)

  def end(self):
    """Ends those that run, within `GRACE` seconds and a moment."""
    self.send(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while None in self.codes() and time.monotonic() < deadline:
      time.sleep(LOOK)
    self.send(signal.SIGKILL)
    for process in self.processes:
      process.wait()

  def finish_output(self):
    """Waits for what they wrote to be passed on."""
    for thread in self._threads:
      thread.join(timeout=5)  # a process that one of them left behind may keep a pipe open


def main(arguments=None):
  """Runs a group until it is done, and returns the exit code.

  Args:
    arguments: of the command line; `sys.argv`'s if None.
  """
  try:
    options, command = _parse(sys.argv[1:] if arguments is None else arguments)
    shown = gpus(options.processes * options.devices_per_process)
  except UsageError as error:
    tell(str(error))
    return EXIT_USAGE
  signals, restarts = _listen(), 0
  while True:
    group = Group(command, options.processes, options.devices_per_process, shown)
    codes, stopped = _watch(group, signals)
    group.finish_output()
    code = _judge(codes)
    if code != EXIT_TRY_AGAIN or stopped:
      return code
    if restarts == options.max_restarts:
      tell(f"Stopped early with everything saved, after {restarts:,} restarts (--max-restarts). The same command goes on.")
      return code
    restarts += 1
    tell(f"All stopped early with everything saved; start {restarts + 1:,}.")


def _parse(arguments):
  parser = argparse.ArgumentParser(
    prog="python -m clip_jax.launch.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--processes", type=int, default=2, metavar="N", help="how many processes (2)")
  parser.add_argument("--devices-per-process", type=int, default=1, metavar="N", help="devices of each (1)")
  parser.add_argument("--max-restarts", type=int, default=100, metavar="N", help="how often all are started again after exit code 75 (100)")
  parser.add_argument("command", nargs="*", metavar="-- PROGRAM", help="a Python program and its arguments, or -m MODULE")
  cut = arguments.index("--") if "--" in arguments else len(arguments)
  options, command = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
  if options.command or not command:
    raise UsageError("What is to be run follows --, as in: python -m clip_jax.launch.local --processes 4 -- main.py --config=FILE --workdir=DIR")
  for name, least in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0)):
    if getattr(options, name) < least:
      raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected {least} or more.")
  if command[0] != "-m" and not os.path.exists(command[0]):
    raise UsageError(f"There is no program {command[0]} in {os.getcwd()}.")
  return options, [sys.executable, *command]


def gpus(needed):
  """The names of the GPUs to be shared out, a list; empty if the devices are those of processors.

  Args:
    needed: how many.

  Raises:
    UsageError: there are fewer.
  """
  if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu") or not clusters.has_gpu_plugin():
    return []
  there = clusters.visible_gpus()
  if there and len(there) < needed:
    raise UsageError(f"{needed:,} GPUs are needed, and there are {len(there):,}; JAX_PLATFORMS=cpu takes the processor instead.")
  return there


def _listen():
  # SIGTERM and SIGINT, as they come.
  came = collections.deque()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: came.append(number))
  return came


def _watch(group, signals):
  # Exit codes of all, once all have ended, and whether it was a signal of ours that stopped them.
  sent, failed_at, first_end = 0, None, None
  while None in (codes := group.codes()):
    while signals:
      number = signals.popleft()
      sent += 1
      group.send(number if sent == 1 else signal.SIGKILL)
    now = time.monotonic()
    failed = [(number, code) for number, code in enumerate(codes) if code not in (None, 0, EXIT_TRY_AGAIN)]
    first_end = first_end or (now if any(code is not None for code in codes) else None)
    if failed and not failed_at:
      failed_at = now
      tell(f"Process {failed[0][0]} {_ended(failed[0][1])}; the others are ended.")
    if failed_at and now - failed_at > NOTICE or first_end and now - first_end > STRAGGLER:
      group.end()
    time.sleep(LOOK)
  return codes, bool(sent)


def _judge(codes):
  # The code of the group: wrong usage is told by all, or by one before the others were ended.
  if EXIT_USAGE in codes:
    return EXIT_USAGE
  others = set(codes) - {0, EXIT_TRY_AGAIN}
  return EXIT_FAILED if others else max(codes)


def _ended(code):
  return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _pass_on(number, stream, out):
  # Whole lines, so that those of several processes do not mix. What counts on one line, for a terminal, comes as lines.
  for line in stream:
    out.buffer.write(b"[%d] %s\n" % (number, line.rstrip(b"\r\n").rpartition(b"\r")[2]))
    out.buffer.flush()


def _free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def _die_with_parent():
  ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
  sys.exit(main())
