"""Decoding, the evaluation transform and augmentation, held against Pillow and arithmetic."""

import contextlib
import io
import itertools
import math
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from clip_jax.data import images
from clip_jax.data.images import (
  DecodeError,
  augment,
  crop_box,
  decode,
  header_size,
  resize_and_crop,
  training_image,
)

WHOLE = dict(crop_scale=(1.0, 1.0))


def picture(height=47, width=61, channels=3, seed=0):
  """Smooth colours, so that JPEG has something to work with; odd sizes."""
  coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, channels), dtype=np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def noise(*shape, below=256, dtype=np.uint8, seed=0):
  return np.random.default_rng(seed).integers(0, below, shape).astype(dtype)


def encoded(image, format, **options):
  buffer = io.BytesIO()
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image.save(buffer, format, **options)
  return buffer.getvalue()


def by_pillow(data, mode="RGB"):
  return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def on_white(rgba):
  """Porter & Duff's "over" in float64, rounded to the nearest level."""
  alpha = rgba[..., 3:].astype(np.float64) / 255
  return np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def chunk(kind, content):
  return (
    struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
  )


def png(width, height, depth, color, rows, *chunks):
  """A PNG written from its specification, for what Pillow cannot write."""
  header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
  data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
  return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


# Decoding.


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [50, 95])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_as_pillow_decodes_it(subsampling, quality, progressive):
  data = encoded(
    picture(), "JPEG", subsampling=subsampling, quality=quality, progressive=progressive
  )
  difference = decode(data).astype(int) - by_pillow(data)
  assert np.abs(difference).max() <= 2


def test_grey_jpeg():
  data = encoded(picture()[..., 0], "JPEG", quality=90)
  got = decode(data)
  assert got.shape == (47, 61, 3)
  assert np.abs(got.astype(int) - by_pillow(data)).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_formats_exactly(format):
  pixels = noise(33, 20, 3)
  got = decode(encoded(pixels, format, lossless=True))
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, pixels)


def test_lossy_webp_as_pillow_decodes_it():
  data = encoded(picture(), "WEBP", quality=80)
  assert np.abs(decode(data).astype(int) - by_pillow(data)).max() <= 2


