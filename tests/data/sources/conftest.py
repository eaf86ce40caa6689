"""Shared by the tests of sources: a cache of their own, and a bucket."""

import pytest

from tests.data import buckets


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """A cache of its own for each test, so that no index is found that the test did not cause."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder))
  return folder


@pytest.fixture(scope="session")
def s3():
  """A bucket of a server on this machine, found through the environment as any other."""
  with buckets.s3("clip-jax-test") as bucket, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket.environment.items():
      patch.setenv(name, value)
    yield bucket
