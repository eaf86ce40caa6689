"""Errors that are meant for people: one sentence, no traceback, exit code 2; and what no sentence may hold."""

import difflib
import re

# Of all programs here, beside 0 for done: anything else that goes wrong, what was given cannot be used, and EX_TEMPFAIL of sysexits.h:
# stopped early with everything saved, start it again.
EXIT_FAILED, EXIT_USAGE, EXIT_TRY_AGAIN = 1, 2, 75

# What signs a request, in the query of a URL: a name that tells it, and a value. The sentence's own marks after it stay, and
# so does what follows a value that is taken out already, as the name of a record does.
# Nothing is tried twice (`++`, `?>`): messages quote what files hold, which may be long, and made to take long.
_SIGNED = re.compile(
  r"(?<=[?&#])(?=[\w.-]++=)((?>[\w.-]*?(?:token|secret|password|signature|credential|key|sig|auth))[\w.-]*+)"
  r"=(?!\*\*\*)[^&\s]*[^&\s.,:;!?'\")\]}>]",
  re.IGNORECASE,
)
# User and password. What follows a colon may have slashes, as keys of Amazon do, unless the colon is that of a port.
_USER = re.compile(r"(?<=\w)://(?:[^/:@]*:(?!\d*/).*|[^/]*)@")


def redact(text):
  """Takes the secrets out of the URLs in a text: user and password, and what signs a request.

  Args:
    text: any; one that was redacted before stays as it is.
  """
  if "=" in text:
    text = _SIGNED.sub(r"\1=***", text)
  return re.sub(r"\S+", _without_user, text) if "://" in text and "@" in text else text


def redacted(value):
  """A value as JSON has it, with `redact` done to each text in it.

  Args:
    value: of any type; texts in dicts, lists and tuples are found.
  """
  if isinstance(value, dict):
    return {name: redacted(one) for name, one in value.items()}
  if isinstance(value, list | tuple):
    return [redacted(one) for one in value]
  return redact(value) if isinstance(value, str) else value


def _without_user(word):
  end = word[0].rfind("@") + 1
  return _USER.sub("://***@", word[0][:end]) + word[0][end:]


class _ForPeople(Exception):
  # Messages name paths, and are printed, logged, and written to reports. So none ever holds what would open a bucket.

  def __init__(self, *args):
    super().__init__(*redacted(args))


class UsageError(_ForPeople, ValueError):
  """Wrong usage, config or input. The message says what was wrong, where, and what would be right."""


class ConfigError(UsageError):
  """A config that cannot be run: an unknown key, a wrong type, an impossible combination."""


class DataError(UsageError):
  """Input data that cannot be used: a missing, truncated or malformed file."""


class StorageError(_ForPeople, RuntimeError):
  """A disk or a bucket that does not answer, after all attempts: nothing is wrong with what was asked for.

  A record behind it must not be replaced by another, or the order of examples would depend on the weather.
  """


class TrainingError(_ForPeople, RuntimeError):
  """A run that must not go on as it is: its numbers, or the memory they are in. The message says what was kept, and what to do."""


class MissingExtraError(UsageError):
  """An optional package that a feature needs is not installed."""

  def __init__(self, feature, extra, package):
    super().__init__(
      f"{feature} needs the package {package}, which is not installed: "
      f"pip install 'clip_jax[{extra}]'."
    )


def did_you_mean(name, known, otherwise, cutoff=0.6):
  """The end of a message about a name that is not known.

  Args:
    name: what was given.
    known: what would be accepted.
    otherwise: what to say if nothing is like it.
    cutoff: how alike two names must be, from 0 to 1.
  """
  near = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
  return f"Did you mean {near[0]}?" if near else otherwise
