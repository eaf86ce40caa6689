"""Records of webdataset shards to training examples: clip_jax against webdataset with Pillow transforms, as open_clip has it.

    python benchmarks/input_pipeline.py [--images N] [--photos FOLDER] [--json]

Both read the same files in one run, in turns, with one and with two workers: JPEG crops of photographs (see
input_images.py) with sides of 512 to 640 px at quality 90, with the captions of input_tokenizer.py. Theirs: torch
`DataLoader` processes of webdataset, Pillow, RandomResizedCrop(224, (0.9, 1), bicubic), tensor, normalisation, open_clip's
Python tokenizer. Ours: what training gets, from threads: random access in the run's order, uint8, which the device normalises. Rates are images a
second of wall time, and of processor time (workers and the process that waits for them), medians of the rounds.
"""

import argparse
import collections
import io
import json
import os
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from input_images import SCALE, SIZE, by_clip_jax, by_pillow, crops, photographs, psnr
from input_tokenizer import PythonTokenizer, captions
from PIL import Image

from clip_jax import config as configs
from clip_jax.data import dataset, images
from clip_jax.data.pipeline import BadRecords, Loader, train_batches

BATCH, ROUNDS, SHARDS = 32, 7, 4
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_shards(folder, files, texts):
  """Writes records `000000.jpg`, `000000.txt`, ... into tar shards, and returns their paths."""
  paths = [folder / f"{shard:05d}.tar" for shard in range(SHARDS)]
  for shard, path in enumerate(paths):
    with tarfile.open(path, "w") as tar:
      for i in range(shard, len(files), SHARDS):
        for suffix, content in (("jpg", files[i]), ("txt", texts[i].encode("utf-8"))):
          member = tarfile.TarInfo(f"{i:06d}.{suffix}")
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
  return [str(path) for path in paths]


class Ours:
  """The batches that training gets."""

  def __init__(self, folder, count):
    self._folder, self._count = folder, count
    self.data = dataset.create(self._config(1))

  def _config(self, threads):
    return configs.resolve(
      {
        "model": {"name": "ViT-B-16"},
        "data": {"path": f"{self._folder}/*.tar", "threads": threads, "crop_scale": SCALE},
        "train": {"global_batch_size": BATCH, "samples": self._count},
      }
    )

  def __call__(self, workers):
    """Loads everything once; returns images and seconds of wall time."""
    config = self._config(workers)
    start = time.perf_counter()
    batches = sum(1 for _ in train_batches(self.data, config, rows=np.arange(BATCH), start=0))
    return batches * BATCH, time.perf_counter() - start

  def shares(self):
    """How one thread's time divides over reading, images and tokens."""
    seconds = collections.Counter()

    def clock(stage, function, *arguments):
      start = time.perf_counter()
      try:
        return function(*arguments)
      finally:
        seconds[stage] += time.perf_counter() - start

    load = Loader(self.data, self._config(1), BadRecords(None, 0.0), clock)
    out = {"images": np.empty((BATCH, SIZE, SIZE, 3), np.uint8), "tokens": np.empty((BATCH, 77), np.int32)}
    for step in range(len(self.data) // BATCH):
      load(np.arange(step * BATCH, (step + 1) * BATCH), out)
    seconds["resize"] = seconds.pop("image") - seconds["decode"]
    return {stage: seconds[stage] / seconds.total() for stage in ("read", "decode", "resize", "tokenize")}


class Theirs:
  """webdataset, transforms of torchvision written out with Pillow and torch, and a Python tokenizer, in processes."""

  def __init__(self, paths, count):
    self._paths, self._count, self._tokenizer = paths, count, PythonTokenizer()

  def __call__(self, workers):
    """Loads everything once, after a first batch that the starting of the processes is hidden behind."""
    import webdataset

    data = (
      webdataset.WebDataset(self._paths, shardshuffle=False)
      .decode("pilrgb")
      .rename(image="jpg", text="txt")
      .map_dict(image=self._transform, text=self._tokens)
      .to_tuple("image", "text")
      .batched(BATCH)
      .repeat()
    )
    loader = webdataset.WebLoader(data, batch_size=None, shuffle=False, num_workers=workers)
    batches = iter(loader)
    for _ in range(2 * workers + 1):  # what the workers have prefetched must not count
      next(batches)
    loaded, start = 0, time.perf_counter()
    while loaded < self._count:
      loaded += len(next(batches)[1])
    return loaded, time.perf_counter() - start

  def _tokens(self, text):
    import torch

    return torch.from_numpy(self._tokenizer([text])[0])

  def _transform(self, image):
    import torch

    left, top, width, height = self._box(image)
    image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.convert("RGB"), copy=True)).permute(2, 0, 1).contiguous()
    pixels = pixels.to(torch.float32).div(255)
    mean, std = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)

  def _box(self, image):
    # RandomResizedCrop.get_params of torchvision.
    import torch

    width, height = image.size
    ratios = torch.log(torch.tensor((3 / 4, 4 / 3)))
    for _ in range(10):
      area = width * height * torch.empty(1).uniform_(*SCALE).item()
      ratio = torch.exp(torch.empty(1).uniform_(ratios[0], ratios[1])).item()
      w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
      if 0 < w <= width and 0 < h <= height:
        top = torch.randint(0, height - h + 1, size=(1,)).item()
        left = torch.randint(0, width - w + 1, size=(1,)).item()
        return left, top, w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def processor_seconds():
  """Of this process and of its children that have ended."""
  ended = resource.getrusage(resource.RUSAGE_CHILDREN)
  return time.process_time() + ended.ru_utime + ended.ru_stime


