"""A folder for each class with the images of it, as torchvision's ImageFolder reads them: `DIR/CLASS/IMAGE`."""

import posixpath

import numpy as np

from clip_jax.data import locations
from clip_jax.data.sources import opening
from clip_jax.data.sources.protocol import Options, RandomAccess, Record
from clip_jax.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class ClassFolderSource(RandomAccess):
  """Random access to labelled images, class after class.

  Attributes:
    folders: names of the folders in the order of their numbers: by name, or by number where all of them are numbers.
  """

  def __init__(self, path, options=None, only=None):
    """Lists the images; none is opened.

    Args:
      path: the folder that holds the classes; local, gs:// or s3://.
      options: an `Options`, the defaults if not given.
      only: names of folders to read; all if not given.

    Raises:
      DataError: there is no image in a folder of it.
      StorageError: a store does not answer.
    """
    options = options or Options()
    self._storage, self._path = options.storage, path.rstrip("/")
    try:
      found = options.storage.expand(f"{self._path}/*/*")
    except DataError:
      found = []
    found = [file for file in found if file.lower().endswith(ENDINGS)]
    if only is not None:
      found = [file for file in found if posixpath.basename(posixpath.dirname(file)) in only]
    if not found:
      raise DataError(f"{self._path}: no image in a folder of it; DIR/CLASS/IMAGE.jpg would be one.")
    owners = [posixpath.basename(posixpath.dirname(file)) for file in found]
    numbered = all(name.isdecimal() for name in owners)
    self.folders = tuple(sorted(set(owners), key=int if numbered else None))
    number = {name: i for i, name in enumerate(self.folders)}
    labels = np.array([number[name] for name in owners])
    order = np.argsort(labels, kind="stable")
    self._files, self._labels = [found[i] for i in order], labels[order]
    self.fingerprint = opening.fingerprint("classes", self._files, [str(len(found))], options)

  def __len__(self):
    return len(self._files)

  def fetch(self, indices):
    """The records at some indices; in the place of one that cannot be read, a `DataError`."""
    for index in indices:
      self.check_index(index)
    images = self._storage.read_many([(self._files[index], 0, None) for index in indices])
    return [
      DataError(f"{self.key(index)}: {image}") if isinstance(image, DataError) else Record(image, [], self.key(index), int(self._labels[index]))
      for index, image in zip(indices, images, strict=True)
    ]

  def key(self, index):
    """The class and the file."""
    self.check_index(index)
    folder, file = self._files[index].rsplit("/", 2)[1:]
    return f"{folder}/{locations.file_name(file)}"
