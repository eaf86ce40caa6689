"""Errors that are meant for people: one sentence, no traceback, exit code 2."""


class UsageError(ValueError):
  """Wrong usage, config or input. The message says what was wrong, where, and what would be right."""


class ConfigError(UsageError):
  """A config that cannot be run: an unknown key, a wrong type, an impossible combination."""


class DataError(UsageError):
  """Input data that cannot be used: a missing, truncated or malformed file."""


class MissingExtraError(UsageError):
  """An optional package that a feature needs is not installed."""

  def __init__(self, feature, extra, package):
    super().__init__(
      f"{feature} needs the package {package}, which is not installed: "
      f"pip install 'clip_jax[{extra}]'."
    )
