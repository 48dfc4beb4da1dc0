"""GGUF vocabularies: the tokenizer's part of a file's metadata to a tokenizer of the tokenizers library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmcompress.types import FormatError

if TYPE_CHECKING:
  import tokenizers

MAX_TOKEN_CHARACTERS = 1 << 10

# The pre-tokenizers of llama.cpp's src/llama-vocab.cpp: each pattern cuts the pieces that others left.
_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
  r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.format(digits="{1,3}")
_QWEN2 = _WORDS.format(digits="")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
  rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
  r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_PATTERNS = {
  "default": _DEFAULT,
  "falcon": _FALCON,
  "tekken": (_TEKKEN,),
  **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "roberta-bpe"), (_GPT2,)),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (_DIGIT, _GPT2)),
  **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), (_LLAMA3,)),
  **dict.fromkeys(("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen"), (_QWEN2,)),
}
# A word that is itself a token needs no merges, and sequences begin with a token unless told otherwise.
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_NORMAL = 1
_SPACE = "▁"


class Built(NamedTuple):
  """What metadata describes.

  Attributes:
    backend: the tokenizer, its special tokens added.
    tokens: spelling by role (`bos_token`, ...); None where the vocabulary has none.
    stop_ids: tokens that end a turn, beside the end of sequence.
    wants_bos: whether sequences begin with the BOS token.
  """

  backend: tokenizers.Tokenizer
  tokens: dict[str, str | None]
  stop_ids: list[int]
  wants_bos: bool


def build(metadata: Mapping[str, Any], source: str) -> Built:
  """Builds the tokenizer; `source` is what errors call the metadata.

  Raises:
    FormatError: the tokenizer is of another kind, or its parts do not fit together.
  """
  model = metadata.get("tokenizer.ggml.model")
  if not isinstance(model, str) or model not in _BUILDERS:
    raise FormatError(
      f"{source}: tokenizer.ggml.model is {str(model)[:80]!r}; supported are "
      f"{', '.join(_BUILDERS)}. Export the model with a tokenizer.json instead"
    )
  vocabulary = _Vocabulary(metadata, source)
  with library_errors(f"{source}: the tokenizer cannot be built"):
    backend, wants_bos = _BUILDERS[model](vocabulary)
    _add_tokens(backend, vocabulary)
  tokens = {role: vocabulary.role(*keys) for role, keys in _ROLES[model].items()}
  if model == "bert":  # llama.cpp asks no flag; files may lack the ids, whose tokens all vocabularies spell alike
    for role, spelled in _SPELLED.items():
      tokens[role] = tokens[role] or (spelled if spelled in vocabulary.tokens else None)
    _frame(backend, tokens["cls_token"], tokens["sep_token"])
    return Built(backend, tokens, [], False)
  wants_bos = vocabulary.flag("add_bos_token", wants_bos)
  wants_eos = vocabulary.flag("add_eos_token", model == "t5")
  twice = vocabulary.flag("add_sep_token", False)
  _frame(backend, tokens["bos_token"] if wants_bos else None, tokens["eos_token"] if wants_eos else None, twice)
  stop_ids = [index for index in (vocabulary.index("eot"), vocabulary.index("eom")) if index is not None]
  return Built(backend, tokens, stop_ids, wants_bos)


class _Vocabulary:
  """The tokenizer's part of GGUF metadata, checked."""

  def __init__(self, metadata: Mapping[str, Any], source: str):
    self.metadata = metadata
    self.source = source
    # llama.cpp's spelling of tokens that have none.
    self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.strings("tokens"))]
    self.ids = {token: i for i, token in enumerate(self.tokens)}
    if len(self.ids) != len(self.tokens):
      raise self.fail(f"tokenizer.ggml.tokens has {len(self.tokens)} entries, {len(self.ids)} distinct ones")
    longest = max(map(len, self.tokens), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
      raise self.fail(f"a token has {longest} characters, {MAX_TOKEN_CHARACTERS} are allowed")
    self.types = self.numbers("token_type", default=_NORMAL)

  def fail(self, what: str) -> FormatError:
    return FormatError(f"{self.source}: {what}; fetch the file again, or export the model with a tokenizer.json")

  def strings(self, key: str) -> list[str]:
    values = self.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
      raise self.fail(f"tokenizer.ggml.{key} is missing or no list of strings")
    return values

  def numbers(self, key: str, default: float) -> list:
    values = self.metadata.get(f"tokenizer.ggml.{key}")
    if values is None:
      return [default] * len(self.tokens)
    values = values.tolist() if hasattr(values, "tolist") else values
    if (
      not isinstance(values, list)
      or len(values) != len(self.tokens)
      or not all(isinstance(value, int | float) for value in values)
    ):
      raise self.fail(f"tokenizer.ggml.{key} is no list of {len(self.tokens)} numbers, one for each token")
    return values

  def index(self, key: str) -> int | None:
    value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if value is None:
      return None
    if type(value) is not int or not 0 <= value < len(self.tokens):
      raise self.fail(
        f"tokenizer.ggml.{key}_token_id is {str(value)[:80]}, the vocabulary has {len(self.tokens)} tokens"
      )
    return value

  def role(self, *keys: str) -> str | None:
    """The spelling of the first of some keys that the metadata has."""
    found = (index for index in map(self.index, keys) if index is not None)
    return next((self.tokens[index] for index in found), None)

  def flag(self, key: str, default: bool) -> bool:
    value = self.metadata.get(f"tokenizer.ggml.{key}")
    return value if isinstance(value, bool) else default

  def merges(self) -> list[tuple[str, str]]:
    pairs = []
    for merge in self.strings("merges"):
      # The first character may itself be a space in a vocabulary that is not byte-level.
      cut = merge.find(" ", 1)
      if cut < 0:
        raise self.fail(f"merge {merge[:40]!r} is no pair of tokens")
      pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
  """Byte-level BPE, as of GPT-2."""
  from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

  name = vocabulary.metadata.get("tokenizer.ggml.pre", "default")
  if not isinstance(name, str) or name not in _PATTERNS:
    raise FormatError(
      f"{vocabulary.source}: tokenizer.ggml.pre is {str(name)[:80]!r}; supported are "
      f"{', '.join(sorted(_PATTERNS))}. Export the model with a tokenizer.json instead"
    )
  patterns = _PATTERNS[name]
  own = patterns[-1] == _GPT2  # ByteLevel cuts by this pattern itself
  splits = [
    pre_tokenizers.Digits(individual_digits=True)
    if pattern == _DIGIT
    else pre_tokenizers.Split(Regex(pattern), "isolated")
    for pattern in (patterns[:-1] if own else patterns)
  ]
  backend = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges(), ignore_merges=name in _WHOLE_WORDS))
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own)]
  )
  backend.decoder = decoders.ByteLevel()
  return backend, name in _WHOLE_WORDS


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
  """BPE over characters with scores, bytes for what the vocabulary lacks, as of Llama 2."""
  from tokenizers import Tokenizer, decoders, models, normalizers

  unknown = [vocabulary.tokens[i] for i, kind in enumerate(vocabulary.types) if kind == _UNKNOWN]
  backend = Tokenizer(
    models.BPE(
      vocab=vocabulary.ids,
      merges=_merges_by_score(vocabulary),
      byte_fallback=True,
      fuse_unk=True,
      unk_token=unknown[0] if unknown else vocabulary.role("unknown"),
    )
  )
  prefix = vocabulary.flag("add_space_prefix", True)
  backend.normalizer = normalizers.Sequence(
    [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
  )
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *([decoders.Strip(" ", 1, 0)] if prefix else []),
    ]
  )
  return backend, True


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
  """Every cut of a token into two tokens, the best score of the whole first, as SentencePiece merges."""
  scores = vocabulary.numbers("scores", default=0.0)
  ids = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == _NORMAL}
  ranked = []
  for token, i in ids.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in ids and right in ids:
        ranked.append((-scores[i], -len(left), i, left, right))
  ranked.sort()
  return [(left, right) for *_, left, right in ranked]


