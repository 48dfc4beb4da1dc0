"""Tokenizers: text to ids and back, from GGUF metadata or a tokenizer.json."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcompress.data import gguf_vocabulary
from lmcompress.data.gguf_vocabulary import library_errors
from lmcompress.types import FormatError

if TYPE_CHECKING:
  import tokenizers

MAX_FILE_NBYTES = 64 << 20
MAX_TEMPLATE_CHARACTERS = 1 << 20

END_OF_TURN = frozenset(
  {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "<｜end▁of▁sentence｜>",
  }
)
"""Special tokens that end a reply, whatever the file calls its end of sequence."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")

TARGET = "target_tokenizer.json"
"""The file of the second tokenizer of a pair."""


class Tokenizer:
  """Text to token ids and back, with what generation and chat need to know of the vocabulary.

  Attributes:
    bos_id: the token that begins a sequence, or None.
    eos_id: the token that ends a sequence, or None.
    stop_ids: tokens at which generation stops: `eos_id` and those that end a turn.
    chat_template: a Jinja template, or None.
    wants_bos: whether the model was trained on sequences that begin with `bos_id`.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    tokens: Mapping[str, str | None] | None = None,
    stop_ids: Iterable[int] = (),
    chat_template: str | None = None,
    wants_bos: bool = False,
  ):
    """Wraps a tokenizer of the tokenizers library; `from_gguf` and `from_folder` are the usual ways to one.

    Args:
      backend: what splits and merges; truncation and padding are switched off.
      tokens: special tokens by role, e.g. `{"bos_token": "<s>"}`.
      stop_ids: further tokens to stop at.
      chat_template: a Jinja template.
      wants_bos: whether sequences begin with the token of role `bos_token`.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    self._plain = backend
    self._special: tokenizers.Tokenizer | None = None
    self._tokens = {
      role: token
      for role, token in (tokens or {}).items()
      if token is not None and backend.token_to_id(token) is not None
    }
    self.bos_id = self._id("bos_token")
    self.eos_id = self._id("eos_token")
    turn_ids = {
      token_id
      for token_id, token in backend.get_added_tokens_decoder().items()
      if token.special and token.content in END_OF_TURN
    }
    self.stop_ids = frozenset({*stop_ids, *turn_ids, *(() if self.eos_id is None else (self.eos_id,))})
    self.chat_template = chat_template
    self.wants_bos = wants_bos and self.bos_id is not None

  @property
  def vocab_size(self) -> int:
    return self._plain.get_vocab_size(with_added_tokens=True)

  @property
  def backend(self) -> tokenizers.Tokenizer:
    """The wrapped tokenizer, set to read special tokens in a text as text."""
    return self._plain

  def encode(
    self, text: str, add_bos: bool = False, *, parse_special: bool = False, add_special: bool = False
  ) -> list[int]:
    """Text to ids.

    Args:
      text: any text.
      add_bos: puts `bos_id` first, unless it is there already.
      parse_special: reads special tokens that the text spells as these tokens; leave it off for text that a
        user wrote.
      add_special: adds what the tokenizer's own template adds, such as BERT's `[CLS]` and `[SEP]`.
    """
    with library_errors("the tokenizer cannot encode the text"):
      ids = self._parser(parse_special).encode(text, add_special_tokens=add_special).ids
    if not add_bos:
      return ids
    if self.bos_id is None:
      raise ValueError("encode(add_bos=True): this tokenizer has no token that begins a sequence; leave it off")
    return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Ids to text; bytes that are no UTF-8 become U+FFFD."""
    with library_errors("the tokenizer cannot decode the ids"):
      return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_special)

  def stream(self, skip_special: bool = True) -> TextStream:
    """A decoder that takes one id at a time and gives text as soon as it is complete."""
    return TextStream(self, skip_special)

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """Messages as the text that the model was trained on; encode it with `parse_special=True`.

    Args:
      messages: dicts with `role` and `content`.
      add_generation_prompt: ends with the start of the assistant's turn.

    Raises:
      FormatError: there is no template, or it fails.
    """
    if self.chat_template is None:
      raise FormatError("the tokenizer has no chat template; give the prompt as plain text, or use an instruct model")
    if len(self.chat_template) > MAX_TEMPLATE_CHARACTERS:
      raise FormatError(
        f"the chat template has {len(self.chat_template)} characters, {MAX_TEMPLATE_CHARACTERS} are allowed"
      )
    try:
      return _template(self.chat_template).render(
        messages=[dict(message) for message in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=self._tokens.get("bos_token", ""),
        eos_token=self._tokens.get("eos_token", ""),
      )
    except Exception as error:
      raise FormatError(f"the chat template fails: {error or type(error).__name__}") from error

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, which transformers and `from_folder` load."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      **self._tokens,
      "add_bos_token": self.wants_bos,
      "clean_up_tokenization_spaces": False,
      "stop_ids": sorted(self.stop_ids),
    }
    if self.chat_template is not None:
      config["chat_template"] = self.chat_template
    (folder / "tokenizer.json").write_text(self._plain.to_str(), encoding="utf-8")
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")

  @classmethod
  def from_gguf(cls, metadata: Mapping[str, Any], source: str = "the GGUF metadata") -> Tokenizer:
    """The tokenizer that a GGUF file describes.

    Args:
      metadata: of `lmcompress.io.gguf.read_header`.
      source: what error messages call the metadata, such as the file's path.

    Raises:
      FormatError: the tokenizer is of another kind, or its parts do not fit together.
    """
    built = gguf_vocabulary.build(metadata, source)
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
      raise FormatError(f"{source}: tokenizer.chat_template is no string; fetch the file again")
    return cls(
      built.backend, tokens=built.tokens, stop_ids=built.stop_ids, chat_template=template, wants_bos=built.wants_bos
    )

  @classmethod
  def from_text(cls, text: str, vocabulary: int) -> Tokenizer:
    """A byte-level BPE learned from a text (Sennrich et al. 2016, arXiv:1508.07909), the same in every run.

    Args:
      text: what it is learned from; any other text can be encoded too.
      vocabulary: entries, the 256 bytes and the token that ends a text counted.

    Raises:
      ValueError: a vocabulary below 257, or one that the text cannot fill.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocabulary < 257:
      raise ValueError(f"from_text(vocabulary={vocabulary}): 256 bytes and the end of a text need 257")
    backend, end = Backend(models.BPE()), "<|endoftext|>"
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.train_from_iterator(
      text.splitlines(keepends=True),
      trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
      ),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    if backend.get_vocab_size() < vocabulary:
      found = f"{len(text)} characters give {backend.get_vocab_size()} entries"
      raise ValueError(f"from_text(vocabulary={vocabulary}): {found}; ask for fewer")
    return cls(backend, tokens={"eos_token": end})

  @classmethod
  def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder, with the stop tokens of its configs.

    Args:
      folder: holds `tokenizer.json`; `tokenizer_config.json`, `generation_config.json`, `config.json` and
        `chat_template.jinja` are read where they are.

    Raises:
      FormatError: a file is missing, too large or damaged.
    """
    from tokenizers import Tokenizer as Backend

    folder = Path(folder)
    path = folder / "tokenizer.json"
    text = _read(path)
    if text is None:
      raise FormatError(
        f"{folder} has no tokenizer.json; save one with transformers: "
        "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
      )
    with library_errors(f"{path} is no tokenizer that the tokenizers library reads"):
      backend = Backend.from_str(text)
    config = _read_json(folder / "tokenizer_config.json")
    tokens = {role: token for role in _ROLES if (token := _spelling(config.get(role))) is not None}
    stop_ids = set(_ids(config.get("stop_ids")))
    for name in ("generation_config.json", "config.json"):
      settings = _read_json(folder / name)
      ends = _ids(settings.get("eos_token_id"))
      stop_ids.update(ends)
      for role, ids in (("eos_token", ends), ("bos_token", _ids(settings.get("bos_token_id")))):
        token = backend.id_to_token(ids[0]) if ids and role not in config else None
        if token is not None:
          tokens.setdefault(role, token)
    template = _read(folder / "chat_template.jinja")
    if template is None:
      template = _default_template(config.get("chat_template"))
    wants_bos = config.get("add_bos_token")
    if wants_bos is None:
      with library_errors(f"{path} cannot encode"):
        first = backend.encode("").ids[:1]
      wants_bos = "bos_token" in tokens and first == [backend.token_to_id(tokens["bos_token"])]
    target = _read(folder / TARGET)
    if target is not None:
      with library_errors(f"{folder / TARGET} is no tokenizer that the tokenizers library reads"):
        return PairTokenizer(backend, cls(Backend.from_str(target), stop_ids=stop_ids))
    return cls(backend, tokens=tokens, stop_ids=stop_ids, chat_template=template, wants_bos=bool(wants_bos))

  def _id(self, role: str) -> int | None:
    token = self._tokens.get(role)
    return None if token is None else self._plain.token_to_id(token)

  def _parser(self, parse_special: bool) -> tokenizers.Tokenizer:
    if not parse_special:
      return self._plain
    # A copy, because switching the one tokenizer back and forth would race with other threads.
    if self._special is None:
      special = copy.deepcopy(self._plain)
      special.encode_special_tokens = False
      self._special = special
    return self._special


class PairTokenizer(Tokenizer):
  """Two vocabularies: what is read is encoded by one, what is written is decoded by the other.

  Attributes:
    target: the tokenizer of what is written; its `stop_ids` are those of the pair.
  """

  def __init__(self, backend: tokenizers.Tokenizer, target: Tokenizer):
    super().__init__(backend)
    self.target, self.stop_ids = target, target.stop_ids

  @classmethod
  def of_words(cls, source: Sequence[str], target: Sequence[str]) -> PairTokenizer:
    """Letters, ended by `</s>`, to words with blanks between them; each vocabulary has an `<unk>` and a `</s>`."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    reads, writes = (
      Backend(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))  # pyright: ignore[reportCallIssue]
      for words in (source, target)
    )
    reads.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
      [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    reads.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    reads.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
      single="$A </s>", special_tokens=[("</s>", list(source).index("</s>"))]
    )
    writes.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return cls(reads, Tokenizer(writes, stop_ids=[list(target).index("</s>")]))

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Ids of what was written, to text."""
    return self.target.decode(ids, skip_special)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes what `Tokenizer.save` does, and the tokenizer of what is written as `target_tokenizer.json`."""
    super().save(folder)
    (Path(folder) / TARGET).write_text(self.target.backend.to_str(), encoding="utf-8")