def test_interlaced_size_of_one_pixel():
  np.testing.assert_array_equal(decode(encoded(noise(1, 1, 3), "PNG")), noise(1, 1, 3))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_black_and_white_and_palette_png(mode):
  image = Image.fromarray(picture())
  image = image.quantize(17) if mode == "P" else image.convert(mode)
  np.testing.assert_array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_set_on_white(format):
  """All 256 values of alpha over all 256 values of colour."""
  alpha, color = np.mgrid[0:256, 0:256].astype(np.uint8)
  rgba = np.dstack([color, 255 - color, color // 2, alpha])
  # exact: WebP would otherwise drop the colour of what is fully transparent.
  got = decode(encoded(rgba, format, lossless=True, exact=True))
  np.testing.assert_array_equal(got, on_white(rgba))
  assert (got[0] == 255).all()


def test_grey_with_alpha():
  image = Image.fromarray(noise(30, 40, 4)).convert("LA")
  want = on_white(np.asarray(image.convert("RGBA")))
  np.testing.assert_array_equal(decode(encoded(image, "PNG")), want)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("transparency", [3, bytes(range(0, 255, 15))])
def test_a_palette_with_transparency(transparency):
  data = encoded(Image.fromarray(picture()).quantize(17), "PNG", transparency=transparency)
  got = decode(data)
  np.testing.assert_array_equal(got, on_white(by_pillow(data, "RGBA")))
  assert (got != by_pillow(data)).any()


def test_one_transparent_colour():
  pixels = noise(20, 30, 3, below=4)
  data = encoded(pixels, "PNG", transparency=(1, 2, 3))
  want = np.where((pixels == (1, 2, 3)).all(-1, keepdims=True), 255, pixels)
  assert (want == 255).any()
  np.testing.assert_array_equal(decode(data), want)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_one_transparent_grey(depth):
  """Formulas and drawings are often black on a transparent ground that is stored as black."""
  values = noise(9, 16, below=2**depth, dtype=np.int64)
  values[::2] = 0
  if depth == 16:
    rows, grey = [row.astype(">u2").tobytes() for row in values], values // 256
  else:
    bits = ["".join(f"{v:0{depth}b}" for v in row) for row in values]
    rows = [int(row, 2).to_bytes(16 * depth // 8, "big") for row in bits]
    grey = values * 255 // (2**depth - 1)
  data = png(16, 9, depth, 0, rows, chunk(b"tRNS", struct.pack(">H", 0)))
  want = np.where(values == 0, 255, grey).astype(np.uint8)
  np.testing.assert_array_equal(decode(data), np.repeat(want[..., None], 3, axis=2))


@pytest.mark.parametrize(("channels", "color"), [(1, 0), (3, 2), (4, 6)])
def test_sixteen_bits_keep_the_upper_eight(channels, color):
  values = noise(20, 30, channels, below=2**16, dtype=np.int64)
  data = png(30, 20, 16, color, [row.astype(">u2").tobytes() for row in values])
  upper = (values // 256).astype(np.uint8)
  want = on_white(upper) if channels == 4 else np.broadcast_to(upper, (20, 30, 3))
  np.testing.assert_array_equal(decode(data), want)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(format, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encoded(picture(), format, exif=exif, quality=95, lossless=True)
  want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
  got = decode(data)
  assert got.shape == ((47, 61, 3) if orientation < 5 else (61, 47, 3))
  assert np.abs(got.astype(int) - want).max() <= (2 if format == "JPEG" else 0)


def test_exif_orientation_of_transparent_and_of_deep_images():
  exif = Image.Exif()
  exif[0x0112] = 6
  rgba = noise(5, 8, 4)
  np.testing.assert_array_equal(
    decode(encoded(rgba, "PNG", exif=exif)), on_white(np.rot90(rgba, k=-1))
  )
  deep = noise(5, 8, below=2**16, dtype=np.uint16)
  want = np.rot90(deep // 256, k=-1)
  np.testing.assert_array_equal(decode(encoded(deep, "PNG", exif=exif))[..., 0], want)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_exif_block_is_passed_over():
  pixels = noise(5, 8, 3)
  rows = [row.tobytes() for row in pixels]
  for block in (b"", b"garbage", b"MM\0*\0\0\0\x08", b"II*\0" + b"\xff" * 40):
    np.testing.assert_array_equal(decode(png(8, 5, 8, 2, rows, chunk(b"eXIf", block))), pixels)


def test_cmyk_jpeg_is_the_complement_less_black():
  """(1 - C)(1 - K), as Pillow does it: Adobe's inversion is undone, a colour profile not applied."""
  cmyk = Image.fromarray(picture(channels=4), "CMYK")
  data = encoded(cmyk, "JPEG", quality=95, subsampling=0)
  stored = np.asarray(Image.open(io.BytesIO(data))).astype(np.float64)
  want = (255 - stored[..., :3]) * (255 - stored[..., 3:]) / 255
  got = decode(data)
  assert np.abs(got - want).max() <= 2
  assert np.abs(got.astype(int) - by_pillow(data)).max() <= 2


def test_the_first_frame_of_an_animation():
  first, second = Image.fromarray(noise(9, 9, 3)), Image.fromarray(noise(9, 9, 3, seed=1))
  for format in ("PNG", "WEBP", "GIF"):
    if format == "GIF":
      first, second = first.quantize(256), second.quantize(256)
    data = encoded(first, format, save_all=True, append_images=[second], lossless=True)
    np.testing.assert_array_equal(decode(data), np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("interlace", [0, 1])
def test_gif(interlace):
  image = Image.fromarray(picture()).quantize(50)
  np.testing.assert_array_equal(decode(encoded(image, "GIF", interlace=interlace)), np.asarray(image.convert("RGB")))


def test_a_transparent_gif_is_set_on_white():
  data = encoded(Image.fromarray(picture()).quantize(17), "GIF", transparency=3)
  got = decode(data)
  np.testing.assert_array_equal(got, on_white(by_pillow(data, "RGBA")))
  assert (got != by_pillow(data)).any()


CUTS = {
  "JPEG": ("JPEG", {}),
  "fine JPEG": ("JPEG", dict(quality=95, subsampling=0)),
  "progressive JPEG": ("JPEG", dict(progressive=True)),
  "PNG": ("PNG", {}),
  "WebP": ("WEBP", {}),
  "lossless WebP": ("WEBP", dict(lossless=True)),
  "GIF": ("GIF", {}),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_off_file_is_an_error(name):
  """At every byte. The end marker of a JPEG, its last two bytes, holds nothing of the picture."""
  format, options = CUTS[name]
  data = encoded(picture(20, 26), format, **options)
  whole = decode(data)
  for cut in range(len(data)):
    if format == "JPEG" and cut >= len(data) - 2:
      with contextlib.suppress(DecodeError):
        np.testing.assert_array_equal(decode(data[:cut]), whole)
    else:
      with pytest.raises(DecodeError):
        decode(data[:cut])


def test_an_empty_image():
  with pytest.raises(DecodeError, match="the image is empty"):
    decode(b"")


@pytest.mark.parametrize(
  "data", [b"\0", b"<html>404</html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF" + bytes(40)]
)
def test_what_is_no_image(data):
  with pytest.raises(DecodeError, match="cannot be decoded"):
    decode(data)


@pytest.mark.filterwarnings(
  "ignore::UserWarning"
)  # Pillow's, on what it makes of a damaged EXIF block
@settings(max_examples=200, deadline=None)
@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_damage_is_an_image_or_an_error_of_ours(data, format):
  exif = Image.Exif()
  exif[0x0112] = 6
  content = bytearray(encoded(picture(20, 30), format, exif=exif))
  for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=10)):
    content[at] = data.draw(st.integers(0, 255))
  try:
    got = decode(bytes(content))
  except DecodeError as error:
    assert str(error).startswith("the image")
  else:
    assert got.dtype == np.uint8
    assert got.ndim == 3
    assert got.shape[2] == 3


def test_an_image_too_large_is_refused_by_its_header():
  """A few bytes may claim any size: nothing of that size may be allocated to find out."""
  side = math.isqrt(images.MAX_PIXELS) + 1
  jpeg = bytearray(encoded(picture(), "JPEG"))
  frame = jpeg.index(b"\xff\xc0")
  jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
  # Before the frame comes what may hold a smaller picture, with a frame of its own.
  thumbnail = encoded(picture(9, 9), "JPEG")
  segment = b"\xff\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
  with_thumbnail = bytes(jpeg[:2]) + segment + bytes(jpeg[2:])
  whole = encoded(Image.new("1", (side, side)), "PNG")  # really of that size, and 35 kB
  for data in (
    png(side, side, 8, 2, []),
    png(2**31 - 1, 2**31 - 1, 8, 2, []),
    bytes(jpeg),
    with_thumbnail,
    whole,
  ):
    with pytest.raises(DecodeError, match="claims to have .* pixels, more than 268,435,456"):
      decode(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_how_large_is_too_large_can_be_said(format):
  data = encoded(Image.fromarray(picture(20, 26)), format)
  out = np.zeros((8, 8, 3), np.uint8)
  for read in (decode, lambda data, **how: training_image(data, 8, np.random.default_rng(0), out=out, **WHOLE, **how)):
    read(data, max_pixels=520)
    with pytest.raises(DecodeError, match="claims to have 520 pixels, more than 519"):
      read(data, max_pixels=519)


# The header.

HEADERS = {
  "JPEG": ("JPEG", {}),
  "progressive JPEG": ("JPEG", dict(progressive=True)),
  "PNG": ("PNG", {}),
  "lossy WebP": ("WEBP", {}),
  "lossless WebP": ("WEBP", dict(lossless=True)),
  "extended WebP": ("WEBP", dict(icc_profile=b"not empty")),
  "GIF": ("GIF", {}),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (300, 7), (257, 5000)])
def test_header_size_is_what_pillow_reads(name, width, height):
  format, options = HEADERS[name]
  data = encoded(Image.new("RGB", (width, height)), format, **options)
  assert header_size(data) == Image.open(io.BytesIO(data)).size == (width, height)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_not_all_there_tells_nothing(name):
  """Of every beginning of the file, those that are too short say None, all others the size."""
  format, options = HEADERS[name]
  data = encoded(picture(47, 61), format, **options)
  told = [header_size(data[:length]) for length in range(len(data) + 1)]
  enough = told.index((61, 47))
  assert 0 < enough <= (700 if format == "JPEG" else 30)
  assert told == [None] * enough + [(61, 47)] * (len(told) - enough)


def test_a_header_of_webp_extended_is_that_format():
  """Or the test above would only know the other two."""
  assert encoded(picture(), "WEBP", icc_profile=b"not empty")[12:16] == b"VP8X"


def test_header_size_looks_past_profiles_thumbnails_and_filling():
  thumbnail = encoded(picture(9, 9), "JPEG")
  data = encoded(picture(47, 61), "JPEG", exif=b"Exif\0\0" + thumbnail, icc_profile=bytes(100_000))
  assert header_size(data) == (61, 47)
  assert header_size(data[:4096]) is None
  plain = encoded(picture(47, 61), "JPEG")
  for filling in (b"\xff\xff", b"\xff\x01", b"\xff\x00garbage", b"\xff\x01garbage"):
    filled = plain[:2] + filling + plain[2:]
    assert header_size(filled) == decode(filled).shape[1::-1] == (61, 47)


@pytest.mark.parametrize("data", [b"", b"\0", b"<html>", b"\xff\xd8", b"RIFF\0\0\0\0WEBPVP9 " + bytes(40), b"GIF89a" + bytes(9)])
def test_what_has_no_header(data):
  assert header_size(data) is None


# The evaluation transform.


def clip_preprocess(image, size):
  """torchvision's Resize(size, BICUBIC) and CenterCrop(size), as CLIP puts them together."""
  width, height = image.size
  short, long = min(width, height), max(width, height)
  longer = int(size * long / short)
  image = image.resize(
    (size, longer) if width <= height else (longer, size), Image.Resampling.BICUBIC
  )
  top, left = round((image.height - size) / 2), round((image.width - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


@settings(max_examples=150, deadline=None)
@given(
  height=st.integers(1, 260),
  width=st.integers(1, 260),
  size=st.sampled_from([1, 7, 16, 32, 33]),
  seed=st.integers(0, 9),
)
def test_evaluation_is_clips_resize_and_centre_crop(height, width, size, seed):
  pixels = noise(height, width, 3, seed=seed)
  got = resize_and_crop(pixels, size)
  assert got.shape == (size, size, 3)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, clip_preprocess(Image.fromarray(pixels), size))


@pytest.mark.parametrize(
  ("height", "width"), [(400, 601), (601, 400), (224, 224), (224, 339), (500, 500)]
)
def test_evaluation_at_the_size_of_clip(height, width):
  pixels = picture(height, width)
  np.testing.assert_array_equal(
    resize_and_crop(pixels, 224), clip_preprocess(Image.fromarray(pixels), 224)
  )


def test_the_longer_side_is_what_torchvision_computes():
  """45 / 5 * 224 is 2016; 45 * (224 / 5) is 2015.9999999999998 in floating point.

  A strip of 5 by 45 of which each row is its own level shows it: the middle falls elsewhere.
  """
  checked = 0
  for short, factor in itertools.product(range(1, 60), range(2, 12)):
    if int(short * factor * (224 / short)) == 224 * factor:
      continue
    pixels = np.repeat(np.linspace(0, 255, short * factor).astype(np.uint8)[:, None], short, axis=1)
    image = Image.fromarray(pixels).convert("RGB")
    np.testing.assert_array_equal(resize_and_crop(image, 224), clip_preprocess(image, 224))
    checked += 1
  assert checked > 10


def test_evaluation_takes_pil_images_of_any_mode():
  image = Image.fromarray(picture())
  for mode in ("RGB", "L", "P", "CMYK", "1"):
    converted = image.convert(mode)
    want = clip_preprocess(converted.convert("RGB"), 16)
    np.testing.assert_array_equal(resize_and_crop(converted, 16), want)


# Augmentation.


def coordinates(height, width):
  """An image whose red channel is x and whose green is y, as shares of the width and the height."""
  x, y = np.meshgrid(np.arange(width), np.arange(height))
  return (
    np.dstack([x * 255 / (width - 1), y * 255 / (height - 1), np.zeros_like(x)])
    .round()
    .astype(np.uint8)
  )


def crop_of(result, height, width):
  """The box that a crop of `coordinates` shows: (left, top, right, bottom) in pixels.

  Straight lines fitted through the middle of the result, where no edge bends them.
  """
  size = len(result)
  inner = slice(size // 8, size - size // 8)
  at = np.arange(size)[inner] + 0.5
  box = []
  for channel, extent, axis in ((0, width, 0), (1, height, 1)):
    levels = result[inner, inner, channel].mean(axis=axis)
    slope, start = np.polyfit(at, levels, 1)
    scale = (extent - 1) / 255
    box.append((start * scale + 0.5, (start + slope * size) * scale + 0.5))
  (left, right), (top, bottom) = box
  return left, top, right, bottom


def test_the_yardstick_of_crops():
  image = Image.fromarray(coordinates(250, 200))
  box = (31.0, 17.5, 151.0, 203.25)
  result = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=box))
  np.testing.assert_allclose(crop_of(result, 250, 200), box, atol=0.3)


@pytest.mark.parametrize(("height", "width"), [(250, 250), (250, 200), (200, 250)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.7), (0.9, 1.0)])
def test_crops_keep_to_scale_and_aspect(height, width, scale):
  image = coordinates(height, width)
  random = np.random.default_rng(0)
  shares, ratios, middles, fallbacks = [], [], [], 0
  for _ in range(150):
    left, top, right, bottom = crop_of(augment(image, 64, random, crop_scale=scale), height, width)
    assert left > -1
    assert right < width + 1
    assert top > -1
    assert bottom < height + 1
    w, h = right - left, bottom - top
    # Ten boxes that do not fit are followed by the centre square.
    side, tolerance = min(height, width), 1.0
    square = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    if np.allclose((left, top, right, bottom), square, atol=tolerance):
      fallbacks += 1
      continue
    shares.append(w * h / (width * height))
    ratios.append(w / h)
    middles.append(((left + right) / 2, (top + bottom) / 2))
  assert fallbacks < 75
  assert scale[0] - 0.02 < min(shares)
  assert max(shares) < scale[1] + 0.02
  assert min(ratios) > 0.75 - 0.03
  assert max(ratios) < 4 / 3 + 0.03
  if scale != (0.9, 1.0):  # where hardly anything but the whole image fits there is nothing to see
    # The whole range is used, both ways, and all over the image.
    assert min(shares) < scale[0] + 0.2 * (scale[1] - scale[0])
    assert max(shares) > scale[1] - 0.4 * (scale[1] - scale[0])
    assert min(ratios) < 0.85
    assert max(ratios) > 1.18
    assert np.std(middles, axis=0).min() > 8


def test_a_panorama_falls_back_to_its_centre_square():
  """Nine tenths of 3:1 cannot be had between 3:4 and 4:3."""
  box = crop_of(
    augment(coordinates(100, 300), 64, np.random.default_rng(0), crop_scale=(0.9, 1.0)), 100, 300
  )
  np.testing.assert_allclose(box, (100, 0, 200, 100), atol=1)


@pytest.mark.parametrize("side", [1, 33, 64, 150])
def test_the_whole_of_a_square_is_pillows_resize(side):
  pixels = noise(side, side, 3)
  got = augment(pixels, 64, np.random.default_rng(0), **WHOLE)
  want = np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.3, 0.9)])
def test_resizing_does_not_alias(scale):
  """A chequerboard too fine to be shown is grey, not a pattern of its own."""
  board = (np.indices((300, 300)).sum(axis=0) % 2 * 255).astype(np.uint8)
  board = np.repeat(board[..., None], 3, axis=2)
  for seed in range(5):
    got = augment(board, 50, np.random.default_rng(seed), crop_scale=scale).astype(int)
    assert np.abs(got[2:-2, 2:-2] - 127.5).max() < 12


EVERYTHING = dict(crop_scale=(0.2, 1.0), color_jitter=0.4, flip=0.5, rotation=15.0)


@settings(max_examples=60, deadline=None)
@given(
  height=st.integers(1, 90),
  width=st.integers(1, 90),
  size=st.integers(1, 48),
  seed=st.integers(0, 2**32),
)
def test_augmentation_is_a_function_of_the_generator(height, width, size, seed):
  pixels = noise(height, width, 3)
  before = pixels.copy()

  def run():
    return augment(pixels, size, np.random.Generator(np.random.Philox(key=[seed, 1])), **EVERYTHING)

  first = run()
  assert first.shape == (size, size, 3)
  assert first.dtype == np.uint8
  np.testing.assert_array_equal(first, run())
  np.testing.assert_array_equal(pixels, before)


def test_augmentation_differs_between_generators():
  results = {
    augment(picture(), 16, np.random.default_rng(seed), **EVERYTHING).tobytes()
    for seed in range(50)
  }
  assert len(results) == 50


def test_flip():
  pixels = picture(60, 60)
  plain = augment(pixels, 32, np.random.default_rng(0), **WHOLE)
  flipped = [augment(pixels, 32, np.random.default_rng(i), **WHOLE, flip=1.0) for i in range(20)]
  kept = [augment(pixels, 32, np.random.default_rng(i), **WHOLE, flip=0.0) for i in range(20)]
  for image in flipped:
    np.testing.assert_array_equal(image, plain[:, ::-1])
  for image in kept:
    np.testing.assert_array_equal(image, plain)
  random = np.random.default_rng(0)
  half = [augment(pixels, 32, random, **WHOLE, flip=0.5) for _ in range(400)]
  count = sum(np.array_equal(image, plain[:, ::-1]) for image in half)
  assert 150 < count < 250  # five deviations of 10 either way
  assert sum(np.array_equal(image, plain) for image in half) == 400 - count


def test_rotation_fills_the_corners_with_white():
  black = np.zeros((101, 101, 3), np.uint8)
  white_corners = 0
  for seed in range(40):
    got = augment(black, 101, np.random.default_rng(seed), **WHOLE, rotation=30.0)
    # What is not black is white, but for the smooth edge between them; the inscribed disc stays.
    y, x = np.indices((101, 101)) - 50
    assert got[x**2 + y**2 < 48**2].max() == 0
    assert np.mean((got > 5) & (got < 250)) < 0.05
    corners = got[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == corners[0]).all()
    white_corners += bool((corners == 255).all())
  assert white_corners > 30  # angles near none leave them black


def test_rotation_keeps_the_middle_and_stays_within_its_angle():
  """A ray from the middle to the right: where it points is the angle, and its foot stays put."""
  ray = np.full((151, 151, 3), 255, np.uint8)
  ray[75, 75:] = 0
  angles = []
  for seed in range(100):
    dark = 255.0 - augment(ray, 151, np.random.default_rng(seed), **WHOLE, rotation=20.0)[..., 0]
    dark[dark < 64] = 0
    y, x = np.indices(dark.shape) - 75.0
    slope = np.sum(dark * x * y) / np.sum(dark * x * x)
    angles.append(math.degrees(math.atan(slope)))
    # A line through the middle passes it at distance zero.
    assert abs(np.sum(dark * (y - slope * x)) / np.sum(dark)) < 0.15
  assert max(np.abs(angles)) < 20.3
  assert min(angles) < -16
  assert max(angles) > 16


def test_rotation_turns_about_the_very_middle():
  """Half a turn of an image is its pixels in the opposite order; a shift would show."""

  class HalfTurn:
    """Stands in for a generator: the one angle for which the answer is known exactly."""

    def uniform(self, low, high, size=None):
      return high

  pixels = picture(31, 31)
  got = augment(pixels, 31, HalfTurn(), **WHOLE, rotation=180.0).astype(int)
  assert np.abs(got - pixels[::-1, ::-1]).max() <= 1


def jitter_reference(pixels, brightness, contrast, saturation):
  """The three by their definitions, one after the other in float64, clipped at the end.

  Each is a blend: with grey of the same luma (ITU-R BT.601), with the mean luma, and with black.
  """
  pixels = pixels.astype(np.float64)
  luma = pixels @ [0.299, 0.587, 0.114]
  pixels = saturation * pixels + (1 - saturation) * luma[..., None]
  pixels = contrast * pixels + (1 - contrast) * luma.mean()
  return np.clip(brightness * pixels, 0, 255)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), strength=st.floats(0.01, 1.0), flip=st.sampled_from([0.0, 1.0]))
def test_jitter_is_brightness_contrast_and_saturation(seed, strength, flip):
  pixels = noise(24, 24, 3, seed=seed % 7)
  got = augment(pixels, 24, np.random.default_rng(seed), **WHOLE, color_jitter=strength, flip=flip)
  # The same draws: those of the crop and the flip, then one for each of the three.
  random = np.random.default_rng(seed)
  plain = augment(pixels, 24, random, **WHOLE, flip=flip)
  factors = 1 + random.uniform(-strength, strength, 3)
  assert np.abs(got - jitter_reference(plain, *factors)).max() <= 1.01


def test_jitter_spans_its_range():
  """On grey neither contrast nor saturation does anything: what is left is brightness alone."""
  grey = np.full((4, 4, 3), 100, np.uint8)
  random = np.random.default_rng(0)
  levels = [augment(grey, 4, random, **WHOLE, color_jitter=0.4)[0, 0, 0] for _ in range(300)]
  assert 60 <= min(levels) < 64
  assert 136 < max(levels) <= 140


def test_no_jitter_is_the_identity():
  pixels = noise(24, 24, 3)
  for strength in (0.0, 1e-9):
    got = augment(pixels, 24, np.random.default_rng(0), **WHOLE, color_jitter=strength)
    np.testing.assert_array_equal(got, pixels)


# From a file to a row of a batch.


def landscape(height, width, seed=0):
  """Noise with the spectrum of photographs, amplitude 1/f^1.2 (Tolhurst et al. 1992), in each channel of its own."""
  random = np.random.default_rng(seed)
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
  frequency[0, 0] = 1
  channels = []
  for _ in range(3):
    spectrum = np.fft.rfft2(random.standard_normal((height, width))) / frequency**1.2
    channel = np.fft.irfft2(spectrum, s=(height, width))
    channels.append(channel / channel.std())
  return np.clip(128 + 45 * np.dstack(channels), 0, 255).astype(np.uint8)


def trained(data, size, seed=0, **how):
  """The row that `training_image` writes, and the number that the generator would give next."""
  random, out = np.random.default_rng(seed), np.full((size, size, 3), 77, np.uint8)
  assert training_image(data, size, random, out=out, **how) is None
  return out, random.random()


def psnr(image, reference):
  return -10 * math.log10(np.mean((image / 255 - reference / 255.0) ** 2) + 1e-12)


# From the reference, in dB. Photographs come nearer, 45 and more: this noise has no soft edges, and the sizes below are
# also those where decoding leaves just the pixels of the result, and so the sharpest picture. Wrong by a pixel is 25.
NEAR = 32

LITTLE = dict(crop_scale=(0.9, 1.0))


@settings(max_examples=60, deadline=None)
@given(
  format=st.sampled_from(["PNG", "WEBP", "GIF"]),
  height=st.integers(1, 90),
  width=st.integers(1, 90),
  size=st.integers(1, 48),
  seed=st.integers(0, 2**32),
  how=st.sampled_from([LITTLE, EVERYTHING]),
)
def test_all_formats_but_jpeg_are_decoded_and_augmented(format, height, width, size, seed, how):
  data = encoded(noise(height, width, 4), format, lossless=True)
  random = np.random.default_rng(seed)
  want = augment(decode(data), size, random, **how)
  got, next_number = trained(data, size, seed, **how)
  np.testing.assert_array_equal(got, want)
  assert next_number == random.random()


def test_only_the_row_that_is_given_is_written():
  batch = np.full((3, 16, 16, 3), 7, np.uint8)
  for format in ("JPEG", "PNG"):
    training_image(encoded(picture(), format), 16, np.random.default_rng(0), out=batch[1], **EVERYTHING)
    assert (batch[[0, 2]] == 7).all()
    assert batch[1].std() > 10
    batch[1] = 7


# Pixels of the file and of the square, and the factor by which decoding then shrinks.
SCALES = [(300, 260, 224), (640, 512, 224), (560, 640, 224), (1000, 1040, 224), (700, 650, 32), (130, 150, 64), (401, 277, 17)]


@pytest.mark.parametrize(("height", "width", "size"), SCALES)
@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.5, 0.8)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_is_near_pillows_crop_of_the_whole(height, width, size, scale, subsampling):
  data = encoded(landscape(height, width), "JPEG", quality=90, subsampling=subsampling)
  for seed in range(4):
    box = crop_box(width, height, np.random.default_rng(seed), scale)
    want = Image.open(io.BytesIO(data)).resize((size, size), Image.Resampling.BICUBIC, box=box)
    got, _ = trained(data, size, seed, crop_scale=scale)
    assert psnr(got, np.asarray(want)) > NEAR


