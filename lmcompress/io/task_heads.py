"""The head of a task in a Hugging Face folder: what its config.json says of it, and how it is said there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmcompress.types import FormatError, Params

_ENDS = {"labels": "ForSequenceClassification", "tags": "ForTokenClassification", "spans": "ForQuestionAnswering"}
"""How transformers calls a model by what its head tells (`training.heads.Kind`)."""
_SPANS = ("start", "end")
_LONGEST = 512
"""Tokens of a text that are read at most, where a config tells of more."""


def task_of(config: Mapping[str, Any]) -> str | None:
  """What the head of a `config.json` tells, None where it names no such head."""
  words = config.get("architectures")
  words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
  return next((kind for kind, end in _ENDS.items() if any(word.endswith(end) for word in words)), None)


def read_head(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
  """`kind` and `classes` of the head that a `config.json` names.

  Raises:
    FormatError: it tells no class out of several, or its `id2label` is damaged.
  """
  kind = task_of(config)
  problem = config.get("problem_type")
  if kind == "labels" and problem not in (None, "single_label_classification"):
    raise FormatError(f"{where}: problem_type {problem!r} is not known here; single_label_classification is")
  if kind == "spans":
    return {"kind": kind, "classes": list(_SPANS)}
  labels = config.get("id2label")
  if labels is None:  # what transformers takes then
    count = config.get("num_labels", 2)
    labels = {str(i): f"LABEL_{i}" for i in range(count)} if type(count) is int and 0 < count < 1 << 16 else None
  names = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else []
  if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
    raise FormatError(f"{where}: id2label does not name the classes from 0 on, each once")
  if len(names) < 2:
    raise FormatError(f"{where}: a head of one class gives a number, which is not known here; two or more are")
  return {"kind": kind, "classes": names}


def check_head(config: Mapping[str, Any], params: Params, where: Any) -> None:
  """Refuses a head that tells another number of classes than its config.

  Raises:
    FormatError: says both numbers.
  """
  head = read_head(config, where)
  found, classes = params["tasks"][head["kind"]]["kernel"].shape[-1], head["classes"]
  if found != len(classes):
    raise FormatError(f"{where}: names {len(classes)} classes, and the head tells {found} apart")


def told(config: Mapping[str, Any], where: Any, max_length: int) -> dict[str, dict[str, Any]]:
  """As `checkpoint.read_tasks`: the head that a `config.json` names, called by its kind."""
  head = read_head(config, where)
  return {head["kind"]: {**head, "length": min(max_length, _LONGEST)}}


def with_head(
  config: dict[str, Any], params: Params, tasks: Mapping[str, Any], known: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], Params]:
  """A `config.json` that names the tree's head, and the tree with that head called by its kind.

  Args:
    tasks: kinds and classes of heads by name, as of `checkpoint.read_tasks`.
    known: kinds of heads that the architecture's folders have.

  Raises:
    FormatError: such folders have no such head, or more than one is there.
  """
  heads = params["tasks"]
  name, head = next(iter(heads.items()))
  if len(heads) > 1:
    raise FormatError(f"{folder}: heads of {', '.join(sorted(heads))}; a Hugging Face folder has one")
  if name not in tasks:
    raise FormatError(f"{folder}: a head {name}, of which nothing is said; give its kind and classes by `tasks`")
  kind, classes = tasks[name].get("kind", "labels"), list(tasks[name]["classes"])
  if kind not in known:
    raise FormatError(f"{folder}: a head {name} of {kind}, which a folder of {config['model_type']} does not have")
  if kind == "labels" and "dense" not in head:
    raise FormatError(
      f"{folder}: the head {name} reads the mean of all tokens, and such folders keep heads that read the first; save "
      "with lmcompress.save"
    )
  stem = config["architectures"][0].removesuffix("Model").removesuffix("ForMaskedLM")
  said = {**config, "architectures": [stem + _ENDS[kind]]}
  if kind != "spans":
    said |= {"id2label": {str(i): word for i, word in enumerate(classes)}}
    said |= {"label2id": {word: i for i, word in enumerate(classes)}}
  return said, {**params, "tasks": {kind: head}}
