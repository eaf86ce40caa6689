"""Pictures that look different from one another, and shards of them."""

import io
import json
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed, width=96, height=80):
  """Soft colours, some discs, and fine grain: a picture of its own for each seed."""
  random = np.random.default_rng(seed)
  soft = cv2.resize(random.uniform(0, 255, (6, 6, 3)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
  for _ in range(6):
    centre = tuple(int(at) for at in random.integers(0, min(width, height), 2))
    color = tuple(int(value) for value in random.integers(0, 255, 3))
    cv2.circle(soft, centre, int(random.integers(4, max(5, width // 5))), color, -1)
  grain = cv2.resize(random.normal(0, 12, (height // 2, width // 2, 3)).astype(np.float32), (width, height))
  return np.clip(soft + grain, 0, 255).astype(np.uint8)


def encoded(pixels, kind="jpeg", **options):
  """A picture as a file."""
  content = io.BytesIO()
  Image.fromarray(pixels).save(content, kind, **options)
  return content.getvalue()


def jpeg(seed, quality=92, **size):
  """A picture as a JPEG."""
  return encoded(picture(seed, **size), quality=quality)


def members(image, caption, kind="jpg", **about):
  """The members of a record by their kinds."""
  return {kind: image, "txt": caption.encode()} | ({"json": json.dumps(about).encode()} if about else {})


def write_tar(path, records, first=0):
  """Writes records, each a dict of members by kinds, or a (name, dict)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as archive:
    for i, record in enumerate(records, first):
      key, parts = record if isinstance(record, tuple) else (f"{i:06}", record)
      for kind, content in parts.items():
        member = tarfile.TarInfo(f"{key}.{kind}")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
  return str(path)


def write_parquet(path, rows, row_group_size=7):
  """Writes dicts of columns."""
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
  return str(path)


def tree(folder):
  """The content of all files below a folder, by name."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
