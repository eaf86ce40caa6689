"""What a tokenizer is apart from its folder: its cleaning, its copies, what it is exported as."""

import concurrent.futures
import dataclasses
import html
import json
import pathlib
import pickle
import string
import subprocess
import sys

import ftfy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clip_jax.data
from clip_jax.data import tokenizer_files, tokenizer_folders
from clip_jax.data.tokenizer_files import FileTokenizer
from clip_jax.errors import DataError, MissingExtraError, UsageError
from tests.data import test_tokenizer_folders as folders
from tests.data.test_tokenizer_folders import FOLDERS, assert_rows, folder_of, read, rows_of, texts

KINDS = ["siglip", "siglip 2", "siglip 2, naflex", "clip", "t5"]


@pytest.mark.parametrize("name", KINDS)
def test_surrogates(name):
  """transformers refuses them. A pair is one character, a lone one is U+FFFD."""
  paired = ["a \ud83d\ude00", "a\ud800b", "\ude00\ud83d", "\ufeff\ud83d\ude00\ud83d"]
  same = ["a 😀", "a\ufffdb", "\ufffd\ufffd", "\ufeff😀\ufffd"]
  assert_rows(same, read(name, 30)(paired), read(name, 30)(same))


def test_kinds_of_sequences():
  for tokenizer in (read("siglip", 9), read("clip", 9)):
    want = tokenizer(["a cat", "a dog"]).tolist()
    assert want[:1] == tokenizer("a cat").tolist()
    for sequence in (("a cat", "a dog"), np.array(["a cat", "a dog"]), iter(["a cat", "a dog"])):
      assert tokenizer(sequence).tolist() == want
    assert (tokenizer([]).shape, tokenizer([]).dtype) == ((0, 9), np.int32)
    for wrong in (None, b"a cat", ["a cat", float("nan")]):
      with pytest.raises(ValueError, match=r"not None|not b'a cat'|Caption 1 is nan"):
        tokenizer(wrong)


@pytest.mark.parametrize("name", FOLDERS)
def test_decode_and_vocab_size(name):
  tokenizer = read(name, 64)
  for text in ("hello world", "a photo of a cat", "the quick brown fox", ""):
    if not ("of its own" in name and "a" in text):  # "a" and "cat" are added tokens there
      assert tokenizer.decode(tokenizer(text)[0]).strip() == text
  assert all(isinstance(tokenizer.decode(row), str) for row in tokenizer(texts()[::3]))
  for wrong in ([1_000], [-1], [3, 1 << 40], [[3]], 3, [1.5], ["cat"]):
    with pytest.raises(ValueError, match="token id|one row"):
      tokenizer.decode(wrong)
  theirs = folders.transformers_tokenizer(folder_of(name)).get_vocab()
  assert tokenizer.vocab_size == max(theirs.values()) + 1


def test_decode_stops_at_the_end_token():
  assert read("siglip", 64).decode(read("siglip", 64)("hello</s>world")[0]) == "hello"
  left = read("siglip 2, nothing but its class", 16)
  assert left("hello<eos>world")[0][0] == left.pad_id
  assert left.decode(left("hello<eos>world")[0]) == "hello"
  same = dataclasses.replace(left, pad_id=left.end_id)
  assert same.decode(same("hello")[0]) == "hello"


# ------------------------------------------------------------------------- open_clip's cleaning


