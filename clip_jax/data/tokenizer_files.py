"""A tokenizer that comes as a file beside a model: `spiece.model` or `tokenizer.json`.

The models that bring one (SigLIP: Zhai et al. 2023; SigLIP 2: Tschannen et al. 2025) were published
with what `transformers` makes of it, so the ids here are those of `transformers`. What a model
folder says of its tokenizer is read in `tokenizer_folders`.

What a tokenizer depends on is in the object, the file's bytes included, so it can travel in a
checkpoint. This module imports neither JAX nor torch nor transformers; `spiece.model` needs the
optional package `sentencepiece`.
"""

import base64
import dataclasses
import functools
import html
import itertools
import re
import string
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

from clip_jax.data.tokenizer import checked
from clip_jax.errors import DataError, MissingExtraError, UsageError

SPIECE, JSON = "spiece.model", "tokenizer.json"
SPACE = "▁"  # how SentencePiece writes a space: U+2581
ID = range(1 << 31)  # rows are int32


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
  """Turns captions into rows of token ids, with a tokenizer that was read from a file.

  Made by `tokenizer_folders.read`, or by `from_dict` from what a checkpoint holds. Instances are
  hashable, picklable and safe to call from many threads. The file is parsed once per process, at
  the first call; a pickle carries its bytes.

  Args:
    content: the file. A `tokenizer.json` that its tokenizer class reads otherwise than it is
      written (tokens that stand in `tokenizer_config.json` only, say) is here as it is read.
    kind: "spiece.model" or "tokenizer.json".
    context_length: tokens a row, at least 2, special tokens included.
    pad_id: fills a row up: on the right, unless `content` is a `tokenizer.json` with padding on
      the left.
    end_id: stands once after the text; a longer text loses its tail, never this. A
      `tokenizer.json` has it put there by its own post-processor.
    lower_case: whether captions are lower-cased first. A `tokenizer.json` may do so by itself.
    added_tokens: for "spiece.model", what stands for one token wherever a caption spells it out:
      (text, id, whether it is a special token). In a `tokenizer.json` they are in the file.
    canonicalize: whether captions are cleaned as in open_clip before anything else; see
      `canonicalizing`.

  Raises:
    UsageError: a value is of the wrong type or out of range.
  """

  content: bytes = dataclasses.field(repr=False)
  kind: str
  context_length: int
  pad_id: int
  end_id: int
  lower_case: bool
  added_tokens: tuple = dataclasses.field(default=(), repr=False)
  canonicalize: bool = False

  def __post_init__(self):
    check_length(self.context_length)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      possible = {"kind": (SPIECE, JSON), "pad_id": ID, "end_id": ID}.get(field.name, [value])
      if type(value) is not field.type or value not in possible:
        raise UsageError(f"A tokenizer's {field.name} cannot be {value!r:.80}.")

  def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
    """Tokenizes captions.

    A caption that spells out a special token, "</s>" say, gets that token's id, as in
    `transformers`. Where that refuses a caption, a lone surrogate, this reads U+FFFD in its place
    (and a pair of surrogates as the character it stands for).

    Args:
      texts: one caption or a sequence of n captions.

    Returns:
      int32 [n, context_length] (n = 1 for a single string).

    Raises:
      ValueError: if an item is not a string (a missing caption read as None or NaN, say).
      DataError: at the first call, if `content` is not a tokenizer.
      MissingExtraError: at the first call, if `sentencepiece` is needed and not installed.
    """
    clean = _canonicalized if self.canonicalize else _encodable
    return self._parsed.rows([clean(text) for text in checked(texts)])

  @property
  def vocab_size(self) -> int:
    """How many ids there are: one more than the largest. Parses the file."""
    return self._parsed.vocab_size

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Gives the text of one row back, for people to read.

    Args:
      ids: [length] token ids; padding before the text and everything from the end token on is
        dropped.

    Returns:
      The text as the tokenizer saw it, without special tokens.

    Raises:
      ValueError: if an id is outside the vocabulary, or `ids` has more than one row.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
      raise ValueError(f"decode takes one row of ids, not {ids.dtype} of shape {ids.shape}.")
    if wrong := [i for i in ids.tolist() if not 0 <= i < self.vocab_size]:
      raise ValueError(f"{wrong[0]} is not a token id; the vocabulary has {self.vocab_size:,}.")
    text = itertools.dropwhile(lambda i: i == self.pad_id, ids.tolist())
    return self._parsed.decode(list(itertools.takewhile(lambda i: i != self.end_id, text)))

  def canonicalizing(self) -> "FileTokenizer":
    """This tokenizer behind open_clip's cleaning of captions (its `clean="canonicalize"`).

    In this order: the encoding is repaired (`ftfy.fix_text`), HTML entities are resolved twice,
    "_" becomes a space, ASCII punctuation goes, letters are lower-cased, white space is collapsed
    and stripped. So no special token can be spelled out that has punctuation in it.
    """
    return dataclasses.replace(self, canonicalize=True)

  def to_dict(self) -> dict[str, Any]:
    """All of it as values that JSON can hold, the file's bytes in base64."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    values["content"] = base64.b64encode(self.content).decode("ascii")
    values["added_tokens"] = [list(token) for token in self.added_tokens]
    return values

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> "FileTokenizer":
    """The tokenizer that `to_dict` was called on. The file itself is parsed at the first call.

    Args:
      values: a dict from `to_dict`.

    Raises:
      UsageError: a key is missing or unknown, or a value is malformed.
    """
    keys = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, Mapping) or values.keys() != keys:
      raise UsageError(f"A tokenizer must be a dict of {', '.join(sorted(keys))}.")
    try:
      content = base64.b64decode(values["content"], validate=True)
      tokens = tuple((str(t), int(i), bool(s)) for t, i, s in values["added_tokens"])
    except (TypeError, ValueError) as error:
      raise UsageError(f"A tokenizer's content or added_tokens are malformed: {error}.") from error
    return cls(**dict(values) | {"content": content, "added_tokens": tokens})

  def transformers_config(self) -> dict[str, Any]:
    """The JSON object of a tokenizer_config.json, for `transformers` to give the same ids.

    It goes with `transformers_content` in a file named `kind`, beside the config.json of a CLIP
    or SigLIP model.
    """
    return self._parsed.transformers_config() | {
      "model_max_length": self.context_length,
      # Towers of both kinds are trained without a mask: SigLIP's sees the padding, too.
      "model_input_names": ["input_ids"],
    }

  def transformers_content(self) -> bytes:
    """The file to write beside `transformers_config`.

    A `tokenizer.json` lower-cases by itself there. Of `canonicalizing` it does what can be written
    in it: captions with broken encoding, HTML entities or added tokens spelled out get other ids.
    (`SiglipTokenizer` cleans what it reads, though there "_" becomes nothing, not a space.)

    Raises:
      UsageError: a token would be found in other places than here.
    """
    if self.kind == SPIECE or not (self.lower_case or self.canonicalize):
      return self.content
    steps = [normalizers.Lowercase()]
    if self.canonicalize:
      pairs = [("_", " "), (Regex(r"[!-/:-@\[-`{-~]"), ""), (Regex(r"[\s\x1c-\x1f]+"), " ")]
      steps += [*itertools.starmap(normalizers.Replace, pairs), normalizers.Strip()]
    first, rust = normalizers.Sequence(steps), rust_tokenizer(self.content)
    for token in rust.get_added_tokens_decoder().values():
      # One that goes by normalised text is normalised itself when a file is read.
      if token.normalized and first.normalize_str(token.content) != token.content:
        raise UsageError(f"transformers would look for {token.content!r} in another spelling.")
    rust.normalizer = _in_turn(first, rust.normalizer)
    split = rust.pre_tokenizer
    if self.canonicalize and getattr(split, "prepend_scheme", None) == "first":
      split.prepend_scheme = "always"  # a word is not the first one where something before it went
      rust.pre_tokenizer = split
    return rust.to_str().encode()

  @functools.cached_property
  def _parsed(self) -> "_SentencePiece | _Rust":
    with _parsing:  # else every data thread parses the file at the first batch
      return _parse(self)

  def __getstate__(self):
    return {name: value for name, value in vars(self).items() if name != "_parsed"}


def check_length(length):
  """Raises UsageError if `length` cannot be a context length."""
  is_integer = isinstance(length, int | np.integer) and not isinstance(length, bool)
  if not is_integer or length < 2:
    raise UsageError(
      f"context_length={length!r} must be an integer of at least 2: a token of text and an end "
      "token. SigLIP models use 64 or 16."
    )


def _encodable(text: str) -> str:
  """Lone surrogates have no UTF-8, which both libraries work on; a pair is one character."""
  return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _canonicalized(text: str) -> str:
  # Not `captions.clean` and then the rest: beside punctuation that is still there, a capital sigma
  # can have another lower case. Printable ASCII needs no repair, and without "&" has no entities.
  if not (text.isascii() and text.isprintable() and "&" not in text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.replace("_", " ").translate(_PUNCTUATION).lower().split())


# ------------------------------------------------------------------------- spiece.model


def sentencepiece_model(content: bytes, path=f"This {SPIECE}"):
  """Parses a SentencePiece model; `path` is what a DataError calls it."""
  try:
    import sentencepiece
  except ImportError as error:
    raise MissingExtraError(f"Reading {SPIECE}", "sentencepiece", "sentencepiece") from error
  try:
    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(content)
    return model
  except RuntimeError as error:
    raise DataError(f"{path} is not a SentencePiece model; it may be cut off.") from error


class _SentencePiece:
  """`SiglipTokenizer`, oddities included: users of the released weights see those.

  The one known difference is in captions that spell out added tokens whose texts overlap, as "aab"
  and "ab" do; "<extra_id_0>" and its like do not. `transformers` then misses some of them.
  """

  def __init__(self, tokenizer: FileTokenizer):
    self.tokenizer = tokenizer
    self.model = sentencepiece_model(tokenizer.content)
    pieces = map(self.model.id_to_piece, range(self.model.get_piece_size()))
    self.ids = {piece: i for i, piece in enumerate(pieces)}
    self.ids |= {text: i for text, i, _ in tokenizer.added_tokens}
    self.vocab_size = 1 + max(self.ids.values())
    self.special = {text for text, _, special in tokenizer.added_tokens if special}
    longest_first = sorted((text for text, *_ in tokenizer.added_tokens), key=len, reverse=True)
    self.added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # or nowhere
    self.unknown = self.model.id_to_piece(self.model.unk_id())
    self.prefix_length = len(self.model.encode(self.unknown, out_type=str))

  def rows(self, texts: list[str]) -> np.ndarray:
    length, end = self.tokenizer.context_length, self.tokenizer.end_id
    rows = np.full((len(texts), length), self.tokenizer.pad_id, np.int32)
    for row, text in zip(rows, texts, strict=True):
      pieces = self._pieces(text)
      ids = [self.ids.get(piece, self.model.unk_id()) for piece in pieces[: length - 1]]
      if ids[-1:] != [end]:  # a text may end with it already
        ids.append(end)
      row[: len(ids)] = ids
    return rows

  def _pieces(self, text: str) -> list[str]:
    """Pieces by name, because an unknown stretch of text can be the name of a piece."""
    # The first word gets its space here, not from the model. So a word after a spelled-out
    # special token has none and other ids than after a word.
    text = SPACE + text.replace(SPACE, " ")
    pieces, at = [], 0
    for match in self.added.finditer(text):
      pieces += self._plain(text[at : match.start()])
      pieces.append(match.group())
      at = match.end()
    pieces += self._plain(text[at:])
    if pieces[0:1] == [SPACE] and pieces[1:2] and pieces[1] in self.special:
      return pieces[1:]
    return pieces

  def _plain(self, text: str) -> list[str]:
    # Each stretch between special tokens is cleaned by itself. So "<|A|>" is "a", and a special
    # token is one only as it is spelled, before any lower-casing.
    if not text:
      return []
    if self.tokenizer.lower_case:
      text = text.lower()
    text = " ".join(text.translate(_PUNCTUATION).split())
    # The model would drop a space at the beginning, so something is put before it and taken off
    # again. Where the two run together in fewer pieces than that has, nothing is taken off.
    pieces = self.model.encode(self.unknown + text, out_type=str)
    return pieces[self.prefix_length :] if len(pieces) >= self.prefix_length else pieces

  def decode(self, ids: list[int]) -> str:
    # The model knows no token that was added to it; such a one is special and not text.
    return self.model.decode([i for i in ids if i < self.model.get_piece_size()])

  def transformers_config(self):
    texts = {i: text for text, i in self.ids.items()}
    named = {
      "eos_token": texts[self.tokenizer.end_id],
      "pad_token": texts[self.tokenizer.pad_id],
      "unk_token": self.unknown,
    }
    flags = dict(lstrip=True, rstrip=True, normalized=False, single_word=False)
    return named | {
      "tokenizer_class": "SiglipTokenizer",
      "do_lower_case": self.tokenizer.lower_case or self.tokenizer.canonicalize,
      "padding_side": "right",
      "additional_special_tokens": sorted(self.special - set(named.values())),
      "added_tokens_decoder": {
        str(i): {"content": text, "special": special, **flags}
        for text, i, special in self.tokenizer.added_tokens
      },
    }


# ------------------------------------------------------------------------- tokenizer.json


def rust_tokenizer(content: bytes, path=f"This {JSON}") -> Tokenizer:
  """Parses a `tokenizer.json`; `path` is what a DataError calls it."""
  try:
    return Tokenizer.from_str(content.decode("utf-8"))
  except Exception as error:  # the library raises nothing more special
    reason = str(error).partition("\n")[0].rstrip(".")
    raise DataError(f"{path} is not a tokenizer; it may be cut off: {reason}.") from error


def _in_turn(first, then):
  return first if then is None else normalizers.Sequence([first, then])


class _Rust:
  def __init__(self, tokenizer: FileTokenizer):
    self.tokenizer = tokenizer
    self.rust = rust_tokenizer(tokenizer.content)
    self.vocab_size = 1 + max(self.rust.get_vocab().values())
    if tokenizer.lower_case:
      self.rust.normalizer = _in_turn(normalizers.Lowercase(), self.rust.normalizer)
    length = tokenizer.context_length
    self.padding_side = (self.rust.padding or {}).get("direction", "right")
    self.truncation_side = (self.rust.truncation or {}).get("direction", "right")
    self.rust.enable_truncation(length, direction=self.truncation_side)
    self.rust.enable_padding(length=length, pad_id=tokenizer.pad_id, direction=self.padding_side)
    # Byte-pair vocabularies like CLIP's mark the end of a word where others mark its beginning.
    self.word_end = getattr(self.rust.model, "end_of_word_suffix", None)

  def rows(self, texts: list[str]) -> np.ndarray:
    rows = [encoding.ids for encoding in self.rust.encode_batch_fast(texts)]
    return np.array(rows, np.int32).reshape(len(texts), self.tokenizer.context_length)

  def decode(self, ids: list[int]) -> str:
    text = self.rust.decode(ids, skip_special_tokens=True)
    return text.replace(self.word_end, " ").strip() if self.word_end else text

  def transformers_config(self):
    added = self.rust.get_added_tokens_decoder()
    end, pad = self.tokenizer.end_id, self.tokenizer.pad_id
    return {
      "tokenizer_class": "PreTrainedTokenizerFast",  # takes the file as it is written
      "pad_token": self.rust.id_to_token(pad),
      # Not where captions cannot spell it out: with a name they could.
      "eos_token": self.rust.id_to_token(end) if end in added else None,
      "padding_side": self.padding_side,
      "truncation_side": self.truncation_side,
    }


# ------------------------------------------------------------------------- parsing, once

_parsing = threading.Lock()


@functools.lru_cache(maxsize=8)
def _parse(tokenizer: FileTokenizer) -> _SentencePiece | _Rust:
  parsed = _SentencePiece(tokenizer) if tokenizer.kind == SPIECE else _Rust(tokenizer)
  ids = tokenizer.pad_id, tokenizer.end_id
  if not 0 <= min(ids) <= max(ids) < parsed.vocab_size:
    raise DataError(f"The ids {ids} are not both in the vocabulary of {parsed.vocab_size}.")
  return parsed
