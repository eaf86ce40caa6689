"""Embeddings of a whole held-out set, jitted and sharded like training.

A row's embedding does not depend on the devices there are: each of them runs the same program on the same number of rows, and
row n lies at the same place among those of its device, however many devices follow one another.
"""

import functools

import grain
import jax
import numpy as np

from clip_jax.data.pipeline import tokenizer_for
from clip_jax.models.clip import CLIP
from clip_jax.parallel import mesh as meshes
from clip_jax.parallel import rules

THREADS = 16  # that load images
NOTHING = np.zeros(0, np.int32)  # is known of an image that is only embedded
# Lengths that texts are cut to, a program each: a causal tower's end token sees nothing that comes after it, and most texts are short.
LENGTHS = (8, 10, 12, 16, 24, 40)


class Encoder:
  """Both towers as functions of batches, compiled once for images and once for each length of texts."""

  def __init__(self, model, mesh, batch_size, progress=lambda done, count: None, normalize=True, tokenizer=None):
    """Prepares the jitted towers.

    Args:
      model: a resolved `clip_jax.config.Model`.
      mesh: the device mesh.
      batch_size: rows encoded at a time over all devices; a multiple of the batch shards.
      progress: called for each batch with how many rows of a set, or of texts of a length, are done, and how many there are.
      normalize: whether rows get unit length.
      tokenizer: the model's, if it is not the one that the config names.
    """
    module = CLIP(model)
    self._progress = progress
    self.model, self.mesh, self.batch_size = model, mesh, batch_size
    self.tokenizer = tokenizer or tokenizer_for(model)
    self.chunk = batch_size // meshes.batch_shards(mesh)  # rows of a device

    def jitted(method):
      def encode(params, batch, beside):
        return module.apply({"params": params}, batch, normalize, method=method), beside

      # Every device, and so every process, gets all rows: ranks are computed over the whole set.
      return jax.jit(encode, out_shardings=rules.replicated(mesh))

    self._image, self._text = jitted("encode_image"), jitted("encode_text")

  def images(self, params, count, load):
    """Embeds images that are loaded by number, each process loading only its own rows.

    Args:
      params: parameters of the model, on the mesh.
      count: number of images.
      load: a function from a number below `count` to uint8 [size, size, 3]; called from threads.

    Returns:
      float32 [count, embed_dim], on every process.
    """
    parts = self.chunks(params, count, lambda index: (load(index), NOTHING), NOTHING)
    return np.concatenate([embeddings for _, embeddings, _ in parts])

  def chunks(self, params, count, load, beside):
    """Embeds images one part of the set after the other, so that nothing grows with the set.

    Args:
      params: parameters of the model, on the mesh.
      count: number of images.
      load: a function from a number below `count` to a pair of uint8 [size, size, 3] and an array of what else is known of
        the image; called from threads, for each number in one process only.
      beside: an array of the shape and type of the latter.

    Yields:
      (number of the first, float32 [n, embed_dim], what else is known of each [n, ...]), on every process. n is `chunk`, and
      less at the end: parts do not depend on how many devices there are.
    """
    size = self.model.image_size
    padding = np.zeros((size, size, 3), np.uint8), beside
    for start, rows, known in self._encode(self._image, params, count, load, padding):
      for first in range(0, len(rows), self.chunk):
        part = slice(first, first + self.chunk)
        yield start + first, rows[part], known[part]

  def texts(self, params, tokens):
    """Embeds rows of token ids.

    Args:
      params: parameters of the model, on the mesh.
      tokens: int32 [count, context_length].

    Returns:
      float32 [count, embed_dim], on every process.
    """
    found = np.empty((len(tokens), self.model.embed_dim), np.float32)
    for length, rows in self._by_length(tokens):
      cut = tokens[rows, :length]
      # Padding is a real row: zeros alone would have no end token, and it costs nothing to be plain.
      parts = self._encode(self._text, params, len(rows), lambda index, cut=cut: (cut[index], NOTHING), (cut[0], NOTHING))
      for start, embeddings, _ in parts:
        found[rows[start : start + len(embeddings)]] = embeddings
    return found

  def logit_scale(self, params):
    """What the cosines of a model are multiplied by."""
    return float(np.exp(np.asarray(params["logit_scale"])))

  def _by_length(self, tokens):
    # (length, numbers of rows that are no longer), short ones first; few of a length go with those of the next one.
    context = tokens.shape[1]
    rows = np.arange(len(tokens))
    if self.model.text.kind != "clip" or len(tokens) <= self.chunk:
      return [(context, rows)] if len(rows) else []
    needed = tokens.argmax(axis=1) + 1
    found, waiting = [], np.zeros(0, int)
    shorter = 0
    for length in (*(length for length in LENGTHS if length < context), context):
      waiting = np.union1d(waiting, rows[(needed > shorter) & (needed <= length)])
      shorter = length
      if len(waiting) >= self.chunk or (length == context and len(waiting)):
        found.append((length, waiting))
        waiting = waiting[:0]
    return found

  def _encode(self, encode, params, count, load, padding):
    # Yields (number of the first row, embeddings, what else is known) of one batch after the other.
    held = rules.local_rows(self.mesh, self.batch_size)
    starts = range(0, count, self.batch_size)

    def load_row(i):
      batch, row = divmod(i, len(held))
      index = starts[batch] + held[row]
      return load(index) if index < count else padding

    # Rows are loaded in parallel, not batches: the threads have work in a set of one batch, too.
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(THREADS, len(held)))
    loaded = grain.MapDataset.range(len(starts) * len(held)).map(load_row).to_iter_dataset(options)
    to_global = functools.partial(rules.to_global, mesh=self.mesh, rows=self.batch_size)
    waiting = None
    for start, (batch, beside) in zip(starts, loaded.batch(len(held)), strict=True):
      running = start, encode(params, to_global(np.asarray(batch)), to_global(np.asarray(beside)))
      if waiting:  # the next batch is on its way when this one's numbers are waited for
        yield self._on_host(*waiting, count)
      waiting = running
    if waiting:
      yield self._on_host(*waiting, count)

  def _on_host(self, start, arrays, count):
    embeddings, beside = (np.asarray(array)[: count - start] for array in arrays)
    self._progress(start + len(embeddings), count)
    return start, embeddings, beside
