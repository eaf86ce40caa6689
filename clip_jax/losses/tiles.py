"""The matrix of all pairs of a global batch, one tile at a time.

Each shard holds rows (its images) and lends out columns (its texts). `sweep` brings every column past every
row exactly once, and shows a function one tile [local batch, chunk] of the matrix after another. What a tile
tells of its rows is kept where the rows are; what it tells of its columns gets back to where those came from.
So one matrix product serves both directions of a contrastive loss, and no tile outlives its turn.

Two ways to bring the columns past:

gather: every shard receives all columns (`all_gather`), and what was found out about them is reduced back.
ring: columns travel from shard to shard (`ppermute`), and what was found out about them follows one shard
  behind, so that both transfers run while a tile is being worked on. Chunks are replaced in place: a shard
  holds one block of columns and the chunks in flight, never all.

Sizes, transfers and when to use which: docs/losses.md.
"""

import functools

import jax
import jax.numpy as jnp

METHODS = ("gather", "ring")

# A tile of float32 logits is kept at about this size, unless that would make it narrower than a matrix unit. With
# smaller ones, the rows' gradients are read and written too often; benchmarks/loss_memory.py shows both.
TILE_BYTES = 16 * 2**20
NARROWEST = 128


def chunk_for(rows):
  """How many columns to score at a time.

  Args:
    rows: local batch.

  Returns:
    A multiple of `NARROWEST`.
  """
  return max(TILE_BYTES // (4 * rows) // NARROWEST, 1) * NARROWEST


def dot(a, b, contract):
  """A matrix product with float32 sums.

  Args:
    a: a matrix.
    b: a matrix of the same dtype.
    contract: the axis of each that is summed over.

  Returns:
    A float32 matrix: the other axis of `a`, then that of `b`. Float32 factors are not rounded first, as they
    would be on a TPU otherwise.
  """
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def matching(axes, rows, columns, first):
  """Where a tile holds pairs, and not negatives.

  Args:
    axes: mesh axes the batch is sharded over.
    rows: local batch.
    columns: width of the tile.
    first: global number of its first column.

  Returns:
    bool [rows, columns].
  """
  here = jax.lax.axis_index(axes) * rows
  return (here + jnp.arange(rows))[:, None] == (first + jnp.arange(columns))[None, :]


def hidden(row_keys, column_keys, pairs):
  """Where a tile holds false negatives: another pair with the same key.

  Args:
    row_keys: int [rows], or None if nothing is to be hidden.
    column_keys: int [columns].
    pairs: bool [rows, columns], what `matching` returns.

  Returns:
    bool [rows, columns], or None.
  """
  return None if row_keys is None else (row_keys[:, None] == column_keys[None, :]) & ~pairs


def scatter_sum(found, axes):
  """The `reduce` of `sweep` for what is summed over shards."""
  if jax.lax.axis_size(axes) == 1:  # libtpu 0.0.42 ends its process over a scatter among one chip
    return found
  return jax.tree.map(lambda x: jax.lax.psum_scatter(x, axes, tiled=True), found)


def weight_sum(weights, rows, axes):
  """The sum of all shards' weights, or the global batch if there are none."""
  if weights is None:
    return float(rows * jax.lax.axis_size(axes))
  return jax.lax.psum(jnp.sum(weights), axes)


def settings(image, text, axes, method, chunk, label_smoothing, weights, keys):
  """What of a loss's arguments is not an array, after a check of all that can be known before computing.

  Returns:
    The axes, a tuple; the method; the columns of a tile; the label smoothing.

  Raises:
    ValueError: one of them cannot be used; the message says which and what would be right.
  """
  if image.ndim != 2 or image.shape != text.shape or image.dtype != text.dtype:
    raise ValueError(
      f"image is {image.dtype} {list(image.shape)} and text is {text.dtype} {list(text.shape)}; expected two "
      "arrays [local batch, embed] of one dtype."
    )
  if not jnp.issubdtype(image.dtype, jnp.floating):
    raise ValueError(f"embeddings are {image.dtype}; expected float32 or bfloat16.")
  if method not in METHODS:
    raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}.")
  if chunk is not None and chunk < 1:
    raise ValueError(f"chunk={chunk} must be at least 1 column.")
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and less than 1.")
  for name, values in (("weights", weights), ("keys", keys)):
    if values is not None and values.shape != image.shape[:1]:
      raise ValueError(f"{name} are {list(values.shape)}; expected [{len(image)}], one a pair.")
  axes = (axes,) if isinstance(axes, str) else tuple(axes)
  return axes, method, chunk or chunk_for(len(image)), label_smoothing


