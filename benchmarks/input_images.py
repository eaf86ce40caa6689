"""From a JPEG to a 224 px crop: how fast is each way, and how far from Pillow's result?

    python benchmarks/input_images.py [--photos FOLDER] [--json]

The reference decodes all of the file with Pillow and resizes the box with Pillow's bicubic. Everybody gets the same boxes
(scale 0.9 to 1.0, as open_clip) of the same files: crops of photographs at quality 90, with sides of 512 to 640, 1,500 and
300 px. Times are medians over rounds in each of which every way runs once, on one core; PSNR is over RGB. The
photographs are those of three Debian packages of wallpapers, fetched with apt-get (110 MB, not installed) unless
--photos names a folder of JPEGs. Needs `pip install simplejpeg pyvips-binary pyvips` for their rows.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VIPS_CONCURRENCY", "1")

import cv2
import numpy as np
from PIL import Image

from clip_jax.data import images

PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds")
DRAWN = ("abstract", "desktop")  # folders of wallpapers that are no photographs
SIZE, SCALE, ROUNDS = 224, (0.9, 1.0), 5
CASES = {"512-640 px": (512, 640), "1,500 px": (1500, 1500), "300 px": (300, 300)}
BICUBIC = Image.Resampling.BICUBIC


def photographs(folder=None):
  """The JPEGs of a folder, or of the Debian packages, which are kept in the temporary folder.

  Returns:
    A list of RGB PIL images with sides of at least 700 pixels.
  """
  if folder is None:
    folder = Path(tempfile.gettempdir()) / "clip_jax_photographs"
    if not folder.exists():
      with tempfile.TemporaryDirectory() as packages:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=packages, check=True, stdout=subprocess.DEVNULL)
        for package in sorted(Path(packages).glob("*.deb")):
          subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
  paths = sorted(path for path in Path(folder).rglob("*.jpg") if path.parent.name not in DRAWN)
  photos = [Image.open(path).convert("RGB") for path in paths]
  return [photo for photo in photos if min(photo.size) >= 700]


def crops(photos, low, high, count, seed=0):
  """JPEG files of quality 90 with sides of `low` to `high`, which show between a sixth and all of a photograph."""
  random = np.random.default_rng(seed)
  files = []
  while len(files) < count:
    photo = photos[random.integers(len(photos))]
    width, height = (int(side) for side in random.integers(low, high + 1, 2))
    scale = max(width / photo.width, height / photo.height) * random.uniform(1, 2.5)
    if scale > 1:
      continue
    photo = photo.resize((math.ceil(photo.width * scale), math.ceil(photo.height * scale)), Image.Resampling.LANCZOS)
    left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
    file = io.BytesIO()
    photo.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
    files.append(file.getvalue())
  return files


def psnr(image, reference):
  """Peak signal-to-noise ratio in dB, 99 for equal images."""
  error = np.mean((image.astype(np.float64) - reference) ** 2)
  return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0


def by_pillow(encoded, box, draft=False):
  """Pillow decodes and resizes; with `draft` it decodes at 1/2, 1/4 or 1/8 where that still holds the result."""
  image = Image.open(io.BytesIO(encoded))
  width = image.width
  if draft:
    image.draft("RGB", [side * SIZE // round(min(box[2] - box[0], box[3] - box[1])) for side in image.size])
  scale = round(width / image.width)
  return np.asarray(image.convert("RGB").resize((SIZE, SIZE), BICUBIC, box=[edge / scale for edge in box]))


def scale_of(box):
  """By how much decoding may shrink."""
  return max((s for s in (2, 4, 8) if s * SIZE <= min(box[2] - box[0], box[3] - box[1])), default=1)


def by_opencv(encoded, box, reduced, resize):
  """OpenCV decodes, whole or reduced; `resize` takes the array and the box in it."""
  scale = scale_of(box) if reduced else 1
  flag = {1: cv2.IMREAD_COLOR, 2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4, 8: cv2.IMREAD_REDUCED_COLOR_8}
  image = cv2.cvtColor(cv2.imdecode(np.frombuffer(encoded, np.uint8), flag[scale]), cv2.COLOR_BGR2RGB)
  return resize(image, [edge / scale for edge in box])


def pillow_resize(image, box):
  """Pillow's bicubic of an array."""
  return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), BICUBIC, box=box))


