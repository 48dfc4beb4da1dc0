"""A model that is yet to be trained: a YAML file of sizes to random weights and a vocabulary learned from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import pydantic

from lmcompress.data.text import load_text
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.io.yaml_text import parse
from lmcompress.models import (
  GPT2,
  LSTM,
  LSTM_DEPTH,
  T5,
  Bart,
  BartConfig,
  BartSizes,
  GPT2Config,
  GPT2Sizes,
  Llama,
  LlamaConfig,
  LlamaSizes,
  LSTMConfig,
  LSTMSizes,
  T5Config,
  T5Sizes,
)
from lmcompress.types import ConfigError, Params


class _Untrained(pydantic.BaseModel):
  """What every architecture's file says; the vocabulary is learned from `text`."""

  model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

  seed: int = pydantic.Field(0, ge=0, lt=2**32)
  text: str
  vocab: int = pydantic.Field(4096, ge=257, le=1 << 20)
  embed: int = pydantic.Field(256, ge=1)
  layers: int = pydantic.Field(4, ge=1)
  max_length: int = pydantic.Field(1024, ge=2)


class UntrainedLlama(_Untrained):
  """A Llama; the widths are as of `models.LlamaSizes`, with `experts` of `mlp` neurons each in the place of an MLP."""

  architecture: Literal["llama"] = "llama"
  mlp: int = pydantic.Field(768, ge=1)
  heads: int = pydantic.Field(4, ge=1)
  kv_heads: int = pydantic.Field(2, ge=1)
  head_dim: int = pydantic.Field(64, ge=2, multiple_of=2)
  tied: bool = True
  experts: int = pydantic.Field(0, ge=0)
  shared: int = pydantic.Field(0, ge=0)
  experts_per_token: int = pydantic.Field(2, ge=1)

  @pydantic.model_validator(mode="after")
  def _fits(self) -> UntrainedLlama:
    if self.heads % self.kv_heads:
      raise ValueError(f"{self.heads} heads over {self.kv_heads} kv_heads: a whole number of them shares one")
    if self.experts and self.experts_per_token > self.experts:
      raise ValueError(f"{self.experts_per_token} experts_per_token of {self.experts} experts: there are not so many")
    if self.shared and not self.experts:
      raise ValueError(f"shared {self.shared}: an expert that all share needs others; give experts")
    return self

  def model(self) -> Any:
    """The model, with its sizes."""
    named = {"vocab", "embed", "mlp", "layers", "heads", "kv_heads", "tied", "experts", "shared"}
    config = LlamaConfig(self.head_dim, max_length=self.max_length, experts_per_token=self.experts_per_token)
    return Llama(config, LlamaSizes(**self.model_dump(include=named)))


class UntrainedGPT2(_Untrained):
  """A GPT-2; the widths are as of `models.GPT2Sizes`, and heads divide `embed`."""

  architecture: Literal["gpt2"]
  mlp: int = pydantic.Field(1024, ge=1)
  heads: int = pydantic.Field(4, ge=1)
  tied: bool = True

  @pydantic.model_validator(mode="after")
  def _fits(self) -> UntrainedGPT2:
    if self.embed % self.heads:
      raise ValueError(f"embed {self.embed} over {self.heads} heads: each has a whole number of entries")
    return self

  def model(self) -> Any:
    """The model, with its sizes."""
    widths = self.model_dump(include={"vocab", "embed", "mlp", "layers", "heads", "tied"})
    config = GPT2Config(head_dim=self.embed // self.heads, max_length=self.max_length)
    return GPT2(config, GPT2Sizes(**widths))


class UntrainedLSTM(_Untrained):
  """An LSTM; the widths are as of `models.LSTMSizes`, whose defaults have 4,178,704 parameters."""

  architecture: Literal["lstm"]
  vocab: int = pydantic.Field(10000, ge=257, le=1 << 20)
  units: int = pydantic.Field(128, ge=1)
  layers: int = pydantic.Field(2, ge=1, le=LSTM_DEPTH)

  def model(self) -> Any:
    """The model, with its sizes."""
    widths = self.model_dump(include={"vocab", "embed", "units", "layers"})
    return LSTM(LSTMConfig(max_length=self.max_length), LSTMSizes(**widths))


class UntrainedT5(_Untrained):
  """An encoder-decoder, gated and without a head of its own; widths as of `models.T5Sizes`, `layers` on either side."""

  architecture: Literal["t5"]
  mlp: int = pydantic.Field(512, ge=1)
  heads: int = pydantic.Field(4, ge=1)
  head_dim: int = pydantic.Field(64, ge=1)

  def model(self) -> Any:
    """The model, with its sizes; its decoder begins with the token that ends a text, the vocabulary's first."""
    widths = self.model_dump(include={"vocab", "embed", "mlp", "layers", "heads"})
    config = T5Config(self.head_dim, activation="gelu_tanh", scaled=True, start=0, max_length=self.max_length)
    return T5(config, T5Sizes(**widths, decoder_layers=self.layers, gated=True))


class UntrainedBart(_Untrained):
  """An encoder-decoder with learned positions and a norm before each part; widths as of `models.BartSizes`."""

  architecture: Literal["bart"]
  mlp: int = pydantic.Field(512, ge=1)
  heads: int = pydantic.Field(4, ge=1)

  @pydantic.model_validator(mode="after")
  def _fits(self) -> UntrainedBart:
    if self.embed % self.heads:
      raise ValueError(f"embed {self.embed} over {self.heads} heads: each has a whole number of entries")
    return self

  def model(self) -> Any:
    """The model, with its sizes; its decoder begins with the token that ends a text, the vocabulary's first."""
    widths = self.model_dump(include={"vocab", "embed", "mlp", "layers", "heads"})
    config = BartConfig(self.embed // self.heads, pre_norm=True, start=0, max_length=self.max_length)
    return Bart(config, BartSizes(**widths, decoder_layers=self.layers))


UNTRAINED = {
  "llama": UntrainedLlama, "gpt2": UntrainedGPT2, "lstm": UntrainedLSTM, "t5": UntrainedT5, "bart": UntrainedBart,
}  # fmt: skip
"""The keys of a file by its architecture."""


def load_untrained(path: Path) -> tuple[Any, Params, Any]:
  """Model, random parameters of the file's seed, and tokenizer; the same bits every time.

  Raises:
    ConfigError: a key is wrong, or the text cannot fill the vocabulary.
  """
  table = parse(path.read_text("utf-8", "replace"), path.name)
  if not isinstance(table, dict):
    raise ConfigError(f"{path.name}: a table of sizes is needed; found {type(table).__name__}")
  word = table.get("architecture", "llama")
  kind = UNTRAINED.get(word) if isinstance(word, str) else None
  if kind is None:
    raise ConfigError(f"{path.name}: architecture {word!r} is none that can be trained from a file of sizes; "
                      f"those are {', '.join(UNTRAINED)}")  # fmt: skip
  try:
    sizes = kind(**table)
  except pydantic.ValidationError as error:
    from lmcompress.recipe import explain

    raise ConfigError(f"{path.name}: {explain(error)}") from None
  try:
    tokenizer = Tokenizer.from_text(load_text(sizes.text), sizes.vocab)
  except ValueError as error:
    raise ConfigError(f"{path.name}: {error}") from None
  model = sizes.model()
  return model, model.init(jax.random.key(sizes.seed)), tokenizer
