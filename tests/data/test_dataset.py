"""What a run trains on: mixtures, captions by weight, filters, blocks; and shards in which much is wrong."""

import collections
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax import config as configs
from clip_jax.config import checks
from clip_jax.data import dataset, pipeline, sources
from clip_jax.data.dataset import Dataset
from clip_jax.data.order import mixture
from clip_jax.data.pipeline import BadRecords, train_batches
from clip_jax.data.sources import Record
from clip_jax.data.sources.block_cache import BlockCache
from clip_jax.data.sources.protocol import RandomAccess
from clip_jax.errors import DataError
from tests.conftest import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  folder = tmp_path_factory.mktemp("cache")
  monkeypatch.setenv("CLIP_JAX_CACHE", str(folder))
  return folder


def resolve(steps=1, batch=16, **data):
  return configs.resolve(tiny(train={"global_batch_size": batch, "steps": steps}, data=data))


def picture(number, width=9, height=9, kind="png", **save):
  buffer = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), (number // 256, number % 256, 77), np.uint8)).save(buffer, kind, **save)
  return buffer.getvalue()


def write_tar(path, records):
  with tarfile.open(path, "w") as tar:
    for key, members in records.items():
      for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  return str(path)


def coloured(path, numbers):
  return write_tar(path, {f"{i:05}": {"png": picture(i), "txt": f"number {i}".encode()} for i in numbers})


def coloured_parquet(path, numbers):
  pq.write_table(pa.table({"image": [picture(i) for i in numbers], "caption": [f"number {i}" for i in numbers]}), path)
  return str(path)


def load(config, found=None, rows=None, bad_records=None):
  found = found or dataset.create(config)
  rows = np.arange(config.train.global_batch_size) if rows is None else rows
  return list(train_batches(found, config, rows=rows, start=0, bad_records=bad_records))


def numbers_of(batches):
  images = np.concatenate([batch["images"] for batch in batches]).astype(int)
  return (images[:, 8, 8, 0] * 256 + images[:, 8, 8, 1]).tolist()


# Mixtures.


def test_a_mixture_of_formats_in_exact_proportions(tmp_path):
  mix = (
    (coloured(tmp_path / "a.tar", range(30)), 0.7),
    (coloured_parquet(tmp_path / "b.parquet", range(100, 110)), 0.3),
  )
  config = resolve(10, 20, mixture=mix)
  seen = numbers_of(load(config))
  for start in range(0, 200, 10):
    assert sum(number < 100 for number in seen[start : start + 10]) == 7
  counts = collections.Counter(seen)
  assert [counts[i] for i in range(100, 110)] == [6] * 10  # six epochs of the small one
  assert {counts[i] for i in range(30)} == {4, 5}  # and between four and five of the large one
  components, _ = mixture(0, (7, 3), np.arange(200))
  assert [number >= 100 for number in seen] == components.tolist()


def test_any_split_over_hosts_of_a_mixture_in_blocks(tmp_path):
  """With records that cannot be read: the same substitutes on every host count."""
  (tmp_path / "bad").mkdir()
  records = {f"{i:05}": {"png": picture(i), "txt": b"x"} for i in range(60)}
  for i in (3, 17, 18, 40):
    records[f"{i:05}"]["png"] = b"not an image"
  mix = ((write_tar(tmp_path / "bad/a.tar", records), 2.0), (coloured(tmp_path / "b.tar", range(100, 150)), 1.0))
  options = dict(mixture=mix, order="blocks", block=4, window=3, lanes=4, max_bad_share=1.0)
  config = resolve(12, 24, **options)
  bad = tmp_path / "bad_records.jsonl"
  want = load(config, bad_records=BadRecords(bad, 1.0))
  for hosts in (2, 3, 8):
    parts = [load(config, rows=rows) for rows in np.split(np.arange(24), hosts)]
    for step, whole in enumerate(want):
      for key, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), value)
  lines = [json.loads(line) for line in bad.read_text().splitlines()]
  assert sorted(line["index"] for line in lines) == [3, 17, 18, 40]
  assert {line["source"] for line in lines} == {mix[0][0]}
  seen = numbers_of(want)
  assert not {3, 17, 18, 40} & set(seen)
  assert sum(number < 100 for number in seen) == 2 * sum(number >= 100 for number in seen)


def test_the_components_of_a_mixture_are_one_set_to_who_goes_through_it(tmp_path):
  mix = ((coloured(tmp_path / "a.tar", range(3)), 1.0), (coloured(tmp_path / "b.tar", range(5, 7)), 1.0))
  found = dataset.create(resolve(mixture=mix))
  assert found.lengths == (3, 2) and len(found) == 5
  assert [found[i].captions for i in range(5)] == [[f"number {i}"] for i in (0, 1, 2, 5, 6)]
  with pytest.raises(IndexError):
    found[5]


# Captions.


