"""What is found in data sets of which all is known."""

import json

import numpy as np
import pytest

from clip_jax import config as configs
from clip_jax.data import dataset, inspection, pipeline, tokenizer_folders
from clip_jax.data.tokenizer import ClipTokenizer
from tests.conftest import tiny
from tests.data.test_dataset import coloured, picture, write_tar
from tests.data.test_tokenizer_folders import folder_of

WHOLE = picture(1, 64, 48, "jpeg")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def resolve(**data):
  return configs.resolve(tiny(data=data))


def captioned(image, *captions, kind="png"):
  return {kind: image, "json": json.dumps({"caption": list(captions)}).encode()}


def test_counts_of_a_set_of_which_all_is_known(tmp_path):
  sizes = [(20, 10), (30, 40), (8, 8), (100, 25), (50, 50)]
  kinds = ["png", "jpeg", "webp", "gif", "png"]
  texts = [["a"], ["b b", "c" * 40], ["a"], [" ".join("word" for _ in range(30))], ["ü" * 5]]
  encoded = [picture(i, *size, kind) for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True))]
  records = {f"{i}": captioned(image, *text) for i, (image, text) in enumerate(zip(encoded, texts, strict=True))}
  found = inspection.inspect(resolve(path=write_tar(tmp_path / "a.tar", records)), 1000)
  summary = found.summary
  assert json.loads(json.dumps(summary)) == summary
  assert (summary["records"], summary["looked_at"], summary["image_size"], summary["context_length"]) == (5, 5, 16, 12)
  assert summary["formats"] == {"PNG": 2, "JPEG": 1, "WebP": 1, "GIF": 1}
  want = {
    "width": [size[0] for size in sizes],
    "height": [size[1] for size in sizes],
    "shorter_side": [min(size) for size in sizes],
    "aspect": [width / height for width, height in sizes],
    "bytes": list(map(len, encoded)),
    "captions": [1, 2, 1, 1, 1],
    "characters": [1, 3, 40, 1, 149, 5],
    "tokens": [(row > 0).sum() for row in ClipTokenizer(12)([text for one in texts for text in one])],
  }
  for name, values in want.items():
    assert sorted(found.values[name]) == sorted(values), name
    assert summary[name]["median"] == np.median(values) and summary[name]["mean"] == pytest.approx(np.mean(values))
    assert (summary[name]["min"], summary[name]["max"]) == (min(values), max(values))
  assert max(want["tokens"]) == 12
  assert summary["fill_context"] == pytest.approx(want["tokens"].count(12) / 6)
  assert summary["smaller_than_model"] == pytest.approx(2 / 5)
  assert summary["bad"] == {"records": 0, "reasons": []}
  assert summary["duplicates"] == {"images": 0, "captions": 1, "most_repeated": [{"caption": "a", "times": 2}]}
  assert found.samples == [] and found.copies == []


def test_bad_records_by_reason_with_the_first_keys(tmp_path):
  records = {f"{i:03}": {"jpg": WHOLE, "txt": b"x"} for i in range(40)}
  for i in range(7):
    records[f"{i:03}"]["jpg"] = f"<html>{i}".encode()
  for i in (10, 11):
    records[f"{i:03}"]["jpg"] = WHOLE[: 300 + i]
  records["020"] = {"jpg": WHOLE}
  records["021"] = {"jpg": WHOLE, "cls": b"3"}
  path = write_tar(tmp_path / "a.tar", records)
  bad = inspection.inspect(resolve(path=path), 100).summary["bad"]
  assert bad["records"] == 11
  reasons = {kind["reason"]: (kind["records"], {key.removeprefix("a.tar/")[:3] for key in kind["keys"]}) for kind in bad["reasons"]}
  assert [kind["records"] for kind in bad["reasons"]] == [7, 2, 1, 1]
  found = {next(word for word in ("<html>", "xff", "no caption (", "a class") if word in text): kind for text, kind in reasons.items()}
  assert found["<html>"][0] == 7 and len(found["<html>"][1]) == 5 and found["<html>"][1] <= {f"{i:03}" for i in range(7)}
  assert found["xff"] == (2, {"010", "011"})
  assert found["no caption ("] == (1, {"020"}) and found["a class"] == (1, {"021"})


def test_a_set_in_which_nothing_can_be_read(tmp_path):
  path = write_tar(tmp_path / "a.tar", {f"{i}": {"png": b"nothing", "txt": b"x"} for i in range(3)})
  found = inspection.inspect(resolve(path=path), 100, samples=2)
  assert found.summary["bad"]["records"] == 3 and found.summary["tokens"] is None and found.summary["formats"] == {}
  assert found.samples == [] and found.copies == []


def test_duplicates_are_groups_with_the_captions_of_each(tmp_path):
  same = {3: 1, 7: 1, 9: 1, 12: 2, 13: 2}  # record -> picture
  records = {f"{i:02}": {"png": picture(same.get(i, 100 + i), 300, 200), "txt": f"number {i % 10}".encode()} for i in range(20)}
  found = inspection.inspect(resolve(path=write_tar(tmp_path / "a.tar", records)), 100, samples=1)
  assert found.summary["duplicates"]["images"] == 3 and found.summary["duplicates"]["captions"] == 10
  assert {same["times"] for same in found.summary["duplicates"]["most_repeated"]} == {2}
  groups = [(count, {(copy.key, *copy.captions) for copy in group}) for count, group in found.copies]
  keys = [{(f"a.tar/{i:02}.png", f"number {i % 10}") for i in group} for group in ((3, 7, 9), (12, 13))]
  assert groups == [(3, keys[0]), (2, keys[1])]
  assert found.copies[0][1][0].pixels.shape == (107, 160, 3) and (found.copies[0][1][0].pixels[..., 1] == 1).all()