@pytest.mark.parametrize(("height", "width", "size"), [(501, 433, 100), (1201, 1499, 64), (401, 399, 224)])
def test_a_jpeg_is_cropped_where_it_should_be(height, width, size):
  """To a fifth of a pixel of the result, which is how well JPEG's steps let the lines be fitted."""
  data = encoded(coordinates(height, width), "JPEG", quality=98, subsampling=0)
  for seed in range(10):
    box = crop_box(width, height, np.random.default_rng(seed), (0.6, 1.0))
    got, _ = trained(data, size, seed, crop_scale=(0.6, 1.0))
    np.testing.assert_allclose(crop_of(got, height, width), box, atol=0.2 * max(height, width) / size)


@pytest.mark.parametrize("size", [60, 224])
def test_a_jpeg_that_is_enlarged_is_pillows(size):
  """On one side or on both."""
  data = encoded(picture(47, 61), "JPEG", quality=90)
  for seed in range(5):
    random = np.random.default_rng(seed)
    want = augment(decode(data), size, random, crop_scale=(0.3, 1.0))
    np.testing.assert_array_equal(trained(data, size, seed, crop_scale=(0.3, 1.0))[0], want)


@pytest.mark.parametrize("period", [2, 3.2, 4.4, 6])
def test_a_jpeg_does_not_alias(period):
  """Stripes too fine for the result leave no more of a pattern than Pillow leaves; at 1/2 of the size some survive."""
  stripes = 127.5 + 100 * np.sin(2 * np.pi * np.arange(600) / period)
  pixels = np.repeat(np.repeat(stripes[None, :, None], 600, 0), 3, 2).astype(np.uint8)
  for turned in (pixels, pixels.swapaxes(0, 1)):
    data = encoded(np.ascontiguousarray(turned), "JPEG", quality=95, subsampling=0)
    want = np.asarray(Image.open(io.BytesIO(data)).resize((170, 170), Image.Resampling.BICUBIC))
    assert trained(data, 170, **WHOLE)[0].std() < want.std() + 8  # without a filter it is 25 to 31


