"""Embeddings of a whole held-out set, jitted and sharded like training."""

import grain
import jax
import numpy as np

from clip_jax.models.clip import CLIP
from clip_jax.parallel import rules

THREADS = 16  # that load images


class Encoder:
  """Both towers as functions of batches, compiled once."""

  def __init__(self, model, mesh, batch_size, alive=lambda: None):
    """Prepares the jitted towers.

    Args:
      model: a resolved `clip_jax.config.Model`.
      mesh: the device mesh.
      batch_size: rows encoded at a time over all devices; a multiple of the batch shards.
      alive: called for each batch.
    """
    module = CLIP(model)
    self._alive = alive
    self.model, self.mesh, self.batch_size = model, mesh, batch_size

    def jitted(method):
      def encode(params, batch):
        return module.apply({"params": params}, batch, method=method)

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
      float32 [count, embed_dim], L2-normalised, on every process.
    """
    size = self.model.image_size
    return self._encode(self._image, params, count, load, np.zeros((size, size, 3), np.uint8))

  def texts(self, params, tokens):
    """Embeds rows of token ids.

    Args:
      params: parameters of the model, on the mesh.
      tokens: int32 [count, context_length].

    Returns:
      float32 [count, embed_dim], L2-normalised, on every process.
    """
    # Padding is a real row: zeros alone would have no end token, and it costs nothing to be plain.
    return self._encode(self._text, params, len(tokens), tokens.__getitem__, tokens[0])

  def _encode(self, encode, params, count, load, padding):
    held = rules.local_rows(self.mesh, self.batch_size)
    starts = range(0, count, self.batch_size)

    def load_row(i):
      batch, row = divmod(i, len(held))
      index = starts[batch] + held[row]
      return load(index) if index < count else padding

    # Rows are loaded in parallel, not batches: the threads have work in a set of one batch, too.
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(THREADS, len(held)))
    loaded = grain.MapDataset.range(len(starts) * len(held)).map(load_row).to_iter_dataset(options)
    parts = []
    for local in loaded.batch(len(held)):
      batch = rules.to_global(np.asarray(local), self.mesh, self.batch_size)
      parts.append(encode(params, batch))
      self._alive()
    return np.concatenate([np.asarray(part) for part in parts])[:count]
