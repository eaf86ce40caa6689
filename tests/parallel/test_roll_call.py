"""Processes of a run meet, or are told who did not come: threads here, over real sockets."""

import concurrent.futures
import json
import socket
import threading
import time

import pytest

from clip_jax.errors import TrainingError, UsageError
from clip_jax.parallel import roll_call
from clip_jax.parallel.clusters import Cluster


def free_address():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def cluster(address, number, count=4, hosts=None):
  return Cluster("here", address, count, number, hosts or {})


def meet(address, numbers, seconds, count=4, hosts=None, wait=30):
  """What comes out of each of the processes with some numbers, all at the same time."""
  with concurrent.futures.ThreadPoolExecutor(len(numbers)) as threads:
    futures = [threads.submit(roll_call.meet, cluster(address, number, count, hosts), seconds) for number in numbers]
    return [future.exception(timeout=wait) for future in futures]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_all_go_on_once_the_last_one_came_and_the_port_is_free(count):
  address = free_address()
  assert meet(address, range(count), 20, count) == [None] * count
  with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):  # where JAX's own service will be
    pass


def test_those_who_wait_go_on_when_the_first_one_comes_late():
  address, ends = free_address(), []
  early = [threading.Thread(target=lambda number=number: (roll_call.meet(cluster(address, number, 3), 20), ends.append(number))) for number in (1, 2)]
  for thread in early:
    thread.start()
  time.sleep(0.3)
  assert not ends
  roll_call.meet(cluster(address, 0, 3), 20)
  for thread in early:
    thread.join(timeout=20)
  assert sorted(ends) == [1, 2]


def test_each_that_came_is_told_who_did_not():
  hosts = {number: f"node{number}" for number in range(16)}
  found = meet(free_address(), [0, 3], 1.0, 5, hosts)
  assert all(isinstance(error, TrainingError) for error in found)
  assert str(found[0]) == str(found[1])
  assert "2 of 5 processes came" in str(found[0]) and "not there: processes 1 (node1), 2 (node2), 4 (node4). Look" in str(found[0])
  [error] = meet(free_address(), [0], 0.5, 16)
  assert "not there: processes 1, 2, 3, 4, 5, 6, 7, 8 and 7 more. Look" in str(error)
  [error] = meet(free_address(), [0], 0.5, 2, hosts)
  assert "1 of 2 processes came" in str(error) and "not there: process 1 (node1). Look" in str(error)


def test_where_the_first_one_does_not_come_the_others_say_where_they_looked():
  address = free_address()
  [error] = meet(address, [2], 1.0, hosts={0: "node0"})
  assert isinstance(error, TrainingError)
  assert f"Process 0 on node0 at {address} cannot be reached (Connection refused), in 1 s, from process 2 ({socket.gethostname()})" in str(error)
  [error] = meet("nowhere.invalid:99", [1], 0.5)
  assert "Process 0 at nowhere.invalid:99 cannot be reached (" in str(error)


def test_a_service_of_somebody_else_at_the_address_is_no_first_process():
  with socket.create_server(("127.0.0.1", 0)) as other:

    def serve():
      for _ in range(2):
        connection, _ = other.accept()
        with connection:
          connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    threading.Thread(target=serve, daemon=True).start()
    [error] = meet(f"127.0.0.1:{other.getsockname()[1]}", [1], 0.8)
  assert isinstance(error, TrainingError) and "answers there, but not as this run's first process" in str(error)


def test_strangers_at_the_port_change_nothing():
  address = free_address()
  host, _, port = address.rpartition(":")
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    first = threads.submit(roll_call.meet, cluster(address, 0, 2), 20)
    lines = b"GET / HTTP/1.1\r\n\r\n", b"", b'{"clip_jax": {"number": 1}}\n', b"[]\n", b"x" * 9000, b"\xff\n", b'{"clip_jax": 1}\n'
    for line in lines:
      for _ in range(100):  # the first one may not listen yet
        try:
          connection = socket.create_connection((host, int(port)))
          break
        except ConnectionRefusedError:
          time.sleep(0.05)
      with connection:
        connection.sendall(line)
    assert not first.done()
    roll_call.meet(cluster(address, 1, 2), 20)
    assert first.result(timeout=20) is None


def test_a_process_that_ended_while_it_waited_may_come_again():
  address = free_address()
  host, _, port = address.rpartition(":")
  with concurrent.futures.ThreadPoolExecutor(3) as threads:
    first = threads.submit(roll_call.meet, cluster(address, 0, 3), 20)
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as connection:
      connection.sendall(json.dumps({roll_call.GREETING: {"number": 1, "count": 3, "host": "it ends"}}).encode() + b"\n")
      time.sleep(0.2)
    rest = [threads.submit(roll_call.meet, cluster(address, number, 3), 20) for number in (1, 2)]
    assert [future.result(timeout=20) for future in (first, *rest)] == [None] * 3


def test_two_with_the_same_number_or_another_count_are_told_so():
  found = meet(free_address(), [0, 1, 1], 20)
  assert all(isinstance(error, UsageError) for error in found)
  assert f"Two processes have the number 1: one on {socket.gethostname()}, one on {socket.gethostname()}" in str(found[0])
  address = free_address()
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    futures = [threads.submit(roll_call.meet, cluster(address, number, count), 20) for number, count in ((0, 3), (2, 4))]
    errors = [future.exception(timeout=20) for future in futures]
  assert all(isinstance(error, UsageError) and "was told of 4 processes, process 0" in str(error) and "of 3" in str(error) for error in errors)


def test_a_port_that_is_taken_is_told_with_what_may_be_done():
  with socket.create_server(("", 0)) as taken:
    [error] = meet(f"127.0.0.1:{taken.getsockname()[1]}", [0], 5)
  assert isinstance(error, UsageError) and "cannot be used (Address already in use)" in str(error) and "JAX_COORDINATOR_ADDRESS=HOST:PORT" in str(error)


def test_who_is_waited_for_is_said_while_waiting(monkeypatch, capsys):
  monkeypatch.setattr(roll_call, "PATIENCE", 0.3)
  meet(free_address(), [0], 1.0, 3, {1: "node1"})
  assert "Waiting for processes 1 (node1), 2.\n" in capsys.readouterr().err
  address = free_address()
  meet(address, [1], 1.5)
  assert f"Waiting for process 0 at {address} (Connection refused).\n" in capsys.readouterr().err
