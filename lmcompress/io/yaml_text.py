"""YAML that a person writes: data alone, without anchors, tags or surprises of types."""

from __future__ import annotations

import re
from typing import Any

import yaml

from lmcompress.types import ConfigError

_MAX_BYTES, _MAX_DEPTH = 1 << 20, 50


class _Loader(yaml.SafeLoader):
  """YAML without anchors, aliases, tags, duplicate keys or deep nesting; scalars by the core schema of YAML 1.2."""

  depth = 0

  def compose_node(self, parent: Any, index: Any) -> Any:
    event = self.peek_event()
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
      raise ConfigError(f"line {event.start_mark.line + 1}: anchors and aliases are not allowed; write it out")
    if getattr(event, "tag", None) is not None:
      raise ConfigError(f"line {event.start_mark.line + 1}: tags such as {event.tag!r} are not allowed")
    self.depth += 1
    if self.depth > _MAX_DEPTH:
      raise ConfigError(f"nested deeper than {_MAX_DEPTH} levels")
    node = super().compose_node(parent, index)
    self.depth -= 1
    return node

  def construct_mapping(self, node: Any, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
      key = self.construct_object(key_node, deep=True)
      if not isinstance(key, str):
        raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is not a text")
      if key in seen:
        raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
      seen.add(key)
    return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
  ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
  ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
  ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
  (
    "float",
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "-+0123456789.",
  ),
):
  _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _integer(loader: _Loader, node: Any) -> int:
  """YAML 1.2: a leading zero is no octal."""
  text = loader.construct_scalar(node)
  return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> Any:
  """The value of a YAML text, or ConfigError naming `where`."""
  if len(text.encode("utf-8", "replace")) > _MAX_BYTES:
    raise ConfigError(f"{where}: over {_MAX_BYTES} bytes; a config is a small file")
  try:
    return yaml.load(text, _Loader)  # a subclass of SafeLoader
  except ConfigError as error:
    raise ConfigError(f"{where}: {error}") from None
  except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}:" if mark else ""
    raise ConfigError(
      f"{where}:{line} not valid YAML ({getattr(error, 'problem', None) or type(error).__name__})"
    ) from None
