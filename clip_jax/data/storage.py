"""Byte ranges of local files and of objects in `gs://` and `s3://` buckets, read the same way.

Buckets are read by TensorStore's key-value stores: many requests in flight from C++ threads, outside the interpreter's
lock, and repeated with a growing delay where a server is busy (429), fails (5xx), stalls or drops the connection.
Credentials are those of the platform: Application Default Credentials for Google Cloud; the environment, profile or
instance role for S3, with `AWS_ENDPOINT_URL` for other stores that speak S3 and `AWS_NO_SIGN_REQUEST=1` for public data.
"""

import errno
import fnmatch
import glob
import io
import os
import re
import threading
import time
from pathlib import Path

from clip_jax.data.locations import check, expand_braces, is_remote
from clip_jax.errors import DataError, StorageError, UsageError, redact

DEADLINE = 600.0  # seconds
# A connection that brings nothing for this long is given up and the request repeated; the deadline is for all of them.
STALLED_SECONDS = 30
# Bytes between two ranges that are cheaper to read than a second request, and the most that one request reads.
MAX_GAP, MAX_REQUEST = 16 << 10, 16 << 20
RETRIES = {"max_retries": 64, "initial_delay": "200ms", "max_delay": "15s"}


class Storage:
  """Reads and lists, wherever a path points. Safe to use from many threads."""

  def __init__(self, deadline=DEADLINE):
    """Prepares; nothing is opened yet.

    Args:
      deadline: seconds that one read may take, all its repetitions included.
    """
    self.deadline = deadline
    self._lock, self._buckets = threading.Lock(), {}

  def __reduce__(self):
    return Storage, (self.deadline,)  # connections are of one process

  def read(self, path, start=0, stop=None):
    """Reads a range of bytes.

    Args:
      path: a local path, `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.
      start: the first byte.
      stop: the byte after the last; the end of the file if not given.

    Raises:
      DataError: there is no such file, or it ends before `stop`.
      UsageError: it may not be read.
      StorageError: the store does not answer; trying again later may help.
    """
    (result,) = self.read_many([(path, start, stop)])
    if isinstance(result, DataError):
      raise result
    return result

  def read_many(self, ranges):
    """Reads ranges of bytes, those of buckets all at the same time, and neighbours with one request.

    Args:
      ranges: (path, start, stop) each, as `read` takes them.

    Returns:
      A list of bytes, or of a `DataError` where there are no such bytes.

    Raises:
      UsageError: something may not be read.
      StorageError: a store does not answer; the message names the object.
    """
    results = [None] * len(ranges)
    requests = []
    for members in _neighbours(ranges):
      path, start, stop = ranges[members[0]][0], ranges[members[0]][1], ranges[members[-1]][2]
      future = self._request(path, start, stop) if is_remote(path) else None
      requests.append((members, path, start, stop, future))
    give_up = time.monotonic() + self.deadline
    for members, path, start, stop, future in requests:
      try:
        whole = self._answer(future, path, stop, give_up)[0] if future else _read_local(path, start, stop)
      except DataError as error:
        if len(members) > 1:  # some of them may be there
          for i in members:
            results[i] = self.read_many([ranges[i]])[0]
        else:
          results[members[0]] = error
        continue
      for i in members:
        _, first, last = ranges[i]
        alone = len(members) == 1
        results[i] = whole if alone else whole[first - start : last - start]
    return results

  def size(self, path):
    """The size of a file in bytes."""
    if not is_remote(path):
      return _stat(path).st_size
    # The interface has no question for it, but the answer to a range that cannot be there tells.
    try:
      self._answer(self._request(path, 0, 2**62), path, None, time.monotonic() + self.deadline)
    except _TooShort as error:
      if error.size is not None:
        return error.size
    raise StorageError(f"{path}: its store does not tell its size.")

  def stamps(self, paths):
    """For each file a string that changes when the file does.

    Raises:
      DataError: one of them is not there.
    """
    remote = [self._request(path, 0, 0) if is_remote(path) else None for path in paths]
    give_up = time.monotonic() + self.deadline
    found = []
    for path, future in zip(paths, remote, strict=True):
      if future is None:
        stat = _stat(path)
        found.append(f"{stat.st_size} {stat.st_mtime_ns}")
      else:
        found.append(self._answer(future, path, None, give_up)[1].hex())
    return found

  def expand(self, pattern):
    """The sorted files that a glob stands for; `{00000..00099}` and `{a,b}` are expanded first.

    Raises:
      DataError: a part of the pattern matches no file, or is no path that can be read.
    """
    found = set()
    for part in expand_braces(pattern):
      if is_remote(part):
        matches = self._list(part)
      else:
        found_there = glob.glob(os.path.expanduser(part), recursive=True)
        matches = [path for path in found_there if not os.path.isdir(path)]
        if found_there and not matches:
          raise DataError(f"{part} is a folder. The pattern must match files, such as '{part}/*.tar'.")
      if not matches:
        raise DataError(f"{part}: no such file. The pattern must match files, such as 'DIR/*.tar'.")
      found.update(matches)
    return sorted(found)

  def first(self, prefix):
    """The first object, in the order of names, whose URL begins with another one; None if there is none.

    Args:
      prefix: `gs://BUCKET/...` or `s3://BUCKET/...`.

    Raises:
      UsageError: it may not be listed.
      StorageError: the store does not answer.
    """
    bucket, keys = self._keys(prefix, prefix)
    paths = (bucket + key.decode() for key in sorted(keys))
    # Some stores answer with more; and consoles make objects that stand for folders.
    return next((path for path in paths if path.startswith(prefix) and not path.endswith("/")), None)

  def open(self, path):
    """A seekable binary file, for libraries that want one."""
    return io.BufferedReader(_File(self, path, self.size(path)), 1 << 16)

  def write(self, path, content):
    """Writes a file whole or not at all.

    Raises:
      OSError: it cannot be written there.
    """
    if is_remote(path):
      store, key = self._locate(path)
      try:
        store.write(key, content).result(timeout=self.deadline)
      except Exception as error:  # of whatever kind: the caller has another place for it
        raise OSError(redact(f"{path}: {_reason(error)}")) from error
      return
    path = Path(path)  # hidden until it is whole, from globs as well
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
      temporary.write_bytes(content)
      os.replace(temporary, path)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise

  def _locate(self, path):
    check(path)
    scheme, _, rest = path.partition("://")
    bucket, _, key = rest.partition("/")
    with self._lock:
      if (scheme, bucket) not in self._buckets:
        self._buckets[scheme, bucket] = _open_bucket(scheme, bucket)
      return self._buckets[scheme, bucket], key

  def _request(self, path, start, stop):
    store, key = self._locate(path)
    return store.read(key, byte_range=slice(start, stop))

  def _answer(self, future, path, stop, give_up):
    # The bytes and the generation of what was asked for.
    try:
      result = future.result(timeout=max(give_up - time.monotonic(), 0.001))
    except TimeoutError:
      future.cancel()
      raise StorageError(f"{path} has not been read within {self.deadline:g} seconds.") from None
    except ValueError as error:
      raise _explained(error, path, stop) from error
    if result.state != "value":
      raise DataError(f"{path}: no such file.")
    return result.value, result.stamp.generation

  def _list(self, pattern):
    prefix = re.split(r"[*?\[]", pattern)[0]
    store, key = self._locate(prefix)
    if prefix == pattern:
      future = store.read(key, byte_range=slice(0, 0))
      try:
        self._answer(future, pattern, None, time.monotonic() + self.deadline)
      except DataError:
        return []
      return [pattern]
    bucket, keys = self._keys(pattern, prefix)
    # As in a file system, a star does not go from one folder into the next.
    matches = re.compile(fnmatch.translate(pattern).replace(".*", "[^/]*")).match
    return [path for path in (bucket + name.decode() for name in keys) if matches(path)]

  def _keys(self, asked, prefix):
    # The bucket and all keys in it that begin with what a URL ends with; what was asked for is for the message.
    store, key = self._locate(prefix)
    start = key.encode()
    everything = type(store).KeyRange(start, _after(start)) if start else type(store).KeyRange()
    try:
      keys = store.list(everything).result(timeout=self.deadline)
    except TimeoutError:
      raise StorageError(f"{asked} has not been listed within {self.deadline:g} seconds.") from None
    except ValueError as error:
      raise _explained(error, asked, None) from error
    return prefix[: len(prefix) - len(key)], keys


