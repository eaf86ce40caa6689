"""What arguments of the command may be, and how it shows that it works."""

import argparse
import re
import sys


def number_of_bytes(text):
  """A size, such as 5GB."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
  if not match or not float(match[1]):
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; 5GB and 500MB are.")
  return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def count(text):
  """A whole number from 1 on."""
  if not re.fullmatch(r"0*[1-9]\d{0,11}", text, re.ASCII):
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on.")
  return int(text)


def count_or_none(text):
  """A whole number from 0 on, or "none"."""
  return None if text == "none" else 0 if text == "0" else count(text)


def counts(text):
  """Whole numbers from 1 on, with commas between them."""
  return tuple(map(count, text.split(",")))


def seconds(text):
  """A positive number of seconds."""
  if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text, re.ASCII) or not float(text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds.")
  return float(text)


def price(text):
  """An amount of money."""
  if not re.fullmatch(r"\d+(\.\d+)?|\.\d+", text, re.ASCII):
    raise argparse.ArgumentTypeError(f"{text!r} is not a price; 1.20 is.")
  return float(text)


def tracker(what):
  """A function that passes items on and shows a person how far that is."""
  from rich.console import Console
  from rich.progress import track

  # To stderr, and only for people: standard output is for the result.
  return lambda items: track(items, what, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