@pytest.mark.parametrize("size", [40, 200])
def test_a_jpeg_is_augmented_with_the_same_draws(size):
  data = encoded(landscape(400, 300), "JPEG", quality=90)
  changes = [dict(flip=0.5), dict(rotation=20.0), dict(color_jitter=0.4), {}]
  for seed, change in itertools.product(range(6), changes + [dict(flip=0.5, rotation=20.0, color_jitter=0.4)]):
    random = np.random.default_rng(seed)
    want = augment(decode(data), size, random, crop_scale=(0.4, 1.0), **change)
    got, next_number = trained(data, size, seed, crop_scale=(0.4, 1.0), **change)
    assert psnr(got, want) > NEAR - 2, change
    assert next_number == random.random()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("size", [24, 150, 400])
def test_a_jpegs_orientation(orientation, order, size):
  """The box is one of the oriented image, whatever the size decoded at."""
  # "Exif", then the header, a directory of two entries, and what the entries say (TIFF 6.0).
  short = "<" if order == "little" else ">"
  tiff = (b"II*\0" if order == "little" else b"MM\0*") + struct.pack(short + "I", 8) + struct.pack(short + "H", 2)
  tiff += struct.pack(short + "HHII", 0x0100, 4, 1, 61) + struct.pack(short + "HHIHH", 0x0112, 3, 1, orientation, 0)
  data = encoded(landscape(320, 390), "JPEG", quality=95, exif=b"Exif\0\0" + tiff + bytes(4))
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  assert (upright.size == (320, 390)) == (orientation > 4)
  for seed in range(3):
    box = crop_box(*upright.size, np.random.default_rng(seed), (0.5, 1.0))
    want = upright.resize((size, size), Image.Resampling.BICUBIC, box=box)
    assert psnr(trained(data, size, seed, crop_scale=(0.5, 1.0))[0], np.asarray(want)) > NEAR


