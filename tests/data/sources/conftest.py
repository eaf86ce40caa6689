"""Shared by the tests of sources: a cache of their own, and a bucket."""

import os

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """A cache of its own for each test, so that no index is found that the test did not cause."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder))
  return folder


class Bucket:
  """A bucket that speaks S3."""

  def __init__(self, client, name):
    self._client, self._name = client, name
    client.create_bucket(Bucket=name)

  def put(self, key, content):
    """Stores an object; returns its URL."""
    self._client.put_object(Bucket=self._name, Key=key, Body=content)
    return self.url(key)

  def put_folder(self, folder, key):
    """Stores the files of a local folder; returns the URL of its copy."""
    for path in folder.rglob("*"):
      if path.is_file():
        self.put(f"{key}/{path.relative_to(folder)}", path.read_bytes())
    return self.url(key)

  def url(self, key):
    """The URL of an object, or of what its key begins with."""
    return f"s3://{self._name}/{key}"


@pytest.fixture(scope="session")
def s3():
  """A bucket of a server on this machine, found through the environment as any other."""
  import boto3
  from moto.server import ThreadedMotoServer

  server = ThreadedMotoServer(port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  endpoint = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}"
  account = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
  before = dict(os.environ)
  os.environ.update(account, AWS_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION="us-east-1")
  yield Bucket(boto3.client("s3", endpoint_url=endpoint), "clip-jax-test")
  server.stop()
  for name in (*account, "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
    os.environ.pop(name)
    if name in before:
      os.environ[name] = before[name]
