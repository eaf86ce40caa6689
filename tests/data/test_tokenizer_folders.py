"""Id-for-id equality with `transformers`, which reads the same folders with the same texts.

The vocabularies are made here, small, and laid out like the released ones.
"""

import contextlib
import functools
import io
import json
import pathlib
import random
import re
import tempfile
import warnings

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import normalizers as norm
from tokenizers import pre_tokenizers as pre
from tokenizers import processors as post

from clip_jax.data import tokenizer_folders
from clip_jax.errors import DataError, UsageError

CORPUS = [
  "a photo of a cat", "two dogs play in the park", "the quick brown fox jumps over the lazy dog", "hello world",
  "naïve café in paris, mañana über die straße", "an old car from 2021", "日本語 の 写真", "привет мир", "pad unk eos extra id s",
]  # fmt: skip


def spiece(corpus, **options):
  """A SentencePiece model with SigLIP's first three ids: <pad>, </s>, <unk>; no start token."""
  file = io.BytesIO()
  fixed = dict(model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)
  train = sentencepiece.SentencePieceTrainer.train
  train(sentence_iterator=iter([*corpus] * 20), model_writer=file, **{"vocab_size": 160} | fixed | options)
  return file.getvalue()


def template(single):
  special = [(text, i) for text, i in {"<eos>": 1, "</s>": 1, "<bos>": 2}.items() if text in single]
  return json.loads(post.TemplateProcessing(single, special_tokens=special).__getstate__())


def gemma(**changes):
  """A tokenizer.json laid out like SigLIP 2's: Gemma's special tokens, then the bytes."""
  rust = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
  rust.normalizer, rust.pre_tokenizer = norm.Replace(" ", "▁"), pre.Split(" ", "merged_with_previous")
  rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
  symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", "▁▁"]
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=symbols, show_progress=False)
  rust.train_from_iterator([*CORPUS, *(line.title() for line in CORPUS)], trainer)
  file = json.loads(rust.to_str())
  file["added_tokens"] = [token for token in file["added_tokens"] if token["id"] < 5]
  file["added_tokens"] += [token(text, id=symbols.index(text), special=False) for text in ("\n\n", "▁▁")]
  return json.dumps(file | {"post_processor": template("$A <eos>")} | changes).encode()


def clip(**changes):
  """A tokenizer.json like CLIP's, with a handful of merges."""
  from transformers import CLIPTokenizer

  merges = [("c", "a"), ("ca", "t</w>"), ("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o</w>")]
  symbols = sorted(pre.ByteLevel.alphabet())
  symbols += [*(s + "</w>" for s in symbols), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
  made = CLIPTokenizer(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges)
  file = json.loads(made.backend_tokenizer.to_str())
  added = [token | {"normalized": True} for token in file["added_tokens"]]
  return json.dumps(file | {"added_tokens": added} | changes).encode()


def t5(sentinels):
  """A tokenizer.json as transformers 4 made it of SigLIP's SentencePiece model."""
  model = sentencepiece_model_pb2.ModelProto.FromString(vocabulary("siglip"))
  special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in reversed(range(sentinels)))]
  pieces = [*((piece.piece, piece.score) for piece in model.pieces), *((text, 0.0) for text in special[3:])]
  rust = Tokenizer(models.Unigram(pieces, unk_id=2))
  characters = norm.Precompiled(model.normalizer_spec.precompiled_charsmap)
  rust.normalizer = norm.Sequence([characters, norm.Strip(left=False), norm.Replace(Regex(" {2,}"), "▁")])
  rust.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
  rust.decoder = decoders.Metaspace(prepend_scheme="first")
  rust.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
  return json.dumps(json.loads(rust.to_str()) | {"post_processor": template("$A </s>")}).encode()


def token(text, **changes):
  """A token as it stands in added_tokens_decoder."""
  flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
  return {"content": text} | flags | changes