def test_an_orientation_in_a_comment_is_no_orientation():
  tiff = b"MM\0*" + struct.pack(">IHHHIHH", 8, 1, 0x0112, 3, 1, 6, 0)
  data = encoded(landscape(100, 140), "JPEG", quality=95, comment=b"Exif\0\0" + tiff)
  turned = encoded(landscape(100, 140), "JPEG", quality=95, exif=b"Exif\0\0" + tiff)
  plain = encoded(landscape(100, 140), "JPEG", quality=95)
  np.testing.assert_array_equal(trained(data, 40, **WHOLE)[0], trained(plain, 40, **WHOLE)[0])
  assert (trained(turned, 40, **WHOLE)[0] != trained(plain, 40, **WHOLE)[0]).any()


def test_a_large_jpeg_is_never_held_whole(monkeypatch):
  """At 1/2, 1/4 and 1/8, as far as that leaves the crop the pixels of the result."""
  decoded = []
  imdecode = cv2.imdecode
  monkeypatch.setattr(images.cv2, "imdecode", lambda *arguments: decoded.append(imdecode(*arguments)) or decoded[-1])
  data = encoded(picture(1000, 1000), "JPEG")
  for size in (600, 300, 200, 101, 50):
    trained(data, size, **WHOLE)
  assert [len(image) for image in decoded] == [1000, 500, 250, 125, 125]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("block", [b"", b"garbage", b"MM\0*\0\0\0\x08", b"II*\0" + b"\xff" * 40, b"II*\0\x08\0\0\0\2\0\x12\1"])