def open_clip_canonicalize(text):
  """`_clean_canonicalize` of open_clip/tokenizer.py, with the functions that it calls."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  text = text.replace("_", " ")
  text = text.translate(str.maketrans("", "", string.punctuation))
  text = text.lower()
  text = " ".join(text.split())
  return text.strip()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KINDS), st.text(st.characters(max_codepoint=0x17F)) | st.text() | folders.ANY_TEXT)
def test_canonicalizing_is_open_clips_cleaning_and_then_the_tokenizer(name, text):
  assert_rows([text], read(name, 32).canonicalizing()(text), read(name, 32)(open_clip_canonicalize(text)))


def test_canonicalizing():
  odd = ["A_Photo", "ΑΣ-Β", "ΑΣ.", "&amp;lt;cat&amp;gt;", "cafÃ©", "</s>", "a\x85b", "a\ud83d", "\x1c_\x1fa"]
  given = [*texts(), *odd]
  cleaned = [open_clip_canonicalize(text) for text in given]
  for name in KINDS:
    # T5's class in transformers 5 then gives the same ids, too.
    theirs = rows_of(folders.transformers_tokenizer(folder_of(name)), cleaned, 32)
    assert_rows(given, read(name, 32).canonicalizing()(given), theirs)


# ------------------------------------------------------------------------- exports


def assert_exported(tokenizer, folder, texts):
  """What is written of a tokenizer gives its ids, read again and by transformers."""
  config = json.loads(json.dumps(tokenizer.transformers_config()))
  model = {"model_type": "clip" if "clip" in folder.name else "siglip"}
  folders.write(folder, tokenizer_config=config, config=model)
  (folder / tokenizer.kind).write_bytes(tokenizer.transformers_content())
  length, want = tokenizer.context_length, tokenizer(texts)
  assert_rows(texts, tokenizer_folders.read(folder, length)(texts), want)
  theirs = folders.transformers_tokenizer(folder)
  assert_rows(texts, rows_of(theirs, texts, length), want)
  assert (theirs.model_max_length, theirs.model_input_names) == (length, ["input_ids"])


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "siglip 2 with tokens of its own"])
def test_transformers_reads_what_is_exported(name, tmp_path):
  assert_exported(read(name, 16), tmp_path / name, texts()[::2])


@pytest.mark.parametrize("name", ["siglip, case kept", "siglip 2 in a siglip folder", "as written", "clip"])
def test_transformers_lower_cases_what_is_exported(name, tmp_path):
  """Released SigLIP 2 folders keep the case in transformers, and the models were trained without."""
  tokenizer = dataclasses.replace(read(name, 16), lower_case=True)
  assert tokenizer("A Photo").tolist() == read(name, 16)("a photo").tolist()
  assert_exported(tokenizer, tmp_path / name, texts())


@pytest.mark.parametrize("name", ["siglip", "siglip, case kept", "siglip 2, naflex", "t5"])
def test_transformers_canonicalizes_plain_captions(name, tmp_path):
  tokenizer = read(name, 16).canonicalizing()
  unfit = [*"<>&Σ", *("_" if tokenizer.kind == "spiece.model" else ("\n\n", "▁▁"))]
  plain = [t for t in texts() if not any(u in t for u in unfit) and ftfy.fix_text(t) == t]
  assert len(plain) > 100
  assert_exported(tokenizer, tmp_path / name, plain)


def test_a_token_that_transformers_would_look_for_in_another_spelling():
  for tokenizer in (read("siglip 2 with tokens of its own", 9), read("clip", 9).canonicalizing()):
    with pytest.raises(UsageError, match=r"look for ('Photo'|'<\|startoftext\|>') in another"):
      tokenizer.transformers_content()


# ------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", FOLDERS)
def test_travels_as_json_and_as_pickle(name):
  tokenizer = read(name, 17).canonicalizing() if "t5" in name else read(name, 17)
  values = json.loads(json.dumps(tokenizer.to_dict()))
  for copy in (FileTokenizer.from_dict(values), pickle.loads(pickle.dumps(tokenizer))):
    assert (copy, hash(copy), copy.to_dict()) == (tokenizer, hash(tokenizer), values)
    assert np.array_equal(copy(texts()[::5]), tokenizer(texts()[::5]))
  assert len(pickle.dumps(tokenizer)) < len(tokenizer.content) + 1_000
  assert len(repr(tokenizer)) < 300


@pytest.mark.parametrize("name", ["siglip", "siglip 2, naflex"])
def test_many_threads_parse_once_and_agree(name):
  tokenizer = tokenizer_folders.read(folder_of(name), 16)
  tokenizer_files._parse.cache_clear()
  copies = [tokenizer, *(pickle.loads(pickle.dumps(tokenizer)) for _ in range(3))]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    starts = range(0, len(texts()), 20)
    parts = list(pool.map(lambda i: copies[i % 4](texts()[i : i + 20]), starts))
  assert tokenizer_files._parse.cache_info().misses == 1
  assert np.array_equal(np.concatenate(parts), tokenizer(texts()))


def test_imports_neither_jax_nor_torch_and_sentencepiece_only_for_its_file():
  program = """
