"""Reads the tokenizer of a Hugging Face model folder.

The rule is that of `transformers` 5: for one folder and one text, `read(folder, n)(text)` gives the
ids of `AutoTokenizer.from_pretrained(folder)(text, padding="max_length", truncation=True,
max_length=n)`. tests/data/test_tokenizer_folders.py holds it to that. A folder that could only be
read otherwise is refused.
"""

import json
import pathlib
from typing import Any, NamedTuple

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from clip_jax.data import tokenizer_files
from clip_jax.data.tokenizer_files import JSON, SPACE, SPIECE, FileTokenizer
from clip_jax.errors import DataError, UsageError

AS_WRITTEN = "PreTrainedTokenizer"  # transformers' class for a tokenizer.json with no class
GEMMA_TOKENS = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad", "mask")}
# The tokenizer classes that are known here, with the special tokens each has by default.
CLASSES = {
  "SiglipTokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
  "Siglip2Tokenizer": GEMMA_TOKENS,
  "GemmaTokenizer": GEMMA_TOKENS,
  "CLIPTokenizer": {"bos_token": "<|startoftext|>"}
  | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
  # The one class that is not read as in transformers 5, which builds anew what takes text apart.
  # open_clip's SigLIP was released with version 4, where the file counts as it is written. The two
  # differ after U+0085 and after special tokens spelled out, and open_clip cleans away both.
  "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
  AS_WRITTEN: {},
  "TokenizersBackend": {},
}
# They take vocabulary, merges and post-processor from a tokenizer.json and build the rest anew.
REBUILT = ("Siglip2Tokenizer", "GemmaTokenizer", "CLIPTokenizer")
OF_MODEL = {"siglip": "SiglipTokenizer", "siglip2": "Siglip2Tokenizer", "clip": "CLIPTokenizer"}
# In this order tokens that are in no vocabulary would get their ids.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read(path, context_length: int) -> FileTokenizer:
  """Reads the tokenizer of a Hugging Face model folder.

  Which file is read, and how, is what `transformers` 5 would do. The class of the tokenizer is:

  - `Siglip2Tokenizer` if config.json says `model_type` "siglip2", whatever else is said;
  - else the `tokenizer_class` of tokenizer_config.json (or of config.json), without "Fast";
  - else that of the `model_type`: `SiglipTokenizer` for "siglip", `CLIPTokenizer` for "clip";
  - else, where nothing is said, `SiglipTokenizer` if there is a `spiece.model`, and if not, the
    `tokenizer.json` as it stands.

  `SiglipTokenizer` reads `spiece.model`, and all others read `tokenizer.json`. So in a folder that
  holds both files, the class decides. Only `SiglipTokenizer` and `Siglip2Tokenizer` lower-case: a
  SigLIP 2 folder with `model_type` "siglip" and `GemmaTokenizer` gives upper case other ids than
  lower case, in `transformers` too, though the model was trained on lower case;
  `dataclasses.replace(tokenizer, lower_case=True)` is then what it was trained with.

  Args:
    path: a folder with a `spiece.model` or a `tokenizer.json`, or one of these files. Settings
      come from the `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
      `config.json` beside it, where there are any.
    context_length: tokens a row, at least 2.

  Returns:
    The tokenizer; it needs no file any more.

  Raises:
    DataError: no such file, neither file in the folder, or a file is not what its name says.
    UsageError: the context length is too small, or the folder asks for something that would be
      read otherwise here than in `transformers`.
    MissingExtraError: `spiece.model` needs `sentencepiece`, which is not installed.
  """
  tokenizer_files.check_length(context_length)
  path = pathlib.Path(path)
  if not path.exists():
    raise DataError(f"{path} does not exist; a {SPIECE}, a {JSON} or a folder with one is needed.")
  folder = path if path.is_dir() else path.parent
  files = [path.name] if path != folder else [f for f in (SPIECE, JSON) if (folder / f).is_file()]
  if not files:
    raise DataError(f"{folder} holds neither a {SPIECE} nor a {JSON}.")
  if not {SPIECE, JSON}.issuperset(files):
    raise UsageError(f"{path} is neither a {SPIECE}, nor a {JSON}, nor a folder with one.")
  config = _json(folder / "tokenizer_config.json") or {}
  name = _class_name(folder, config) or ("SiglipTokenizer" if files[0] == SPIECE else AS_WRITTEN)
  kind = SPIECE if name == "SiglipTokenizer" else JSON
  if kind not in files:
    raise UsageError(f"{path} is for {name}, which reads a {kind}; there is only {files[0]}.")
  _refuse_unsupported(folder / "tokenizer_config.json", config, kind)
  content = _bytes(folder / kind)
  if kind == SPIECE:
    return _read_spiece(folder / kind, content, config, int(context_length))
  return _read_json(folder / kind, content, config, name, int(context_length))


