"""The files of ArrayRecord: Riegeli/records chunks, with the places of all chunks at the end.

The package array_record opens local paths only; this reads byte ranges, wherever they come from. A file is

    signature | chunk | chunk | ... | footer chunk | zeros up to a multiple of 64 KiB | postscript chunk in 64 KiB

and at each multiple of 64 KiB a block header of 24 bytes interrupts whatever is there. The formats:
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md and
https://github.com/google/array_record/blob/main/cpp/layout.proto. Hashes (HighwayHash) are not verified.
"""

import struct
from typing import NamedTuple

import numpy as np

from clip_jax.errors import DataError

BLOCK, BLOCK_HEADER = 1 << 16, 24
CHUNK_HEADER = struct.Struct("<QQQQQ")  # hash, size, hash of the data, type and number of records, size when decoded
SIMPLE, TRANSPOSED = ord("r"), ord("t")
CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}

MAGIC = 0x71930E704FDAE05E
POSTSCRIPT = 1 << 10  # bytes of it that are read; it has about 50
MAX_CHUNK = 1 << 31  # bytes that a chunk may claim to be when decoded


class Chunks(NamedTuple):
  """Where the chunks of a file lie.

  Attributes:
    offsets: uint64 [chunks + 1], where each begins, and where the last one ends.
    records: the number of records in the file.
    group: the number of records in each chunk; there may be fewer in the last one.
  """

  offsets: np.ndarray
  records: int
  group: int


def chunks(storage, path):
  """Reads where the chunks of a file lie.

  Args:
    storage: a `Storage`.
    path: an ArrayRecord file.

  Raises:
    DataError: it is none, it is cut off, or it is of a kind that cannot be read.
  """
  begin = storage.size(path) - BLOCK
  if begin < BLOCK or begin % BLOCK:
    raise DataError(f"{path} is no ArrayRecord file, or is cut off: its size is no multiple of 64 KiB. Copy it again.")
  try:
    postscript = _fields(decode(storage.read(path, begin, begin + POSTSCRIPT), begin)[0])
    if postscript.get(2) != MAGIC or not 0 < postscript.get(1, 0) < begin:
      raise _Malformed("the postscript has another mark")
  except (_Malformed, IndexError, TypeError) as error:
    raise DataError(f"{path} is no ArrayRecord file, or is cut off ({error}). Copy it again.") from error
  footer = postscript[1]
  try:
    about, *places = decode(storage.read(path, footer, begin), footer)
    about = _fields(_fields(about)[1])
    if about[1] != 1:
      raise _Malformed(f"version {about[1]} of the format")
    transposed = b"transpose:true" in about.get(4, b"")  # the writer's options, as a text
    found = _places(places, footer, about)
  except (_Malformed, LookupError, TypeError, ValueError) as error:
    raise DataError(f"{path}: its footer cannot be read ({error}). Copy it again.") from error
  if transposed:
    raise DataError(f"{path}: {_TRANSPOSED}")
  return found


def decode(content, at):
  """Decodes the records of a chunk.

  Args:
    content: bytes of the file from the chunk's first on; there may be more than the chunk.
    at: where they lie in the file.

  Returns:
    A list of bytes.

  Raises:
    DataError: they are damaged, or transposed.
  """
  content = _strip(content, at)
  if len(content) < CHUNK_HEADER.size:
    raise _Malformed("a chunk is cut off")
  _, size, _, kind, decoded = CHUNK_HEADER.unpack_from(content)
  kind, records = kind & 255, kind >> 8
  data = memoryview(content)[CHUNK_HEADER.size : CHUNK_HEADER.size + size]
  if kind == TRANSPOSED:
    raise _Malformed(_TRANSPOSED)
  if kind != SIMPLE or len(data) != size or not size:
    raise _Malformed("there is no chunk of records at its place")
  sizes, start = _varint(data, 1)
  values = _inflate(data[0], data[start + sizes :])
  sizes = varints(_inflate(data[0], data[start : start + sizes])) if records else ()
  if len(sizes) != records or len(values) != decoded or sum(map(int, sizes)) != decoded:
    raise _Malformed("the sizes of a chunk's records contradict each other")
  ends = np.cumsum(sizes, dtype=np.int64).tolist()
  return [bytes(values[end - int(n) : end]) for n, end in zip(sizes, ends, strict=True)]