def test_a_damaged_exif_block_of_a_jpeg_is_passed_over(block):
  pixels = landscape(100, 140)
  data = encoded(pixels, "JPEG", quality=95, exif=b"Exif\0\0" + block)
  want = augment(pixels, 40, np.random.default_rng(0), **LITTLE)
  assert psnr(trained(data, 40, **LITTLE)[0], want) > NEAR
  assert decode(data).shape == pixels.shape


@pytest.mark.parametrize("size", [30, 64, 100, 400])
@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpegs_in_training(mode, size):
  image = Image.fromarray(landscape(280, 300))
  if mode == "CMYK":
    image = Image.fromarray(np.dstack([np.asarray(image), landscape(280, 300, seed=1)[..., 0] // 2]), "CMYK")
  data = encoded(image.convert(mode), "JPEG", quality=95, subsampling=0)
  want = augment(by_pillow(data), size, np.random.default_rng(0), **LITTLE)
  assert psnr(trained(data, size, **LITTLE)[0], want) > NEAR


@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(restart_marker_blocks=5), dict(subsampling=0)])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_cut_off_jpeg_is_an_error_at_every_scale(options, size):
  """What is missing must not be trained on as grey."""
  data = encoded(landscape(160, 150), "JPEG", **options)
  trained(data, size, **WHOLE)
  for cut in [*range(0, len(data) - 2, 97), len(data) - 3]:
    with pytest.raises(DecodeError):
      trained(data[:cut], size, **WHOLE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it makes of a damaged EXIF block
@settings(max_examples=200, deadline=None)
@given(data=st.data(), format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF"]))
def test_damage_in_training_is_an_image_or_an_error_of_ours(data, format):
  exif = Image.Exif()
  exif[0x0112] = 6
  options = {} if format == "GIF" else dict(exif=exif)
  content = bytearray(encoded(Image.fromarray(picture(40, 50)), format, **options))
  for at in data.draw(st.lists(st.integers(0, min(len(content), 700) - 1), min_size=1, max_size=10)):
    content[at] = data.draw(st.integers(0, 255))
  try:
    trained(bytes(content), 9, max_pixels=10**5, **EVERYTHING)
  except DecodeError as error:
    assert str(error).startswith("the image")