FIXED = {"strategy": {"Fixed": 9}, "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
FIXED |= {"direction": "Right", "pad_token": "<pad>"}
LEFT = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
VOCABULARIES = {
  "siglip": lambda: spiece([*CORPUS, "x < y > z"]),
  # Like the multilingual one: bytes instead of unknown pieces, sentinels in the model.
  "bytes": lambda: spiece(
    CORPUS, byte_fallback=True, vocab_size=420, user_defined_symbols=["<extra_id_0>", "▁<extra_id_1>"]
  ),
  # Keeps spaces where they are, knows neither "<" nor ">" by themselves, nor much else, and has a
  # piece that joins what is put before a text.
  "bare": lambda: spiece(
    CORPUS[:3], vocab_size=40, normalization_rule_name="identity", remove_extra_whitespaces=False,
    user_defined_symbols=["<unk>dogs"],
  ),
  "gemma": gemma,
  "gemma, padded": lambda: gemma(padding=FIXED, truncation=LEFT),
  "gemma, other steps": lambda: gemma(normalizer={"type": "NFC"}, pre_tokenizer=None),
  "gemma, no tokens": lambda: gemma(added_tokens=[]),
  "gemma, no end": lambda: gemma(post_processor=None),
  "gemma, a start": lambda: gemma(post_processor=template("<bos> $A")),
  "gemma, starts": lambda: gemma(post_processor=template("<bos> " * 64 + "$A <eos>")),
  "clip": clip,
  "clip, other steps": lambda: clip(normalizer={"type": "NFKC"}, post_processor=None),
  "t5": lambda: t5(0),
  "t5, sentinels": lambda: t5(3),
}  # fmt: skip


@functools.cache
def vocabulary(name):
  return VOCABULARIES[name]()


# ------------------------------------------------------------------------- folders

stripping = functools.partial(token, lstrip=True, rstrip=True)
ADDED = {"1": stripping("</s>"), "2": stripping("<unk>")}
SENTINELS = {str(100 + i): token(f"<extra_id_{i}>") for i in range(3)}
SIGLIP = dict(tokenizer_class="SiglipTokenizer", unk_token="<unk>", pad_token="</s>", eos_token="</s>")
SIGLIP |= dict(do_lower_case=True, sp_model_kwargs={}, additional_special_tokens=[], added_tokens_decoder=ADDED)
GEMMA = dict(tokenizer_class="GemmaTokenizer", padding_side="right", add_bos_token=False, add_eos_token=True)
GEMMA |= {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk")}
DECODER = {str(i): token(f"<{role}>") for i, role in enumerate(("pad", "eos", "bos", "unk", "mask"))}
DECODER |= {"261": token("\n\n", special=False), "262": token("▁▁", special=False)}
GEMMA |= {"added_tokens_decoder": DECODER}
OWN = {"1": token("<eos>", lstrip=True), "500": token("Photo", special=False, normalized=True)}
TOKENS = {f"{role}_token": token("<|endoftext|>", normalized=True) for role in ("eos", "unk")}
TOKENS |= {"bos_token": token("<|startoftext|>", normalized=True)}
OLD_CLIP = {role: token | {"__type": "AddedToken"} for role, token in TOKENS.items()}
OLD_CLIP |= {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
T5 = SIGLIP | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "legacy": False}
T5 |= {"added_tokens_decoder": {str(i): token(t) for i, t in enumerate(["<pad>", "</s>", "<unk>"])}}
IN_SIGLIP, IN_CLIP, IN_SIGLIP2 = ({"config": {"model_type": name}} for name in ("siglip", "clip", "siglip2"))


def as_class(name, **changes):
  return {"tokenizer_class": name} | changes


# name: (spiece.model, tokenizer.json, the class that transformers takes, tokenizer_config.json, other files)
FOLDERS = {
  "siglip": ("siglip", None, "SiglipTokenizer", SIGLIP),
  "siglip by its model": ("siglip", None, "SiglipTokenizer", {}, IN_SIGLIP),
  "siglip with a tokenizer.json": ("siglip", "gemma", "SiglipTokenizer", SIGLIP, IN_SIGLIP),
  "siglip, case kept": ("siglip", None, "SiglipTokenizer", SIGLIP | {"do_lower_case": False}),
  "siglip that pads with <pad>": (
    "siglip", None, "SiglipTokenizer", as_class("SiglipTokenizer", pad_token="</s>"),
    {"special_tokens_map": {"pad_token": stripping("<pad>")}},
  ),
  "siglip with sentinels": (
    "bytes", None, "SiglipTokenizer",
    SIGLIP | {"added_tokens_decoder": ADDED | {"3": token("<extra_id_0>")}, "additional_special_tokens": ["▁<extra_id_1>"]},
  ),
  "siglip with tokens of its own": (
    "siglip", None, "SiglipTokenizer", as_class("SiglipTokenizer"),
    {"special_tokens_map": {"additional_special_tokens": ["a"]}, "added_tokens": {"<new": 501, "<new>": 500}},
  ),
  "siglip, bytes": ("bytes", None, "SiglipTokenizer", SIGLIP),
  "siglip, bare": (
    "bare", None, "SiglipTokenizer",
    SIGLIP | {"added_tokens_decoder": ADDED | SENTINELS, "additional_special_tokens": ["<extra_id_2>"]},
  ),
  "siglip 2": (None, "gemma", "GemmaTokenizer", GEMMA),
  "siglip 2 in a siglip folder": (None, "gemma, padded", "GemmaTokenizer", GEMMA, IN_SIGLIP),
  "siglip 2, naflex": (None, "gemma", "Siglip2Tokenizer", GEMMA, IN_SIGLIP2),
  "siglip 2, nothing but its class": ("siglip", "gemma", "Siglip2Tokenizer", as_class("Siglip2Tokenizer")),
  "siglip 2, other steps": (None, "gemma, other steps", "Siglip2Tokenizer", GEMMA | as_class("Siglip2Tokenizer")),
  "siglip 2 with tokens of its own": (
    None, "gemma", "Siglip2Tokenizer",
    GEMMA | as_class("Siglip2Tokenizer", image_token="<image>", mask_token=None, truncation_side="left")
    | {"added_tokens_decoder": DECODER | OWN, "additional_special_tokens": ["cat"]},
  ),
  "as written": (None, "gemma, other steps", "TokenizersBackend", as_class("PreTrainedTokenizerFast", pad_token="<pad>")),
  "as written, padding too": (None, "gemma, padded", "TokenizersBackend", {}),
  "as written, one token": (None, "gemma, no tokens", "TokenizersBackend", as_class("TokenizersBackend", pad_token="<pad>")),
  "clip": (None, "clip", "CLIPTokenizer", OLD_CLIP, IN_CLIP | {"special_tokens_map": TOKENS}),
  "clip that pads with !": (None, "clip", "CLIPTokenizer", as_class("CLIPTokenizerFast", pad_token="!")),
  "clip, other steps": (None, "clip, other steps", "CLIPTokenizer", {}, IN_CLIP),
  "t5": (None, "t5", "T5Tokenizer", T5),
  "t5 with sentinels": (
    "siglip", "t5, sentinels", "T5Tokenizer", as_class("T5TokenizerFast", extra_ids=3, pad_token="<pad>"), IN_SIGLIP
  ),
}  # fmt: skip
ROOT = tempfile.TemporaryDirectory()


def write(folder, spiece=None, file=None, **settings):
  """A model folder with these files' bytes and these settings as JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  if spiece is not None:
    (folder / "spiece.model").write_bytes(spiece)
  if file is not None:
    (folder / "tokenizer.json").write_bytes(file)
  for name, values in settings.items():
    (folder / f"{name}.json").write_text(json.dumps(values))
  return folder


@functools.cache
def folder_of(name):
  *kinds, _, config, files = (*FOLDERS[name], {})[:5]
  contents = (vocabulary(kind) if kind else None for kind in kinds)
  files = {"tokenizer_config": config} | files if config else files
  return write(pathlib.Path(ROOT.name) / name, *contents, **files)


@functools.cache
def read(name, context_length):
  return tokenizer_folders.read(folder_of(name), context_length)


@functools.cache
def transformers_tokenizer(folder, cls="AutoTokenizer"):
  import transformers

  return getattr(transformers, cls).from_pretrained(folder, local_files_only=True)


def rows_of(tokenizer, texts, context_length):
  """int32 [n, context_length] by transformers."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of a text that ends with the end token
    options = dict(padding="max_length", truncation=True, max_length=context_length)
    return np.array(tokenizer(texts, **options)["input_ids"], np.int32)


def assert_rows(texts, ours, theirs):
  assert ours.dtype == np.int32
  assert ours.shape == theirs.shape
  for i in np.flatnonzero((ours != theirs).any(axis=1)):
    assert ours[i].tolist() == theirs[i].tolist(), ascii(texts[i])


def assert_equal(folder, texts, context_length):
  # See `tokenizer_folders.CLASSES` for T5, and below.
  by = "PreTrainedTokenizerFast" if folder.name.startswith("t5") else "AutoTokenizer"
  theirs = rows_of(transformers_tokenizer(folder, by), texts, context_length)
  assert_rows(texts, tokenizer_folders.read(folder, context_length)(texts), theirs)


# ------------------------------------------------------------------------- texts

BITS = """
</s> </S> <pad> <PAD> <unk> <eos> <EOS> <bos> <mask> <image> <new> <newer <|endoftext|> <|EndOfText|>
<|startoftext|> <extra_id_0> <extra_id_1> <EXTRA_ID_0> <extra_id_2> <0x41> ▁ ▁▁ ▁<extra_id_1> a A
cat dogs CAT Photo photo PHOTO hello 's 'S don't ! ? ... -- _ , . ; " \\ / < > | s pad unk x &amp;
é É e\u0301 naïve straße STRASSE ß ẞ ΟΔΟΣ Σ ς İ ı ſ ﬁ Ａ ％ Ⅷ ² ½ ١ 日本語 写真 привет ПРИВЕТ 안녕 नमस्ते
שלום السلام กรุงเทพ 😀 👩\u200d👩\u200d👧 🇫🇷 ❤\ufe0f \u200b \ufeff \u00ad \U000e0067 \ue000 \U0010ffff 2021
"""
SPACES = ["", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x1c", "\x85", "\xa0", "\u3000"]
PIECES = [bit for bit in re.split("[ \n]+", BITS) if bit] + SPACES
CHARACTERS = st.characters(exclude_categories=["Cs"])
PARTS = st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=3), max_size=12)
ANY_TEXT = st.text(CHARACTERS, max_size=40) | PARTS.map("".join)


@functools.cache
def texts():
  """A few hundred: every piece by itself and in company, the same at each run."""
  pick = random.Random(2023)
  made = ["!?.", "▁ a", " a", "a ", "a  photo\n of a\tcat ", "A Photo of a CAT.", "</s></s> </s>", "a</s>dogs", "a_cat_"]
  made += ["two dogs " * 100, "x" * 300, "</s>" * 70, "<eos> " * 70, "! " * 70, "😀" * 70]
  for piece in PIECES:
    made += [piece, f"a {piece} cat", f"a{piece}cat", f"{piece} {piece}a"]
  made += ["".join(pick.choices([*PIECES, *SPACES], k=pick.randint(2, 14))) for _ in range(200)]
  return list(dict.fromkeys(made))


# ------------------------------------------------------------------------- equality


@pytest.mark.parametrize("name", FOLDERS)
def test_every_text_equals_transformers(name):
  folder = folder_of(name)
  assert type(transformers_tokenizer(folder)).__name__ == FOLDERS[name][2]
  assert_equal(folder, texts(), 64)
  for context_length in (2, 3, 9):
    assert_equal(folder, texts()[::7], context_length)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(FOLDERS)), ANY_TEXT, st.integers(2, 40))
