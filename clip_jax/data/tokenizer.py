"""CLIP's byte-pair encoding: captions to int32 token ids.

Radford et al. 2021, section 2.4: a byte-pair encoding of lower-cased text with a vocabulary of
49,152, every sequence bracketed by a start and an end token. (The published models count the 256
bytes twice, plain and word-final, and so have 49,408 token embeddings.) docs/tokenizer.md tells
where other implementations leave OpenAI's rule; tests/data/test_tokenizer.py holds this one to it.

The merges are applied by the Rust library `tokenizers`, outside the GIL. This module imports
neither JAX nor torch, so data workers can start without them.
"""

import collections
import dataclasses
import functools
import gzip
import itertools
import os
import threading
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import ClassVar

import numpy as np
from ftfy import chardata
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clip_jax.data.captions import clean

# The published table holds 262,144 merges, of which CLIP uses as many as 49,152 ids leave room for
# beside 256 bytes and two special tokens.
MERGES = 49_152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
SPECIAL = {START: 49_406, END: 49_407}
WORD_END = "</w>"

# What counts as a word. OpenAI's expression ignores case, on text that is already lower-case. That
# shows on two characters: the long s matches an "s" spelled out in the expression, and the iota
# subscript U+0345, no letter but the other case of one, matches nothing and is dropped like a
# space. Writing both out keeps the Rust engine's own, wider case folding out of it.
WORD = (
  r"<\|[sſ]tartoftext\|>|<\|endoftext\|>|'(?:[sſtmd]|re|ve|ll)"
  r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)


@dataclasses.dataclass(frozen=True)
class ClipTokenizer:
  """Turns captions into rows of token ids, as OpenAI's CLIP does.

  Instances are cheap, hashable, picklable and safe to call from many threads: the merge table is
  loaded once per process, at the first call.

  Args:
    context_length: tokens a row, start and end token included; 77 in every published CLIP.

  Raises:
    ValueError: if `context_length` is not an integer of at least 3 (start, one token, end).
  """

  context_length: int = 77

  vocab_size: ClassVar[int] = 49_408
  start_token: ClassVar[int] = SPECIAL[START]
  end_token: ClassVar[int] = SPECIAL[END]

  def __post_init__(self):
    length = self.context_length
    if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 3:
      raise ValueError(
        f"context_length={length!r} must be an integer of at least 3: a start token, "
        "one token of text and an end token. Every published CLIP uses 77."
      )

  def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
    """Cleans and tokenizes captions.

    Args:
      texts: one caption or a sequence of n captions, raw (see `clip_jax.data.captions.clean`).

    Returns:
      int32 [n, context_length] (n = 1 for a single string): the start token, the caption, the end
      token, zeros. A longer caption loses its tail, never its end token, so `ids.argmax(-1)` is
      where the text tower reads.

    Raises:
      ValueError: if an item is not a string (a missing caption read as None or NaN, say).
    """
    captions = [clean(text) for text in checked(texts)]
    rows = np.zeros((len(captions), self.context_length), np.int32)
    rows[:, 0] = self.start_token
    for row, ids in zip(rows, _encode(captions), strict=True):
      end = min(len(ids), self.context_length - 2) + 1
      row[1:end] = ids[: end - 1]
      row[end] = self.end_token
    return rows

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Gives the text of one row back, for people to read.

    Words, digits and runs of punctuation come out separated by single spaces, however they stood
    in the caption. A character cut in two by truncation becomes U+FFFD.

    Args:
      ids: [length] token ids; start tokens are skipped and everything from the first end token on
        is dropped.

    Returns:
      The cleaned, lower-case text without special tokens.

    Raises:
      ValueError: if an id is outside the vocabulary, or `ids` has more than one row.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
      raise ValueError(f"decode takes one row of ids, not {ids.dtype} of shape {ids.shape}.")
    return _decode(itertools.takewhile(lambda i: i != self.end_token, ids.tolist()))


