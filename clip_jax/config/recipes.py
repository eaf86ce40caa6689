"""Recipes on a command line: --config=FILE[:ARGUMENT], and --config.a.b=value for each key that is changed."""

import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from clip_jax.config import check_key
from clip_jax.errors import UsageError

FLAG = re.compile(r"--?(?:no)?config(?:\.([^=]+))?(=.*)?")


def split(arguments):
  """Tells flags of the config from others.

  Args:
    arguments: of a command line, without the program's name.

  Returns:
    Two lists of them: those that start with --config, with the values that follow them, and the rest.
  """
  own, others, following = [], [], False
  for argument in arguments:
    flag = FLAG.fullmatch(argument)
    value = following and not argument.startswith("-")
    (own if flag or value else others).append(argument)
    following = bool(flag) and flag[2] is None
  return own, others


def load(arguments):
  """Reads a recipe, with its changes.

  Args:
    arguments: flags of the config, as `split` finds them: one --config, and any number of --config.a.b.

  Returns:
    A `ConfigDict`; None if no --config is among them.

  Raises:
    UsageError: a recipe that cannot be loaded, or a change of a key that does not exist or has another type.
  """
  named = name(arguments)
  changed = [flag[1] for argument in arguments if (flag := FLAG.fullmatch(argument)) and flag[1]]
  for key in changed:
    check_key(key)
  # Recipes import the one they start from by the name of their folder, which lies wherever they do.
  above = Path(named.partition(":")[0]).resolve().parent.parent
  if named and str(above) not in sys.path:
    sys.path.append(str(above))
  sys.modules.pop("config_config", None)  # as ml_collections calls each recipe: one without get_config would be taken for the one before
  found = flags.FlagValues()
  argv = ["", *arguments]
  config = config_flags.DEFINE_config_file("config", None, "A recipe.", flag_values=found, sys_argv=argv)
  try:
    found(argv)
  except flags.Error as error:
    said = str(error).strip()
    if "Traceback" in said:  # of what the recipe itself raised
      raise UsageError(f"--config={named} cannot be loaded: {_last_line(said)}") from error
    raise UsageError(said) from error
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if not changed:
      raise UsageError(f"--config={named} cannot be loaded: {type(error).__name__} {error}") from error
    raise UsageError(
      f"One of --config.{', --config.'.join(changed)} cannot be set ({' '.join(str(error).split())}); "
      "the recipe must have the key, as those that start from configs/base.py do."
    ) from error
  except Exception as error:  # whatever else a recipe may raise, or that it is no Python
    raise UsageError(f"--config={named} cannot be loaded: {type(error).__name__} {' '.join(str(error).split())}") from error
  if config.value is None and not named:
    return None
  try:
    return config.value.copy_and_resolve_references()
  except OSError as error:  # of a recipe that is missing or cannot be run, with the reason last
    raise UsageError(f"--config={named} cannot be loaded: {_last_line(error)}") from error
  except AttributeError as error:
    raise UsageError(f"--config={named} cannot be loaded: its get_config() returns no ConfigDict.") from error


def _last_line(text):
  return str(text).strip().splitlines()[-1].strip()


def name(arguments):
  """The recipe that is named: "configs/vitb16.py"; an empty string if none is.

  Args:
    arguments: of a command line.
  """
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
    if flag := re.fullmatch(r"--?config(=.*)?", argument):
      return flag[1][1:] if flag[1] else following
  return ""