def test_captions_are_drawn_by_their_weights(tmp_path):
  about = json.dumps({"synthetic": "s", "long": "l"}).encode()
  records = {f"{i:03}": {"png": picture(i), "txt": b"o", "json": about} for i in range(100)}
  weights = (("txt", 1.0), ("synthetic", 2.0), ("long", 5.0))
  config = resolve(100, 40, path=write_tar(tmp_path / "a.tar", records), captions=weights)
  tokens = np.concatenate([batch["tokens"][:, 1] for batch in load(config)])
  counts = {text: (tokens == pipeline.tokenizer_for(config.model)([text])[0, 1]).sum() for text in "osl"}
  assert sum(counts.values()) == 4000
  for text, weight in zip("osl", (1, 2, 5), strict=True):
    share = weight / 8
    assert abs(counts[text] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5


def test_a_caption_that_is_missing_leaves_its_weight_to_the_others(tmp_path):
  records = {"0": {"png": picture(1), "txt": b"o", "json": b"{}"}}
  config = resolve(2, 16, path=write_tar(tmp_path / "a.tar", records), captions=(("txt", 1.0), ("synthetic", 9.0)))
  tokens = np.concatenate([batch["tokens"][:, 1] for batch in load(config)])
  assert len(set(tokens.tolist())) == 1


# Filters.

SIZES = {0: (100, 100), 1: (50, 200), 2: (200, 49), 3: (64, 65), 4: (300, 100), 5: (1, 1)}
CAPTIONS = {0: "ten chars.", 1: "short", 2: "a caption of some length", 3: "x", 4: "ünïcödé 🦊", 5: "ten chars."}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize(
  ("filters", "kept"),
  [
    ({"min_size": 50}, [0, 1, 3, 4]),
    ({"max_aspect": 3.0}, [0, 3, 4, 5]),
    ({"min_caption": 6}, [0, 2, 4, 5]),
    ({"max_caption": 9}, [1, 3, 4]),
    ({"min_size": 64, "max_aspect": 2.9, "min_caption": 2}, [0]),
  ],
)
def test_filters_choose_when_a_set_is_opened(tmp_path, cache, capsys, kind, filters, kept):
  images = {i: picture(i, *size, "jpeg") for i, size in SIZES.items()}
  if kind == "tar":
    path = write_tar(tmp_path / "a.tar", {f"{i}": {"jpg": images[i], "txt": CAPTIONS[i].encode()} for i in SIZES})
  else:
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"jpg": list(images.values()), "text": list(CAPTIONS.values())}), path)
  for _ in range(2):
    found = dataset.create(resolve(path=path, **filters))
    assert [found[i].captions[0] for i in range(len(found))] == [CAPTIONS[i] for i in kept]
    assert found.at(np.arange(3))[0][1].image in images.values()
  said = capsys.readouterr().err
  assert said.count(f"{len(kept)} of 6 records pass the filters") == 1  # the second time it was known
  assert all(name in said for name in filters)


def test_labelled_records_without_captions_are_filtered_as_others(tmp_path):
  path = str(tmp_path / "a.parquet")
  rows = {"image": [picture(0, 100, 100, "jpeg"), picture(1, 20, 20, "jpeg")], "label": [3, 4]}
  pq.write_table(pa.table(rows), path)
  found = dataset.create(resolve(path=path, min_size=50))
  assert [(found[i].captions, found[i].label) for i in range(len(found))] == [([], 3)]


def test_the_config_names_the_formats_that_there_are():
  assert checks.FORMATS[0] == "auto" and set(checks.FORMATS[1:]) == set(sources.FORMATS)


def test_filters_that_nothing_passes(tmp_path):
  path = coloured(tmp_path / "a.tar", range(5))
  with pytest.raises(DataError, match="None of 5 records passes .*min_size=100.*: min_size 5"):
    dataset.create(resolve(path=path, min_size=100))


def test_what_cannot_be_told_passes_and_is_listed_when_its_turn_comes(tmp_path):
  records = {"0": {"png": picture(1), "txt": b"x"}, "1": {"png": b"no image at all", "txt": b"x"}}
  found = dataset.create(resolve(path=write_tar(tmp_path / "a.tar", records), min_size=5))
  assert len(found) == 2


# Blocks.


class Counted(RandomAccess):
  fingerprint = "counted"

  def __init__(self, length, refused=()):
    self.length, self.refused, self.reads = length, refused, collections.Counter()

  def __len__(self):
    return self.length

  def fetch(self, indices):
    self.reads.update(indices)
    return [
      DataError(f"{i} is refused") if i in self.refused else Record(bytes(100), [str(i)], str(i)) for i in indices
    ]

  def key(self, index):
    return str(index)


