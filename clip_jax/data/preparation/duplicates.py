"""Which records are copies of others, of arrays of `manifest.ROW`.

Nothing here depends on the order of the rows, nor on how they are split up, as long as those that can be equal come
together: by their pixels, by their perceptual hash, by one masked value of that, or by their leader. Ids from `EXCLUDED` on
are images to keep out of training; they win over everything.
"""

import numpy as np

from clip_jax.data.preparation.manifest import EXCLUDED

MOST_MERGED = 64  # records whose captions come together; the rest of a larger group is mostly one placeholder
CONTAMINATION, NEAR = 1, 2
REASONS = {CONTAMINATION: "contamination", NEAR: "near_duplicate"}
DROP = np.dtype([("leader", "<u8"), ("why", "u1")])


def same_pixels(rows, same_image):
  """Drops what has the same pixels.

  Args:
    rows: `ROW`s.
    same_image: as in `Settings`.

  Returns:
    The rows that stay, with their leaders; those to keep out, each image once; and the numbers of rows that are dropped by
    reason. With "merge", a row that is not its own leader stays for its captions only.
  """
  rows = rows[np.lexsort((rows["id"], rows["pixels"][:, 1], rows["pixels"][:, 0]))].copy()
  begins = np.append(True, (rows["pixels"][1:] != rows["pixels"][:-1]).any(axis=1)) if len(rows) else np.zeros(0, bool)
  group = np.cumsum(begins) - 1
  first = np.flatnonzero(begins)
  rows["leader"] = rows["id"][first][group]
  outside = rows["id"] >= EXCLUDED
  dirty = np.zeros(len(first), bool)
  dirty[group[outside]] = True
  keep_out = rows[outside][np.unique(group[outside], return_index=True)[1]]
  counts = {"contamination": int((dirty[group] & ~outside).sum())}
  clean = ~dirty[group]
  total, rows, group = int(clean.sum()), rows[clean], group[clean]
  # Of the same captions the first stays.
  by_text = np.lexsort((rows["id"], rows["texts"], group))
  rows, group = rows[by_text], group[by_text]
  again = np.append(False, (group[1:] == group[:-1]) & (rows["texts"][1:] == rows["texts"][:-1])) if len(rows) else group > 0
  rows, group = rows[~again], group[~again]
  if same_image == "first":
    rows = rows[rows["id"] == rows["leader"]]
  elif same_image == "merge" and len(rows):
    back = np.lexsort((rows["id"], group))
    rows, group = rows[back], group[back]
    rank = np.arange(len(rows)) - np.searchsorted(group, group)
    rows = rows[rank < MOST_MERGED]
  counts["duplicate"] = total - len(rows)
  return rows, keep_out, counts


def similar(rows, mask, near, exclude):
  """Finds rows that look like a better one: the larger image, then the first record.

  All pairs are looked at that agree in the masked bits, and no others.

  Args:
    rows: `ROW`s that have a perceptual hash, and are their own leaders.
    mask: uint64.
    near: bits in which hashes of two records may differ; None: records are not compared.
    exclude: the same with images to keep out.

  Returns:
    `DROP`s.
  """
  outside = rows["id"] >= EXCLUDED
  key = rows["looks"] & mask
  order = np.lexsort((rows["id"], -rows["area"].astype(np.int64), ~outside, key))
  rows, key, outside = rows[order], key[order], outside[order]
  why = np.zeros(len(rows), np.uint8)
  left, step = np.arange(len(rows)), 1
  while True:
    # Rows of the same key are neighbours, so each is compared to the next, the next but one ... as long as that is of its key.
    left = left[left + step < len(rows)]
    left = left[key[left] == key[left + step]]
    if not len(left):
      break
    right = left + step
    distance = np.bitwise_count(rows["looks"][left] ^ rows["looks"][right])
    for limit, from_outside, reason in ((near, False, NEAR), (exclude, True, CONTAMINATION)):
      if limit is not None:
        hit = right[(distance <= limit) & (outside[left] == from_outside)]
        why[hit] = np.where((why[hit] == 0) | (reason < why[hit]), reason, why[hit])
    step += 1
  hit = (why > 0) & ~outside
  found = np.zeros(int(hit.sum()), DROP)
  found["leader"], found["why"] = rows["leader"][hit], why[hit]
  return found


def same_looks(rows, near, exclude):
  """Compares rows of the same perceptual hash, so that `similar` has few to compare.

  What is dropped here changes nothing for others: a better row with the same hash stays.

  Args:
    rows: as for `similar`.
    near: as for `similar`.
    exclude: as for `similar`.

  Returns:
    The rows that are still to be compared to others, and `DROP`s.
  """
  everything, near = np.uint64(2**64 - 1), None if near is None else 0
  drops = similar(rows, everything, near, None if exclude is None else 0)
  # What is to be kept out is still compared: whether others are its copies must not depend on where that is found.
  copies = similar(rows[rows["id"] < EXCLUDED], everything, near, None)
  rows = rows[~np.isin(rows["leader"], copies["leader"])]
  outside = rows["id"] >= EXCLUDED
  _, once = np.unique(rows["looks"][outside], return_index=True)
  return np.concatenate([rows[~outside], rows[outside][once]]), drops


def without(rows, drops):
  """The rows whose leaders are not dropped.

  Args:
    rows: `ROW`s.
    drops: `DROP`s of their leaders; one may be in it several times.

  Returns:
    The rows that stay, and the numbers of the others by reason.
  """
  drops = drops[np.lexsort((drops["why"], drops["leader"]))]
  leaders, first = np.unique(drops["leader"], return_index=True)
  at = np.minimum(np.searchsorted(leaders, rows["leader"]), max(len(leaders) - 1, 0))
  gone = leaders[at] == rows["leader"] if len(leaders) else np.zeros(len(rows), bool)
  why = drops["why"][first][at[gone]] if len(leaders) else np.zeros(0, np.uint8)
  return rows[~gone], {text: int((why == reason).sum()) for reason, text in REASONS.items()}
