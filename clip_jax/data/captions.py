"""Caption clean-up, as OpenAI's CLIP does it before tokenizing.

Alt texts arrive with broken encodings, HTML entities (often escaped twice), line breaks and
capital letters. CLIP's text tower was trained on captions with all of that ironed out (Radford et
al. 2021, section 2.4 for the lower case; OpenAI's released tokenizer for the rest), so zero-shot
prompts and pretraining captions have to pass through the same function.
"""

import html
import re
import unicodedata

import ftfy
from ftfy import badness, chardata, fixes

# What ftfy writes in another way wherever it stands: ligatures, wide and narrow letters, curly quotes, and the
# one character it drops as a control character although Unicode counts it among the printable ones.
_ALONE = {
  code: fixes.uncurl_quotes(fixes.fix_character_width(fixes.fix_latin_ligatures(chr(code))))
  for code in (*chardata.LIGATURES, *chardata.WIDTH_MAP, 0x2BC, *range(0x2018, 0x2020))
} | {0xFFFC: ""}
_ANY_ALONE = re.compile(f"[{''.join(map(chr, _ALONE))}]")
_SEGMENT = 1_000_000  # characters that ftfy looks at together


def clean(text: str) -> str:
  """Repairs the encoding, resolves HTML entities, collapses whitespace and lower-cases.

  The order is fixed because it shows in the result: `ftfy.fix_text` (mojibake, full-width letters,
  ligatures, curly quotes, control characters, NFC), `html.unescape` twice, whitespace to single
  spaces, `str.lower`. There is no second normalisation at the end, so entities can leave text that
  is not NFC; OpenAI's CLIP leaves it so.

  Args:
    text: a caption of any length, lone surrogates included.

  Returns:
    The cleaned caption, possibly empty. It holds no surrogates, so it always encodes to UTF-8.
  """
  repaired = _repaired_simply(text)
  if repaired is None:
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(repaired.split()).lower()


def _repaired_simply(text):
  """What ftfy and `html.unescape` make of text in which at most single characters change, else None.

  ftfy repeats its steps until nothing changes. Printable text has no control characters, line ends or
  surrogates to see to, and without an ampersand no entity. Encodings are left alone unless ftfy's own
  test calls the text bad, and NFC stays NFC. What is left is `_ALONE`; what that gives must pass the
  same tests, as ftfy's next round. This is a fifth of the work; a property test compares the two ways.
  """
  plain = text.isascii()
  repaired = text.translate(_ALONE) if not plain and _ANY_ALONE.search(text) else text
  if "&" in repaired or not repaired.isprintable():
    return None
  if plain:
    return text
  if len(text) > _SEGMENT or not unicodedata.is_normalized("NFC", repaired):
    return None
  if badness.is_bad(text) or (repaired is not text and badness.is_bad(repaired)):
    return None
  return repaired