class _File(io.RawIOBase):
  def __init__(self, storage, path, size):
    self._storage, self._path, self._size, self._at = storage, path, size, 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def tell(self):
    return self._at

  def seek(self, offset, whence=os.SEEK_SET):
    self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
    return self._at

  def readinto(self, buffer):
    stop = min(self._at + len(buffer), self._size)
    count = max(stop - self._at, 0)
    if count:
      buffer[:count] = self._storage.read(self._path, self._at, stop)
      self._at = stop
    return count


class _TooShort(DataError):
  def __init__(self, path, stop, size):
    self.size = size
    super().__init__(f"{path}: ends before byte {stop:,}." if stop else f"{path}: ends too early.")


def _neighbours(ranges):
  # Groups of indices whose ranges follow one another in one file, in that order.
  order = sorted(range(len(ranges)), key=lambda i: (ranges[i][0], ranges[i][1]))
  groups = []
  for i in order:
    path, start, stop = ranges[i]
    if groups and stop is not None:
      last_path, first, end = groups[-1][1]
      if path == last_path and end is not None and start - end <= MAX_GAP and max(stop, end) - first <= MAX_REQUEST and stop >= end:
        groups[-1][0].append(i)
        groups[-1][1] = path, first, stop
        continue
    groups.append([[i], (path, start, stop)])
  return [members for members, _ in groups]


