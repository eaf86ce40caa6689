"""Caption clean-up, as OpenAI's CLIP does it before tokenizing.

Alt texts arrive with broken encodings, HTML entities (often escaped twice), line breaks and
capital letters. CLIP's text tower was trained on captions with all of that ironed out (Radford et
al. 2021, section 2.4 for the lower case; OpenAI's released tokenizer for the rest), so zero-shot
prompts and pretraining captions have to pass through the same function.
"""

import html

import ftfy


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
  # Printable ASCII has no encoding to repair, and without an ampersand no entity to resolve, so
  # plain English captions skip the slow calls. A property test compares the two ways.
  if not (text.isascii() and text.isprintable() and "&" not in text):
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()
