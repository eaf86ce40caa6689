"""What paths and URLs may be, and what of them may be shown."""

import pytest

from clip_jax.data import locations
from clip_jax.errors import DataError


@pytest.mark.parametrize(
  ("text", "redacted"),
  [
    ("s3://me:pass@bucket/x", "s3://***@bucket/x"),
    ("see https://h/a?X-Amz-Signature=abc&part=1 for", "see https://h/a?X-Amz-Signature=***&part=1 for"),
    ("gs://b/x?access_token=abc", "gs://b/x?access_token=***"),
    ("https://h/a?sv=1&sig=ab%2Fc", "https://h/a?sv=1&sig=***"),
    ("gs://bucket/shard-????.tar", "gs://bucket/shard-????.tar"),
    ("mail me@example.org", "mail me@example.org"),
  ],
)
def test_secrets_are_taken_out(text, redacted):
  assert locations.redact(text) == redacted


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("https://host/a.tar", "only local paths, gs:// and s3:// can be read"),
    ("s3://user:secret@bucket/a.tar", r"s3://\*\*\*@bucket/a.tar: credentials do not belong in a path"),
    ("gs:///a.tar", "the name of the bucket is missing"),
  ],
)
def test_a_path_that_cannot_be_read(path, message):
  with pytest.raises(DataError, match=message) as caught:
    locations.check(path)
  assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["a.tar", "/data/x@y.tar", "gs://bucket/a@b.tar", "s3://bucket/a.tar", "C:/x"])
def test_a_path_that_can_be_read(path):
  locations.check(path)
  assert locations.is_remote(path) == path.startswith(("gs", "s3"))
