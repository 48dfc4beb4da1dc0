"""Phonemes of words by a recurrent encoder-decoder: beside its package's own code, and after compression.

Every variant of a config, calibrated on words of news and the phonemes that the model gives them: how many words of
tales keep all of their phonemes.

  python experiments/phonemes.py --config configs/g2p-en/phonemes.yaml
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"
LONGEST = 20
"""Phonemes of a word at most, as in the package."""
CODE = ("g2p_en/g2p.py", "fc2548b855e102f774506a6afe4f4bc88424229b69701ab6040aa16710ddff3a", 7637)


def words_of(name: str) -> list[str]:
  """The different words of a text, in the alphabet's order."""
  from lmcompress.data.text import load_text

  return sorted(set(re.findall(r"\b[a-z]{3,15}\b", load_text(name))))


def by_its_package(words: list[str]) -> list[str]:
  """The phonemes that g2p-en's own NumPy code gives each word, from the same file.

  Its module also loads a tagger and a dictionary, which one word alone does not need; they are left out.
  """
  import dataclasses

  import numpy as np

  from lmcompress.data.fetch import Wheel, fetch_file
  from lmcompress.io.hub import MODELS, resolve_model

  wheel = MODELS["g2p-en"].sources[0]
  assert isinstance(wheel, Wheel)
  path = fetch_file(dataclasses.replace(wheel, member=CODE[0], member_sha256=CODE[1], nbytes=CODE[2]))
  left_out = ("nltk", "nltk.corpus", "nltk.tokenize", "g2p_en", "g2p_en.expand")
  with mock.patch.dict(sys.modules, {name: mock.MagicMock(__path__=[]) for name in left_out}):
    module = types.ModuleType("g2p_en.g2p")
    module.__dict__.update(__file__=str(path), __package__="g2p_en")
    exec(compile(path.read_text("utf-8"), str(path), "exec"), module.__dict__)
    with mock.patch.object(module.G2p, "load_variables"), mock.patch.object(
      module, "construct_homograph_dictionary"
    ):
      speaker = module.G2p()
  with np.load(resolve_model("g2p-en"), allow_pickle=False) as arrays:
    for name in arrays.files:
      setattr(speaker, name, arrays[name])
  return [" ".join(speaker.predict(word)) for word in words]


def calibration_of(model: Any, params: Any, tokenizer: Any, words: list[str]) -> dict[str, Any]:
  """Words as the encoder reads them, and as its decoder the phonemes that the model gives them."""
  import numpy as np

  from lmcompress.generation.seq2seq import beam_search

  rows = [tokenizer.encode(word, add_special=True) for word in words]
  tokens, real = np.zeros((len(rows), 16), np.int32), np.zeros((len(rows), 16), bool)
  for n, row in enumerate(rows):
    tokens[n, : len(row)], real[n, : len(row)] = row, True
  said = beam_search(model, params, tokens, LONGEST, real, stop_ids=sorted(tokenizer.stop_ids))
  written, writes = np.zeros((len(rows), LONGEST), np.int32), np.zeros((len(rows), LONGEST), bool)
  for n, one in enumerate(said):
    ids = [model.config.start, *(t for t in one.tokens if t not in tokenizer.stop_ids)][:LONGEST]
    written[n, : len(ids)], writes[n, : len(ids)] = ids, True
  return {"tokens": tokens, "attention_mask": real, "decoder_input_ids": written, "decoder_attention_mask": writes}


def study(path: Path, count: int, rows: int, overrides: list[str]) -> dict[str, Any]:
  """The original and each variant on `count` words; `rows` others calibrate."""
  import jax
  import numpy as np

  from lmcompress import compress, load, prepare
  from lmcompress.environment import device, versions
  from lmcompress.evaluate.size import sizes
  from lmcompress.generation.seq2seq import rewrite
  from lmcompress.io.checkpoint import weights_size
  from lmcompress.recipe import build

  config = load_config(path, overrides)
  if not config.variants or count < 1 or rows < 1:
    raise ConfigError(f"{path.name}: variants, words and rows are needed")
  model, params, tokenizer = load(config.model)
  words = words_of("grimm")
  words = words[:: max(1, len(words) // count)][:count]
  others = sorted(set(words_of("bbc")) - set(words))
  calibration = calibration_of(model, params, tokenizer, others[:: max(1, len(others) // rows)][:rows])
  reference = by_its_package(words)

  def row(name: str, tree: Any, **more: Any) -> dict[str, Any]:
    print(name, file=sys.stderr, flush=True)
    said = rewrite(model, prepare(tree), tokenizer, words, LONGEST, batch=64)
    same = np.asarray([a == b for a, b in zip(said, reference, strict=True)], float)
    draws = np.random.default_rng(0).integers(0, len(same), (2000, len(same)))
    changed = [[word, a, b] for word, a, b in zip(words, reference, said, strict=True) if a != b]
    return {"name": name, **more, "bits_per_weight": sizes(tree)["bits_per_weight"],
            "bytes_on_disk": weights_size(tree), "same": float(same.mean()),
            "interval": np.quantile(same[draws].mean(1), [0.025, 0.975]).tolist(),
            "changed": changed[:5]}  # fmt: skip

  found = [row("original", params)]
  for variant in variants_of(config):
    tree, _ = compress(model, params, build(variant.recipe), calibration, jax.random.key(variant.seed))
    found.append(row(variant.name, tree, recipe=[dict(link) for link in variant.recipe]))
  return {"format": 1, "name": config.name, "model": config.model, "words": len(words), "calibration": rows,
          "versions": versions(), "device": device(), "rows": found}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config of g2p-en with named `variants`")
  parser.add_argument("--words", type=int, default=1000, help="words that are spoken")
  parser.add_argument("--rows", type=int, default=512, help="words that calibrate")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.words, arguments.rows, arguments.overrides)
  except LmcompressError as error:
    print(f"phonemes: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{result['name']}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'variant':<16}{'bits':>7}{'kB':>8}{'same':>8}  95 % of resamples")
  for row in result["rows"]:
    low, high = row["interval"]
    print(f"{row['name']:<16}{row['bits_per_weight']:>7.2f}{row['bytes_on_disk'] / 1e3:>8.0f}{row['same']:>8.1%}"
          f"  {low:.3f} to {high:.3f}")  # fmt: skip
  return 0


if __name__ == "__main__":
  sys.exit(main())
