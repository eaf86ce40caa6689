"""Token-for-token equality with OpenAI's rule, and a map of where other implementations leave it.

Three yardsticks: the published rule in plain Python (`Reference`), `instant-clip-tokenizer` (a BPE
of its own, in Rust) and `transformers.CLIPTokenizer` (the same Rust library as ours, put together
by others). docs/tokenizer.md lists the disagreements in words.
"""

import concurrent.futures
import gzip
import html
import itertools
import json
import pathlib
import pickle
import random
import subprocess
import sys
import unicodedata

import emoji
import ftfy
import instant_clip_tokenizer
import numpy as np
import pytest
import regex
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

import clip_jax.data
from clip_jax.data import tokenizer as tokenizer_module
from clip_jax.data.captions import clean
from clip_jax.data.tokenizer import ClipTokenizer, for_transformers

START, END = 49_406, 49_407
WIDE = 1_100  # longer than any string below, so nothing is cut where whole sequences are compared
TABLE = pathlib.Path(clip_jax.data.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


class Reference:
  """Byte-pair encoding as published (Sennrich et al. 2016, algorithm 1; Radford et al. 2021, 2.4).

  Slow and literal: split into words, write each word as bytes with the last one marked, then merge
  the adjacent pair that stands first in the table until no pair is in it.
  """

  def __init__(self, table):
    lines = gzip.decompress(table.read_bytes()).decode("utf-8").split("\n")
    self.merges = [tuple(line.split()) for line in lines[1 : 1 + 49_152 - 256 - 2]]
    # Bytes by themselves where Latin-1 shows something, else the next character from U+0100 on.
    shown = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    unseen = [b for b in range(256) if b not in shown]
    symbols = shown + unseen
    self.symbol = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(unseen)}
    tokens = [self.symbol[b] for b in symbols] + [self.symbol[b] + "</w>" for b in symbols]
    tokens += [first + second for first, second in self.merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    self.ids = {token: i for i, token in enumerate(tokens)}
    self.rank = {pair: i for i, pair in enumerate(self.merges)}
    self.known = {"<|startoftext|>": [START], "<|endoftext|>": [END]}

  def word(self, word):
    if word not in self.known:
      parts = [self.symbol[b] for b in word.encode("utf-8")]
      parts[-1] += "</w>"
      while pairs := [p for p in itertools.pairwise(parts) if p in self.rank]:
        best = min(pairs, key=self.rank.get)
        merged, i = [], 0
        while i < len(parts):
          joins = tuple(parts[i : i + 2]) == best
          merged.append("".join(best) if joins else parts[i])
          i += 2 if joins else 1
        parts = merged
      self.known[word] = [self.ids[part] for part in parts]
    return self.known[word]

  def encode(self, cleaned, unknown=frozenset()):
    """Ids of cleaned text. `unknown` letters and digits count as neither: older Unicode tables."""
    letter, number, other = r"[\p{L}]", r"[\p{N}]", r"[^\s\p{L}\p{N}]"
    if here := "".join(sorted(unknown & set(cleaned))):
      listed = f"[{regex.escape(here)}]"
      letter, number = f"(?!{listed}){letter}", f"(?!{listed}){number}"
      other = f"{listed}|{other}"
    expression = (
      r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
      rf"|(?:{letter})+|{number}|(?:{other})+"
    )
    words = regex.findall(expression, cleaned, regex.IGNORECASE)
    return [i for word in words for i in self.word(word)]


def row(ids, context_length):
  """A row of OpenAI's `tokenize(..., truncate=True)`: zeros after the end, the end last if cut."""
  tokens = [START, *ids, END][:context_length]
  tokens[-1] = END
  return tokens + [0] * (context_length - len(tokens))


def openai_clean(text):
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return regex.sub(r"\s+", " ", text).strip().lower()


# ------------------------------------------------------------------------- the strings

SCRIPTS = {
  "latin": "AZaz\u00c0\u024f\u1e00\u1eff",
  "combining": "az\u0300\u036f\u0591\u05bd\u064b\u065f\u20d0\u20f0",
  "greek and cyrillic": "\u0370\u03ff\u0400\u052f\u1f00\u1fff",
  "right to left": "\u0590\u06ff\u0750\u077f\ufb50\ufdff\ufe70\ufeff\u200e\u200f\u202a\u202e",
  "indic and thai": "\u0900\u0dff\u0e00\u0e7f\u200c\u200d",
  "east asian": "\u3000\u30ff\u4e00\u9fff\u1100\u11ff\uac00\ud7a3\U00020000\U0002a6df",
  "full width": "\uff01\uffef09az",
  "ligatures": "\ufb00\ufb17\u0132\u0133\u0149\u017f\u01c4\u01cc",
  "control": "\x00\x20\x7f\xa0\u0085\u0085\u2028\u2029AZ",
  "digits": "09\u0660\u0669\u06f0\u06f9\u0966\u096f\u0e50\u0e59\u00b2\u00b3",
  "numerals": "09\u2070\u209c\u2150\u218b\u2460\u24ff",
  "joiners": "\U0001f300\U0001faff\u200b\u200f\ufe00\ufe0f\U0001f1e6\U0001f1ff\U0001f3fb\U0001f3ff",
  "symbols": "\u2000\u206f\u20a0\u20c0\u2100\u214f\u2190\u2bff\U0001d400\U0001d7ff",
  "two bytes": "\x00\u02af",
  "basic plane": "\x00\uffff",
  "all planes": "\x00\U0010ffff",
}

PIECES = """
a I cat CATS Photograph naïve Ärger ΑΣ Σ İ ẞ ß ŉ ﬁ ﬆ K Å ſ ΐ ᾳ ᾼ \u0345 2 42 3.14 ٣٤ १२ ² ½ Ⅷ ① １２
! ? ... -- ' '' " # @ _ \\ / < > 's 'S 't 'T 're 'RE 've 'm 'M 'LL 'll 'd 'D 'ſ 'sS I'M Don't O'Re
’s ‘ “ ” — … <| |> <|startoftext|> <|endoftext|> <|ENDOFTEXT|> <|ſtartoftext|> <start_of_text>
<end_of_text> </w> &amp; &amp;amp; &lt;b&gt; &#39; &#x1F600; &nbsp; &eacute; &amp;eacute; <e&#769;
&#8490; &amp;#8491; &#xFB06; &amp;#383; &bogus; & cafÃ© â€™ Ã¼ber ð\x9f\x98\x80 e\u0301 a\u030a
o\u0323\u0302 \u0344 \u1100\u1161 नमस्ते क्षि กำ กรุงเทพ שלום السلام ﷺ 北京 東京タワー 안녕 🇫🇷 👍🏽
👩\u200d👩\u200d👧 ❤\ufe0f \u200b \ufeff \x85 \x1c \x0b \ud83d\ude00 \ud800 \ue000 \U000e0067
\U00100000 \U0001d400 \U00010428 \U00010400 \U0001e922 \U0003d000 \U00010d50
"""


def strings():
  """About 13,000 strings, the same at each run: real names in many languages, then trouble."""
  pick = random.Random(2021)
  names = [entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()]
  words = sorted({word for name in names for word in name.split()})
  yield from names[::4]
  yield from (f"{symbol} {name}" for symbol, name in zip(emoji.EMOJI_DATA, names, strict=True))
  for language in ("ar", "de", "fa", "ja", "ko", "ru", "tr", "zh"):
    emoji.config.load_language(language)
    for entry in itertools.islice(emoji.EMOJI_DATA.values(), 0, None, 50):
      name = entry.get(language, "").replace("_", " ")
      yield name
      yield name.encode("utf-8").decode("latin-1")
      yield name.encode("utf-8").decode("cp1252", errors="replace")
  for _ in range(600):
    sentence = pick.choices(words, k=pick.randint(1, 40))
    case = pick.choice([str.lower, str.upper, str.title, str.swapcase])
    template = pick.choice(["A photo of a {}.", "{}", "It's {}, isn't it?"])
    yield case(template.format(" ".join(sentence)))
  for ends in SCRIPTS.values():
    blocks = [range(ord(a), ord(b) + 1) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    for _ in range(100):
      codes = [pick.choice(pick.choice(blocks)) for _ in range(pick.randint(1, 40))]
      yield "".join(chr(c) for c in codes if not 0xD800 <= c <= 0xDFFF)
  pieces = regex.split("[ \n]+", PIECES.strip(" \n"))
  yield from pieces
  for _ in range(2_000):
    yield pick.choice(["", "", " ", "  "]).join(pick.choices(pieces, k=pick.randint(1, 12)))
  yield from ("", " ", "\n\t ", "\u3000")
  yield from (bit * 1_000 for bit in ("x", "no ", "!", "1", "é ", "'s"))


@pytest.fixture(scope="module")
def corpus():
  raw = list(dict.fromkeys(strings()))
  assert len(raw) >= 10_000
  return raw, [openai_clean(text) for text in raw]


@pytest.fixture(scope="module")
def reference():
  return Reference(TABLE)


@pytest.fixture(scope="module")
def newer(corpus):
  """Letters and digits of the corpus on which `regex` and the Rust library disagree."""
  characters = sorted(set("".join(corpus[1])))
  rust = pre_tokenizers.Split(Regex(r"\p{L}|\p{N}"), behavior="removed", invert=True)
  ours = {character for character, _ in rust.pre_tokenize_str("".join(characters))}
  return {c for c in characters if (c in ours) != bool(regex.match(r"\p{L}|\p{N}", c))}


# ------------------------------------------------------------------------- OpenAI's rule


@pytest.mark.parametrize(
  ("caption", "ids"),
  [
    ("a photo of a cat", [320, 1125, 539, 320, 2368]),
    ("A photo  of a CAT", [320, 1125, 539, 320, 2368]),
    ("a photo of a dog", [320, 1125, 539, 320, 1929]),
    ("a diagram", [320, 22697]),
    ("Hello World!", [3306, 1002, 256]),
    ("", []),
  ],
)
def test_ids_in_print(caption, ids):
  tokens = ClipTokenizer()(caption)
  assert tokens.dtype == np.int32
  assert tokens.tolist() == [row(ids, 77)]


def test_no_merge_spells_an_earlier_token(reference):
  """Then a merge enables only later ones, and the library's order of work cannot show."""
  assert len(reference.ids) == ClipTokenizer.vocab_size == 49_408
  assert ClipTokenizer.start_token == reference.ids["<|startoftext|>"] == START
  assert ClipTokenizer.end_token == reference.ids["<|endoftext|>"] == END


def test_every_string_equals_openais_rule(corpus, reference, newer):
  raw, cleaned = corpus
  longest = 0
  for start in range(0, len(raw), 500):
    rows = ClipTokenizer(WIDE)(raw[start : start + 500])
    cut_rows = ClipTokenizer()(raw[start : start + 500])
    for i, text in enumerate(cleaned[start : start + 500]):
      ids = reference.encode(text, unknown=newer)
      longest = max(longest, len(ids))
      assert rows[i].tolist() == row(ids, WIDE), ascii(raw[start + i])
      assert cut_rows[i].tolist() == row(ids, 77), ascii(raw[start + i])
  assert 900 < longest <= WIDE - 2


def test_only_unicode_newer_than_the_rust_library_is_outside_the_rule(corpus, reference, newer):
  """`\\p{L}` means what the Unicode tables at hand say; the one thing in which ours may differ."""
  _, cleaned = corpus
  assert all(regex.match(r"\p{L}|\p{N}", c) for c in newer)
  if int(unicodedata.unidata_version.split(".")[0]) <= 16:
    assert {unicodedata.category(c) for c in newer} <= {"Cn"}
  without = [text for text in cleaned if newer.isdisjoint(text)]
  assert len(without) > 0.95 * len(cleaned)
  assert all(reference.encode(text) == reference.encode(text, unknown=newer) for text in without)


def test_ignoring_case_matters_where_openais_does(reference):
  """Every character with another case, in each place where the expression could ignore it."""
  cased = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).lower() != chr(c).upper()]
  assert len(cased) > 2_500
  for place in ("{}", "a{}a", "!{}!", "'{}", "'{}e", "'l{}", "<|{}tartoftext|>", "<|en{}oftext|>"):
    texts = [place.format(c) for c in cased]
    for text, ids in zip(texts, ClipTokenizer(20)(texts).tolist(), strict=True):
      assert ids == row(reference.encode(openai_clean(text)), 20), ascii(text)


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cn", "Cs"])), st.integers(3, 90))
@example("'\u017f <|\u017ftartoftext|> <|EndOfText|>!<|endoftext|><|startoftext|>", 77)
@example("&amp;lt;|endoftext|&amp;gt;", 5)
def test_any_text_equals_openais_rule(reference, text, context_length):
  cleaned = openai_clean(text)
  # ftfy may decode mojibake into a code point of a Unicode that the Rust library does not know yet.
  assume(all(unicodedata.category(c) != "Cn" for c in cleaned))
  ids = reference.encode(cleaned)
  assert ClipTokenizer(context_length)(text).tolist() == [row(ids, context_length)]


