"""A model that is yet to be trained: a YAML file of sizes to random weights and a vocabulary learned from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import pydantic

from lmcompress.data.text import load_text
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io.yaml_text import parse
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.types import ConfigError, Params


class Untrained(pydantic.BaseModel):
  """Keys of the file; the widths are as of `models.LlamaSizes`, and the vocabulary is learned from `text`."""

  model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

  architecture: Literal["llama"] = "llama"
  seed: int = pydantic.Field(0, ge=0, lt=2**32)
  text: str
  vocab: int = pydantic.Field(4096, ge=257, le=1 << 20)
  embed: int = pydantic.Field(256, ge=1)
  mlp: int = pydantic.Field(768, ge=1)
  layers: int = pydantic.Field(4, ge=1)
  heads: int = pydantic.Field(4, ge=1)
  kv_heads: int = pydantic.Field(2, ge=1)
  head_dim: int = pydantic.Field(64, ge=2, multiple_of=2)
  max_length: int = pydantic.Field(1024, ge=2)
  tied: bool = True

  @pydantic.model_validator(mode="after")
  def _fits(self) -> Untrained:
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.heads} heads over {self.kv_heads} kv_heads: a whole number of them shares one")
    return self


def load_untrained(path: Path) -> tuple[Any, Params, Any]:
  """Model, random parameters of the file's seed, and tokenizer; the same bits every time.

  Raises:
    ConfigError: a key is wrong, or the text cannot fill the vocabulary.
  """
  table = parse(path.read_text("utf-8", "replace"), path.name)
  if not isinstance(table, dict):
    raise ConfigError(f"{path.name}: a table of sizes is needed; found {type(table).__name__}")
  try:
    sizes = Untrained(**table)
  except pydantic.ValidationError as error:
    from lmcompress.recipe import explain

    raise ConfigError(f"{path.name}: {explain(error)}") from None
  try:
    tokenizer = Tokenizer.from_text(load_text(sizes.text), sizes.vocab)
  except ValueError as error:
    raise ConfigError(f"{path.name}: {error}") from None
  widths = sizes.model_dump(include={"vocab", "embed", "mlp", "layers", "heads", "kv_heads", "tied"})
  model = Llama(LlamaConfig(head_dim=sizes.head_dim, max_length=sizes.max_length), LlamaSizes(**widths))
  return model, model.init(jax.random.key(sizes.seed)), tokenizer
