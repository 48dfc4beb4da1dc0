"""Perplexity, KL and sizes against plain NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from lmcompress import ops, tree
from lmcompress.evaluate import (
  Score,
  compare,
  compression_efficiency,
  perplexity,
  pruning_sensitivity,
  quantization_error,
  sizes,
  speedup,
)
from lmcompress.evaluate.latency import kernels, latency
from lmcompress.ops import backend
from lmcompress.transforms.round_to_nearest import quantize_matrix


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(0, 64, (3, 24), np.int32)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nll(model, params, tokens, mask=None):
  logp = log_softmax(model.apply(params, tokens, attention_mask=mask))[:, :-1]
  return -np.take_along_axis(logp, tokens[:, 1:, None], -1)[..., 0]


def test_perplexity_equals_float64(tiny, tokens):
  model, params = tiny
  expected = np.exp(nll(model, params, tokens).mean())
  assert perplexity(model, params, tokens) == pytest.approx(expected, rel=1e-5)
  assert perplexity(model, params, tokens, batch=3) == pytest.approx(expected, rel=1e-5)


def test_padding_is_masked(tiny, tokens):
  model, params = tiny
  short = perplexity(model, params, tokens[:, :10])
  mask = np.arange(24)[None] < 10
  assert perplexity(model, params, tokens, attention_mask=np.repeat(mask, 3, 0)) == pytest.approx(short, rel=1e-5)


def test_stride_scores_only_new_tokens(tiny, tokens):
  model, params = tiny
  text = tokens[0]
  rows = np.stack([text[i : i + 12] for i in (0, 4, 8, 12)])
  losses = nll(model, params, rows)
  expected = np.exp(np.concatenate([losses[0], *(row[-4:] for row in losses[1:])]).mean())
  assert perplexity(model, params, rows, stride=4) == pytest.approx(expected, rel=1e-5)


def test_kl_and_agreement_equal_float64(tiny, tokens):
  model, params = tiny
  small = tree.map_weights(
    lambda p, w: quantize_matrix(w, bits=2, group_size=16, axis=tree.contraction_axis(p)), params
  )
  total = {"same": Score(0, 0, 0, 0), "small": Score(0, 0, 0, 0)}
  for _, scores in compare(model, params, {"same": params, "small": small}, tokens):
    total = {k: total[k] + scores[k] for k in total}
  a, b = (log_softmax(model.apply(p, tokens))[:, :-1] for p in (params, small))
  expected = (np.exp(a) * (a - b)).sum(-1).mean()
  assert total["small"].summary()["kl"] == pytest.approx(expected, rel=1e-4)
  assert total["small"].summary()["top1"] == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean())
  assert total["small"].summary()["accuracy"] == pytest.approx((b.argmax(-1) == tokens[:, 1:]).mean())
  assert total["same"].summary()["kl"] == 0 and total["same"].summary()["top1"] == 1


def test_done_windows_are_skipped(tiny, tokens):
  model, params = tiny
  assert [row for row, _ in compare(model, params, {"a": params}, tokens, {0: None, 2: None})] == [1]


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (np.zeros((0, 4), np.int32), "predict"),
    (np.zeros((2, 1), np.int32), "predict"),
    (np.zeros(4, np.int32), "length"),
    (np.zeros((2, 4)), "integers"),
  ],
)
def test_bad_tokens(tiny, bad, message):
  model, params = tiny
  with pytest.raises(ValueError, match=message):
    perplexity(model, params, bad)


def test_sizes_count_every_part(tiny):
  _, params = tiny
  found = sizes(params)
  count = sum(leaf.size for leaf in tree.flatten(params).values())
  assert found["parameters"] == count and found["nbits"] == 32 * count and found["bits_per_weight"] == 32
  small = tree.map_weights(
    lambda p, w: quantize_matrix(w, bits=4, group_size=32, axis=tree.contraction_axis(p)), params
  )
  assert sizes(small)["bits_per_weight"] == pytest.approx(4 + 16 / 32)


def test_latency_reports_medians(tiny):
  model, params = tiny
  found = latency(model, params, prefill=8, decode=3, rounds=1)
  assert found["prefill"] > 0 and found["decode"] > 0 and found["backend"].startswith(backend.describe())
  assert found["depth"] == 8
  with pytest.raises(ValueError, match="context"):
    latency(model, params, prefill=10**6)
  with pytest.raises(ValueError, match="depth=-1"):
    latency(model, params, prefill=8, depth=-1)


@pytest.mark.parametrize("depth", [0, 12])
def test_decoding_starts_at_a_depth_of_its_own(tiny, depth):
  model, params = tiny
  found = latency(model, params, prefill=8, decode=2, rounds=1, depth=depth)
  assert found["depth"] == depth and found["prefill"] > 0 and found["decode"] > 0


def test_what_multiplies_is_named(tiny):
  _, params = tiny
  small = tree.map_weights(
    lambda p, w: quantize_matrix(w, bits=4, group_size=32, axis=tree.contraction_axis(p)), params
  )
  with ops.use_backend("reference"):
    assert kernels(small) == "reference (XLA cpu)"
  if backend.runs_native():
    assert kernels(params).endswith("dense weights by XLA")
    assert kernels(small).endswith("weights on the reference")
    assert kernels(ops.prepare(small)) == backend.describe()


def test_the_articles_examples():
  assert quantization_error(3.14, 3.1) == pytest.approx(0.04)
  assert pruning_sensitivity([1, 2, 3], [0, 2, 3]) == pytest.approx(1 / np.sqrt(14))
  assert compression_efficiency(100, 50) == 0.5
  assert speedup(100, 50) == 2
  for bad in (lambda: pruning_sensitivity([0, 0], [0, 0]), lambda: compression_efficiency(0, 1), lambda: speedup(1, 0)):
    with pytest.raises(ValueError):
      bad()
