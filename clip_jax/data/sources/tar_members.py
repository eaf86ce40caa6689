"""The members of a tar archive, read from its headers alone.

The formats are those of POSIX.1-1988 (ustar), POSIX.1-2001 (pax) and GNU tar. A record of a shard is a run of members that
share their folder and their name up to its first dot, as in webdataset.
"""

import re
from typing import NamedTuple

BLOCK = 512
NO_DATA = b"123456"  # links, devices, folders and pipes: their size, if they state one, is of something else
PLAIN = b"0\0007"
LONGEST_NAME = 1 << 16  # bytes of an extended header; a larger one is damage


class Member(NamedTuple):
  """One member, as its header describes it."""

  name: str
  key: str  # folder and name up to the first dot of the name
  extension: str  # what follows that dot, in lower case
  begin: int  # of its first header
  data: int  # where its content begins
  size: int  # of its content, bytes
  plain: bool  # a file with content of its own

  @property
  def hidden(self):
    """Whether its name begins with a dot, as that of what some systems pack beside a file."""
    return self.key.endswith("/")

  @property
  def end(self):
    """The byte after its last block."""
    return self.data + (-(-self.size // BLOCK) * BLOCK if self.size else 0)


class Damaged(ValueError):
  """What was found instead of a header; `key` is that of the member it goes through, if known."""

  def __init__(self, reason, key=None):
    super().__init__(reason)
    self.key = key


def members(read, begin, size):
  """Yields the members of an archive, up to its end mark.

  Args:
    read: a function from first byte and number of bytes to as many bytes, or fewer at the end of the file.
    begin: where to begin, a multiple of 512.
    size: of the file, bytes.

  Raises:
    Damaged: there is no header where one should be, or the archive ends without its mark.
  """
  while True:
    at, name, stated = begin, None, {}
    while True:
      kind, header_name, length = _header(read(at, BLOCK), at)
      if kind is None:
        return
      data = at + BLOCK
      if kind not in b"xgLK":
        break
      if not 0 <= length <= LONGEST_NAME:
        raise Damaged(f"an extended header of {length:,} bytes at byte {at:,}")
      content = read(data, length)
      if len(content) < length:
        raise Damaged(f"no end-of-archive mark at byte {size:,}")
      if kind == b"x":
        stated = _pax(content, at)
      elif kind == b"L":
        name = _text(content.rstrip(b"\0"))
      at = data + -(-length // BLOCK) * BLOCK
    name = stated.get("path", name if name is not None else header_name)
    length = _whole_number(stated.get("size", length), at)
    member = _member(name, kind, begin, data, length, sparse=any(key.startswith("GNU.sparse") for key in stated))
    # An offset that goes back comes from a damaged size, and would be followed in circles.
    if member.size < 0 or member.end > size:
      raise Damaged(f"member {name} at byte {data:,}", member.key)
    yield member
    begin = member.end


def _member(name, kind, begin, data, size, sparse):
  folder, _, last = name.rpartition("/")
  base, _, extension = last.partition(".")
  if kind in NO_DATA or (kind == b"\0" and name.endswith("/")):
    size = 0
  plain = kind in PLAIN and not sparse and not name.endswith("/")
  return Member(name, f"{folder}/{base}", extension.lower(), begin, data, size, plain)


def _header(block, at):
  # Kind, name and size; a kind of None is the mark of the end.
  if len(block) < BLOCK:
    raise Damaged(f"no end-of-archive mark at byte {at:,}")
  if not any(block):
    return None, "", 0
  try:
    stated = _octal(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if stated != unsigned and stated != _signed(block):
      raise ValueError
    size = int.from_bytes(block[124:136], "big", signed=True) if block[124] & 0x80 else _octal(block[124:136])
  except ValueError:
    raise Damaged(f"a damaged header at byte {at:,}") from None
  if block[124] == 0x80:
    size = int.from_bytes(block[125:136], "big")
  if block[156:157] == b"S":
    raise Damaged(f"a sparse member at byte {at:,}")
  name = _text(block[:100].partition(b"\0")[0])
  prefix = block[345:500].partition(b"\0")[0]
  if prefix and block[257:263] == b"ustar\0":
    name = f"{_text(prefix)}/{name}"
  return block[156:157], name, size


def _signed(block):
  # The sum of old tars that counted bytes over 127 as negative.
  return sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:]) + 8 * 32


def _octal(field):
  return int(field.replace(b"\0", b" ").split(b" ")[0] or field.strip(b" \0") or b"0", 8)


def _whole_number(value, at):
  try:
    return int(value)
  except ValueError:
    raise Damaged(f"a damaged header at byte {at:,}") from None


def _pax(content, at):
  found = {}
  while content.strip(b"\0"):
    match = re.match(rb"(\d{1,6}) ([^=]+)=", content)
    if not match or not match.end() <= int(match[1]) <= len(content):
      raise Damaged(f"a damaged header at byte {at:,}")
    length = int(match[1])
    found[_text(match[2])] = _text(content[match.end() : length - 1])
    content = content[length:]
  return found


def _text(raw):
  return raw.decode("utf-8", "backslashreplace")