def test_the_first_positions_of_the_runs_order_are_looked_at(tmp_path):
  images = [picture(i, 10 + i, 9) for i in range(50)]
  path = write_tar(tmp_path / "a.tar", {f"{i:02}": {"png": image, "txt": b"x"} for i, image in enumerate(images)})
  for order in ("global", "blocks"):
    config = resolve(path=path, order=order, block=4, seed=3)
    _, indices = dataset.create(config).order.examples(np.arange(20))
    assert inspection.inspect(config, 20).values["width"].tolist() == (10 + indices).tolist()
  assert sorted(inspection.inspect(config, 1000).values["width"]) == list(range(10, 60))


@pytest.mark.parametrize("weights, scan", [((1.0, 9.0), 1000), ((9.0, 1.0), 1000), ((9.0, 1.0), 30)])
def test_each_record_of_a_mixture_counts_once(tmp_path, weights, scan):
  sets = [tmp_path / "small.tar", tmp_path / "large.tar"]
  mix = ((coloured(sets[0], range(5)), weights[0]), (coloured(sets[1], range(100, 140)), weights[1]))
  summary = inspection.inspect(resolve(mixture=mix), scan).summary
  # Of 30 positions the small set gets 27, which is all of it, and the large one three.
  assert summary["looked_at"] == (45 if scan == 1000 else 8)
  assert summary["duplicates"]["images"] == 0
  assert summary["components"] == [
    {"path": str(path), "records": length, "share": weight / 10, "filtered_out": 0}
    for path, length, weight in zip(sets, (5, 40), weights, strict=True)
  ]


def test_filters_tell_how_many_they_left_out(tmp_path):
  records = {f"{i}": {"png": picture(i, 10 + i, 30), "txt": b"x"} for i in range(20)}
  summary = inspection.inspect(resolve(path=write_tar(tmp_path / "a.tar", records), min_size=16), 100).summary
  assert (summary["records"], summary["looked_at"], summary["components"][0]["filtered_out"]) == (14, 14, 6)
  assert summary["width"]["min"] == 16


def test_samples_are_the_rows_of_the_first_batch(tmp_path):
  """With a record that cannot be read: what stands beside a picture is of the record that took its place."""
  records = {f"{i:02}": captioned(picture(i, 30, 40), f"first {i}", f"second {i}") for i in range(24)}
  config = resolve(path=write_tar(tmp_path / "a.tar", records), color_jitter=0.5, other_captions=0.6, max_bad_share=1.0)
  broken = int(dataset.create(config).order.examples(np.arange(16))[1][2])
  records[f"{broken:02}"]["png"] = b"nothing"
  write_tar(tmp_path / "a.tar", records)
  found = dataset.create(config)
  batch = next(pipeline.train_batches(found, config, rows=np.arange(16), start=0))
  samples = inspection.inspect(config, 5, samples=10).samples
  assert len(samples) == 10
  tokenizer = ClipTokenizer(12)
  for row, sample in enumerate(samples):
    np.testing.assert_array_equal(sample.pixels, batch["images"][row])
    np.testing.assert_array_equal(tokenizer([sample.chosen])[0], batch["tokens"][row])
    number = sample.key.removeprefix("a.tar/").removesuffix(".png").lstrip("0") or "0"
    assert sample.captions == [f"first {number}", f"second {number}"] and sample.chosen in sample.captions
    assert [token for token, _, _ in sample.pieces] == [token for token in batch["tokens"][row].tolist() if token]
    assert "".join(text for _, text, marks in sample.pieces if not marks) == sample.chosen.replace(" ", "")
    assert [marks for _, _, marks in sample.pieces] == [True] + [False] * (len(sample.pieces) - 2) + [True]
  assert int(samples[2].key[6:8]) != broken
  assert {sample.chosen.split()[0] for sample in samples} == {"first", "second"}


@pytest.mark.parametrize("name", ["siglip", "siglip 2", "clip", "t5"])
def test_lengths_in_tokens_of_tokenizers_from_files(name):
  """Independently: what is left when the padding is taken off, and at least the end token stays."""
  tokenizer = tokenizer_folders.read(folder_of(name), 9)
  span = inspection.text_span(tokenizer)
  for text in ("", "a cat", "the quick brown fox jumps over the lazy dog"):
    row = tokenizer([text])[0]
    start, stop = span(row)
    kept = row.tolist()
    while len(kept) > 1 and kept[-1] == tokenizer.pad_id and kept[-2] in (tokenizer.pad_id, tokenizer.end_id):
      kept.pop()
    assert row[start:stop].tolist() == kept and (len(kept) == 9) == (len(text) > 20)


def test_padding_on_the_left_does_not_count():
  class Left:
    pad_id, end_id = 0, 1

  assert inspection.text_span(Left)(np.array([0, 0, 5, 6, 1])) == (2, 5)
  assert inspection.text_span(Left)(np.array([5, 6, 7, 8, 1])) == (0, 5)
