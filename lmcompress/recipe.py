"""Recipes: a table of a config to a transform; a factory's signature is the schema."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcompress.transforms import METHODS, at, chain
from lmcompress.types import ConfigError, Transform


def build(links: Sequence[Mapping[str, Any]], where: str = "recipe") -> Transform:
  """The chain of a recipe's links, each `{name: <method>, at: <pattern, optional>, <the factory's keywords>}`.

  Raises:
    ConfigError: an unknown method or key, or a value that the method refuses; shows what it takes.
  """
  if not links:
    raise ConfigError(f"{where}: it is empty; add a link such as {{name: round_to_nearest, bits: 4, group_size: 64}}")
  return chain(*(build_link(link, f"{where}[{i}]") for i, link in enumerate(links)))


def build_link(link: Mapping[str, Any], where: str = "recipe") -> Transform:
  """One link of a recipe."""
  if not isinstance(link, Mapping):
    raise ConfigError(f"{where}: a link is a table such as {{name: magnitude, sparsity: 0.2}}; found {link!r}")
  name, pattern = link.get("name"), link.get("at")
  factory = METHODS.get(name) if isinstance(name, str) else None
  if factory is None:
    close = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(f"{where}: no method {name!r}{hint} Methods are {', '.join(METHODS)}")
  given = {key: value for key, value in link.items() if key not in ("name", "at")}
  schema = _schema(factory)
  if unknown := set(given) - set(schema.model_fields):
    takes = ", ".join(("at", *schema.model_fields))
    raise ConfigError(f"{where}: {name} does not take {sorted(map(str, unknown))[0]!r}; it takes {takes}")
  if pattern is not None and not isinstance(pattern, str):
    raise ConfigError(f"{where}: at is a pattern such as 'layers/*/mlp'; found {pattern!r}")
  import pydantic

  try:
    values = schema(**given)
    transform = factory(**{key: getattr(values, key) for key in given})
  except pydantic.ValidationError as error:
    raise ConfigError(f"{where} ({name}): {explain(error)}") from None
  except ValueError as error:
    raise ConfigError(f"{where}: {error}") from None
  return transform if pattern is None else at(pattern, transform)


@functools.cache
def _schema(factory: Callable[..., Transform]) -> Any:
  """A pydantic model of a factory's keywords."""
  import typing

  import pydantic

  hints = typing.get_type_hints(factory)
  fields: dict[str, Any] = {
    p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
    for p in inspect.signature(factory).parameters.values()
  }
  config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)
  return pydantic.create_model(factory.__name__, __config__=config, **fields)


def explain(error: Any) -> str:
  """A pydantic error in one line: where, what was found, what would do."""
  first = error.errors()[0]
  where = ".".join(str(part) for part in first["loc"]) or "config"
  more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
  return f"{where}: {first['msg']}; found {str(first.get('input'))[:80]!r}{more}"