# ------------------------------------------------------------------------- other implementations

LONG_S = regex.compile(r"'ſ|<\|ſtartoftext\|>")
LONE_IOTA = regex.compile("\u0345")
OUR_SPECIAL = regex.compile(r"<\|(?:start|end)oftext\|>")
STUCK_SPECIAL = regex.compile(r"[^\s\p{L}\p{N}]<\|(?:start|end)oftext\|>")
THEIR_SPECIAL = regex.compile(r"<(?:start|end)_of_text>")

# Where each leaves OpenAI's rule on text that is already clean: a category of captions, told from
# the caption alone, and an example. docs/tokenizer.md gives the reasons. `assert_same_rows` checks
# that nothing else differs.
INSTANT = {
  "spells the special tokens <start_of_text>": (THEIR_SPECIAL.search, "<start_of_text>"),
  "does not know <|startoftext|>": (OUR_SPECIAL.search, "the <|endoftext|>"),
  "takes the long s after an apostrophe for another letter": (LONG_S.search, "it'ſ"),
  "keeps a lone iota subscript": (LONE_IOTA.search, "a\u0300\u0345"),
}
TRANSFORMERS = {
  "composes again (NFC)": (lambda t: normalizers.NFC().normalize_str(t) != t, "<e\u0301"),
  "lower-cases with newer tables": (
    lambda t: normalizers.Lowercase().normalize_str(t) != t,
    "\U00010d50",  # a letter of Garay, Unicode 16, in which it got its lower case
  ),
  "finds special tokens inside punctuation": (STUCK_SPECIAL.search, "!<|endoftext|>"),
  "takes the long s after an apostrophe for another letter": (LONG_S.search, "it'ſ"),
  "keeps a lone iota subscript": (LONE_IOTA.search, "a\u0300\u0345"),
}


