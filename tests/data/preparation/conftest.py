"""Shared by the tests of preparation: a cache of their own."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  """A cache of its own for each test, so that no index is found that the test did not cause."""
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder))
  return folder
