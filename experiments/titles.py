"""Titles of articles by an encoder-decoder, before and after compression, and beside onnxruntime.

Every variant of a config, calibrated on articles of the training part and the titles that the model gives them: how
many of the titles of held-out articles stay the same, and ROUGE against the headlines. Needs
`pip install 'lmcompress[onnx,tasks]' onnxruntime`.

  python experiments/titles.py --config configs/title-t5/titles.yaml
  python experiments/titles.py --rounded
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lmcompress.config import load_config, variants_of
from lmcompress.errors import ConfigError, LmcompressError

RESULTS = Path(__file__).parent / "results"
CHARACTERS = 600
"""Of an article, about 130 tokens."""
TITLE = 16
"""Tokens of a title."""
SAME_LENGTH = 96
"""Tokens of an article where both round inputs by the range of all its tokens: without padding."""


def floating(path: Path) -> Any:
  """The file's graph with the inputs of integer products left as they are, in place of rounded to 8 bits."""
  import numpy as np
  import onnx
  from onnx import helper, numpy_helper

  model = onnx.load(str(path))
  held, nodes = {tensor.name: tensor for tensor in model.graph.initializer}, []
  model.graph.initializer.append(numpy_helper.from_array(np.asarray(1, np.float32), "one"))
  for node in model.graph.node:
    if node.op_type == "DynamicQuantizeLinear":
      nodes += [helper.make_node("Identity", [node.input[0]], [node.output[0]], name=f"{node.name}/x"),
                helper.make_node("Identity", ["one"], [node.output[1]], name=f"{node.name}/scale")]  # fmt: skip
    elif node.op_type == "MatMulInteger":
      codes, zero = (numpy_helper.to_array(held[name]).astype(np.float32) for name in (node.input[1], node.input[3]))
      weight = f"{node.name}/weight"
      model.graph.initializer.append(numpy_helper.from_array(codes - zero, weight))
      nodes.append(helper.make_node("MatMul", [node.input[0], weight], list(node.output), name=node.name))
    else:
      nodes.append(node)
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  return model


def by_onnxruntime(
  folder: Path, tokenizer: Any, rows: list[list[int]], rounded: bool, exact: bool = False
) -> list[str]:
  """Greedy titles from the two files, each row of tokens alone; `exact`: no sum of 8-bit products saturates."""
  import numpy as np
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  if exact:
    options.add_session_config_entry("session.x64quantprecision", "1")
  sessions = []
  for side in ("encoder", "decoder"):
    path = folder / f"{side}.onnx"
    source = str(path) if rounded else floating(path).SerializeToString()
    sessions.append(onnxruntime.InferenceSession(source, options))
  titles = []
  for row in rows:
    ids, written = np.asarray([row]), [0]
    mask = np.ones_like(ids)
    hidden = sessions[0].run(None, {"input_ids": ids, "attention_mask": mask})[0]
    while len(written) <= TITLE and written[-1] not in tokenizer.stop_ids:
      given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "input_ids": np.asarray([written])}
      written.append(int(np.asarray(sessions[1].run(None, given)[0])[0, -1].argmax()))
    titles.append(tokenizer.decode([t for t in written[1:] if t not in tokenizer.stop_ids]))
  return titles


