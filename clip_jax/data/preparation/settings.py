"""What a prepared data set shall be like."""

import dataclasses

from clip_jax.data import images
from clip_jax.data.sources.protocol import Options
from clip_jax.errors import UsageError, did_you_mean

CHOICES = {
  "format": ("array_record", "tar"),
  "resize_mode": ("keep_ratio", "keep_ratio_largest"),
  "same_image": ("merge", "first", "separate"),
}
LIMITS = {  # lowest and highest
  "shard_size": (1, None),
  "max_size": (1, None),
  "quality": (1, 100),
  "max_aspect": (1, None),
  "near_distance": (0, 16),
  "exclude_distance": (0, 16),
  "range_records": (1, None),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to prepare a data set. The names of `resize_mode` are img2dataset's.

  Attributes:
    format: "array_record", or "tar" with members .jpg, .txt and .json, as img2dataset writes them; of several captions
      .txt is the first, and all of them are `captions` in .json.
    name: what the names of ArrayRecord files begin with.
    shard_size: bytes of a file, about: records come to files by chance, and sizes of new JPEGs are estimated.
    max_size: pixels; larger images are made smaller, smaller ones never larger. No limit if None.
    resize_mode: which side `max_size` limits: the shorter, "keep_ratio", or the longer, "keep_ratio_largest".
    quality: of the JPEGs that are written, 1 to 100. JPEGs in RGB and upright that need no resizing are not written anew.
    min_size: pixels of the shorter side, at least.
    max_aspect: longer side over shorter side, at most; any if None.
    min_caption: characters of a caption, at least. A record goes when none of its captions passes.
    max_caption: characters of a caption, at most; any if None.
    languages: language tags that are wanted; all if empty. A record without a tag passes, and is counted.
    language_key: the name of the tag; the usual ones are tried if empty.
    min_score: the CLIP score, at least; any if None. A record without a score passes, and is counted.
    score_key: the name of the score; the usual ones are tried if empty.
    same_image: of records with the same pixels and other captions, "merge" keeps the first with the captions of all,
      "first" keeps the first as it is, "separate" keeps them all. With the same captions, too, the first is kept.
    near_distance: bits, of 64, in which the perceptual hashes of two images may differ for the smaller one to be a
      copy of the other; copies go. None: only the same pixels are copies.
    exclude: images that must not be trained on: folders or globs of images, or data sets as `sources.create` opens them.
    exclude_distance: as `near_distance`, between a record and an image of `exclude`.
    seed: of the order of the records.
    captions: names of the captions to read; what the format calls a caption if empty.
    image: name of the column or feature with the image; found by itself if empty.
    allow_truncated: use the whole records of tar shards that are cut off.
    max_pixels: an image that claims more is dropped before it is decoded.
    range_records: records that are one piece of work; the result does not depend on it.
  """

  format: str = "array_record"
  name: str = "data"
  shard_size: int = 1_000_000_000
  max_size: int | None = None
  resize_mode: str = "keep_ratio"
  quality: int = 95
  min_size: int = 0
  max_aspect: float | None = None
  min_caption: int = 0
  max_caption: int | None = None
  languages: tuple[str, ...] = ()
  language_key: str = ""
  min_score: float | None = None
  score_key: str = ""
  same_image: str = "merge"
  near_distance: int | None = 4
  exclude: tuple[str, ...] = ()
  exclude_distance: int | None = 4
  seed: int = 0
  captions: tuple[str, ...] = ()
  image: str = ""
  allow_truncated: bool = False
  max_pixels: int = images.MAX_PIXELS
  range_records: int = 500

  def __post_init__(self):
    """Checks.

    Raises:
      UsageError: a value is out of range.
    """
    for name, known in CHOICES.items():
      value = getattr(self, name)
      if value not in known:
        choices = f"One of {', '.join(known)}."
        raise UsageError(f"{name}={value!r}: {did_you_mean(value, known, choices)}")
    for name, (low, high) in LIMITS.items():
      value = getattr(self, name)
      if value is not None and (value < low or high is not None and value > high):
        raise UsageError(f"{name}={value}: {f'from {low} to {high}' if high else f'at least {low}'}.")
    if not self.name or "/" in self.name:
      raise UsageError(f"name={self.name!r}: a part of a file's name.")

  def options(self):
    """The `Options` that sources are opened with."""
    return Options(
      captions=tuple((name, 1.0) for name in self.captions),
      image=self.image,
      extra=True,
      allow_truncated=self.allow_truncated,
    )
