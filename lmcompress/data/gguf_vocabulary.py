"""GGUF vocabularies: the tokenizer's part of a file's metadata to a tokenizer of the tokenizers library."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

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
  tokens = {
    role: vocabulary.role(key)
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
  }
  wants_bos = vocabulary.flag("add_bos_token", wants_bos)
  if wants_bos and tokens["bos_token"] is not None:
    _begin(backend, tokens["bos_token"])
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

  def role(self, key: str) -> str | None:
    index = self.index(key)
    return None if index is None else self.tokens[index]

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


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


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


def _begin(backend: tokenizers.Tokenizer, token: str) -> None:
  from tokenizers import processors

  name, index = "BOS", backend.token_to_id(token)
  backend.post_processor = processors.TemplateProcessing(
    single=f"{name} $A", pair=f"{name} $A {name} $B:1", special_tokens=[{"id": name, "ids": [index], "tokens": [token]}]
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