def varints(content):
  """Decodes a run of protobuf's numbers of variable length; uint64 [numbers]."""
  parts = np.frombuffer(content, np.uint8)
  if not len(parts):
    return np.empty(0, np.uint64)
  last = np.flatnonzero(parts < 128)
  if not len(last) or last[-1] != len(parts) - 1:
    raise _Malformed("a number is cut off")
  first = np.concatenate([[0], last[:-1] + 1])
  lengths = last - first + 1
  if lengths.max() > 10:
    raise _Malformed("a number is too long")
  shifts = 7 * (np.arange(len(parts)) - np.repeat(first, lengths))
  return np.add.reduceat((parts & 127).astype(np.uint64) << shifts.astype(np.uint64), first)


class _Malformed(DataError):
  """What is wrong with a chunk; its message does not name the file."""


_TRANSPOSED = "its records are transposed, which cannot be read; write it without the option 'transpose'."


def _strip(content, at):
  # Without the headers of the blocks that begin in it.
  first = -at % BLOCK
  if first >= len(content):
    return content
  view = memoryview(content)
  pieces = [view[start + BLOCK_HEADER : start + BLOCK] for start in range(first, len(content), BLOCK)]
  return b"".join([view[:first], *pieces])


def _inflate(compression, data):
  if not compression:
    return data
  if compression not in CODECS:
    raise _Malformed(f"compression {chr(compression)!r} is not known")
  size, start = _varint(data, 0)
  if size > MAX_CHUNK:
    raise _Malformed(f"a chunk of {size:,} bytes")
  if not size:
    return b""
  import pyarrow as pa

  try:
    return pa.decompress(data[start:], decompressed_size=size, codec=CODECS[compression], asbytes=True)
  except (OSError, ValueError) as error:
    raise _Malformed(str(error)) from error


def _varint(data, at):
  # The number at a place, and the place after it.
  result = 0
  for i, byte in enumerate(data[at : at + 10]):
    result |= (byte & 127) << 7 * i
    if byte < 128:
      return result, at + i + 1
  raise _Malformed("a number is cut off")


def _fields(message):
  # The numbers and strings of a protobuf message, by field; the other kinds are not in these messages.
  found, at = {}, 0
  while at < len(message):
    tag, at = _varint(message, at)
    value, at = _varint(message, at)
    if tag & 7 == 2:
      value, at = message[at : at + value], at + value
    elif tag & 7:
      raise _Malformed(f"a field of kind {tag & 7}")
    found[tag >> 3] = value
  return found


def _places(places, footer, about):
  # Each has the same three numbers with their tags: where a chunk begins, its decoded size, and its records.
  if len(places) != about[2]:
    raise _Malformed(f"{len(places):,} of {about[2]:,} chunks")
  if not places:
    return Chunks(np.array([footer], np.uint64), 0, 1)
  table = varints(b"".join(places)).reshape(-1, 6)
  if len(table) != len(places) or (table[:, ::2] != np.array([8, 16, 24], np.uint64)).any():
    raise _Malformed("it is not a table of chunks")
  offsets, counts = np.append(table[:, 1], np.uint64(footer)), table[:, 5]
  if (np.diff(offsets.astype(np.int64)) <= 0).any() or not counts.all():
    raise _Malformed("its chunks are not in order")
  if (counts[:-1] != counts[0]).any() or counts[-1] > counts[0] or counts.sum() != about[3]:
    raise _Malformed("its chunks hold different numbers of records")
  return Chunks(offsets, int(about[3]), int(counts[0]))
