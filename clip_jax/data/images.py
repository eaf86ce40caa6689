"""From encoded bytes to a uint8 square: decoding, augmentation, and the resize of evaluation.

All of it runs in input threads; OpenCV and Pillow release the interpreter's lock while they work.
Resizing is Pillow's bicubic, which is antialiased and is what CLIP's own preprocessing uses. Only the
JPEGs of training are decoded at a fraction of their size and resampled by OpenCV, with the same kernel:
benchmarks/input_images.py tells how much faster that is, and how near.
"""

import functools
import io
import math
import struct
from typing import NamedTuple

import cv2
import numpy as np
from PIL import ExifTags, Image

cv2.setNumThreads(0)  # the input pipeline has threads of its own

# A header may claim any size; this many pixels are refused before they are allocated.
MAX_PIXELS = 256 * 1024 * 1024

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
GIF = (b"GIF87a", b"GIF89a")


class DecodeError(ValueError):
  """Bytes that are not an image that can be read."""


def header_size(prefix):
  """The size in pixels that the header of a JPEG, PNG, WebP or GIF claims.

  Args:
    prefix: the first bytes of the file; 30 suffice but for a JPEG, whose size may come after a profile or a thumbnail.

  Returns:
    (width, height) as the pixels are stored, before any EXIF orientation; None where these bytes do not tell.
  """
  size = None
  if prefix[:2] == JPEG:
    frames = (begin for marker, begin in _jpeg_segments(prefix) if _is_frame(marker))
    begin = next(frames, len(prefix))
    if len(prefix) >= begin + 5:
      size = struct.unpack_from(">HH", prefix, begin + 1)[::-1]
  elif prefix[:8] == PNG and len(prefix) >= 24:
    size = struct.unpack_from(">II", prefix, 16)
  elif prefix[:6] in GIF and len(prefix) >= 10:
    size = struct.unpack_from("<HH", prefix, 6)
  elif prefix[:4] == b"RIFF" and prefix[8:12] == b"WEBP" and len(prefix) >= 30:
    size = _webp_size(prefix)
  return size if size and all(size) else None


def _is_frame(marker):
  return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _jpeg_segments(encoded):
  # Markers before the picture, and where what they hold begins; what is between is skipped, as libjpeg does.
  at = 2
  while 0 <= (at := encoded.find(b"\xff", at)) < len(encoded) - 3:
    marker = encoded[at + 1]
    if marker == 0xDA:  # the picture
      return
    if marker in (0x00, 0xFF):  # filling
      at += 1
    elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # these hold nothing
      at += 2
    else:
      yield marker, at + 4
      at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")


