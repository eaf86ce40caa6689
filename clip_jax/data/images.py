"""From encoded bytes to a uint8 square: decoding, augmentation, and the resize of evaluation.

All of it runs in input threads; OpenCV and Pillow release the interpreter's lock while they work.
Resizing is Pillow's bicubic, which is antialiased and is what CLIP's own preprocessing uses.
"""

import io
import math
import struct

import cv2
import numpy as np
from PIL import ExifTags, Image

cv2.setNumThreads(0)  # the input pipeline has threads of its own

# A header may claim any size; this many pixels are refused before they are allocated.
MAX_PIXELS = 256 * 1024 * 1024


class DecodeError(ValueError):
  """Bytes that are not an image that can be read."""


def decode(encoded):
  """Decodes JPEG, PNG or WebP.

  Args:
    encoded: bytes of one image file.

  Returns:
    uint8 [height, width, 3], RGB; transparent pixels are set on white, EXIF orientation is applied.

  Raises:
    DecodeError: not an image, cut off, or too large.
  """
  buffer = np.frombuffer(encoded, np.uint8)
  if not len(buffer):
    raise DecodeError("the image is empty")
  claimed = _pixels_claimed(encoded)
  if claimed > MAX_PIXELS:
    raise DecodeError(f"the image claims to have {claimed:,} pixels, more than {MAX_PIXELS:,}")
  # Only these two carry transparency; the flag for reading it would ignore a JPEG's orientation.
  alpha_format = encoded[:4] == b"\x89PNG" or encoded[8:12] == b"WEBP"
  flag = cv2.IMREAD_UNCHANGED if alpha_format else cv2.IMREAD_COLOR
  try:
    image = cv2.imdecode(buffer, flag)
  except cv2.error as error:
    raise DecodeError(f"the image cannot be decoded ({error.err})") from error
  if image is None:
    raise DecodeError(f"the image cannot be decoded (starts with {encoded[:8]!r})")
  if alpha_format:
    image = _oriented(image, encoded)
    if image.ndim == 2:
      _set_grey_on_white(image, encoded)
  if image.dtype == np.uint16:
    image = (image >> 8).astype(np.uint8)
  if image.ndim == 2:
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
  if image.shape[2] == 4:
    alpha = image[..., 3:].astype(np.uint16)
    white = image[..., :3] * alpha + 255 * (255 - alpha)
    image = ((white + 127) // 255).astype(np.uint8)
  return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _pixels_claimed(encoded):
  # Of the formats whose claim can be too large. Where the header cannot be read, 0: the decoder will
  # say why.
  if encoded[:4] == b"\x89PNG":
    return int.from_bytes(encoded[16:20], "big") * int.from_bytes(encoded[20:24], "big")
  at = 2 if encoded[:2] == b"\xff\xd8" else len(encoded)
  while at + 9 <= len(encoded) and encoded[at] == 0xFF:
    marker = encoded[at + 1]
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a JPEG frame header
      return math.prod(struct.unpack(">HH", encoded[at + 5 : at + 9]))
    at += 1 if marker == 0xFF else 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
  return 0


def _oriented(image, encoded):
  # OpenCV applies the orientation of EXIF only where it drops transparency.
  if b"eXIf" not in encoded and b"EXIF" not in encoded:
    return image
  try:
    orientation = Image.open(io.BytesIO(encoded)).getexif().get(ExifTags.Base.Orientation)
  except Exception:  # a damaged EXIF block; the pixels have been read
    return image
  if orientation in (5, 6, 7, 8):
    image = image.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    image = image[:, ::-1]
  if orientation in (3, 4, 7, 8):
    image = image[::-1]
  return np.ascontiguousarray(image)


def _set_grey_on_white(image, encoded):
  # OpenCV knows the transparent colour of a palette and of RGB, but not that of a grey PNG.
  at = encoded.find(b"\0\0\0\2tRNS", 0, max(encoded.find(b"IDAT"), 0))
  if at > 0:
    level, depth = int.from_bytes(encoded[at + 8 : at + 10], "big"), encoded[24]
    level = level if depth == 16 else level * 255 // (2**depth - 1)
    image[image == level] = np.iinfo(image.dtype).max


def resize_and_crop(image, size, mode="shortest"):
  """The evaluation transform: bicubic, with Pillow.

  Args:
    image: uint8 [height, width, 3] or a PIL image.
    size: pixels.
    mode: "shortest", as CLIP: the shorter side to `size`, then the centre square; or "squash", as SigLIP: both sides.

  Returns:
    uint8 [size, size, 3].
  """
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image = image.convert("RGB")
  if mode == "squash":
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
  width, height = image.size
  # The longer side is truncated, as torchvision does; in whole numbers, or 45 * (224 / 5) is 2015.
  short = min(width, height)
  new = size * width // short, size * height // short
  if new != image.size:
    image = image.resize(new, Image.Resampling.BICUBIC)
  left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def augment(image, size, random, *, crop_scale, color_jitter=0.0, flip=0.0, rotation=0.0):
  """The training transform: random resized crop, and what the config adds to it.

  Args:
    image: uint8 [height, width, 3].
    size: pixels of the square that is returned.
    random: a `numpy.random.Generator`.
    crop_scale: smallest and largest share of the area to keep (Radford et al. 2021, section 2.5: a
      random square crop is the only augmentation; open_clip keeps 0.9 to 1.0). Of ten boxes the
      first that fits inside is taken, or else the centre square.
    color_jitter: largest relative change of brightness, contrast and saturation.
    flip: probability of mirroring left to right.
    rotation: largest angle either way, degrees; corners are filled with white.

  Returns:
    uint8 [size, size, 3].
  """
  height, width = image.shape[:2]
  left, top, right, bottom = _crop_box(width, height, random, crop_scale)
  if rotation:
    middle = (width - 1) / 2, (height - 1) / 2  # OpenCV counts from the middle of the first pixel
    turn = cv2.getRotationMatrix2D(middle, random.uniform(-rotation, rotation), 1)
    image = cv2.warpAffine(image, turn, (width, height), borderValue=(255, 255, 255))
  box = (left, top, right, bottom)
  result = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
  result = np.asarray(result)
  if flip and random.random() < flip:
    result = result[:, ::-1]
  if color_jitter:
    result = _jitter(result, random, color_jitter)
  return result


def _crop_box(width, height, random, crop_scale):
  # Aspect ratios 3/4 to 4/3, uniform in the logarithm, as torchvision's RandomResizedCrop.
  for _ in range(10):
    area = width * height * random.uniform(*crop_scale)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if w <= width and h <= height:
      left, top = random.uniform(0, width - w), random.uniform(0, height - h)
      return left, top, left + w, top + h
  side = min(width, height)
  left, top = (width - side) / 2, (height - side) / 2
  return left, top, left + side, top + side


def _jitter(image, random, strength):
  brightness, contrast, saturation = 1 + random.uniform(-strength, strength, 3)
  grey = np.float64([0.299, 0.587, 0.114])  # ITU-R BT.601
  mean = grey @ cv2.mean(image)[:3]
  # Each of the three is linear in the pixel, and so are all of them together.
  matrix = saturation * np.eye(3) + (1 - saturation) * grey
  offset = np.full((3, 1), brightness * (1 - contrast) * mean)
  return cv2.transform(image, np.hstack([brightness * contrast * matrix, offset]))