def sweep(tile, rows, columns, found, merge, reduce, *, axes, method, chunk):
  """Shows a function every tile of this shard's rows, and collects what it says of the columns.

  Args:
    tile: a function of what is known of the rows, a chunk of `columns` and the global number of the chunk's
      first column, which returns what is then known of the rows and what this tile says of its columns.
    rows: a tree; what is known of the rows before the first tile.
    columns: a tree of arrays [local batch, ...] that this shard lends out.
    found: a tree of arrays [local batch, ...]: what `tile` says of columns, where nothing has been seen.
    merge: joins what two sets of rows say of the same columns.
    reduce: a function of a tree like `found` for all columns of the global batch, as these rows see them, and
      the axes, which returns this shard's own columns as all rows see them.
    axes: mesh axes the batch is sharded over; the call is inside `jax.shard_map`.
    method: "gather" or "ring".
    chunk: columns a tile.

  Returns:
    What is known of the rows at the end, and of this shard's own columns.
  """
  own = jax.tree.leaves(columns)[0].shape[0]
  # Loop state must be marked as differing between shards from the start, as it will be after a step.
  rows, found = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), (rows, found))
  if method == "ring":
    return _ring(tile, rows, columns, found, merge, own, axes, chunk)

  shards = jax.lax.axis_size(axes)
  columns = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), columns)
  found = jax.tree.map(lambda x: jnp.tile(x, (shards,) + (1,) * (x.ndim - 1)), found)

  def visit(start, size, state):
    rows, found = state
    rows, said = tile(rows, _take(columns, start, size), start)
    return rows, _put(found, said, start)

  rows, found = _over_chunks(visit, (rows, found), shards * own, chunk)
  return rows, reduce(found, axes)


def _ring(tile, rows, columns, found, merge, own, axes, chunk):
  shards, here = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  send = functools.partial(
    jax.lax.ppermute, axis_name=axes, perm=[(i, (i + 1) % shards) for i in range(shards)]
  )

  def hop(number, state):
    first = (here - number) % shards * own  # the block here now set out `number` shards back

    def visit(start, size, state):
      rows, columns, found = state
      chunk = _take(columns, start, size)
      # Neither transfer waits for this tile, nor the tile for them.
      said_before = jax.tree.map(send, _take(found, start, size))
      following = jax.tree.map(send, chunk)
      rows, said = tile(rows, chunk, first + start)
      return rows, _put(columns, following, start), _put(found, merge(said_before, said), start)

    return _over_chunks(visit, state, own, chunk)

  rows, _, found = jax.lax.fori_loop(0, shards, hop, (rows, columns, found))
  return rows, jax.tree.map(send, found)  # one shard behind: the last step brings it home


def _over_chunks(visit, state, length, chunk):
  """Calls `visit(start, size, state)` for each chunk; the last one may be narrower."""
  chunk = min(chunk, length)
  whole, rest = divmod(length, chunk)
  if whole == 1:
    state = visit(0, chunk, state)
  else:
    state = jax.lax.fori_loop(0, whole, lambda i, state: visit(i * chunk, chunk, state), state)
  return visit(whole * chunk, rest, state) if rest else state


def _take(tree, start, size):
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), tree)


def _put(tree, parts, start):
  return jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, 0), tree, parts)