def _webp_size(prefix):
  # RFC 9649: the first chunk is lossy (a key frame of VP8, RFC 6386), lossless, or the extended format's canvas.
  kind = prefix[12:16]
  if kind == b"VP8 " and prefix[23:26] == b"\x9d\x01\x2a":
    return tuple(side & 0x3FFF for side in struct.unpack_from("<HH", prefix, 26))
  if kind == b"VP8L" and prefix[20] == 0x2F:
    bits = int.from_bytes(prefix[21:25], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
  if kind == b"VP8X":
    return tuple(1 + int.from_bytes(prefix[at : at + 3], "little") for at in (24, 27))
  return None


def _check_claim(size, max_pixels):
  if size and math.prod(size) > max_pixels:
    raise DecodeError(f"the image claims to have {math.prod(size):,} pixels, more than {max_pixels:,}")


def decode(encoded, *, max_pixels=MAX_PIXELS):
  """Decodes JPEG, PNG, WebP or GIF; of an animation the first frame.

  Args:
    encoded: bytes of one image file.
    max_pixels: a file whose header claims more is refused before anything is allocated.

  Returns:
    uint8 [height, width, 3], RGB; transparent pixels are set on white, EXIF orientation is applied.

  Raises:
    DecodeError: not an image, cut off, or too large.
  """
  _check_claim(header_size(encoded), max_pixels)
  # Only these carry transparency; the flag for reading it would ignore a JPEG's orientation.
  alpha_format = encoded[:4] == PNG[:4] or encoded[8:12] == b"WEBP" or encoded[:6] in GIF
  image = _imdecode(encoded, cv2.IMREAD_UNCHANGED if alpha_format else cv2.IMREAD_COLOR)
  if alpha_format:
    image = _oriented(image, _exif_orientation(encoded))
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


def _imdecode(encoded, flag):
  buffer = np.frombuffer(encoded, np.uint8)
  if not len(buffer):
    raise DecodeError("the image is empty")
  try:
    image = cv2.imdecode(buffer, flag)
  except cv2.error as error:
    raise DecodeError(f"the image cannot be decoded ({error.err})") from error
  if image is None:
    raise DecodeError(f"the image cannot be decoded (starts with {encoded[:8]!r})")
  return image


def _exif_orientation(encoded):
  # OpenCV applies the orientation of EXIF only where it drops transparency.
  if b"eXIf" not in encoded and b"EXIF" not in encoded:
    return 1
  try:
    return Image.open(io.BytesIO(encoded)).getexif().get(ExifTags.Base.Orientation)
  except Exception:  # a damaged EXIF block; the pixels have been read
    return 1


def _jpeg_orientation(encoded):
  # Without Pillow, which would parse all of the header; a block that cannot be read says nothing.
  for marker, begin in _jpeg_segments(encoded):
    if marker == 0xE1 and encoded[begin : begin + 6] == b"Exif\0\0":
      tiff = encoded[begin + 6 : begin - 2 + int.from_bytes(encoded[begin - 2 : begin], "big")]
      order = "<" if tiff[:2] == b"II" else ">"
      try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for at in range(directory + 2, directory + 2 + 12 * entries, 12):
          tag, value = struct.unpack_from(order + "H6xH", tiff, at)
          if tag == ExifTags.Base.Orientation:
            return value
      except struct.error:
        return 1
  return 1


def _oriented(image, orientation):
  if orientation not in range(2, 9):
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


def training_image(
  encoded, size, random, *, out, crop_scale, color_jitter=0.0, flip=0.0, rotation=0.0, max_pixels=MAX_PIXELS,
  timed=lambda stage, function, *arguments: function(*arguments),
):  # fmt: skip
  """From a file to a row of a training batch: `augment(decode(encoded), ...)` in fewer steps.

  The draws and the crop are those of `augment`, and so are the pixels of all formats but JPEG. A JPEG is decoded at
  1/2, 1/4 or 1/8 of its size where that still holds the crop at `size` (a shorter inverse DCT, libjpeg), and where
  the crop is not enlarged OpenCV resamples it; the mean distance from `augment` on photographs is that of a PSNR of 45 dB.

  Args:
    encoded: bytes of one image file.
    size: pixels of the square that is written.
    random: a `numpy.random.Generator`. After an error it may have been drawn from; take a fresh one for another file.
    out: uint8 [size, size, 3], where the result goes.
    crop_scale: as for `augment`, and so are `color_jitter`, `flip` and `rotation`.
    max_pixels: a file whose header claims more is refused before anything is allocated.
    timed: called with "decode" and what decodes, to tell its time from the rest; it returns what that does.

  Raises:
    DecodeError: not an image, cut off, or too large.
  """
  settings = dict(crop_scale=crop_scale, color_jitter=color_jitter, flip=flip, rotation=rotation)
  claimed = header_size(encoded) if encoded[:2] == JPEG else None
  if claimed is None:
    image = timed("decode", functools.partial(decode, max_pixels=max_pixels), encoded)
    out[...] = augment(image, size, random, **settings)
    return
  _check_claim(claimed, max_pixels)
  orientation = _jpeg_orientation(encoded)
  width, height = claimed[::-1] if orientation in (5, 6, 7, 8) else claimed
  drawn = _draw(width, height, random, **settings)
  left, top, right, bottom = drawn.box
  shrinks_by = min(right - left, bottom - top) / size
  scale = max((s for s in (2, 4, 8) if s <= shrinks_by), default=1)
  image = timed("decode", _decode_scaled, encoded, scale, orientation)
  image = _turned(image, drawn.angle, width / scale, height / scale)
  resample = _shrunk if shrinks_by >= 1 else _resized
  out[...] = _finished(resample(image, [edge / scale for edge in drawn.box], size), drawn)


_SCALED = {
  1: cv2.IMREAD_COLOR,
  2: cv2.IMREAD_REDUCED_COLOR_2,
  4: cv2.IMREAD_REDUCED_COLOR_4,
  8: cv2.IMREAD_REDUCED_COLOR_8,
}


def _decode_scaled(encoded, scale, orientation):
  image = _imdecode(encoded, _SCALED[scale] | cv2.IMREAD_IGNORE_ORIENTATION)
  return _oriented(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), orientation)


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
  drawn = _draw(width, height, random, crop_scale, color_jitter, flip, rotation)
  image = _turned(image, drawn.angle, width, height)
  return _finished(_resized(image, drawn.box, size), drawn)


