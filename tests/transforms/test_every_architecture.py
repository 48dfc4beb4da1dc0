"""Every method on every architecture: it acts, or says by name why not; `docs/architectures.md` holds the table."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmcompress as lmc
from lmcompress import tree
from lmcompress.arrays import GatedArray, gated
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, sequence_parallel, shard
from lmcompress.models import (
  GPT2,
  LSTM,
  T5,
  Bart,
  BartConfig,
  BartSizes,
  Bert,
  BertConfig,
  BertSizes,
  Encoded,
  Gemma,
  GemmaConfig,
  GemmaSizes,
  GPT2Config,
  GPT2Sizes,
  Llama,
  LlamaConfig,
  LlamaSizes,
  LSTMSizes,
  Phi,
  PhiConfig,
  PhiSizes,
  Seq2Seq,
  Seq2SeqSizes,
  T5Config,
  T5Sizes,
)
from lmcompress.transforms import METHODS, at, chain
from lmcompress.types import Evidence, WeightError

pytestmark = pytest.mark.usefixtures("few_programs_each")

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
TOKENS = np.random.default_rng(0).integers(0, 48, (4, 16)).astype(np.int32)
ARCHITECTURES = {  # each kernel 32 by 32 or by 128, so that functions of one matrix are compiled once for all
  "Llama": Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4, kv_heads=4)),
  "mixture": Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4, kv_heads=4,
                                                       experts=4)),
  "GPT2": GPT2(GPT2Config(head_dim=8, max_length=32), GPT2Sizes(vocab=48, embed=32, mlp=32, layers=2, heads=4)),
  "Gemma": Gemma(GemmaConfig(head_dim=8, query_scale=8.0, window=8, full_layers=(1,), score_cap=5.0),
                 GemmaSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4, kv_heads=4)),
  "Phi": Phi(PhiConfig(head_dim=8, turned=4), PhiSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4, kv_heads=4)),
  "Bert": Bert(BertConfig(head_dim=8, max_length=32), BertSizes(vocab=48, embed=32, mlp=32, layers=2, heads=4)),
  "Bart": Bart(BartConfig(head_dim=8, max_length=32),
               BartSizes(vocab=48, embed=32, mlp=32, layers=2, decoder_layers=2, heads=4)),
  "T5": T5(T5Config(head_dim=8), T5Sizes(vocab=48, embed=32, mlp=32, layers=2, decoder_layers=2, heads=4)),
  "LSTM": LSTM(sizes=LSTMSizes(vocab=48, embed=32, units=32, layers=2)),
  "Seq2Seq": Seq2Seq(sizes=Seq2SeqSizes(source=48, vocab=48, embed=32, units=32, layers=2)),
}
GIVEN = {  # what a method is asked here, where it must be asked or its defaults do not fit a matrix this small
  **{name: {"group_size": 16} for name in
     ("round_to_nearest", "gptq", "awq", "awq_scale", "any_precision", "fake_quantize")},
  **{name: {"sparsity": 0.5} for name in ("magnitude", "wanda", "sparse_gpt", "gradient", "sensitivity")},
  **{name: {"rank": 2} for name in ("lora", "dora", "low_rank_residual")},
  "hqq": {"group_size": 16}, "mixed_precision": {"bits": 4.5, "candidates": (3, 4, 8), "group_size": 16},
  "learned_rounding": {"group_size": 16, "steps": 2}, "alps": {"sparsity": 0.5, "iterations": 4},
  "quantize_activations": {"step": 0.05}, "prune_neurons": {"fraction": 0.25}, "prune_heads": {"count": 1},
  "prune_width": {"count": 8}, "prune_layers": {"count": 1, "ends": True}, "kmeans": {"clusters": 8},
  "share": {"values": 16}, "product_quantize": {"atoms": 8, "steps": 2}, "shrink": {"amount": 0.05},
  "sparse_code": {"atoms": 8, "group_size": 16, "nonzeros": 2, "steps": 2}, "truncated_svd": {"ratio": 0.8},
  "tie_layers": {"groups": [[0, 1]], "rank": 2}, "prune_gradually": {"end": 10, "interval": 2},
  "rigl": {"end": 10, "interval": 2}, "l0": {"end": 10},
}  # fmt: skip


def some_closed(w):
  """Every fourth gate closed."""
  if not isinstance(w, GatedArray):
    return w
  return dataclasses.replace(w, openness=w.openness.at[::4].set(-1.0))


FIRST = {  # what a method acts on, where that is not a dense tree
  "low_rank_residual": lambda: lmc.round_to_nearest(3, 16),
  "merge": lambda: chain(lmc.round_to_nearest(3, 16), lmc.low_rank_residual(2)),
  "freeze": lambda: lmc.magnitude(0.5),
  "prune_gradually": lambda: lmc.movement(),
  "rigl": lambda: lmc.magnitude(0.5),
  "l0": lambda: lmc.leafwise(lambda w, *, axis: gated(w, 4, axis)),
  "remove_closed": lambda: chain(lmc.hard_concrete(), lmc.leafwise(some_closed)),
}
WHOLE = (
  "rotate", "prune_width", "prune_layers", "prune_neurons", "prune_heads", "tie_layers", "share", "merge", "freeze",
  "hard_concrete", "l0", "remove_closed",
)  # fmt: skip
"""Methods of the whole model, which a pattern does not narrow."""
REASONS = {
  "predicts no next token": "no next token",
  "no axis of its own": "no such axis", "one weight that reads neurons": "no such axis",
  "no stage reads this norm": "norms apart",
  "norms lie on axes []": "no norm",
  "alone feeds what is selected": "nothing feeds it",
}
"""A word for the table, by what the error says."""


DEEP = ("prune_layers", "tie_layers")
"""Methods that mean more than one layer; the others are given one of each stack, which compiles half as much."""


@functools.cache
def model_of(name, deep):
  """`(model, params)`."""
  model = ARCHITECTURES[name]
  if not deep:
    depths = {key: 1 for key in ("layers", "decoder_layers") if hasattr(model.sizes, key)}
    model = dataclasses.replace(model, sizes=dataclasses.replace(model.sizes, **depths))
  return model, model.init(jax.random.key(0))


def given_to(model):
  """What a model is calibrated on."""
  more = {"decoder_input_ids": TOKENS[:, ::-1]} if "decoder_input_ids" in model.takes else {}
  return {"tokens": TOKENS, **more}


def output(model, params):
  inputs = given_to(model)
  given = model.apply(params, inputs.pop("tokens"), **inputs)
  return np.asarray(given.hidden if isinstance(given, Encoded) else given)


def form(params):
  return jax.tree.structure(params), [(x.shape, x.dtype) for x in jax.tree.leaves(params)]


@functools.cache
def outcome(architecture, method):
  """`yes`, or in a word why the method is refused."""
  (model, params), key = model_of(architecture, method in DEEP), jax.random.key(0)
  make = functools.partial(METHODS[method], **GIVEN.get(method, {}))
  transform = make() if method in WHOLE else at("**/layers/*", make())
  first = [at("**/layers/*", FIRST[method]())] if method in FIRST else []
  try:
    if transform.phase == "step":
      params = compress(model, params, first[0], given_to(model), key)[0] if first else params
      grads = tree.map_leaves(lambda _, x: jnp.ones(x.shape), params)
      done, _ = transform.apply(params, transform.init(params), Evidence(step=4, key=key, grads=grads))
    else:
      done, _ = compress(model, params, chain(*first, transform), given_to(model), key)
  except WeightError as error:
    names = (method.split("_")[0], architecture, *(t.name for t in first[:1] for t in (t.links or [t])))
    assert "\n" not in str(error) and any(name.split(" ")[0] in str(error) for name in names), error
    return next((word for text, word in REASONS.items() if text in str(error)), str(error))
  assert np.isfinite(output(model, done)).all()
  assert form(done) != form(params) or any(
    not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(done), jax.tree.leaves(params), strict=True)
  ), "nothing was done"
  return "yes"


def table():
  lines = ["| | " + " | ".join(f"`{name}`" for name in ARCHITECTURES) + " |", "|---" * (len(ARCHITECTURES) + 1) + "|"]
  lines += [f"| `{m}` | " + " | ".join(outcome(name, m) for name in ARCHITECTURES) + " |" for m in METHODS]
  return "\n".join(lines)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_acts_or_says_why_not(method):
  found = {name: outcome(name, method) for name in ARCHITECTURES}
  assert found["Llama"] == "yes"
  assert set(found.values()) <= {"yes", *REASONS.values()}, found


def test_the_page_holds_the_table():
  """Written anew with LMCOMPRESS_WRITE_DOCS=1."""
  text, whole = PAGE.read_text("utf-8"), table()
  assert "<!-- methods -->\n\n" in text and "\n\n<!-- end of methods -->" in text
  block = re.compile(r"(<!-- methods -->\n\n).*?(\n\n<!-- end of methods -->)", re.DOTALL)
  new = block.sub(lambda m: m[1] + whole + m[2], text)
  if os.environ.get("LMCOMPRESS_WRITE_DOCS"):
    PAGE.write_text(new, "utf-8")
  assert new == text or os.environ.get("LMCOMPRESS_WRITE_DOCS")


@pytest.mark.parametrize("name", ["mixture", "GPT2", "Gemma", "Phi", "Bert", "Bart", "T5"])
def test_tokens_in_parts_say_the_same(name):
  """Over two devices that split products and the tokens between them, against one; 1e-5 for another order of sums."""
  model, params = model_of(name, False)
  want, mesh = model.apply(params, **given_to(model)), make_mesh(tensor=2)
  with sequence_parallel(True), jax.set_mesh(mesh):
    lowered = jax.jit(model.apply).lower(shard(model, params, mesh), **given_to(model))
    found = lowered.compile()(shard(model, params, mesh), **given_to(model))
  assert "all-gather" in lowered.compile().as_text()
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5)
