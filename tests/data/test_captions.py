"""Caption clean-up equals OpenAI's recipe, with and without the short cut for plain ASCII."""

import html
import string

import ftfy
import pytest
import regex
from hypothesis import example, given
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


def test_ascii_skips_the_slow_calls(monkeypatch):
  def refuse(text):
    raise AssertionError(f"ftfy was called for {text!r}")

  monkeypatch.setattr(captions.ftfy, "fix_text", refuse)
  plain = string.ascii_letters + string.digits + string.punctuation.replace("&", "")
  assert clean(plain) == plain.lower()
  with pytest.raises(AssertionError, match="ftfy was called"):
    clean("rock & roll")