@pytest.fixture(scope="module")
def instant():
  return instant_clip_tokenizer.Tokenizer()


@pytest.fixture(scope="module")
def huggingface(reference, tmp_path_factory):
  from transformers import CLIPTokenizer

  folder = tmp_path_factory.mktemp("clip-vocabulary")
  (folder / "vocab.json").write_text(json.dumps(reference.ids))
  merges = "\n".join(" ".join(pair) for pair in reference.merges)
  (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
  return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def huggingface_rows(huggingface, cleaned, context_length):
  ids = huggingface(cleaned, truncation=True, max_length=context_length)["input_ids"]
  assert all(sequence[0] == START and sequence[-1] == END for sequence in ids)
  return np.array([row(sequence[1:-1], context_length) for sequence in ids])


def assert_same_rows(categories, cleaned, theirs, ours):
  """Equal outside the categories; inside each, the corpus shows the disagreement by itself."""
  differs = (theirs != ours).any(axis=1)
  shown = dict.fromkeys(categories, 0)
  for text, different in zip(cleaned, differs, strict=True):
    inside = [name for name, (matches, _) in categories.items() if matches(text)]
    assert inside or not different, ascii(text)
    if len(inside) == 1:
      shown[inside[0]] += different
  assert all(shown.values()), shown
  assert np.count_nonzero(~differs) >= 10_000


@pytest.fixture(scope="module")
def instant_tables(corpus, newer, instant):
  """Characters of the corpus that instant-clip-tokenizer and the Rust library class differently."""
  characters = sorted(set("".join(corpus[1])))
  # One that is neither a letter nor a digit nor a space joins the punctuation before it.
  apart = {c for c in characters if instant.encode(f"!{c}")[0] == instant.encode("!")[0]}
  return apart ^ {c for c in characters if regex.match(r"[\s\p{L}\p{N}]", c) and c not in newer}


@pytest.mark.parametrize("context_length", [77, WIDE])
def test_instant_clip_tokenizer(corpus, instant_tables, instant, context_length):
  raw, cleaned = corpus
  other_tables = (lambda text: not instant_tables.isdisjoint(text), None)
  if int(unicodedata.unidata_version.split(".")[0]) <= 14:
    assert {unicodedata.category(c) for c in instant_tables} == {"Cn"}
  assert_same_rows(
    INSTANT | {"has older Unicode tables": other_tables},
    cleaned,
    instant.tokenize_batch(cleaned, context_length=context_length),
    ClipTokenizer(context_length)(raw),
  )


@pytest.mark.parametrize("context_length", [77, WIDE])
def test_transformers(corpus, huggingface, context_length):
  raw, cleaned = corpus
  theirs = huggingface_rows(huggingface, cleaned, context_length)
  assert_same_rows(TRANSFORMERS, cleaned, theirs, ClipTokenizer(context_length)(raw))


@pytest.fixture(scope="module")
def exported():
  rust = Tokenizer.from_str(for_transformers())
  rust.enable_truncation(77)
  return rust


def test_what_is_exported_for_transformers(corpus, exported):
  raw, cleaned = corpus
  same = ("lower-cases with newer tables", "finds special tokens inside punctuation")
  categories = {name: TRANSFORMERS[name] for name in same}
  categories["repairs, or composes, what an entity brought in"] = (lambda t: openai_clean(t) != t, None)
  theirs = np.array([row(e.ids[1:-1], 77) for e in exported.encode_batch(cleaned)])
  assert_same_rows(categories, cleaned, theirs, ClipTokenizer()(raw))


@pytest.mark.parametrize("caption", ["Ｃａｆｅ", "the café’s", "ﬁne “street”", "salt &amp; pepper", "R&amp;amp;B", "a\n\t b"])
def test_what_is_exported_cleans_captions(exported, caption):
  assert row(exported.encode(caption).ids[1:-1], 77) == ClipTokenizer()(caption)[0].tolist()


@pytest.mark.parametrize("name", INSTANT)
def test_where_instant_clip_tokenizer_disagrees(reference, instant, name):
  matches, caption = INSTANT[name]
  assert matches(caption)
  assert list(instant.encode(caption)) != reference.encode(caption)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_where_transformers_disagrees(reference, huggingface, name):
  matches, caption = TRANSFORMERS[name]
  assert matches(caption)
  assert huggingface(caption)["input_ids"][1:-1] != reference.encode(caption)


@pytest.mark.parametrize(
  "caption", ["cafÃ©", "caf&eacute;", "Ｃａｆｅ", "the café’s", "ﬁne", "a\x1cb", "ΟΔΟΣ “street”"]
)
def test_without_clean_up_both_disagree(instant, huggingface, caption):
  ours = ClipTokenizer()(caption)
  assert (instant.tokenize_batch([caption], context_length=77) != ours).any()
  assert (huggingface_rows(huggingface, [caption], 77) != ours).any()
  cleaned = openai_clean(caption)
  assert (instant.tokenize_batch([cleaned], context_length=77) == ours).all()
  assert (huggingface_rows(huggingface, [cleaned], 77) == ours).all()


def test_transformers_reads_a_final_capital_sigma_otherwise(reference, huggingface):
  """Rust lower-cases letter by letter, Python looks at where in the word the sigma stands."""
  assert huggingface("ΟΔΟΣ")["input_ids"] == huggingface("οδοσ")["input_ids"]
  assert ClipTokenizer()("ΟΔΟΣ").tolist() == [row(reference.encode("οδος"), 77)]


def test_transformers_pads_with_the_end_token(huggingface):
  padded = huggingface("a cat", padding="max_length", max_length=8)["input_ids"]
  assert padded == [START, 320, 2368, END, END, END, END, END]
  assert ClipTokenizer(8)("a cat").tolist() == [[START, 320, 2368, END, 0, 0, 0, 0]]


# ------------------------------------------------------------------------- the class

CAPTIONS = st.text(st.characters(exclude_categories=[]), max_size=60).filter(
  lambda text: not OUR_SPECIAL.search(openai_clean(text))
)


@settings(deadline=None)  # the first call loads the merge table
@given(st.lists(CAPTIONS, max_size=5), st.integers(3, 80))
@example(["a photo of a cat"] * 3, 3)
def test_shape_start_and_end(texts, context_length):
  rows = ClipTokenizer(context_length)(texts)
  assert rows.shape == (len(texts), context_length)
  assert rows.dtype == np.int32
  assert (rows[:, 0] == START).all()
  assert ((rows == END).sum(axis=1) == 1).all()
  ends = rows.argmax(axis=1) if len(texts) else []
  for ids, end in zip(rows, ends, strict=True):
    assert ids[end] == END
    assert not ids[end + 1 :].any()


@settings(deadline=None)  # the first call loads the merge table
@given(CAPTIONS, st.integers(3, 80))
@example("one two three four five", 5)
def test_truncation_keeps_the_head_and_the_end_token(text, context_length):
  whole = ClipTokenizer(WIDE)(text)[0]
  cut = ClipTokenizer(context_length)(text)[0]
  end = min(whole.argmax(), context_length - 1)
  assert cut[:end].tolist() == whole[:end].tolist()
  assert cut[end] == END


@settings(deadline=None)  # the first call loads the merge table
@given(st.lists(st.from_regex(r"[A-Za-z]+", fullmatch=True), max_size=12))
def test_words_come_back(words):
  text = " ".join(words)
  assert ClipTokenizer(WIDE).decode(ClipTokenizer(WIDE)(text)[0]) == clean(text)


@settings(deadline=None)  # the first call loads the merge table
@given(CAPTIONS)
@example("naïve 👩\u200d👩\u200d👧 </w> 北京, it's 3.14!")
def test_all_but_spacing_comes_back(text):
  tokenizer = ClipTokenizer(WIDE)
  kept = clean(text).replace("\u0345", "")
  assert "".join(tokenizer.decode(tokenizer(text)[0]).split()) == "".join(kept.split())


def test_decode_of_parts():
  tokenizer = ClipTokenizer()
  ids = tokenizer("Two cats, it's 10:30")[0]
  assert tokenizer.decode(ids) == "two cats , it 's 1 0 : 3 0"
  assert tokenizer.decode(ids[1:3].tolist()) == "two cats"
  assert tokenizer.decode([]) == ""
  assert tokenizer.decode(ClipTokenizer(3)("\U000e0067")[0]).strip("\ufffd") == ""


@pytest.mark.parametrize("ids", [[49_408], [-1], [320, 1 << 40], [[320]], 320, [1.5], ["cat"]])
def test_decode_refuses_what_is_not_a_row_of_ids(ids):
  with pytest.raises(ValueError, match="token id|one row"):
    ClipTokenizer().decode(ids)


@pytest.mark.parametrize("context_length", [2, 0, -77, 77.0, "77", None, True])
def test_context_length_is_checked(context_length):
  with pytest.raises(ValueError, match=r"context_length=.* at least 3"):
    ClipTokenizer(context_length)


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (None, "not None"),
    (7, "not 7"),
    (b"a cat", "not b'a cat'"),
    (["a cat", None], "Caption 1 is None"),
    (["a cat", float("nan")], r"Caption 1 is nan \(float\)"),
    ([b"a cat"], "Caption 0 is b'a cat'"),
    ([["a cat"]], "Caption 0 is "),
  ],
)
def test_what_is_not_a_caption_is_refused(texts, message):
  with pytest.raises(ValueError, match=message):
    ClipTokenizer()(texts)


