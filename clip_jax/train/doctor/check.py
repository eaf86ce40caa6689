"""What a check finds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Check:
  """What was looked at, and what it is like.

  Attributes:
    name: of the part of the machine.
    status: "ok"; "warning", for what makes training slower or dearer; "wrong", for what stops it; "skipped", where nothing can be said.
    found: a sentence with figures.
    advice: how to mend it; empty where nothing has to be done.
  """

  name: str
  status: str
  found: str
  advice: str = ""


def guarded(name, function, *arguments):
  """The result of a check, or a `Check` that says why it failed.

  The others must go on: those that come after it on this machine, and other processes, which wait for this one.

  Args:
    name: of the check.
    function: what makes it.
    *arguments: what it takes.
  """
  try:
    return function(*arguments)
  except Exception as error:  # of whatever kind: a broken machine fails in any way
    return Check(name, "wrong", f"it cannot be measured: {type(error).__name__}: {first_line(error)}.", "Mend what the message names.")


def first_line(error):
  """The first line of an error's message, without a full stop."""
  return (str(error).strip().splitlines() or ["no reason given"])[0].strip().rstrip(".")
