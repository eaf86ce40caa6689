"""Real object stores on loopback, and a proxy before them that misbehaves as stores do on a bad day."""

import collections
import contextlib
import http.client
import http.server
import random
import socket
import threading
import time
import urllib.parse

FAULTS = ("503", "429", "500", "dropped", "reset", "slow")


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on; a share of the reads meets one of `FAULTS`."""

  daemon_threads = True

  def __init__(self, upstream, share, seed=0):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.upstream, self.share = upstream, share
    self.counts, self.lock = collections.Counter(), threading.Lock()
    self.hang = self.forbid = False
    self._random = random.Random(seed)
    self.url = f"http://127.0.0.1:{self.server_address[1]}"
    threading.Thread(target=self.serve_forever, daemon=True).start()

  def fault(self):
    """What goes wrong with the next read, or None."""
    with self.lock:
      fault = self._random.choice(FAULTS) if self._random.random() < self.share else None
      self.counts[fault] += 1
      return fault

  def handle_error(self, request, client_address):
    """A client that has hung up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def handle_one(self):
    server = self.server
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    fault = server.fault() if self.command == "GET" else None
    if server.hang:
      time.sleep(60)
    if server.forbid:
      return self.answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
    if fault in ("503", "429", "500"):
      return self.answer(int(fault), [], b"<Error><Code>SlowDown</Code></Error>")
    if fault == "slow":
      time.sleep(0.4)
    if fault == "reset":
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
      self.close_connection = True
      return self.connection.close()
    upstream = http.client.HTTPConnection(*server.upstream, timeout=30)
    with contextlib.closing(upstream):
      upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Connection"})
      response = upstream.getresponse()
      content = response.read()
    headers = [(k, v) for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")]
    return self.answer(response.status, headers, content, cut=fault == "dropped")

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

  def answer(self, status, headers, content, cut=False):
    self.send_response(status)
    for name, value in headers:
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if cut:  # in the middle of what was promised
      self.wfile.write(content[: len(content) // 2])
      self.close_connection = True
    elif self.command != "HEAD":
      self.wfile.write(content)


class Bucket:
  """A bucket in an emulator behind a proxy.

  Attributes:
    root: what its URLs begin with, such as "s3://bucket".
    proxy: the `Proxy`.
    environment: the variables that lead to it, in a process that shall read from it.
  """

  def __init__(self, root, upstream, put):
    self.root, self._put = root, put
    self.proxy = Proxy(upstream, 0.0)
    account = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    google = {"TENSORSTORE_GCS_HTTP_URL": self.proxy.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "t"}
    self.environment = google if root.startswith("gs") else account | {"AWS_ENDPOINT_URL": self.proxy.url}

  def put(self, key, content):
    """Stores an object; returns its URL."""
    self._put(key, content)
    return self.url(key)

  def put_folder(self, folder, key):
    """Stores the files of a local folder; returns the URL of its copy."""
    for path in folder.rglob("*"):
      if path.is_file():
        self.put(f"{key}/{path.relative_to(folder)}", path.read_bytes())
    return self.url(key)

  def url(self, key):
    """The URL of an object, or of what its key begins with."""
    return f"{self.root}/{key}"

  def misbehave(self, share, seed=0):
    """From now on a share of the reads goes wrong."""
    self.proxy.share, self.proxy._random = share, random.Random(seed)
    self.proxy.counts.clear()


@contextlib.contextmanager
def s3(name):
  """moto's server with an empty bucket."""
  import boto3
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  client = boto3.client(
    "s3", endpoint_url=f"http://{host}:{port}", aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1"
  )
  client.create_bucket(Bucket=name)
  try:
    yield Bucket(f"s3://{name}", (host, port), lambda key, content: client.put_object(Bucket=name, Key=key, Body=content))
  finally:
    server.stop()


@contextlib.contextmanager
def gs(name):
  """The emulator of Google Cloud Storage with an empty bucket."""
  from gcp_storage_emulator.server import create_server

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
  server.start()

  def put(key, content):
    upload = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(upload):
      upload.request("POST", f"/upload/storage/v1/b/{name}/o?uploadType=media&name={urllib.parse.quote(key, '')}", content)
      response = upload.getresponse()
      assert response.status == 200, response.read()

  try:
    yield Bucket(f"gs://{name}", ("127.0.0.1", port), put)
  finally:
    server.stop()