class _Drawn(NamedTuple):
  """What is random about a training image."""

  box: tuple  # left, top, right, bottom in pixels of the oriented image
  angle: float | None  # degrees
  mirrored: bool
  jitter: np.ndarray | None  # float64 [3]: brightness, contrast, saturation


def _draw(width, height, random, crop_scale, color_jitter, flip, rotation):
  # In this order, which runs that are resumed rely on.
  return _Drawn(
    box=crop_box(width, height, random, crop_scale),
    angle=random.uniform(-rotation, rotation) if rotation else None,
    mirrored=bool(flip) and random.random() < flip,
    jitter=1 + random.uniform(-color_jitter, color_jitter, 3) if color_jitter else None,
  )


def _turned(image, angle, width, height):
  if angle is None:
    return image
  middle = (width - 1) / 2, (height - 1) / 2  # OpenCV counts from the middle of the first pixel
  turn = cv2.getRotationMatrix2D(middle, angle, 1)
  return cv2.warpAffine(image, turn, image.shape[1::-1], borderValue=(255, 255, 255))


def _resized(image, box, size):
  return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=box))


def _shrunk(image, box, size):
  # As `_resized`, where neither side grows, in half the time. Pillow sums the source under a cubic kernel as wide as
  # a step from pixel to pixel of the result. Here that kernel, moved by what the box is off whole pixels, filters the
  # source, and `cv2.resize` interpolates between the sums.
  left, top, right, bottom = box
  across, down = (right - left) / size, (bottom - top) / size
  height, width = image.shape[:2]
  columns, rows = round(right - left), round(bottom - top)
  x, y = min(round(left), width - columns), min(round(top), height - rows)
  image = image[y : y + rows, x : x + columns]
  # Two calls: `cv2.sepFilter2D` takes four times as long for a vertical kernel that is not symmetric.
  for kernel in (_cubic(across, left - x)[None], _cubic(down, top - y)[:, None]):
    image = cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REPLICATE)
  # By factors, which are exact, whereas the size asked for would stretch whole pixels. It comes out all the same.
  return cv2.resize(image, None, fx=1 / across, fy=1 / down, interpolation=cv2.INTER_CUBIC)


def _cubic(width, shift):
  # Keys' cubic (1981) with a = -1/2, stretched, at whole pixels from `shift` on, with sum 1.
  reach = math.ceil(2 * width + abs(shift))
  weights = []
  for i in range(-reach, reach + 1):
    x = abs(i - shift) / width
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    weights.append(inner if x < 1 else outer if x < 2 else 0.0)
  return np.float32(weights) / np.float32(sum(weights))


def _finished(image, drawn):
  if drawn.mirrored:
    image = cv2.flip(image, 1)
  return image if drawn.jitter is None else _jittered(image, *drawn.jitter)


def crop_box(width, height, random, crop_scale):
  """Draws the box of a random resized crop: aspect ratios 3/4 to 4/3, uniform in the logarithm, as torchvision's.

  Args:
    width: pixels of the image.
    height: pixels.
    random: a `numpy.random.Generator`.
    crop_scale: as for `augment`.

  Returns:
    (left, top, right, bottom), pixels and parts of them.
  """
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


def _jittered(image, brightness, contrast, saturation):
  grey = np.float64([0.299, 0.587, 0.114])  # ITU-R BT.601
  mean = grey @ cv2.mean(image)[:3]
  # Each of the three is linear in the pixel, and so are all of them together.
  matrix = saturation * np.eye(3) + (1 - saturation) * grey
  offset = np.full((3, 1), brightness * (1 - contrast) * mean)
  return cv2.transform(image, np.hstack([brightness * contrast * matrix, offset]))