@functools.cache
def _byte_symbols() -> dict[str, int]:
  """One printable character for each byte, in the order of the first 256 ids.

  The merge table is a text file, so bytes that are blank or invisible as Latin-1 stand in it as
  the characters from U+0100 on (byte-level encoding: Radford et al. 2019, section 2.2).
  """
  visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in visible]
  return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
  """CLIP's tokens, as a dict of their ids in the order of the ids, and its merges, first ones first."""
  table = resources.files("clip_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
  with table.open("rb") as packed, gzip.open(packed, "rt", encoding="utf-8") as lines:
    merges = [tuple(line.split()) for line in itertools.islice(lines, 1, 1 + MERGES)]
  symbols = list(_byte_symbols())
  tokens = [*symbols, *(s + WORD_END for s in symbols), *map("".join, merges), *SPECIAL]
  return {token: i for i, token in enumerate(tokens)}, merges


def for_transformers() -> str:
  """The tokenizer as the `tokenizer.json` of a Hugging Face folder, cleaning included as far as such a file can say it.

  That is what `ftfy` and HTML do to single characters: curly quotes, ligatures, wide letters, the commonest entities. Mojibake and
  other entities are not repaired there, and special tokens are special wherever their letters occur.
  """
  rust = Tokenizer.from_str(_rust()[0].to_str())
  rust.normalizer = normalizers.Sequence(
    [
      *(normalizers.Replace(entity, text) for entity, text in ENTITIES),
      normalizers.Replace(Regex("[\u02bc\u2018-\u201b]"), "'"),
      normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
      *(normalizers.Replace(chr(old), new) for old, new in (chardata.LIGATURES | chardata.WIDTH_MAP).items()),
      normalizers.NFC(),
      normalizers.Replace(Regex(r"\s+"), " "),
      normalizers.Lowercase(),
    ]
  )
  ends = [(token, SPECIAL[token]) for token in (START, END)]
  rust.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
  rust.add_special_tokens([START, END])
  return rust.to_str()


# Twice, as a page that was escaped twice.
ENTITIES = 2 * (("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&apos;", "'"), ("&nbsp;", " "))

_loading = threading.Lock()


@functools.cache
def _load() -> tuple[Tokenizer, pre_tokenizers.Split]:
  # The library would start a thread a core for each batch. Captions come from input threads, as many as
  # there are cores already; splitting a batch again costs a third more processor time for a caption.
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  vocab, merges = vocabulary()
  words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  rust = Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      end_of_word_suffix=WORD_END,
      # Words whose merges are remembered. The library never evicts one, and its default of
      # 10,000 is soon full of rare words, while captions repeat a few ten thousand.
      cache_capacity=1 << 16,
    )
  )
  rust.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
  return rust, words


def _rust() -> tuple[Tokenizer, pre_tokenizers.Split]:
  with _loading:  # else every data thread builds its own table at the first batch
    return _load()


def checked(texts: str | Sequence[str]) -> Sequence[str]:
  """One caption or many as a sequence of strings.

  Raises:
    ValueError: an item is not a string (a missing caption read as None or NaN, say).
  """
  if isinstance(texts, str):
    return [texts]
  if isinstance(texts, bytes) or not isinstance(texts, Iterable):
    raise ValueError(f"A caption must be a string, or captions a sequence of them, not {texts!r}.")
  texts = list(texts)
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      raise ValueError(f"Caption {i} is {text!r} ({type(text).__name__}), not a string.")
  return texts


# The ids of what stands between spaces, which captions repeat far more than they bring in new; not of what is longer
# than a word, or a data set of links would fill the memory.
_known: dict[str, list[int]] = {}
KNOWN_LIMIT, LONGEST_KNOWN = 1 << 16, 64


def _encode(captions: list[str]) -> list[list[int]]:
  """Ids of each cleaned caption, without start and end token.

  No word reaches over a space, so the ids of a caption are those of its pieces. Looking them up takes a
  seventh of the time that the library needs to split and merge the whole caption.
  """
  global _known
  # A new dict rather than one that is cleared: other threads may be reading this one.
  known = _known = _known if len(_known) < KNOWN_LIMIT else {}
  pieces = [caption.split(" ") for caption in captions]
  new = list(set().union(*pieces).difference(known))
  encoded = _rust()[0].encode_batch_fast(new, add_special_tokens=False)
  long = {}
  for piece, encoding in zip(new, encoded, strict=True):
    ids = _encode_with_specials(piece) if START in piece or END in piece else encoding.ids
    (long if len(piece) > LONGEST_KNOWN else known)[piece] = ids
  known = collections.ChainMap(known, long) if long else known
  return [[i for piece in caption for i in known[piece]] for caption in pieces]


def _encode_with_specials(text: str) -> list[int]:
  """Ids of a text that spells out a special token.

  OpenAI's tokenizer gives such a word the special id. The Rust library would do so too, but
  wherever the letters occur; in OpenAI's they must be where a word begins, so "!<|endoftext|>" is
  punctuation and letters.
  """
  rust, words = _rust()
  ids, plain_from = [], 0
  for word, (begin, end) in words.pre_tokenize_str(text):
    if word in SPECIAL:
      ids += rust.encode(text[plain_from:begin], add_special_tokens=False).ids
      ids.append(SPECIAL[word])
      plain_from = end
  return ids + rust.encode(text[plain_from:], add_special_tokens=False).ids


def _decode(ids: Iterable[int]) -> str:
  rust, _ = _rust()
  byte = _byte_symbols()
  text = bytearray()
  for i in ids:
    if i == SPECIAL[START]:
      continue
    token = rust.id_to_token(i) if 0 <= i < ClipTokenizer.vocab_size else None
    if token is None:
      raise ValueError(f"{i!r} is not a token id; the vocabulary has {ClipTokenizer.vocab_size:,}.")
    # Unambiguous: "</w>" in a caption is three words, so no token spells the mark itself.
    text += bytes(byte[symbol] for symbol in token.removesuffix(WORD_END))
    text += b" " * token.endswith(WORD_END)
  return text.decode("utf-8", errors="replace").strip()
