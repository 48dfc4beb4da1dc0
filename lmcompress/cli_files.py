"""The verbs of model files: `export`, `key`, `encrypt` and `decrypt`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lmcompress.cli_talk import ModelName
from lmcompress.errors import ConfigError
from lmcompress.terminal import console

KeyFile = Annotated[
  Path | None, typer.Option(help="The key's file; else LMCOMPRESS_KEY or LMCOMPRESS_KEY_FILE says it.")
]


def export(
  model: ModelName,
  folder: Annotated[Path, typer.Argument(help="A new or empty folder.")],
) -> None:
  """Writes a model as a Hugging Face folder, which transformers and others load; compressed weights become dense.

  Example:

    lmcompress export results/finetune-1a2b3c4d/model finetuned
  """
  import lmcompress as lmc
  from lmcompress.io.huggingface import save_folder
  from lmcompress.io.load import read_tasks

  net, params, tokenizer = lmc.load(model)
  save_folder(net, params, folder, tokenizer, read_tasks(model))
  _there(lambda: folder)


def key(path: Annotated[Path, typer.Argument(help="The new file, readable by you alone.")]) -> None:
  """Makes a random key for encrypted models.

  Example:

    lmcompress key model.key
  """
  from lmcompress.io.encryption import new_key

  try:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
      file.write(new_key() + "\n")
  except FileExistsError:
    raise ConfigError(f"{path} is there; a key is never replaced") from None
  console().print(f"a key is in {path}; what it encrypts cannot be read without it", markup=False, highlight=False)


def encrypt(
  folder: Annotated[Path, typer.Argument(help="A model folder, e.g. results/quickstart-1a2b3c4d/model.")],
  target: Annotated[Path, typer.Argument(help="The new file.")],
  key_file: KeyFile = None,
) -> None:
  """Writes a model folder as one encrypted file (AES-256-GCM); `load` and every verb read it where the key is set.

  Examples:

    lmcompress encrypt results/quickstart-1a2b3c4d/model quickstart.enc --key-file model.key

    LMCOMPRESS_KEY_FILE=model.key lmcompress generate quickstart.enc "Once upon a time"
  """
  from lmcompress.io import encryption

  _there(lambda: encryption.encrypt(folder, target, encryption.read_key(key_file)))


def decrypt(
  source: Annotated[Path, typer.Argument(help="A file that `encrypt` wrote.")],
  folder: Annotated[Path, typer.Argument(help="The new model folder.")],
  key_file: KeyFile = None,
) -> None:
  """Writes the model folder of an encrypted file; another key or a changed file leaves nothing.

  Example:

    lmcompress decrypt quickstart.enc model --key-file model.key
  """
  from lmcompress.io import encryption

  _there(lambda: encryption.decrypt(source, folder, encryption.read_key(key_file)))


def _there(act: Callable[[], Path]) -> None:
  """What was written, or that something is there already."""
  try:
    done = act()
  except FileExistsError as error:
    raise ConfigError(str(error)) from None
  console().print(f"written: {done}", markup=False, highlight=False, soft_wrap=True)