def as_the_files_round(articles: int) -> dict[str, Any]:
  """How many titles are the same where we, too, round the inputs of all products by their range, as the files say.

  Beside ours stand onnxruntime's own two ways: its default lets sums of two 8-bit products saturate at 16 bits where a
  CPU has no other instruction (Intel and AMD before VNNI), `session.x64quantprecision` does not.
  The decoder reads all that is written at every step, as onnxruntime does with these files: a token's keys and values
  depend on the range of the tokens beside it.
  """
  import jax
  import numpy as np

  import lmcompress as lmc
  from lmcompress.data.labelled import load_labelled
  from lmcompress.environment import device, versions
  from lmcompress.io.hub import resolve_model

  model, params, tokenizer = lmc.load("title-t5")
  rounding = lmc.quantize_inputs("uint8_per_tensor")
  rounded, _ = lmc.compress(model, params, lmc.chain(lmc.at("**/layers/*", rounding), lmc.at("head", rounding)))
  test = [text.split("\n", 1)[1] for text in load_labelled("bbc").test[0] if "\n" in text]
  rows = [tokenizer.encode(text, add_special=True) for text in test]
  rows = [row[: SAME_LENGTH - 1] + row[-1:] for row in rows if len(row) >= SAME_LENGTH]
  rows = rows[:: max(1, len(rows) // articles)][:articles]
  apply = jax.jit(lambda params, ids, written: model.apply(params, ids, decoder_input_ids=written))

  def write(params: Any) -> list[str]:
    titles = []
    for row in rows:
      written = [model.config.start]
      while len(written) <= TITLE and written[-1] not in tokenizer.stop_ids:
        logits = apply(params, np.asarray([row], np.int32), np.asarray([written], np.int32))
        written.append(int(np.asarray(logits)[0, -1].argmax()))
      titles.append(tokenizer.decode([t for t in written[1:] if t not in tokenizer.stop_ids]))
    return titles

  folder, ours, plain = resolve_model("title-t5"), write(rounded), write(params)
  theirs, exact = (by_onnxruntime(folder, tokenizer, rows, True, precise) for precise in (False, True))
  share = lambda a, b: float(np.mean([x == y for x, y in zip(a, b, strict=True)]))  # noqa: E731
  return {
    "format": 1, "name": "titles_rounded", "articles": len(rows), "tokens": SAME_LENGTH,
    "ours_as_onnxruntime": share(ours, theirs), "ours_as_exact_onnxruntime": share(ours, exact),
    "onnxruntime_as_exact_onnxruntime": share(theirs, exact), "not_rounded_as_onnxruntime": share(plain, theirs),
    "versions": versions(), "device": device(),
    "titles": [
      {"onnxruntime": a, "exact": b, "ours": c, "not rounded": d}
      for a, b, c, d in list(zip(theirs, exact, ours, plain, strict=True))[:5]
    ],
  }  # fmt: skip


def study(path: Path, articles: int, rows: int, overrides: list[str]) -> dict[str, Any]:
  """The original and each variant on `articles` held-out articles; `rows` others calibrate."""
  import jax
  import numpy as np
  from rouge_score.rouge_scorer import RougeScorer

  from lmcompress import compress, load, prepare
  from lmcompress.data.labelled import load_labelled
  from lmcompress.environment import device, versions
  from lmcompress.evaluate.size import sizes
  from lmcompress.generation.seq2seq import beam_search, rewrite
  from lmcompress.io.checkpoint import weights_size
  from lmcompress.io.hub import resolve_model
  from lmcompress.recipe import build

  config = load_config(path, overrides)
  if not config.variants:
    raise ConfigError(f"{path.name}: variants are needed")
  model, params, tokenizer = load(config.model)
  data = load_labelled("bbc")
  train, test = ([text for text in part if "\n" in text] for part in (data.train[0], data.test[0]))
  test = test[:: max(1, len(test) // articles)][:articles]
  headlines, texts = [text.split("\n", 1)[0] for text in test], [text.split("\n", 1)[1][:CHARACTERS] for text in test]
  sources = [tokenizer.encode(text.split("\n", 1)[1][:CHARACTERS], add_special=True) for text in train]
  sources = np.asarray([row[:63] + row[-1:] for row in sources if len(row) >= 64][:rows], np.int32)
  said = beam_search(model, prepare(params), sources, TITLE, stop_ids=sorted(tokenizer.stop_ids))
  written, real = np.zeros((len(said), TITLE), np.int32), np.zeros((len(said), TITLE), bool)
  for row, one in enumerate(said):
    ids = [model.config.start, *one.tokens][:TITLE]
    written[row, : len(ids)], real[row, : len(ids)] = ids, True
  calibration = {"tokens": sources, "decoder_input_ids": written, "decoder_attention_mask": real}
  scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)

  def scores(titles: list[str], original: list[str]) -> dict[str, Any]:
    found = [scorer.score(headline, title) for headline, title in zip(headlines, titles, strict=True)]
    rouge = {name: float(np.mean([score[name].fmeasure for score in found])) for name in ("rouge1", "rougeL")}
    draws = np.random.default_rng(0).integers(0, len(found), (2000, len(found)))
    each = np.asarray([score["rougeL"].fmeasure for score in found])
    interval = np.quantile(each[draws].mean(1), [0.025, 0.975]).tolist()
    same = float(np.mean([a == b for a, b in zip(titles, original, strict=True)]))
    return {"same": same, **rouge, "interval": interval, "titles": titles[:5]}

  folder, outcomes = resolve_model(config.model), []
  read = [tokenizer.encode(text, add_special=True) for text in texts]
  print("original", file=sys.stderr, flush=True)
  original = rewrite(model, prepare(params), tokenizer, texts, TITLE)
  for name, rounded in (("onnxruntime, inputs as they are", False), ("onnxruntime, inputs in 8 bits", True)):
    print(name, file=sys.stderr, flush=True)
    outcomes.append({"name": name, **scores(by_onnxruntime(folder, tokenizer, read, rounded), original)})
  about = lambda tree: {  # noqa: E731
    "bits_per_weight": sizes(tree)["bits_per_weight"], "bytes_on_disk": weights_size(tree)
  }
  outcomes.append({"name": "original", **about(params), **scores(original, original)})
  for variant in variants_of(config):
    print(variant.name, file=sys.stderr, flush=True)
    tree, _ = compress(model, params, build(variant.recipe), calibration, jax.random.key(variant.seed))
    titles = rewrite(model, prepare(tree), tokenizer, texts, TITLE)
    recipe = [dict(link) for link in variant.recipe]
    outcomes.append({"name": variant.name, "recipe": recipe, **about(tree), **scores(titles, original)})
  return {"format": 1, "name": config.name, "model": config.model, "articles": len(texts), "calibration": len(sources),
          "versions": versions(), "device": device(), "rows": outcomes}  # fmt: skip


def main() -> int:
  """Runs the study, writes its result and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--config", type=Path, help="a config of title-t5 with named `variants`")
  what.add_argument("--rounded", action="store_true", help="instead: the original, inputs rounded as the files say")
  parser.add_argument("--articles", type=int, default=100, help="held-out articles")
  parser.add_argument("--rows", type=int, default=64, help="articles that calibrate")
  parser.add_argument("--out", type=Path, help="result; by default the config's name under experiments/results")
  parser.add_argument("overrides", nargs="*", help="dotted overrides")
  arguments = parser.parse_args()
  try:
    if arguments.rounded:
      result = as_the_files_round(arguments.articles)
    else:
      result = study(arguments.config, arguments.articles, arguments.rows, arguments.overrides)
  except LmcompressError as error:
    print(f"titles: {error}", file=sys.stderr)
    return 2
  out = arguments.out or RESULTS / f"{result['name']}.json"
  out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
  if arguments.rounded:
    for key in ("ours_as_onnxruntime", "ours_as_exact_onnxruntime", "onnxruntime_as_exact_onnxruntime"):
      print(f"{key.replace('_', ' ')}: {result[key]:.0%} of {result['articles']} titles")
    return 0
  print(f"{'variant':<32}{'bits':>6}{'MB':>7}{'same':>6}{'ROUGE-1':>9}{'ROUGE-L':>9}  95 % of resamples")
  for row in result["rows"]:
    size = f"{row['bits_per_weight']:>6.2f}{row['bytes_on_disk'] / 1e6:>7.1f}" if "bytes_on_disk" in row else " " * 13
    low, high = row["interval"]
    rouge = f"{row['rouge1']:>9.4f}{row['rougeL']:>9.4f}"
    print(f"{row['name']:<32}{size}{row['same']:>6.0%}{rouge}  {low:.4f} to {high:.4f}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