def measured(ways, workers):
  """Rates of each way with so many workers, and the ratio of the second to the first, each of them per round."""
  rounds = []
  for _ in range(ROUNDS):
    rates = {}
    for name, load in ways.items():
      before = processor_seconds()
      loaded, seconds = load(workers)
      # Theirs also loads the batches before the clock starts, and has some in hand when it stops.
      extra = 0 if name == "clip_jax" else BATCH * 4 * workers
      rates[name] = loaded / seconds, (loaded + extra) / (processor_seconds() - before)
    rounds.append(rates)
  row = {}
  for i, unit in enumerate(("images_per_second", "images_per_processor_second")):
    row[unit] = {name: statistics.median(rates[name][i] for rates in rounds) for name in ways}
    first, second = ways
    row[unit]["ratio"] = statistics.median(rates[second][i] / rates[first][i] for rates in rounds)
  return row


def distances(files):
  """PSNR between what Pillow makes of a box and what we make of it, over all files."""
  values = []
  for seed, file in enumerate(files):
    box = images.crop_box(*images.header_size(file), np.random.default_rng(seed), SCALE)
    values.append(psnr(by_clip_jax(file, box, seed), by_pillow(file, box)))
  return {"mean": statistics.fmean(values), "least": min(values)}


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--images", type=int, default=384)
  parser.add_argument("--photos", type=Path)
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  files = crops(photographs(arguments.photos), 512, 640, arguments.images)
  with tempfile.TemporaryDirectory() as folder:
    paths = write_shards(Path(folder), files, captions(len(files)))
    ours = Ours(folder, len(files))
    ways = {"webdataset, Pillow": Theirs(paths, len(files)), "clip_jax": ours}
    for load in ways.values():  # fills the page cache and the tokenizers' caches
      load(1)
    rows = {str(workers): measured(ways, workers) for workers in (1, 2)}
    shares = ours.shares()
  results = {"workers": rows, "share_of_our_time": shares, "psnr": distances(files)}
  print(json.dumps(results) if arguments.json else table(results))


def table(results):
  """The results for people."""
  lines = [f"{'images a second':<44}{'theirs':>9}{'ours':>9}{'ratio':>8}"]
  for workers, row in results["workers"].items():
    for unit, rates in row.items():
      name = f"{workers} worker(s), of {'processor' if 'processor' in unit else 'wall'} time"
      lines.append(f"  {name:<42}" + "{:>9,.0f}{:>9,.0f}{:>7.2f}x".format(*rates.values()))
  shares = ", ".join(f"{name} {share:.1%}" for name, share in results["share_of_our_time"].items())
  lines.append(f"our time, one worker: {shares}")
  lines.append("PSNR to Pillow's result for the same box: {mean:.1f} dB, at least {least:.1f}".format(**results["psnr"]))
  return "\n".join(lines)


if __name__ == "__main__":
  main()