def _word_pieces(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
  """WordPiece, as of BERT; a piece that begins a word is spelled with a space, one that goes on without."""
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

  def spelled(token: str, kind: int) -> str:
    if kind != _CONTROL and token.startswith(_SPACE):
      return token.removeprefix(_SPACE)
    return token if kind != _NORMAL or (token.startswith("[") and token.endswith("]")) else f"##{token}"

  vocabulary.tokens = [spelled(*pair) for pair in zip(vocabulary.tokens, vocabulary.types, strict=True)]
  ids = {token: i for i, token in enumerate(vocabulary.tokens)}
  if len(ids) != len(vocabulary.tokens):
    raise vocabulary.fail(f"of {len(vocabulary.tokens)} pieces of words {len(vocabulary.tokens) - len(ids)} are alike")
  unknown = vocabulary.role("unknown") or "[UNK]"
  if unknown not in ids:
    raise vocabulary.fail(f"the vocabulary has no token {unknown!r} for what it does not know")
  backend = Tokenizer(models.WordPiece(vocab=ids, unk_token=unknown))
  words = (token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == _NORMAL)
  cased = any(word != word.lower() for word in words if not word.startswith("["))
  backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece()
  return backend, True


def _unigram(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
  """The likeliest cut into pieces by their scores (Kudo 2018, arXiv:1804.10959), as of T5."""
  from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

  scores = vocabulary.numbers("scores", default=0.0)
  pieces, unknown = list(zip(vocabulary.tokens, scores, strict=True)), vocabulary.index("unknown")
  backend = Tokenizer(models.Unigram(pieces, 2 if unknown is None else unknown))
  table, steps = vocabulary.metadata.get("tokenizer.ggml.precompiled_charsmap"), []
  if table is not None and len(table):
    steps.append(normalizers.Precompiled((np.asarray(table, np.int64) & 255).astype(np.uint8).tobytes()))
  prefix = "always" if vocabulary.flag("add_space_prefix", True) else "never"
  if vocabulary.flag("remove_extra_whitespaces", True):
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
  backend.normalizer = normalizers.Sequence(steps)
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
  backend.decoder = decoders.Metaspace(prepend_scheme=prefix)
  return backend, False


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece, "bert": _word_pieces, "t5": _unigram}
_COMMON = {"unk_token": ("unknown",), "pad_token": ("padding",)}
_TEXTS = {"bos_token": ("bos",), "eos_token": ("eos",), **_COMMON}
_ROLES = {
  "gpt2": _TEXTS,
  "llama": _TEXTS,
  "t5": _TEXTS,
  "bert": {
    "cls_token": ("cls", "bos"),
    "sep_token": ("seperator", "separator", "eos"),  # the first is how files spell it
    "mask_token": ("mask",),
    **_COMMON,
  },
}
"""Special tokens by role, and the keys of metadata that may name each, by the tokenizer's model."""
_SPELLED = {
  "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]", "pad_token": "[PAD]",
}  # fmt: skip


def _add_tokens(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
  from tokenizers import AddedToken

  special, plain = [], []
  for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
    if kind in (_CONTROL, _UNKNOWN):
      special.append(AddedToken(token, normalized=False, special=True))
    elif kind == _USER_DEFINED:
      plain.append(AddedToken(token, normalized=False, special=False))
  backend.add_special_tokens(special)
  backend.add_tokens(plain)


def _frame(backend: tokenizers.Tokenizer, first: str | None, last: str | None, twice: bool = False) -> None:
  """What begins and ends a model's own rows; between two parts the last stands too, once or `twice`."""
  from tokenizers import processors

  named = {name: token for name, token in (("FIRST", first), ("LAST", last)) if token is not None}
  if not named:
    return
  begin, end = "FIRST " if first else "", " LAST" if last else ""
  second = f"{end.strip()} $B:1{end}:1" if end and twice else f"$B:1{end}:1" if end else f"{begin}$B:1"
  special = [{"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]} for name, token in named.items()]
  backend.post_processor = processors.TemplateProcessing(
    single=f"{begin}$A{end}", pair=f"{begin}$A{end} {second}", special_tokens=special
  )


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
  """Turns what the tokenizers library raises, bare exceptions and panics, into `FormatError`."""
  try:
    yield
  except FormatError:
    raise
  except Exception as error:
    raise FormatError(f"{what}: {error}") from error
  except BaseException as error:
    if type(error).__name__ != "PanicException":
      raise
    raise FormatError(f"{what}: {error}") from error