def test_any_text_equals_transformers(name, text, context_length):
  assert_equal(folder_of(name), [text], context_length)


def test_the_texts_reach_what_is_special():
  """Else the comparison above would be of less than it says."""
  ids = {name: read(name, 64)(texts()) for name in FOLDERS}
  model = sentencepiece.SentencePieceProcessor(model_proto=vocabulary("bytes"))
  assert sum(model.is_byte(i) for i in set(ids["siglip, bytes"].ravel().tolist())) > 50
  added = {"siglip with sentinels": 3, "siglip with tokens of its own": 500, "siglip 2": 261, "siglip 2, naflex": 262}
  for name, i in [*added.items(), ("siglip 2", 5 + 0xF0)]:  # and the first byte of an emoji
    assert (ids[name] == i).any(), (name, i)
  for one, other in (("siglip 2", "siglip 2, naflex"), ("siglip", "siglip, case kept")):
    assert (ids[one] != ids[other]).any(axis=1).sum() > 50, "lower case"
  for name in ("siglip", "siglip, bare", "t5"):
    assert (ids[name] == 2).any(axis=1).sum() > 50, "unknown pieces"
  for name in ("siglip", "siglip 2", "clip", "t5"):
    assert (ids[name][:, -2] != read(name, 64).pad_id).sum() >= 3, "truncation"