class TextStream:
  """Gives the text of a sequence piece by piece, never a part of a character.

  The window of ids that is decoded reaches back to the piece given before, since a token's text may depend on
  the one to its left (a leading space, a character's first bytes).
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
    self._tokenizer = tokenizer
    self._skip_special = skip_special
    self._window: list[int] = []
    self._given = 0

  def push(self, token_id: int) -> str:
    """The text that this id completes, or an empty string."""
    self._window.append(int(token_id))
    return self._take(final=False)

  def flush(self) -> str:
    """What is left at the end; an unfinished character becomes U+FFFD."""
    text = self._take(final=True)
    self._window, self._given = [], 0
    return text

  def _take(self, final: bool) -> str:
    before = self._tokenizer.decode(self._window[: self._given], self._skip_special)
    text = self._tokenizer.decode(self._window, self._skip_special)
    if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
      return ""
    self._window, self._given = self._window[self._given :], len(self._window) - self._given
    return text[len(before) :]


def _read(path: Path) -> str | None:
  """A small text file, or None where there is none."""
  try:
    size = path.stat().st_size
    if size > MAX_FILE_NBYTES:
      raise FormatError(f"{path} is refused: it has {size} bytes, {MAX_FILE_NBYTES} are allowed")
    return path.read_text(encoding="utf-8")
  except FileNotFoundError:
    return None
  except UnicodeDecodeError:
    raise FormatError(f"{path} is not UTF-8; fetch it again") from None
  except OSError as error:
    raise FormatError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_json(path: Path) -> dict[str, Any]:
  text = _read(path)
  if text is None:
    return {}
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise FormatError(f"{path} is no JSON ({error}); fetch it again") from None
  if not isinstance(value, dict):
    raise FormatError(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
  return value


def _spelling(token: Any) -> str | None:
  """A special token as configs write it: a string, or an object with its `content`."""
  token = token.get("content") if isinstance(token, dict) else token
  return token if isinstance(token, str) else None


def _ids(value: Any) -> list[int]:
  values = value if isinstance(value, list) else [value]
  return [value for value in values if type(value) is int and value >= 0]


def _default_template(value: Any) -> str | None:
  """A chat template as configs write it: a string, or a list of named ones."""
  if isinstance(value, list):
    named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    value = named.get("default")
  return value if isinstance(value, str) else None


def _template(text: str) -> Any:
  import datetime

  from jinja2.exceptions import TemplateError
  from jinja2.sandbox import ImmutableSandboxedEnvironment

  def raise_exception(message: str) -> None:
    raise TemplateError(message)

  def to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)

  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
  )
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
  return environment.from_string(text)