def _bytes(path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json(path) -> dict[str, Any] | None:
  """The object in a JSON file, or None if there is no such file."""
  if not path.is_file():
    return None
  try:
    values = json.loads(_bytes(path).decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise DataError(f"{path} is not JSON; it may be cut off: {error}.") from error
  if not isinstance(values, dict):
    raise DataError(f"{path} must hold a JSON object, not {type(values).__name__}.")
  return values


# ------------------------------------------------------------------------- what the settings say


def _class_name(folder, config) -> str | None:
  """Which tokenizer class a folder is for, None if nothing is said (see `read`)."""
  model = _json(folder / "config.json") or {}
  if model.get("model_type") == "siglip2":
    # The released folders say GemmaTokenizer, which does not lower-case; transformers overrules it.
    return "Siglip2Tokenizer"
  declared = config.get("tokenizer_class") or model.get("tokenizer_class")
  if declared is None:
    return OF_MODEL.get(str(model.get("model_type")))
  name = str(declared).removesuffix("Fast")
  if name not in CLASSES:
    raise UsageError(
      f"{folder} is for the tokenizer class {declared}, which is not known here and may read text "
      f"in a way of its own; known are {', '.join(CLASSES)}."
    )
  return name


def _refuse_unsupported(path, config, kind):
  """Settings that change ids and are not followed here."""
  own_code = config.get("auto_map") or {}
  if isinstance(own_code, list) or "AutoTokenizer" in own_code:
    raise UsageError(f"{path} names a tokenizer with code of its own (auto_map), which is not run.")
  supported = {
    "split_special_tokens": [False],
    "fast_tokenizer_files": [None],
    "padding_side": ["left", "right"],
    "truncation_side": ["left", "right"],
  }
  if kind == SPIECE:
    supported |= dict.fromkeys(("padding_side", "truncation_side"), ["right"])
    supported |= {"sp_model_kwargs": [{}], "legacy": [True]}
  for key, values in supported.items():
    if key in config and config[key] not in values:
      raise UsageError(f"{path} sets {key} to {config[key]!r}, unsupported for a {kind}.")


class _Tokens(NamedTuple):
  """The tokens that a folder's settings add to its vocabulary, or mark in it."""

  added: dict[int, AddedToken]  # by id
  named: dict[str, AddedToken]  # by role ("pad_token"), in the order of `NAMED`
  extra: list[AddedToken]  # special tokens without a role


def _tokens(folder, config, name, defaults) -> _Tokens:
  """Collects tokens from all the places where generations of transformers have written them."""
  try:
    values = defaults | CLASSES[name] | config
    # The old name of the same thing.
    extra = values.get("extra_special_tokens") or values.get("additional_special_tokens") or []
    if isinstance(extra, dict):  # with roles that only this model has
      values |= extra
      extra = []
    told = "added_tokens_decoder" in config  # the latest place, which makes the older ones void
    special_map = {} if told else _json(folder / "special_tokens_map.json") or {}
    for key, token in special_map.items():
      if not key.endswith("special_tokens"):
        values[key] = _token(token, special=True) if isinstance(token, dict) else token
      elif isinstance(token, dict):
        values |= token
      else:
        extra = [*extra, *(text for text in token or [] if text not in extra)]
    if name == "T5Tokenizer" and not any("<extra_id_" in str(token) for token in extra):
      extra = [*extra, *(f"<extra_id_{i}>" for i in range(config.get("extra_ids", 100)))]
    roles = [*NAMED, *(r for r in values if r.endswith("_token") and r not in NAMED)]
    named = {
      r: _token(values[r]) for r in roles if isinstance(values.get(r), str | dict | AddedToken)
    }
    extra = [_token(token) for token in extra]
    if told:
      added = {int(i): _token(token) for i, token in config["added_tokens_decoder"].items()}
    else:
      special = {named[r].content for r in NAMED if r in named} | {t.content for t in extra}
      added = {
        i: AddedToken(text, normalized=text not in special, special=text in special)
        for text, i in (_json(folder / "added_tokens.json") or {}).items()
      }
      for token in (_json(folder / JSON) or {}).get("added_tokens", []):
        added[token["id"]] = _token({key: token[key] for key in token if key != "id"})
    if not all(i in tokenizer_files.ID for i in added):
      raise ValueError(f"not all ids are numbers: {list(added)!r:.80}")
    return _Tokens(added, named, extra)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    if isinstance(error, UsageError):
      raise
    raise DataError(f"{folder}: the settings list a token that is malformed ({error}).") from error


def _token(token, **settings) -> AddedToken:
  """A token from its JSON: a text, which is then special, or all its settings."""
  if isinstance(token, AddedToken):
    return token
  if isinstance(token, str):
    return AddedToken(token, special=True)
  if not isinstance(token["content"], str):
    raise TypeError(f"its content is {token['content']!r}")
  return AddedToken(**{key: token[key] for key in token if key != "__type"} | settings)


def _require(path, tokens, roles):
  for role in NAMED:
    if role in roles and role not in tokens.named:
      raise UsageError(f"{path} comes without a {role}; tokenizer_config.json should name one.")


# ------------------------------------------------------------------------- spiece.model


def _read_spiece(path, content, config, context_length) -> FileTokenizer:
  if not _is_whole(content):
    raise DataError(f"{path} is not a SentencePiece model; it may be cut off.")
  model = tokenizer_files.sentencepiece_model(content, path)
  vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
  tokens = _tokens(path.parent, config, "SiglipTokenizer", {})
  _require(path, tokens, CLASSES["SiglipTokenizer"])
  special = {token.content for token in (*tokens.named.values(), *tokens.extra)}
  added = {token.content: i for i, token in tokens.added.items()}
  for text in sorted(special - added.keys()):
    if text not in vocabulary:
      raise UsageError(f"{path.parent} has the special token {text!r}, which {path.name} has not.")
    added[text] = vocabulary[text]
  for text, i in added.items():
    if vocabulary.get(text, i) != i or (text not in vocabulary and i < len(vocabulary)):
      raise UsageError(f"{path.parent} gives the token {text!r} another id, {i}, than {path.name}.")
  if alone := [token.content for token in tokens.added.values() if token.single_word]:
    raise UsageError(f"{path.parent} has the token {alone[0]!r} for whole words only: unsupported.")
  pad, end, unknown = (tokens.named[f"{role}_token"].content for role in ("pad", "eos", "unk"))
  if unknown != (theirs := model.id_to_piece(model.unk_id())):
    raise UsageError(f"{path.parent} has unk_token {unknown!r}, where {path.name} has {theirs!r}.")
  return FileTokenizer(
    content=content,
    kind=SPIECE,
    context_length=context_length,
    pad_id=added[pad],
    end_id=added[end],
    lower_case=bool(config.get("do_lower_case", True)),
    added_tokens=tuple((text, i, text in special) for text, i in sorted(added.items()) if text),
  )


def _is_whole(content: bytes) -> bool:
  """Whether a SentencePiece model has all its parts.

  A model is a list of pieces, then the trainer's settings, then the normaliser's (a protocol
  buffer: field number and size before each). Cut off between two of them it would load, with fewer
  pieces and no normaliser, and give other ids.
  """

  def number(at):
    value = shift = 0
    while True:
      byte = content[at]
      value |= (byte & 0x7F) << shift
      at, shift = at + 1, shift + 7
      if byte < 0x80 or shift > 63:
        return value, at

  at, fields = 0, set()
  try:
    while at < len(content):
      tag, at = number(at)
      size, at = number(at)
      at += size
      fields.add(tag)
  except IndexError:
    return False
  whole = {1 << 3 | 2, 2 << 3 | 2, 3 << 3 | 2}  # fields 1 to 3; 2 is for "comes with its size"
  return at == len(content) and fields >= whole


# ------------------------------------------------------------------------- tokenizer.json


def _read_json(path, content, config, name, context_length) -> FileTokenizer:
  written = tokenizer_files.rust_tokenizer(content, path)
  padding, truncation = written.padding or {}, written.truncation or {}
  written.no_padding()
  written.no_truncation()
  as_written = written.to_str()

  default = {"pad_token": padding["pad_token"]} if padding else {}
  tokens = _tokens(path.parent, config, name, default)
  optional = {"bos_token", "mask_token"} if CLASSES[name] is GEMMA_TOKENS else set()
  _require(path, tokens, {"pad_token", *CLASSES[name]} - optional)
  try:
    made = _rebuilt(name, json.loads(content), written, tokens) if name in REBUILT else written
    _add(made, tokens)
    if name == "CLIPTokenizer":
      ends = [tokens.named[role].content for role in ("eos_token", "bos_token")]
      ends = [(text, made.token_to_id(text)) for text in ends]
      options = dict(trim_offsets=False, add_prefix_space=False)  # as in the class
      made.post_processor = processors.RobertaProcessing(*ends, **options)
  except Exception as error:  # the library raises nothing more special
    reason = str(error).partition("\n")[0].rstrip(".")
    raise DataError(f"{path} is not what {name} reads: {reason}.") from error
  end_id = _end_id(path, made, context_length)

  pad = tokens.named["pad_token"].content
  pad_id = made.token_to_id(pad)
  # Gemma's classes pad on the left unless file or settings say otherwise.
  usual = "left" if CLASSES[name] is GEMMA_TOKENS else "right"
  side = config.get("padding_side") or padding.get("direction") or usual
  cut = config.get("truncation_side") or truncation.get("direction") or "right"
  sides = (padding.get("direction", "right"), truncation.get("direction", "right"))
  if (side, cut) != sides or made.to_str() != as_written:
    made.enable_padding(direction=side, pad_id=pad_id, pad_token=pad, length=context_length)
    made.enable_truncation(context_length, direction=cut)
    content = made.to_str().encode()
  return FileTokenizer(
    content=content,
    kind=JSON,
    context_length=context_length,
    pad_id=pad_id,
    end_id=end_id,
    # Not written into `content`: the class begins to lower-case after it has added its tokens. So
    # an added "Photo" that goes by normalised text is looked for in this case, and never found.
    lower_case=name == "Siglip2Tokenizer",
  )


def _rebuilt(name, file, written, tokens) -> Tokenizer:
  """What a class makes of vocabulary, merges and post-processor, with the rest its own."""
  if (kind := type(written.model).__name__) != "BPE":
    raise ValueError(f"its model is a {kind}, not a BPE")
  if name == "CLIPTokenizer":
    settings = dict(continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False)
    special = r"<\|startoftext\|>|<\|endoftext\|>"
    words = special + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
  else:
    settings = dict(fuse_unk=True, byte_fallback=True)
    normalizer = normalizers.Replace(" ", SPACE)
    pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
  vocabulary, merges = file["model"]["vocab"], file["model"]["merges"]
  merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
  unknown = tokens.named["unk_token"].content
  made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, **settings))
  made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
  made.post_processor = written.post_processor
  made.decoder = written.decoder  # no id depends on it
  return made


def _add(made, tokens):
  """Adds tokens as the base class of all does it."""
  named = {token.content for token in tokens.named.values()}
  added = [token for _, token in sorted(tokens.added.items())]
  known = {token.content for token in (*made.get_added_tokens_decoder().values(), *added)}
  added += [t for t in (*tokens.named.values(), *tokens.extra) if t.content not in known]
  for token in added:
    token.special |= token.content in named
  made.add_tokens(added)


def _end_id(path, made, context_length) -> int:
  """The token that the post-processor puts last."""
  unknown = getattr(made.model, "unk_token", None)
  if unknown is not None and made.model.token_to_id(unknown) is None:
    raise DataError(f"{path} has no {unknown!r} in its vocabulary, its token for unknown text.")
  specials = made.num_special_tokens_to_add(False)
  if specials > context_length:
    raise UsageError(f"{path} adds {specials} tokens to a text: too many for {context_length=}.")
  example = made.encode("a")
  if example.special_tokens_mask[-1:] != [1]:
    raise UsageError(
      f"{path} has no post-processor that puts an end token after a text, as SigLIP and CLIP "
      "models need; add_eos_token in tokenizer_config.json has no effect beside it."
    )
  return example.ids[-1]
