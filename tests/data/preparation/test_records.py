"""What becomes of single records: each reason to drop one, and what is written of the others."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import images
from clip_jax.data.preparation import Settings, records
from clip_jax.data.sources.protocol import Record
from clip_jax.errors import DataError, UsageError
from tests.data.preparation import pictures


def record(image=None, captions=("a caption",), label=None, **extra):
  return Record(pictures.jpeg(0) if image is None else image, list(captions), "a.tar/0.jpg", label, None, extra)


def reason(one, **settings):
  return records.judge(one, Settings(**settings)).reason


def bomb():
  """A PNG whose header claims 40,000 x 40,000 pixels."""
  content = bytearray(pictures.encoded(pictures.picture(0), "png"))
  content[16:24] = (40_000).to_bytes(4, "big") * 2
  return bytes(content)


@pytest.mark.parametrize(
  ("one", "settings", "expected"),
  [
    (record(), {}, ""),
    (record(b"no image"), {}, "undecodable"),
    (record(b""), {}, "undecodable"),
    (record(pictures.jpeg(0)[:700]), {}, "undecodable"),
    (record(bomb()), {}, "too_many_pixels"),
    (record(), {"max_pixels": 96 * 80 - 1}, "too_many_pixels"),
    (record(), {"min_size": 80}, ""),
    (record(), {"min_size": 81}, "min_size"),
    (record(), {"max_aspect": 1.2}, ""),
    (record(), {"max_aspect": 1.19}, "max_aspect"),
    (record(pictures.encoded(np.zeros((2, 66_000, 3), np.uint8), "png")), {}, "max_side"),
    (record(pictures.encoded(np.zeros((2, 66_000, 3), np.uint8), "png")), {"max_size": 1000, "resize_mode": "keep_ratio_largest"}, ""),
    (record(captions=["é" * 5]), {"min_caption": 5, "max_caption": 5}, ""),
    (record(captions=[" five5 "]), {"max_caption": 4}, "max_caption"),
    (record(captions=["four"]), {"min_caption": 5}, "min_caption"),
    (record(captions=["four", "fives"]), {"min_caption": 5}, ""),
    (record(captions=[], label=3), {"min_caption": 5}, ""),
    (record(LANGUAGE="en"), {"languages": ("EN", "de")}, ""),
    (record(language="fr"), {"languages": ("en", "de")}, "language"),
    (record(tongue="fr", language="en"), {"languages": ("en",), "language_key": "tongue"}, "language"),
    (record(similarity=0.3), {"min_score": 0.3}, ""),
    (record(similarity="0.29"), {"min_score": 0.3}, "min_score"),
    (record(clip_l14_similarity_score=0.1), {"min_score": 0.3}, "min_score"),
    (record(mine=0.1, similarity=0.5), {"min_score": 0.3, "score_key": "mine"}, "min_score"),
    (DataError("a.tar/../0.jpg: a name that leads out of the archive; such records are not read."), {}, "hostile_name"),
    (DataError("a.tar/0.jpg: a caption of 1,000,000 bytes; 65,536 is the most."), {}, "caption_too_long_to_read"),
    (DataError("a.tar/0.jpg: none of txt holds a caption."), {}, "no_caption"),
    (DataError("a.tar/0.jpg: something else."), {}, "unreadable"),
  ],
)  # fmt: skip
def test_why_a_record_is_dropped(one, settings, expected):
  assert reason(one, **settings) == expected


@pytest.mark.parametrize("extra", [{}, {"similarity": None}, {"similarity": float("nan")}, {"similarity": "high"}])
def test_a_record_without_tags_passes_and_is_counted(extra):
  judged = records.judge(record(**extra), Settings(min_score=0.3, languages=("en",)))
  assert (judged.reason, judged.untagged) == ("", ("language", "score"))


def exif(orientation):
  about = Image.Exif()
  about[274] = orientation
  return about


def cmyk():
  content = io.BytesIO()
  Image.fromarray(pictures.picture(0)).convert("CMYK").save(content, "jpeg")
  return content.getvalue()


@pytest.mark.parametrize(
  ("image", "settings", "size"),
  [
    (pictures.jpeg(0), {}, None),
    (pictures.jpeg(0), {"max_size": 80}, None),
    (pictures.jpeg(0), {"max_size": 96, "resize_mode": "keep_ratio_largest"}, None),
    (pictures.encoded(pictures.picture(0), progressive=True), {}, None),
    (pictures.encoded(pictures.picture(0), exif=exif(1)), {}, None),
    (pictures.jpeg(0), {"max_size": 79}, (95, 79)),
    (pictures.jpeg(0), {"max_size": 48, "resize_mode": "keep_ratio_largest"}, (48, 40)),
    (pictures.jpeg(0), {"max_size": 1}, (1, 1)),
    (pictures.encoded(pictures.picture(0), "png"), {}, (96, 80)),
    (pictures.encoded(pictures.picture(0), "webp"), {"max_size": 40}, (48, 40)),
    (pictures.encoded(pictures.picture(0)[..., 0]), {}, (96, 80)),
    (cmyk(), {}, (96, 80)),
    (pictures.encoded(pictures.picture(0), exif=exif(6)), {}, (80, 96)),
    (pictures.encoded(pictures.picture(0), exif=exif(6)), {"max_size": 40}, (40, 48)),
  ],
)
def test_what_is_written_of_an_image(image, settings, size):
  prepared = records.prepare(record(image), Settings(**settings))
  assert (prepared.width, prepared.height) == (size or (96, 80))
  if size is None:
    assert prepared.image == image
    return
  written = Image.open(io.BytesIO(prepared.image))
  assert (written.format, written.mode, written.size) == ("JPEG", "RGB", size)
  original = Image.fromarray(images.decode(image))
  assert (prepared.more["original_width"], prepared.more["original_height"]) == original.size
  if size != (1, 1):
    expected = np.asarray(original.resize(size, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(written) - expected).mean() < 6
  # What is written would be written again as it is.
  assert records.prepare(record(prepared.image), Settings(**settings)).image == prepared.image


def test_quality():
  small, large = (records.prepare(record(pictures.encoded(pictures.picture(0), "png")), Settings(quality=q)) for q in (50, 95))
  assert len(small.image) < 0.6 * len(large.image)


def test_captions_are_texts_that_can_be_written():
  one = record(captions=[" a ", "a", "half \ud83e", "x" * 10])
  prepared = records.prepare(one, Settings(max_caption=9))
  assert prepared.captions == ["a", "half ?"]


def test_metadata_is_handed_on():
  extra = {"url": "http://x", "caption": "c", "nothing": None, "nested": {"a": [1]}, "raw": b"\xff", "json": '{"old": 1}', "width": 5}
  assert records.metadata(record(**extra)) == {"url": "http://x", "nested": {"a": [1]}, "raw": "b'\\xff'", "old": 1}
  for bad in ({"exif": "x" * 70_000}, {"json": "{"}, {"json": "[" * 100_000}, {"json": 5}):
    assert records.metadata(record(**bad)) == {}
  json.dumps(records.metadata(record(text="\ud83e", name="\ud83e")))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"format": "tfrecord"}, "format='tfrecord': .*array_record"),
    ({"resize_mode": "keep_ration"}, "Did you mean keep_ratio"),
    ({"quality": 0}, "quality=0: from 1 to 100"),
    ({"near_distance": 17}, "near_distance=17: from 0 to 16"),
    ({"shard_size": 0}, "shard_size=0: at least 1"),
    ({"name": "a/b"}, "a part of a file's name"),
  ],
)
def test_settings_are_checked(settings, message):
  with pytest.raises(UsageError, match=message):
    Settings(**settings)
