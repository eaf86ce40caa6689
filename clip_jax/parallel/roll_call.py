"""The processes of a run meet before JAX joins them, so that those that do not come can be named.

`jax.distributed` waits, too, but ends each process with a stack of C++ that says nobody's name.
"""

import contextlib
import json
import os
import selectors
import socket
import time

from clip_jax.errors import TrainingError, UsageError
from clip_jax.files import tell

GREETING = "clip_jax"
PATIENCE = 15.0  # seconds until it is said, and said again, who is waited for
PAUSE = 0.5  # seconds between attempts to reach the first process
MOST_NAMED = 8


def meet(cluster, seconds):
  """Returns once all processes of a run are there.

  The first one listens where JAX's own service will; the others tell it their numbers and wait for its word.

  Args:
    cluster: a `clip_jax.parallel.clusters.Cluster`.
    seconds: how long to wait for the last one.

  Raises:
    TrainingError: some did not come; the message of each process that did names them.
    UsageError: two have the same number, or not all were told the same count.
  """
  host, _, port = cluster.address.rpartition(":")
  deadline = time.monotonic() + seconds
  if cluster.number == 0:
    answer = _Desk(cluster, int(port)).wait(deadline, seconds)
  else:
    answer = _ask(cluster, host.strip("[]"), int(port), deadline, seconds)
  if answer.get("wrong"):
    raise UsageError(answer["wrong"])
  if answer.get("missing"):
    raise TrainingError(answer["missing"])


class _Desk:
  # Where the first process writes down who came.

  def __init__(self, cluster, port):
    self._cluster = cluster
    self._names = {0: socket.gethostname()}
    self._numbers = {}  # of connections
    self._heard = {}  # bytes of each connection, until they are a line
    self._wrong = ""
    try:
      dual = socket.has_dualstack_ipv6()
      self._server = socket.create_server(("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
      raise UsageError(
        f"Port {port} of this machine cannot be used ({os.strerror(error.errno)}), where the processes of the run would meet; is another run there, or an "
        f"earlier start of this one still at its end? Another one is chosen by JAX_COORDINATOR_ADDRESS=HOST:PORT."
      ) from error
    self._server.setblocking(False)
    self._selector = selectors.DefaultSelector()
    self._selector.register(self._server, selectors.EVENT_READ)

  def wait(self, deadline, seconds):
    """Waits for all, and tells them. Returns the answer that they have got, too."""
    told = time.monotonic()
    try:
      while not self._wrong and len(self._names) < self._cluster.count and time.monotonic() < deadline:
        self._listen(min(PATIENCE, max(0.0, deadline - time.monotonic())))
        if time.monotonic() - told > PATIENCE:
          told = time.monotonic()
          tell(f"Waiting for {self._missing()}.")
      answer = {}
      if self._wrong:
        answer = {"wrong": self._wrong}
      elif len(self._names) < self._cluster.count:
        came = f"{len(self._names):,} of {self._cluster.count:,} processes came to {self._cluster.address} in {seconds:,.0f} s"
        answer = {"missing": f"{came}; not there: {self._missing()}. Look at what those wrote; config.train.join_timeout is how long to wait."}
      self._tell(answer)
      return answer
    finally:
      for connection in self._heard:
        connection.close()
      self._server.close()
      self._selector.close()

  def _listen(self, seconds):
    for key, _ in self._selector.select(seconds):
      if key.fileobj is self._server:
        with contextlib.suppress(OSError):  # gone again before it was let in
          connection, _ = self._server.accept()
          connection.setblocking(False)
          self._heard[connection] = b""
          self._selector.register(connection, selectors.EVENT_READ)
      else:
        self._hear(key.fileobj)

  def _hear(self, connection):
    try:
      said = connection.recv(4096)
    except OSError:
      said = b""
    self._heard[connection] += said
    line, end, _ = self._heard[connection].partition(b"\n")
    guest = _read(line) if end else None
    if guest and {"number", "count", "host"} <= set(guest):
      self._write_down(connection, guest)
    elif end or not said or len(self._heard[connection]) > 4096:
      # Somebody else who looks at open ports; or a process that ended, and may be started again.
      self._selector.unregister(connection)
      del self._heard[connection]
      connection.close()
      number = self._numbers.pop(connection, None)
      if number is not None:
        del self._names[number]

  def _write_down(self, connection, guest):
    number, host = guest["number"], guest["host"]
    if guest["count"] != self._cluster.count:
      self._wrong = (
        f"Process {number} ({host}) was told of {guest['count']:,} processes, process 0 ({self._names[0]}) of {self._cluster.count:,}; "
        "all must be started with the same number."
      )
    elif number in self._names:
      self._wrong = f"Two processes have the number {number}: one on {self._names[number]}, one on {host}; each must have its own."
    else:
      self._names[number], self._numbers[connection] = host, number
      self._heard[connection] = b""

  def _tell(self, answer):
    # They hang up first, so that nothing is left of these connections at a port that JAX's service needs next.
    for connection in self._heard:
      with contextlib.suppress(OSError):
        connection.settimeout(5)
        connection.sendall(json.dumps({GREETING: answer}).encode() + b"\n")
    for connection in self._heard:
      with contextlib.suppress(OSError):
        while connection.recv(4096):
          pass

  def _missing(self):
    missing = [number for number in range(self._cluster.count) if number not in self._names]
    named = [f"{number} ({self._cluster.hosts[number]})" if number in self._cluster.hosts else str(number) for number in missing[:MOST_NAMED]]
    more = f" and {len(missing) - MOST_NAMED:,} more" if len(missing) > MOST_NAMED else ""
    return f"process{'es' if len(missing) > 1 else ''} {', '.join(named)}{more}"


def _ask(cluster, host, port, deadline, seconds):
  # The answer of the first process to this one.
  told, connected, reason = time.monotonic(), False, "no answer"
  while time.monotonic() < deadline:
    try:
      with socket.create_connection((host, port), timeout=max(0.1, min(10.0, deadline - time.monotonic()))) as connection:
        connected = True
        guest = {"number": cluster.number, "count": cluster.count, "host": socket.gethostname()}
        connection.sendall(json.dumps({GREETING: guest}).encode() + b"\n")
        answer = _answer(connection, deadline)
        if answer is not None:
          return answer
        reason = "no answer of a run's first process"
    except OSError as error:
      reason = error.strerror or str(error)
    if time.monotonic() - told > PATIENCE:
      told = time.monotonic()
      tell(f"Waiting for process 0 at {cluster.address} ({reason}).")
    time.sleep(min(PAUSE, max(0.0, deadline - time.monotonic())))
  where = "answers there, but not as this run's first process" if connected else f"cannot be reached ({reason})"
  name = cluster.hosts.get(0)
  raise TrainingError(
    f"Process 0{f' on {name}' if name and name != host else ''} at {cluster.address} {where}, in {seconds:,.0f} s, from process {cluster.number} "
    f"({socket.gethostname()}). Look at what it wrote, and whether a firewall is between them; config.train.join_timeout is how long to wait."
  )


def _answer(connection, deadline):
  # The first process answers when all are there, or when its own time is over, a little after ours perhaps.
  heard = b""
  while not heard.endswith(b"\n"):
    connection.settimeout(max(0.1, deadline - time.monotonic()) + 5)
    said = connection.recv(65536)
    if not said or len(heard) > 1 << 20:
      return None
    heard += said
  return _read(heard)


def _read(line):
  # What a process of a run says, or None of what somebody else does.
  try:
    found = json.loads(line)
    return found[GREETING] if isinstance(found[GREETING], dict) else None
  except (ValueError, KeyError, TypeError):
    return None
