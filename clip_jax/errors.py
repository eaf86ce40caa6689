"""Errors that are meant for people: one sentence, no traceback, exit code 2."""


import difflib


class UsageError(ValueError):
  """Wrong usage, config or input. The message says what was wrong, where, and what would be right."""


class ConfigError(UsageError):
  """A config that cannot be run: an unknown key, a wrong type, an impossible combination."""


class DataError(UsageError):
  """Input data that cannot be used: a missing, truncated or malformed file."""


class StorageError(RuntimeError):
  """A disk or a bucket that does not answer, after all attempts: nothing is wrong with what was asked for.

  A record behind it must not be replaced by another, or the order of examples would depend on the weather.
  """


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
