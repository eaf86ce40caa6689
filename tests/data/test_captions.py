"""Caption clean-up equals OpenAI's recipe, with and without the short cuts past `ftfy`."""

import contextlib
import html
import string
import sys

import ftfy
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax.data import captions
from clip_jax.data.captions import clean

PRINTABLE = "".join(chr(c) for c in range(0x20, 0x7F))


def published_recipe(text):
  """The steps one by one, no short cut; `\\s` as Unicode defines it, in the `regex` package."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return regex.sub(r"\s+", " ", text).strip().lower()


@pytest.mark.parametrize(
  ("raw", "cleaned"),
  [
    ("A photo of a CAT.", "a photo of a cat."),
    ("  two\tspaces \n and a line  ", "two spaces and a line"),
    ("non\u00a0breaking\u3000ideographic\u2028separator", "non breaking ideographic separator"),
    ("AT&amp;amp;T", "at&t"),
    ("&lt;b&gt;Sale&lt;/b&gt;", "<b>sale</b>"),
    ("<i> caf&amp;eacute;", "<i> café"),
    ("The cafÃ©\u2019s menu", "the café's menu"),
    ("schÃ¶n â€” â€œquotedâ€\x9d", 'schön — "quoted"'),
    ("ＦＵＬＬ １２", "full 12"),
    ("ﬁne ﬂour", "fine flour"),
    ("e\u0301", "é"),
    ("\ud83d\ude00 then \ud800", "😀 then \ufffd"),
    ("bell\x07 and\x0b tab", "bell and tab"),
    ("İstanbul ΟΔΟΣ", "i̇stanbul οδος"),
    ("&#0;&#xD800;", "\ufffd\ufffd"),
    ("", ""),
    (" \n ", ""),
  ],
)
def test_known_captions(raw, cleaned):
  assert clean(raw) == cleaned == published_recipe(raw)


def test_every_pair_of_ascii_characters():
  ascii_characters = [chr(c) for c in range(128)]
  for first in ascii_characters:
    for second in ascii_characters:
      text = f"A{first}{second}b "
      assert clean(text) == published_recipe(text), ascii(text)


@given(
  st.text(st.sampled_from(PRINTABLE)) | st.text(st.sampled_from("&amp;lt#x39quot<>;' A\t\x0b"))
)
@example("&amp;lt;b&gt; &#39;")
def test_ascii_short_cut_changes_nothing(text):
  assert clean(text) == published_recipe(text)


# Surrogates included: a caption out of `json.loads` can hold half a pair.
@given(st.text(st.characters(exclude_categories=[])))
@example("\x1c\x85\x0c")
@example("<e&#769;>")
def test_any_text_equals_the_published_recipe_and_encodes(text):
  cleaned = clean(text)
  assert cleaned == published_recipe(text)
  cleaned.encode("utf-8")


# What ftfy looks for: letters that come of UTF-8 read as Latin-1, Windows-1252 or Mac Roman, what it writes
# otherwise, marks that compose, half-width letters that do, and what stands next to them in captions.
TROUBLE = (
  "".join(map(chr, range(0x20, 0x180))) + "ÃÂâ€ðŸ" * 6 + "‘’“”–—…™ŒœŠšŽžƒˆ˜‰‹›•†‡√ÔËÏπ∂ﬁﬂĳŉǆｶﾞﾊﾟＡ１＆；！　ʼ"
  "\u0301\u0308\u0323\u200d\u200b\xa0\ufeff\ufffc\ufffd\u212b\u1100\u1161東京キあんабвάלاक😀"
)
CLEAN = ["The café’s menu – “crème brûlée”", "Ein Straßenschild in Zürich", "東京タワーの夜景", "Красивая фотография", "ﬁne 🌅 ＡＢＣ"]


@settings(max_examples=3_000, deadline=None)
@given(st.text(st.sampled_from(TROUBLE), max_size=12))
@example("Ã\ufffc©")
@example("e\ufffc\u0301")
@example("＆amp;")
@example("Ã ﬁ")
@example("Ɩ’")
@example("ｶﾞ")
def test_the_short_cut_past_ftfy_changes_nothing(text):
  assert clean(text) == published_recipe(text)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CLEAN), st.text(st.sampled_from(TROUBLE), max_size=4), st.integers(0, 12))
def test_trouble_within_a_caption(caption, trouble, at):
  text = caption[:at] + trouble + caption[at:]
  assert clean(text) == published_recipe(text)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(CLEAN), st.sampled_from(["latin-1", "cp1252", "mac-roman", "cp437"]), st.integers(1, 2))
def test_mojibake_is_repaired_as_ever(caption, encoding, times):
  for _ in range(times):
    caption = caption.encode("utf-8").decode(encoding, "replace")
  assert clean(caption) == published_recipe(caption)


def test_ftfy_looks_at_a_million_characters_at_a_time():
  """What it takes for mojibake at the beginning of a text alone, it also does where it begins anew."""
  text = "東" * 1_000_000 + "Ã la"
  assert clean(text) == published_recipe(text) == "東" * 1_000_000 + "à la"


class Called(Exception):
  """ftfy was."""


def refuse(text):
  raise Called(text)


def test_every_character_that_takes_the_short_cut(monkeypatch):
  """One by one between letters: what is not sent to ftfy comes out as ftfy would have written it."""
  cleaned = {}
  with monkeypatch.context() as patched:
    patched.setattr(captions.ftfy, "fix_text", refuse)
    for code in range(sys.maxunicode + 1):
      with contextlib.suppress(Called):
        cleaned[code] = clean(f"A{chr(code)}b")
  for code, found in cleaned.items():
    assert found == published_recipe(f"A{chr(code)}b"), hex(code)
  assert len(cleaned) > 100_000


@pytest.mark.parametrize("text", CLEAN)
def test_what_has_nothing_to_repair_skips_ftfy(monkeypatch, text):
  want = published_recipe(text)
  monkeypatch.setattr(captions.ftfy, "fix_text", refuse)
  assert clean(text) == want
  with pytest.raises(Called):
    clean(text.encode("utf-8").decode("latin-1"))


def test_ascii_skips_the_slow_calls(monkeypatch):
  monkeypatch.setattr(captions.ftfy, "fix_text", refuse)
  plain = string.ascii_letters + string.digits + string.punctuation.replace("&", "")
  assert clean(plain) == plain.lower()
  with pytest.raises(Called):
    clean("rock & roll")