def test_kinds_of_sequences():
  want = ClipTokenizer()(["a cat", "a dog"])
  assert want[:1].tolist() == ClipTokenizer()("a cat").tolist()
  for texts in (("a cat", "a dog"), np.array(["a cat", "a dog"]), iter(["a cat", "a dog"])):
    assert ClipTokenizer()(texts).tolist() == want.tolist()
  assert ClipTokenizer(9)([]).shape == (0, 9)


def test_many_threads_load_once_and_agree(corpus):
  texts = corpus[0][:2_000]
  want = ClipTokenizer()(texts)
  tokenizer_module._load.cache_clear()
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    parts = list(pool.map(lambda i: ClipTokenizer()(texts[i : i + 25]), range(0, len(texts), 25)))
  assert tokenizer_module._load.cache_info().misses == 1
  assert np.array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize("limit", [0, 1, 50])
def test_what_is_remembered_never_shows(corpus, monkeypatch, limit):
  """Ids of pieces are kept up to a limit, and then collected anew."""
  texts = corpus[0][-3_000:]
  want = ClipTokenizer()(texts)
  monkeypatch.setattr(tokenizer_module, "KNOWN_LIMIT", limit)
  for _ in range(2):
    parts = [ClipTokenizer()(texts[i : i + 7]) for i in range(0, len(texts), 7)]
    assert np.array_equal(np.concatenate(parts), want)


def test_what_is_remembered_is_limited(monkeypatch):
  monkeypatch.setattr(tokenizer_module, "KNOWN_LIMIT", 100)
  for i in range(1_000):
    ClipTokenizer()([f"{i}x{j}" for j in range(10)])
    assert len(tokenizer_module._known) <= 100 + 10


def test_travels_to_other_processes_small():
  tokenizer = ClipTokenizer(64)
  tokenizer("load the table")
  packed = pickle.dumps(tokenizer)
  assert len(packed) < 1_000
  assert pickle.loads(packed) == tokenizer


def test_imports_neither_jax_nor_torch():
  program = """
import sys
from clip_jax.data.tokenizer import ClipTokenizer
ClipTokenizer()("a cat")
print(*{"jax", "flax", "torch", "transformers"}.intersection(sys.modules))
"""
  root = pathlib.Path(clip_jax.data.__file__).parents[2]
  run = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
  )
  assert run.stdout.split() == []