def test_t5_as_transformers_5_reads_it(tmp_path):
  """Its class takes text apart anew, which shows where no caption of open_clip's gets to."""
  for name in ("t5", "t5 with sentinels"):
    theirs = rows_of(transformers_tokenizer(folder_of(name)), texts(), 64)
    odd = (read(name, 64)(texts()) != theirs).any(axis=1)
    assert 5 < odd.sum() < 200
    assert all("\x85" in text or "<" in text for text in np.array(texts(), object)[odd])
  # Tokens that are in no file: a hundred, unless the settings say how many.
  for count, said in ((100, {}), (2, {"extra_ids": 2}), (1, {"extra_ids": 1})):
    config = as_class("T5TokenizerFast", **said)
    folder = write(tmp_path / str(count), None, vocabulary("t5"), tokenizer_config=config)
    ours, theirs = tokenizer_folders.read(folder, 9), transformers_tokenizer(folder)
    assert ours.vocab_size == read("t5", 9).vocab_size + count == len(theirs)
    assert_rows(["<extra_id_0>"], ours("<extra_id_0>"), rows_of(theirs, ["<extra_id_0>"], 9))


def test_added_tokens_that_overlap(tmp_path):
  """The one known difference. transformers passes a token by while it follows a longer one."""
  tokens = {str(500 + i): token(text) for i, text in enumerate(["§", "¤§§", "¶¶§§"])}
  config = SIGLIP | {"added_tokens_decoder": tokens}
  write(tmp_path, vocabulary("siglip"), tokenizer_config=config)
  assert_equal(tmp_path, ["§", "a ¤§§ ¶¶§§ §", "¤§ ¶¶§", "§¤§§¶¶§§§"], 16)
  text = "¤§¤§§¶¶§§¶¤§"
  ours = tokenizer_folders.read(tmp_path, 16)(text)[0]
  theirs = rows_of(transformers_tokenizer(tmp_path), [text], 16)[0]
  assert ours[ours >= 500].tolist() == [500, 501, 502, 500]
  assert theirs[theirs >= 500].tolist() == [500, 502, 500]