@settings(max_examples=80, deadline=None)
@given(
  length=st.integers(1, 60),
  block=st.integers(1, 16),
  limit=st.sampled_from([0, 500, 10**6]),
  data=st.data(),
)
def test_a_block_cache_changes_nothing_but_the_reads(length, block, limit, data):
  source = Counted(length, refused={2, 7})
  found = BlockCache(source, block, limit)
  wanted = data.draw(st.lists(st.lists(st.integers(0, length - 1), max_size=6), max_size=12))
  for indices in wanted:
    for index, record in zip(indices, found.fetch(indices), strict=True):
      assert str(record) == f"{index} is refused" if index in (2, 7) else record.captions == [str(index)]


def test_each_record_of_an_epoch_is_read_once():
  source = Counted(500)
  config = resolve(25, 20, order="blocks", block=10, window=3, lanes=4)
  found = Dataset({"": source}, config)
  for step in range(25):
    found.at(np.arange(step * 20, step * 20 + 20))
  assert set(source.reads.values()) == {1} and len(source.reads) == 500


def test_a_cache_that_is_too_small_says_so_and_reads_again(capsys):
  source = Counted(500)
  found = BlockCache(source, 50, limit=1)
  for index in (0, 60, 120, 1, 61, 121):
    assert found[index].captions == [str(index)]
  assert source.reads[0] + source.reads[1] > 2
  assert capsys.readouterr().err.count("data.block_cache") == 1


# Shards in which much is wrong.


def orientation(value):
  exif = Image.Exif()
  exif[0x0112] = value
  return exif


def exotic(number):
  """Images that are unusual and must be read: how each is stored, and the colour that is in it."""
  colour = (200, 30, 90)
  image = Image.new("RGB", (40, 30), colour)
  image.paste((10, 220, 40), (0, 0, 20, 15))  # the upper left quarter

  def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

  sixteen = np.asarray(image.convert("L")).astype(np.uint16) * 257
  rotated = image.transpose(Image.Transpose.ROTATE_90)
  return [
    ("jpg", saved(image.convert("CMYK"), "jpeg", quality=95), image),
    ("png", saved(Image.fromarray(sixteen), "png"), image.convert("L").convert("RGB")),
    ("webp", saved(image, "webp", save_all=True, append_images=[Image.new("RGB", (40, 30))], lossless=True), image),
    ("jpg", saved(rotated, "jpeg", quality=95, exif=orientation(6)), image),
    ("png", saved(image, "jpeg", quality=95), image),  # the wrong extension
    ("jpg", saved(image, "png"), image),
  ][number]


def test_three_per_cent_of_six_kinds_of_damage(tmp_path):
  """The run goes through, names what it could not read, and reads what is only unusual."""
  whole = picture(0, 64, 64, "jpeg")
  wrong = {
    "truncated": {"jpg": whole[: len(whole) // 2], "txt": b"caption"},
    "empty": {"jpg": b"", "txt": b"caption"},
    "text": {"jpg": b"<html>404 Not Found</html>", "txt": b"caption"},
    "no_caption": {"jpg": whole},
    "blank_caption": {"jpg": whole, "txt": b"\n"},
    "bomb": {"png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\2\0\0\0" + bytes(200), "txt": b"c"},
  }
  records = {f"good{i:03}": {"jpg": whole, "txt": b"caption"} for i in range(190)}
  unusual = {f"unusual{i}": exotic(i) for i in range(6)}
  for i, (name, members) in enumerate(wrong.items()):
    records[f"good{30 * i:03}x{name}"] = members
  records |= {name: {extension: content, "txt": b"caption"} for name, (extension, content, _) in unusual.items()}
  path = write_tar(tmp_path / "a.tar", dict(sorted(records.items())))
  config = resolve(13, 16, path=path, crop_scale=(1.0, 1.0))
  found, bad = dataset.create(config), tmp_path / "bad_records.jsonl"
  assert len(found) == 202
  batches = load(config, found, bad_records=BadRecords(bad, config.data.max_bad_share))
  assert len(batches) == 13 and all(np.isfinite(batch["images"]).all() for batch in batches)
  lines = [json.loads(line) for line in bad.read_text().splitlines()]
  assert len(lines) == 6 and {line["substitute"] for line in lines} <= set(range(202))
  source = dataset.create(config)
  for i in range(202):  # what is unusual looks as Pillow's reading of it does
    record = source.read((0, i))
    name = getattr(record, "key", "").partition("/")[2].partition(".")[0]
    if name in unusual:
      got = pipeline.images.decode(record.image).astype(int)
      want = np.asarray(unusual[name][2]).astype(int)
      assert got.shape == want.shape, name
      assert np.abs(got - want).mean() < 6, name
      unusual.pop(name)
  assert not unusual


@pytest.mark.parametrize("limit", [99, 100])
def test_the_limit_of_pixels_is_the_configs(tmp_path, limit):
  path = write_tar(tmp_path / "a.tar", {"0": {"png": picture(1, 10, 10), "txt": b"x"}})
  config = resolve(1, 16, path=path, max_pixels=limit, max_bad_share=1.0)
  if limit == 100:
    assert len(load(config)) == 1
  else:
    with pytest.raises(DataError, match="neither it nor 100 substitutes"):
      load(config)
