"""Telling the same image again, and one that looks the same."""

import hashlib
import itertools

import cv2
import numpy as np

SIDE = 32  # pixels, to which images are reduced
# Of plain images, with coefficients as of a pattern of less than two grey levels, only the noise would be hashed.
PLAIN = 32.0
TOGETHER = 2  # bands that two hashes must share to be compared


def of_pixels(image):
  """A digest of an image's size and pixels.

  Args:
    image: uint8 [height, width, 3].

  Returns:
    16 bytes.
  """
  digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
  digest.update(np.ascontiguousarray(image))
  return digest.digest()


def perceptual(image):
  """The DCT hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), 3.2.1.

  A bit for each of the 8 x 8 lowest frequencies of the grey image, without those along the edges: whether its coefficient is
  over their median. Copies that were compressed again or resized differ in few bits.

  Args:
    image: uint8 [height, width, 3], RGB.

  Returns:
    64 bits as an integer; None if the image is plain.
  """
  grey = cv2.cvtColor(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
  low = cv2.dct(grey.astype(np.float32))[1:9, 1:9]
  if np.abs(low).max() < PLAIN:
    return None
  return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def masks(distance):
  """Masks of which two hashes at a distance share at least one masked value.

  The bits are split into distance + 2 bands; bits that differ can be in all but two of them at most, so that some pair
  of bands is the same. Manku et al., "Detecting Near-Duplicates for Web Crawling" (2007), section 3.

  Args:
    distance: bits.

  Returns:
    uint64 [pairs of bands].
  """
  edges = np.linspace(0, 64, distance + TOGETHER + 1).round().astype(int).tolist()
  bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
  return np.array([sum(some) for some in itertools.combinations(bands, TOGETHER)], np.uint64)


def mix(numbers):
  """Hashes uint64 numbers one to one: the finalizer of SplitMix64 (Steele et al., 2014).

  Args:
    numbers: uint64 array.
  """
  with np.errstate(over="ignore"):
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return numbers ^ (numbers >> np.uint64(31))


def order(ids, seed):
  """Where records come in the shuffled order.

  Args:
    ids: uint64 [n].
    seed: a number.

  Returns:
    uint64 [n].
  """
  return mix(ids ^ mix(np.array([seed % 2**64], np.uint64)))