# ------------------------------------------------------------------------- which file, which class


@pytest.mark.parametrize(
  ("declared", "model_type", "name"),
  [
    ("SiglipTokenizer", "siglip2", "Siglip2Tokenizer"), ("SiglipTokenizer", "siglip_text_model", "SiglipTokenizer"),
    ("GemmaTokenizerFast", None, "GemmaTokenizer"), ("GemmaTokenizer", "siglip2", "Siglip2Tokenizer"),
    ("Siglip2Tokenizer", "siglip", "Siglip2Tokenizer"), ("Siglip2TokenizerFast", "clip", "Siglip2Tokenizer"),
    ("PreTrainedTokenizerFast", "siglip", "TokenizersBackend"), ("T5Tokenizer", "siglip2", "Siglip2Tokenizer"),
    ("PreTrainedTokenizerFast", "siglip2", "Siglip2Tokenizer"), ("TokenizersBackend", "other", "TokenizersBackend"),
    (None, "siglip", "SiglipTokenizer"), (None, "siglip2", "Siglip2Tokenizer"),
  ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["tokenizer_config", "config"])
def test_the_settings_decide(tmp_path, declared, model_type, name, where):
  files = {"tokenizer_config": {"pad_token": "<pad>", "unk_token": "<unk>"}, "config": {}}
  files[where] |= as_class(declared) if declared else {}
  files["config"] |= {"model_type": model_type} if model_type else {}
  kind, other = "tokenizer.json", "spiece.model"
  if name == "SiglipTokenizer":
    kind, other = other, kind
    # The tokens of an unrelated tokenizer.json are no business of this one.
    files["tokenizer_config"]["added_tokens_decoder"] = {}
  write(tmp_path, vocabulary("siglip"), vocabulary("gemma"), **files)
  assert type(transformers_tokenizer(tmp_path)).__name__ == name
  assert_equal(tmp_path, ["A Photo of a CAT!", "a\n\n  cat"], 9)
  both = tokenizer_folders.read(tmp_path, 9)
  assert both.kind == kind
  assert tokenizer_folders.read(tmp_path / kind, 9) == both
  (tmp_path / other).rename(tmp_path / "other")
  assert tokenizer_folders.read(tmp_path, 9) == both
  (tmp_path / kind).unlink()
  (tmp_path / "other").rename(tmp_path / other)
  for path in (tmp_path, tmp_path / other):
    with pytest.raises(UsageError, match=f"which reads a {kind}; there is only {other}"):
      tokenizer_folders.read(path, 9)


def test_nothing_said_is_siglips_default(tmp_path):
  from transformers import SiglipTokenizer

  write(tmp_path, vocabulary("siglip"))
  ours, theirs = tokenizer_folders.read(tmp_path, 16), SiglipTokenizer(str(tmp_path / "spiece.model"))
  assert_rows(texts(), ours(texts()), rows_of(theirs, texts(), 16))
  # transformers would read the other file here; that it has a class for this one is no secret.
  write(tmp_path, file=vocabulary("clip"))
  assert tokenizer_folders.read(tmp_path, 16).kind == "spiece.model"


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_transformers_saved(name, tmp_path):
  transformers_tokenizer(folder_of(name)).save_pretrained(tmp_path / name)
  assert_equal(tmp_path / name, texts()[::3], 24)


# ------------------------------------------------------------------------- errors


def test_no_such_file(tmp_path):
  (tmp_path / "vocab.json").write_text("{}")
  for path, message in {
    "nowhere": "nowhere does not exist",
    ".": r"holds neither a spiece\.model nor a tokenizer\.json",
    "vocab.json": r"vocab\.json is neither",
  }.items():
    with pytest.raises(UsageError, match=message):
      tokenizer_folders.read(tmp_path / path, 64)


def test_a_cut_off_spiece_model_is_refused(tmp_path):
  """Cut between two of its parts it would load, and give other ids."""
  content, loads = vocabulary("siglip"), 0
  for size in [*range(0, 999, 7), *range(999, len(content), 19_973), len(content) - 1]:
    write(tmp_path, content[:size])
    with pytest.raises(DataError, match="not a SentencePiece model; it may be cut off"):
      tokenizer_folders.read(tmp_path, 64)
    with contextlib.suppress(RuntimeError):
      loads += sentencepiece.SentencePieceProcessor(model_proto=content[:size]).piece_size() > 3
  assert loads > 5, "what the library takes"


def test_a_tokenizer_json_that_is_cut_off_or_another_kind_is_refused(tmp_path):
  whole, named = vocabulary("gemma"), {"pad_token": "<pad>", "unk_token": "<unk>"}
  others = [gemma(model=None), gemma(normalizer={"type": "?"}), gemma(added_tokens=3)]
  for config in (named, as_class("GemmaTokenizer", **named)):
    for content in [*(whole[:size] for size in range(0, len(whole), 1_499)), b"\xff" * 99, bytes(1_000), *others]:
      write(tmp_path, file=content, tokenizer_config=config)
      with pytest.raises(DataError, match=r"tokenizer\.json is not|malformed"):
        tokenizer_folders.read(tmp_path, 64)


ERRORS = [  # (vocabulary, settings, changes to them, message)
  ("siglip", SIGLIP, {"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map"),
  ("siglip", SIGLIP, {"tokenizer_class": "BertTokenizer"}, "class BertTokenizer, which is not kn"),
  ("siglip", SIGLIP, {"sp_model_kwargs": {"enable_sampling": True}}, "sets sp_model_kwargs"),
  ("siglip", SIGLIP, {"legacy": False}, "sets legacy to False"),
  ("siglip", SIGLIP, {"padding_side": "left"}, "sets padding_side to 'left'"),
  ("siglip", SIGLIP, {"pad_token": None}, "without a pad_token"),
  ("siglip", SIGLIP, {"eos_token": None}, "without a eos_token"),
  ("siglip", SIGLIP, {"pad_token": "[PAD]"}, r"special token '\[PAD\]', which spiece"),
  ("siglip", SIGLIP, {"unk_token": "a"}, "unk_token 'a', where spiece.model has '<unk>'"),
  ("siglip", SIGLIP, {"added_tokens_decoder": {"5": token("</s>")}}, "another id, 5, than"),
  ("siglip", SIGLIP, {"added_tokens_decoder": {"5": token("<x>")}}, "another id, 5"),
  ("siglip", SIGLIP, {"added_tokens_decoder": {"500": token("<x>", single_word=True)}}, "whole"),
  ("siglip", SIGLIP, {"added_tokens_decoder": {"5": {"text": "x"}}}, "malformed"),
  ("siglip", SIGLIP, {"added_tokens_decoder": {"-5": token("x")}}, "malformed"),
  ("gemma", GEMMA, {"auto_map": ["a.B", None]}, "auto_map"),
  ("gemma", GEMMA, {"unk_token": None}, "without a unk_token"),
  ("gemma", GEMMA, as_class("CLIPTokenizer", unk_token="<|e|>"), r"no '<\|e\|>' in its vocabulary"),
  ("gemma", GEMMA, {"padding_side": "both"}, "sets padding_side to 'both', unsupported for a tok"),
  ("gemma", GEMMA, {"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files"),
  # transformers would append none; it does not look at add_eos_token beside this file.
  ("gemma, no end", GEMMA, {}, "no post-processor that puts an end token"),
  ("gemma, a start", GEMMA, {}, "no post-processor that puts an end token"),
  ("gemma, starts", GEMMA, {}, "adds 65 tokens to a text: too many for context_length=64"),
  ("t5", T5, {"extra_ids": "many"}, "malformed"),
  ("t5", T5, as_class("GemmaTokenizer"), "its model is a Unigram, not a BPE"),
]


@pytest.mark.parametrize(("name", "config", "changes", "message"), ERRORS)
def test_what_a_folder_may_not_say(tmp_path, name, config, changes, message):
  kind = "spiece" if name == "siglip" else "file"
  write(tmp_path, tokenizer_config=config | changes, **{kind: vocabulary(name)})
  with pytest.raises(UsageError, match=message) as error:
    tokenizer_folders.read(tmp_path, 64)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config", "config", "special_tokens_map"])
def test_settings_that_are_no_json_object(tmp_path, name):
  write(tmp_path, vocabulary("siglip"))
  for content in (b"{", b"[]", b"\xff"):
    (tmp_path / f"{name}.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\.json (is not JSON|must hold a JSON object)"):
      tokenizer_folders.read(tmp_path, 64)