def area_resize(image, box):
  """OpenCV's mean over areas, of the nearest whole pixels."""
  left, top, right, bottom = (round(edge) for edge in box)
  return cv2.resize(image[top:bottom, left:right], (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def linear_resize(image, box):
  """OpenCV's linear interpolation, which is not antialiased."""
  left, top, right, bottom = box
  across, down = (right - left) / SIZE, (bottom - top) / SIZE
  matrix = np.float64([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
  flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  return cv2.warpAffine(image, matrix, (SIZE, SIZE), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def by_simplejpeg(encoded, box):
  """libjpeg-turbo by itself, at 1/2, 1/4 or 1/8, and Pillow's bicubic."""
  import simplejpeg

  scale = scale_of(box)
  height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
  least = dict(min_width=-(-width // scale), min_height=-(-height // scale)) if scale > 1 else {}
  image = simplejpeg.decode_jpeg(encoded, "RGB", **least)
  return pillow_resize(image, [edge / scale for edge in box])


def by_vips(encoded, box):
  """libvips shrinks while it loads and reduces with a cubic kernel, of the nearest whole pixels."""
  import pyvips

  scale = scale_of(box)
  image = pyvips.Image.jpegload_buffer(encoded, shrink=scale)
  left, top, right, bottom = (round(edge / scale) for edge in box)
  image = image.crop(left, top, min(right, image.width) - left, min(bottom, image.height) - top)
  return image.reduce(image.width / SIZE, image.height / SIZE, kernel="cubic").numpy()


def by_clip_jax(encoded, box, seed):
  """What training does; the generator draws the box again."""
  out = np.empty((SIZE, SIZE, 3), np.uint8)
  images.training_image(encoded, SIZE, np.random.default_rng(seed), crop_scale=SCALE, out=out)
  return out


WAYS = {
  "Pillow": lambda encoded, box, seed: by_pillow(encoded, box),
  "Pillow, draft": lambda encoded, box, seed: by_pillow(encoded, box, draft=True),
  "simplejpeg scaled, Pillow's resize": lambda encoded, box, seed: by_simplejpeg(encoded, box),
  "pyvips, shrink on load": lambda encoded, box, seed: by_vips(encoded, box),
  "OpenCV, Pillow's resize": lambda encoded, box, seed: by_opencv(encoded, box, False, pillow_resize),
  "OpenCV reduced, Pillow's resize": lambda encoded, box, seed: by_opencv(encoded, box, True, pillow_resize),
  "OpenCV reduced, INTER_AREA": lambda encoded, box, seed: by_opencv(encoded, box, True, area_resize),
  "OpenCV reduced, INTER_LINEAR": lambda encoded, box, seed: by_opencv(encoded, box, True, linear_resize),
  "clip_jax training_image": by_clip_jax,
}


def measured(files):
  """Milliseconds an image, the ratio of speeds to the first way and PSNR of each way."""
  sizes = [images.header_size(file) for file in files]
  boxes = [images.crop_box(*size, np.random.default_rng(i), SCALE) for i, size in enumerate(sizes)]
  jobs = list(zip(files, boxes, range(len(files)), strict=True))
  reference = [by_pillow(file, box) for file, box, _ in jobs]
  rows, seconds = {}, {}
  for name, way in WAYS.items():
    try:
      distances = [psnr(way(*job), want) for job, want in zip(jobs, reference, strict=True)]
    except ImportError:
      continue  # a package that is only compared with
    rows[name] = {"psnr_mean": statistics.fmean(distances), "psnr_min": min(distances)}
    seconds[name] = []
  for _ in range(ROUNDS):
    for name in rows:
      start = time.process_time()
      for job in jobs:
        WAYS[name](*job)
      seconds[name].append((time.process_time() - start) / len(jobs))
  for name, row in rows.items():
    row["ms"] = 1000 * statistics.median(seconds[name])
    row["ratio"] = statistics.median(p / s for p, s in zip(seconds["Pillow"], seconds[name], strict=True))
  return rows


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--photos", type=Path)
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  photos = photographs(arguments.photos)
  results = {name: measured(crops(photos, *sides, 64)) for name, sides in CASES.items()}
  if arguments.json:
    print(json.dumps(results))
    return
  for case, rows in results.items():
    print(f"{case + f' to {SIZE} px':<38}{'ms':>7}{'speed':>8}{'PSNR, dB':>10}{'least':>7}")
    for name, row in rows.items():
      print(f"  {name:<36}{row['ms']:>7.2f}{row['ratio']:>7.1f}x{row['psnr_mean']:>10.1f}{row['psnr_min']:>7.1f}")


if __name__ == "__main__":
  main()
