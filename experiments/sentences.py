"""What compression does to a sentence encoder: how near its vectors stay, and what a linear classifier makes of them.

Every variant of a config, calibrated on articles of the training part: the mean cosine of its vectors with the
original's, and the accuracy of a logistic regression on its vectors on held-out articles, beside one on TF-IDF.

  python experiments/sentences.py --config configs/minilm/sentences.yaml
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"


def study(path: Path, data: str, length: int, rows: int, overrides: list[str]) -> dict[str, Any]:
  """The original first, then each variant; `length` tokens of an article are read, `rows` articles calibrate."""
  import jax
  import numpy as np
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression
  from sklearn.pipeline import make_pipeline

  from lmcompress import compress, load, prepare
  from lmcompress.data.labelled import load_labelled
  from lmcompress.environment import device, versions
  from lmcompress.evaluate.classification import scores
  from lmcompress.evaluate.sentences import mean_cosine, sentence_vectors
  from lmcompress.evaluate.size import sizes
  from lmcompress.io.checkpoint import weights_size
  from lmcompress.recipe import build

  config = load_config(path, overrides)
  if not config.variants:
    raise ConfigError(f"{path.name}: variants are needed")
  model, params, tokenizer = load(config.model)
  labelled = load_labelled(data)
  (train, learned), (test, truth) = ((list(texts), labels) for texts, labels in (labelled.train, labelled.test))
  ids = [tokenizer.encode(text, add_special=True)[:length] for text in train]
  calibration = np.asarray([row for row in ids if len(row) == length][:rows], np.int32)
  words = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(max_iter=1000, C=10.0))
  shares = words.fit(train, learned).predict_proba(test)
  found: list[dict[str, Any]] = [{"name": "TF-IDF", "scores": scores(truth, shares, labelled.classes)}]
  trees: dict[str, tuple[Any, list[Any]]] = {"original": (params, [])}
  for variant in variants_of(config):
    print(variant.name, file=sys.stderr, flush=True)
    tree, _ = compress(model, params, build(variant.recipe), calibration, jax.random.key(variant.seed))
    trees[variant.name] = (tree, [dict(link) for link in variant.recipe])
  whole: Any = None
  few, times = test[:64], {name: [] for name in trees}
  ready = {name: prepare(tree) for name, (tree, _) in trees.items()}
  for n in range(4):  # all take turns, so that a busy machine hits all alike
    for name, tree in ready.items():
      begun = time.perf_counter()
      sentence_vectors(model, tree, tokenizer, few, length)
      times[name] += [time.perf_counter() - begun] if n else []
  for name, (tree, recipe) in trees.items():
    print(f"{name}: {len(train) + len(test)} articles", file=sys.stderr, flush=True)
    vectors = [sentence_vectors(model, ready[name], tokenizer, texts, length) for texts in (train, test)]
    whole = vectors[1] if whole is None else whole
    head = LogisticRegression(max_iter=1000, C=10.0).fit(vectors[0], learned)
    found.append({
      "name": name, "recipe": recipe, "bits_per_weight": sizes({"layers": tree["layers"]})["bits_per_weight"],
      "bytes_on_disk": weights_size(tree), "cosine": mean_cosine(whole, vectors[1]),
      "texts_per_s": len(few) / statistics.median(times[name]),
      "scores": scores(truth, head.predict_proba(vectors[1]), labelled.classes),
    })  # fmt: skip
  return {"format": 1, "name": config.name, "model": config.model, "data": data, "length": length,
          "calibration": len(calibration), "versions": versions(), "device": device(), "rows": found}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", type=Path, required=True, help="a config of an encoder with named `variants`")
  parser.add_argument("--data", default="bbc", help="a labelled data set of texts")
  parser.add_argument("--length", type=int, default=64, help="tokens of an article that are read")
  parser.add_argument("--rows", type=int, default=256, help="articles that calibrate")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides")
  arguments = parser.parse_args()
  try:
    result = study(arguments.config, arguments.data, arguments.length, arguments.rows, arguments.overrides)
  except LmcompressError as error:
    print(f"sentences: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{result['name']}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  print(f"{'variant':<16}{'bits':>7}{'MB':>7}{'cosine':>8}{'texts/s':>9}{'accuracy':>10}  95 % of resamples")
  for row in result["rows"]:
    low, high = row["scores"]["interval"]["accuracy"]
    numbers = "" if "cosine" not in row else (
      f"{row['bits_per_weight']:>7.2f}{row['bytes_on_disk'] / 1e6:>7.1f}{row['cosine']:>8.4f}{row['texts_per_s']:>9.1f}"
    )  # fmt: skip
    print(f"{row['name']:<16}{numbers:<31}{row['scores']['accuracy']:>10.4f}  {low:.4f} to {high:.4f}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