def _open_bucket(scheme, bucket):
  # Read when the first connection is made.
  os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(STALLED_SECONDS))
  os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
  import tensorstore as ts

  if scheme == "gs":
    spec = {"driver": "gcs", "bucket": bucket, "context": {"gcs_request_retries": RETRIES}}
  else:
    spec = {"driver": "s3", "bucket": bucket, "context": {"s3_request_retries": RETRIES}}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:  # with a region that is not looked up, for the look-up asks Amazon
      spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    elif region:
      spec["aws_region"] = region
    if os.environ.get("AWS_NO_SIGN_REQUEST"):
      spec["context"]["aws_credentials"] = {"type": "anonymous"}
  try:
    return ts.KvStore.open(spec).result()
  except ValueError as error:
    raise DataError(f"{scheme}://{bucket} cannot be opened: {_reason(error)}") from error


def _explained(error, path, stop):
  text = str(error)
  if "OUT_OF_RANGE" in text:
    size = re.search(r"total size (\d+)", text)
    return _TooShort(path, stop, int(size[1]) if size else None)
  if re.match("PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|NOT_FOUND|FAILED_PRECONDITION", text):
    return UsageError(f"{path} cannot be read: {_reason(error)}")
  return StorageError(f"{path} cannot be read: {_reason(error)}")


def _reason(error):
  # Without the source lines and request headers that follow.
  return re.split(r"\s*\[\w+='|\n", str(error))[0]


def _after(prefix):
  # The smallest string greater than all that start with the prefix.
  trimmed = prefix.rstrip(b"\xff")
  return trimmed[:-1] + bytes([trimmed[-1] + 1])


def _stat(path):
  try:
    return os.stat(path)
  except OSError as error:
    raise DataError(f"{path} cannot be read ({error.strerror}).") from error


def _read_local(path, start, stop):
  # Opened for each read: a descriptor kept for each of 10,000 shards would be over the usual limit.
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except FileNotFoundError:
    raise DataError(f"{path}: no such file.") from None
  except OSError as error:
    # Of a name that no file can have, only the record that gives it is wrong.
    kind = DataError if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) else UsageError
    raise kind(f"{path} cannot be read ({error.strerror}).") from error
  try:
    stop = os.fstat(descriptor).st_size if stop is None else stop
    content = os.pread(descriptor, stop - start, start)
  except IsADirectoryError:
    raise DataError(f"{path} is a folder.") from None
  except OSError as error:  # of a disk that fails: another try may go well
    raise StorageError(f"{path} cannot be read ({error.strerror}).") from error
  finally:
    os.close(descriptor)
  if len(content) != stop - start:
    raise _TooShort(path, stop, None)
  return content
