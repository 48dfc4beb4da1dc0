"""A conversation with a model: what was said, what still fits its context, and commands that begin with a slash."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from lmcompress.generation.generate import generate
from lmcompress.generation.prefix import PrefixCache
from lmcompress.knowledge import Knowledge, Passage
from lmcompress.types import ConfigError, Params

COMMANDS = {
  "help": "this list",
  "reset": "forget what was said",
  "undo": "forget the last question and its answer",
  "system TEXT": "what the model is told before everything; without a text, nothing",
  "set NAME VALUE": "temperature, top_p, max_new_tokens or passages",
  "sources": "the passages that the last answer rests on",
  "history": "what was said",
  "save FILE": "write what was said as JSON",
  "exit": "leave; so does the end of the input",
}
GROUNDED = (
  "Answer the question from these passages alone and cite them by their numbers, such as [1]. "
  "If they do not hold the answer, say so."
)


@dataclasses.dataclass
class Settings:
  """How answers are drawn; as of `generate`."""

  temperature: float = 0.7
  top_p: float = 0.9
  max_new_tokens: int = 256
  passages: int = 3

  def change(self, name: str, value: str) -> None:
    """Sets one by its name.

    Raises:
      ConfigError: there is no such setting, or the value is out of range.
    """
    kinds: dict[str, Callable[[str], float]] = {f.name: type(f.default) for f in dataclasses.fields(self)}  # type: ignore[misc]
    lows = {"temperature": 0.0, "top_p": 1e-6, "max_new_tokens": 1, "passages": 1}
    try:
      found = kinds[name](value)
      if not lows[name] <= found <= {"top_p": 1.0, "passages": 20}.get(name, 1e6):
        raise ValueError
    except (KeyError, ValueError):
      raise ConfigError(f"/set {name} {value}: temperature (0 and more), top_p (to 1), max_new_tokens or passages "
                        "(1 and more)") from None  # fmt: skip
    setattr(self, name, found)


class Conversation:
  """What was said, and the model that answers.

  Attributes:
    messages: of user and assistant by turns, as chat templates take them.
    sources: the passages that the last answer rests on, with their cosines.
  """

  def __init__(
    self,
    model: Any,
    params: Params,
    tokenizer: Any,
    settings: Settings | None = None,
    system: str = "",
    knowledge: Knowledge | None = None,
    seed: int = 0,
  ):
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self.settings, self.system, self.knowledge = settings or Settings(), system, knowledge
    self.messages: list[dict[str, str]] = []
    self.sources: list[tuple[Passage, float]] = []
    self._key = jax.random.key(seed)
    self._prefixes = PrefixCache(256 << 20)

  def prompt(self, question: str) -> tuple[list[dict[str, str]], int]:
    """The messages that the model reads, and how many earlier turns had to be left out to fit its context.

    Raises:
      ConfigError: the question alone is too long.
    """
    told = self.system
    if self.sources:
      passages = "\n".join(f"[{n}] {passage.text}" for n, (passage, _) in enumerate(self.sources, 1))
      told = f"{told}\n\n{GROUNDED}\n\n{passages}".strip()
    first = [{"role": "system", "content": told}] if told else []
    room = self.model.config.max_length - self.settings.max_new_tokens
    for left_out in range(0, len(self.messages) + 1, 2):
      messages = [*first, *self.messages[left_out:], {"role": "user", "content": question}]
      if len(self.tokenizer.encode(self.tokenizer.chat(messages), parse_special=True)) <= room:
        return messages, left_out // 2
    raise ConfigError(
      f"the question and what goes before it do not fit {room} tokens; shorten it, or /set max_new_tokens or passages"
    )

  def ask(self, question: str, on_text: Callable[[str], None] = lambda text: None) -> tuple[str, int]:
    """The model's answer, which joins the conversation, and how many earlier turns it did not see.

    Args:
      on_text: called with each piece as it comes. If it raises (or the user interrupts) nothing joins.
    """
    self.sources = self.knowledge.search(question, self.settings.passages) if self.knowledge else []
    messages, left_out = self.prompt(question)
    self._key, key = jax.random.split(self._key)
    s = self.settings
    answer = generate(
      self.model, self.params, self.tokenizer, messages, s.max_new_tokens, chat=True, temperature=s.temperature,
      top_p=s.top_p, key=key, prefix_cache=self._prefixes, on_text=on_text,
    )  # fmt: skip
    self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return answer, left_out

  def command(self, line: str) -> str | None:
    """What a line that begins with a slash does, as a text to show; None means to leave.

    Raises:
      ConfigError: no such command, or not what it needs.
    """
    word, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    match word:
      case "exit" | "quit":
        return None
      case "help":
        return "\n".join(f"  /{name:<16} {what}" for name, what in COMMANDS.items())
      case "reset":
        self.messages, self.sources = [], []
        return "forgotten"
      case "undo":
        self.messages, self.sources = self.messages[:-2], []
        return f"turns left: {len(self.messages) // 2}"
      case "system":
        self.system = rest
        return "told" if rest else "nothing is told"
      case "set":
        name, _, value = rest.partition(" ")
        self.settings.change(name, value.strip())
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.settings).items())
      case "sources":
        return cited(self.sources) or "the last answer rests on no passages"
      case "history":
        return "\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "nothing was said yet"
      case "save":
        if not rest:
          raise ConfigError("/save needs the name of a file")
        said = {"system": self.system, "settings": dataclasses.asdict(self.settings), "messages": self.messages}
        try:
          with Path(rest).expanduser().open("x", encoding="utf-8") as file:
            file.write(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
        except FileExistsError:
          raise ConfigError(f"/save {rest}: it is there already; take another name") from None
        except (OSError, RuntimeError, ValueError) as error:  # no such folder, no such user's home, a NUL
          raise ConfigError(f"/save {rest}: {getattr(error, 'strerror', None) or error}") from None
        return f"saved in {rest}"
    raise ConfigError(f"/{word}: no such command; /help lists them")


def cited(sources: Iterable[tuple[Passage, float]]) -> str:
  """A line for each passage, by the number under which the model read it."""
  lines = [
    f"[{n}] {passage.source}:{passage.line} ({cosine:.2f})  {passage.text[:80]}"
    for n, (passage, cosine) in enumerate(sources, 1)
  ]
  return "\n".join(lines)
