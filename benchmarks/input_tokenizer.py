"""Captions to token ids, on one core: clip_jax, the Python byte-pair encoding of open_clip, and instant-clip-tokenizer.

    python benchmarks/input_tokenizer.py [--captions N] [--json]

The captions are made up, the same at each run: of words of CLIP's vocabulary, drawn by Zipf's law in the order of their
merges, 3 to 20 a caption. Out of a hundred 70 are plain ASCII, 10 have curly quotes, dashes and accents, 8 are in
another script (Cyrillic, Greek, Arabic, Devanagari, Chinese, Japanese or Korean pseudo-words), 5 have emoji, 4 have HTML
entities and 3 are mojibake (UTF-8 read as Windows-1252). All words have been seen before the clock starts, so the caches
of all three are warm. instant-clip-tokenizer does not clean captions; it is timed on clean ones, and with our cleaning.
"""

import argparse
import html
import itertools
import json
import os
import random
import statistics
import time

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core for everybody

import ftfy
import numpy as np
import regex

from clip_jax.data.captions import clean
from clip_jax.data.tokenizer import SPECIAL, START, WORD_END, ClipTokenizer, vocabulary

BATCH, REPEATS = 32, 5
SCRIPTS = ("\u0430\u044f", "\u03b1\u03c9", "\u0627\u064a", "\u0915\u0939", "\u4e00\u9fa5", "\u3042\u3093", "\uac00\ud7a3")


class PythonTokenizer:
  """The byte-pair encoding that open_clip ships: words by a regular expression, merges in Python, a cache of words."""

  def __init__(self):
    self._ids, merges = vocabulary()
    self._rank = {pair: rank for rank, pair in enumerate(merges)}
    symbols = itertools.islice(self._ids, 256)
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    order = [*visible, *(byte for byte in range(256) if byte not in visible)]
    self._symbol = dict(zip(order, symbols, strict=True))
    self._cache = {token: token for token in SPECIAL}
    self._words = regex.compile(
      r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )

  def __call__(self, texts, length=77):
    """Token ids as int64 [texts, length]."""
    rows = np.zeros((len(texts), length), np.int64)
    for row, text in zip(rows, texts, strict=True):
      ids = [SPECIAL[START], *self._encode(text), SPECIAL["<|endoftext|>"]][:length]
      ids[-1] = SPECIAL["<|endoftext|>"]
      row[: len(ids)] = ids
    return rows

  def _encode(self, text):
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = " ".join(text.split()).lower()
    ids = []
    for word in self._words.findall(text):
      word = "".join(self._symbol[byte] for byte in word.encode("utf-8"))
      ids.extend(self._ids[piece] for piece in self._merged(word).split(" "))
    return ids

  def _merged(self, word):
    if word in self._cache:
      return self._cache[word]
    parts = [*word[:-1], word[-1] + WORD_END]
    while len(parts) > 1:
      best = min(itertools.pairwise(parts), key=lambda pair: self._rank.get(pair, float("inf")))
      if best not in self._rank:
        break
      joined, i = [], 0
      while i < len(parts):
        both = tuple(parts[i : i + 2]) == best
        joined.append("".join(best) if both else parts[i])
        i += 2 if both else 1
      parts = joined
    self._cache[word] = " ".join(parts)
    return self._cache[word]


def captions(count, seed=0):
  """Alt texts as the heading of this file describes them.

  Returns:
    A list of `count` strings.
  """
  pick = random.Random(seed)
  words = [token.removesuffix(WORD_END) for token in vocabulary()[0] if token.endswith(WORD_END)]
  words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
  shares = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
  foreign = [
    ["".join(chr(pick.randint(*map(ord, ends))) for _ in range(pick.randint(2, 7))) for _ in range(500)] for ends in SCRIPTS
  ]

  def sentence():
    return " ".join(pick.choices(words, cum_weights=shares, k=pick.randint(3, 20)))

  def accents():
    return f"{sentence().capitalize()} \u2013 the caf\u00e9\u2019s \u201c{sentence()}\u201d in Z\u00fcrich"

  makers = {
    70: lambda: pick.choice((str.title, str.capitalize, str.lower))(f"{sentence()}, {pick.randint(1, 2030)}"),
    10: accents,
    8: lambda: " ".join(pick.choices(pick.choice(foreign), k=pick.randint(3, 12))),
    5: lambda: f"{sentence()} {chr(pick.randint(0x1F300, 0x1F5FF))} #{pick.choice(words)}",
    4: lambda: f"{sentence()} &amp; {sentence()}&#39;s &quot;{pick.choice(words)}&quot;",
    3: lambda: accents().encode("utf-8").decode("cp1252", "replace"),
  }
  kinds = pick.choices(list(makers.values()), weights=list(makers), k=count)
  return [make() for make in kinds]


def main():
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--captions", type=int, default=10_000)
  parser.add_argument("--json", action="store_true")
  arguments = parser.parse_args()
  raw = captions(arguments.captions)
  rows = measured(raw)
  if arguments.json:
    print(json.dumps(rows))
    return
  print(f"{'captions a second on one core':<44}{'':>9}  times open_clip's")
  for name, row in rows.items():
    print(f"{name:<44}{row['captions_per_second']:>9,.0f}{row['ratio']:>10.1f}")


def measured(raw):
  """The rate of each tokenizer: medians of several rounds, in each of which everybody runs once."""
  import instant_clip_tokenizer

  ours, python, instant = ClipTokenizer(), PythonTokenizer(), instant_clip_tokenizer.Tokenizer()
  cleaned = {text: clean(text) for text in raw}
  ways = {
    "open_clip's Python BPE": python,
    "clip_jax": ours,
    "instant-clip-tokenizer, clean captions": lambda batch: instant.tokenize_batch([cleaned[t] for t in batch], context_length=77),
    "instant-clip-tokenizer after our cleaning": lambda batch: instant.tokenize_batch([clean(t) for t in batch], context_length=77),
    "(our cleaning alone)": lambda batch: [clean(t) for t in batch],
    "(ftfy alone)": lambda batch: [ftfy.fix_text(t) for t in batch],
  }
  batches = [raw[i : i + BATCH] for i in range(0, len(raw), BATCH)]
  same = all(np.array_equal(ours(batch), python(batch)) for batch in batches)  # and fills the caches
  if not same:
    raise SystemExit("the tokenizers disagree")
  rates = {name: [] for name in ways}
  for _ in range(REPEATS):
    for name, tokenize in ways.items():
      start = time.process_time()
      for batch in batches:
        tokenize(batch)
      rates[name].append(len(raw) / (time.process_time() - start))
  first = next(iter(rates.values()))
  return {
    name: {
      "captions_per_second": statistics.median(rate),
      "ratio": statistics.median(r / f for r, f in zip(rate, first, strict=True)),
    }
    for name, rate in rates.items()
  }


if __name__ == "__main__":
  main()