import sys
from clip_jax.data import tokenizer_folders
heavy = {"jax", "flax", "torch", "transformers", "sentencepiece"}
for path in sys.argv[1:]:
  tokenizer_folders.read(path, 9)("a cat")
  print(path, *heavy.intersection(sys.modules), sep=",")
"""
  root = pathlib.Path(clip_jax.data.__file__).parents[2]
  command = [sys.executable, "-c", program, folder_of("siglip 2"), folder_of("siglip")]
  run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
  assert run.stdout.splitlines() == [str(command[3]), f"{command[4]},sentencepiece"]


# ------------------------------------------------------------------------- errors


def test_sentencepiece_is_optional(monkeypatch):
  tokenizer = dataclasses.replace(read("siglip", 9), context_length=10)
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  for call in (lambda: tokenizer_folders.read(folder_of("siglip"), 9), lambda: tokenizer("a cat")):
    with pytest.raises(MissingExtraError, match=r"Reading spiece.model .*\[sentencepiece\]"):
      call()
  assert tokenizer_folders.read(folder_of("siglip 2"), 9)("a cat").shape == (1, 9)


@pytest.mark.parametrize("context_length", [1, 0, -64, 64.0, "64", None, True])
def test_context_length_is_checked(context_length):
  for call in (tokenizer_folders.read, lambda _, n: dataclasses.replace(read("siglip 2", 9), context_length=n)):
    with pytest.raises(UsageError, match=r"context_length=.* at least 2"):
      call(folder_of("siglip"), context_length)
  assert tokenizer_folders.read(folder_of("siglip"), np.int64(9)) == read("siglip", 9)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 99, b"{}"])
@pytest.mark.parametrize("kind", ["spiece.model", "tokenizer.json"])
def test_content_that_is_no_tokenizer_is_refused(kind, content):
  with pytest.raises(DataError, match=f"{kind} is not"):
    FileTokenizer(content, kind, 64, 0, 1, False)("a cat")


def test_a_malformed_dict_is_refused():
  values = read("siglip", 9).to_dict()
  for name, wrong in {
    "kind": ["vocab.txt", None],
    "content": ["not base64!", "ünicode", None],
    "context_length": [1, "64"],
    "pad_id": [-1, 1 << 31, "1"],
    "end_id": [1.0, None],
    "lower_case": [1],
    "canonicalize": [None],
    "added_tokens": [None, [["</s>", 1]], [["</s>", "?", True]]],
  }.items():
    for value in wrong:
      with pytest.raises(UsageError, match=name):
        FileTokenizer.from_dict(values | {name: value})
    with pytest.raises(UsageError, match="must be a dict of added_tokens, canonicalize"):
      FileTokenizer.from_dict({key: values[key] for key in values if key != name})
  for other in (values | {"colour": "red"}, [values], None):
    with pytest.raises(UsageError, match="must be a dict of added_tokens, canonicalize"):
      FileTokenizer.from_dict(other)


@pytest.mark.parametrize("role", ["pad_id", "end_id"])
def test_ids_outside_the_vocabulary_are_refused(role):
  for name in ("siglip", "siglip 2"):
    with pytest.raises(DataError, match=r"not both in the vocabulary of \d+"):
      dataclasses.replace(read(name, 9), **{role: 1_000})("a cat")
