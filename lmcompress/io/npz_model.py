"""A recurrent encoder-decoder as the NumPy archive that g2p-en ships: letters of a word to ARPAbet phonemes."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmcompress import tree
from lmcompress.data.tokenizer import PairTokenizer
from lmcompress.io import names
from lmcompress.models import Seq2Seq, Seq2SeqConfig
from lmcompress.models.recurrent import GATES
from lmcompress.types import FormatError, Params

SUFFIX = ".npz"
_LIMIT = 64 << 20
_NAMES = {
  "embed/table": "enc_emb",
  "decoder/embed/table": "dec_emb",
  "head/table": "fc_w",
  "head/bias": "fc_b",
  **{
    f"{side}/layers/0/{ours}/{leaf}": f"{side[:3]}_{part}_{theirs}"
    for side in ("encoder", "decoder")
    for ours, theirs in (("input", "ih"), ("recurrent", "hh"))
    for leaf, part in (("kernel", "w"), ("bias", "b"))
  },
}
LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH")
_SOUNDS = (
  *(f"{vowel}{stress}" for vowel in (*_VOWELS, "UW") for stress in range(3)), "UW",
  *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH"),
  *("V", "W", "Y", "Z", "ZH"),
)  # fmt: skip
PHONEMES = ("<pad>", "<unk>", "<s>", "</s>", *sorted(_SOUNDS))
"""ARPAbet with stresses, in the alphabet's order."""


def load_npz(path: Path) -> tuple[Seq2Seq, Params, PairTokenizer]:
  """Model, float32 parameters, and the tokenizers of letters and phonemes.

  Raises:
    FormatError: the file is damaged, too large, or holds other arrays than these.
  """
  found = _arrays(path)
  if missing := sorted(set(_NAMES.values()) - set(found)):
    raise FormatError(f"{path}: no {missing[0]}; a model here is g2p-en's, with {', '.join(sorted(_NAMES.values()))}")
  if extra := sorted(set(found) - set(_NAMES.values())):
    raise FormatError(f"{path}: {extra[0]} is no part of g2p-en's model")
  leaves: dict[str, Any] = {}
  for ours, theirs in _NAMES.items():
    array = found[theirs]
    if array.ndim != (1 if ours.endswith("bias") else 2) or array.dtype != np.float32:
      raise FormatError(f"{path}: {theirs} is {array.dtype}{list(array.shape)}, a float32 of another rank is needed")
    leaves[ours] = jnp.asarray(array.T if ours.endswith("kernel") else array)
  for side in ("enc", "dec"):
    (gates, units), inputs = found[f"{side}_w_hh"].shape, found[f"{side}_w_ih"].shape[0]
    if not units or gates != GATES["gru"] * units or inputs != gates:
      raise FormatError(f"{path}: {side}_w_hh is {[gates, units]} and {side}_w_ih has {inputs} rows; a GRU has three "
                        "rows for each unit in both")  # fmt: skip
  model, params = Seq2Seq(Seq2SeqConfig(start=PHONEMES.index("<s>"))), tree.unflatten(leaves)
  names.check_shapes(model, params, str(path))
  for what, entries, words in (("embed/table", "letters", LETTERS), ("head/table", "phonemes", PHONEMES)):
    if leaves[what].shape[0] != len(words):
      raise FormatError(f"{path}: {leaves[what].shape[0]} {entries} in {_NAMES[what]}; {len(words)} are known")
  return model, params, PairTokenizer.of_words(LETTERS, PHONEMES)


def _arrays(path: Path) -> dict[str, np.ndarray]:
  """The arrays of an archive whose whole size, unpacked, is within bounds."""
  try:
    with zipfile.ZipFile(path) as archive:
      total = sum(info.file_size for info in archive.infolist())
      if total <= _LIMIT:
        return {info.filename.removesuffix(".npy"): _array(archive.read(info)) for info in archive.infolist()}
  except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
    raise FormatError(f"{path}: no NumPy archive that can be read ({str(error)[:120]})") from None
  raise FormatError(f"{path}: {total} bytes unpacked are over the limit of {_LIMIT}")


def _array(data: bytes) -> np.ndarray:
  """The array of one member, of which the header says no more than is there.

  Raises:
    ValueError: it is no array, holds objects, or its header is of another size.
  """
  file = io.BytesIO(data)
  version = np.lib.format.read_magic(file)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, fortran, dtype = read(file)
  if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
    raise ValueError(f"an array {dtype}{list(shape)} in {len(data)} bytes")
  return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
