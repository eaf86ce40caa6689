"""What no message of ours holds, and that it is the same message otherwise."""

import pickle
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax import errors
from clip_jax.errors import redact, redacted


@pytest.mark.parametrize(
  ("text", "redacted"),
  [
    ("s3://me:pass@bucket/x", "s3://***@bucket/x"),
    ("s3://me:pa@ss@bucket/x", "s3://***@bucket/x"),
    ("s3://AKIA:ab/cd+e@bucket/x, too", "s3://***@bucket/x, too"),  # keys of Amazon have slashes
    ("see https://h/a?X-Amz-Signature=abc&part=1 for", "see https://h/a?X-Amz-Signature=***&part=1 for"),
    ("gs://b/x?access_token=abc", "gs://b/x?access_token=***"),
    ("https://h/a?sv=1&sig=ab%2Fc", "https://h/a?sv=1&sig=***"),
    ("https://h/a#access_token=abc", "https://h/a#access_token=***"),
    ("h/a?v=1?sig=abc", "h/a?v=1?sig=***"),
    ("('a.tar?X-Goog-Credential=a/b=').", "('a.tar?X-Goog-Credential=***')."),
    ("a.tar?sig=abc: no such file.", "a.tar?sig=***: no such file."),
    ("a.tar?sig=***/003.jpg: no caption", "a.tar?sig=***/003.jpg: no caption"),
  ],
)
def test_secrets_are_taken_out(text, redacted):
  assert redact(text) == redacted


@pytest.mark.parametrize(
  "text",
  [
    "config.train.steps=4, and this config has 5",
    "--config.data.path=gs://b/x: Did you mean x?",
    "Is it x? key=3 & token=4 are not known",
    "gs://bucket/shard-????.tar",
    "gs://bucket/a@b.tar",
    "http://localhost:9000/a@b",
    "mail me@example.org about http://x/",
    "a.tar?sig=",
    "a.tar?part=1&x=2",
  ],
)
def test_ordinary_sentences_stay(text):
  assert redact(text) == text


PIECES = ["://", "?", "&", "#", "=", "@", ":", "/", " ", "\n", "sig", "Key", "a", "80", "***", ".", "'", ")", "s3", "-", "é"]


@settings(max_examples=1000)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join) | st.text())
@example("://a?sig=/b&c@d")
def test_what_is_redacted_stays(text):
  assert redact(redact(text)) == redact(text)


@settings(max_examples=300)
@given(
  before=st.text("abc /.,?&='\"", max_size=20),
  secret=st.text("abcABC019/+%=~*", min_size=1, max_size=40).map(lambda text: f"s3cret{text}"),
  name=st.sampled_from(["X-Amz-Signature", "x-goog-signature", "sig", "access_token", "AWSSecretKey", "password"]),
  after=st.sampled_from(["", ".", ": no such file.", "') ", "&part=1", "\nmore", " and x"]),
)
def test_no_secret_is_left(before, secret, name, after):
  for text in (f"{before} gs://b/a.tar?{name}={secret}{after}", f"{before} a.tar?x=1&{name}={secret}{after}", f"{before} s3://me:{secret}@b/x{after}"):
    for kind in (errors.UsageError, errors.DataError, errors.ConfigError, errors.StorageError, errors.TrainingError):
      error = kind(text)
      for shown in (str(error), repr(error), str(error.args), str(pickle.loads(pickle.dumps(error)))):
        assert "s3cret" not in shown
      assert isinstance(error, ValueError if issubclass(kind, errors.UsageError) else RuntimeError)
  assert after.strip() in str(error)


@settings(max_examples=300)
@given(st.text("abcdefg ,.:;'()=-_/%?\n"))
def test_a_message_without_a_url_is_as_it_was(text):
  assert str(errors.DataError(text)) == text


def test_other_arguments_stay():
  assert errors.DataError(3, "a?sig=b", None).args == (3, "a?sig=***", None) and errors.UsageError().args == ()
  assert "pip install 'clip_jax[torch]'" in str(errors.MissingExtraError("x?token=y", "torch", "torch"))


@pytest.mark.parametrize("piece", ["a://b:c", "x://", "?key", "?sig=;", "?a=&", "@", "a://b:80/", "key", "?sig=.", "w"])
@pytest.mark.parametrize("end", ["", "=", "@", " = :// @"])
def test_a_long_text_takes_no_long_time(piece, end):
  """Messages quote what files hold: what grows with the square of its length would take minutes."""
  begin = time.process_time()
  redact("?" + piece * (200_000 // len(piece)) + end)
  assert time.process_time() - begin < 1


def test_texts_are_found_wherever_they_are_in_a_value():
  url, safe = "s3://user:secret@bucket/a?token=1", "s3://***@bucket/a?token=***"
  value = {"a": [url, 1, None], "b": {"c": (url, 2.5)}, url: True}
  assert redacted(value) == {"a": [safe, 1, None], "b": {"c": [safe, 2.5]}, url: True}  # keys are names of the project
