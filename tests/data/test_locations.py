"""What paths and URLs may be, and what of them may be shown."""

import pytest

from clip_jax.data import locations
from clip_jax.errors import DataError


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("https://host/a.tar", "only local paths, gs:// and s3:// can be read"),
    ("s3://user:secret@bucket/a.tar", r"s3://\*\*\*@bucket/a.tar: credentials do not belong in a path"),
    ("s3://user:sec/secret@bucket/a.tar", r"s3://\*\*\*@bucket/a.tar: credentials do not belong in a path"),
    ("gs:///a.tar", "the name of the bucket is missing"),
  ],
)
def test_a_path_that_cannot_be_read(path, message):
  with pytest.raises(DataError, match=message) as caught:
    locations.check(path)
  assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
  ("path", "name"),
  [
    ("a.tar", "a.tar"),
    ("/data/a.tar", "a.tar"),
    ("s3://bucket/b/a.tar?x=1&sig=ab/cd", "a.tar?x=1&sig=***"),  # a signature may have slashes
  ],
)
def test_what_records_are_called_after(path, name):
  assert locations.file_name(path) == name


@pytest.mark.parametrize("path", ["a.tar", "/data/x@y.tar", "gs://bucket/a@b.tar", "s3://bucket/a.tar", "C:/x"])
def test_a_path_that_can_be_read(path):
  locations.check(path)
  assert locations.is_remote(path) == path.startswith(("gs", "s3"))
