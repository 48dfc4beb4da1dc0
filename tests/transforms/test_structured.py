"""Structured pruning: arrays get smaller by what arithmetic says, and what did nothing is not missed."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import load, save, tree
from lmcompress.calibration import compress
from lmcompress.distributed import make_mesh, shard
from lmcompress.evaluate.size import sizes
from lmcompress.generation.engine import Engine
from lmcompress.io import checkpoint
from lmcompress.models import (
  GPT2,
  Bert,
  BertConfig,
  BertSizes,
  GPT2Config,
  GPT2Sizes,
  Llama,
  LlamaConfig,
  LlamaSizes,
)
from lmcompress.transforms import (
  at,
  chain,
  magnitude,
  prune_heads,
  prune_layers,
  prune_neurons,
  prune_width,
  round_to_nearest,
)
from lmcompress.transforms.prune_entries import compensated, global_counts
from lmcompress.transforms.prune_width import _completed
from lmcompress.transforms.structure import remaining
from lmcompress.types import Block, Stage, WeightError

MODEL = Llama(LlamaConfig(head_dim=8), LlamaSizes(vocab=64, embed=48, mlp=64, layers=3, heads=6, kv_heads=3))
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))


def shapes(params, layer=1):
  return {
    path.removeprefix(f"layers/{layer}/").removesuffix("/kernel"): leaf.shape
    for path, leaf in tree.weights(params).items()
    if path.startswith(f"layers/{layer}/")
  }


def run(params, transform, model=MODEL, tokens=TOKENS):
  return compress(model, params, transform, tokens, jax.random.key(0))[0]


METHODS = {
  "neurons": lambda: prune_neurons(0.25),
  "neurons global": lambda: prune_neurons(0.25, scope="global", score="magnitude"),
  "neurons taylor": lambda: prune_neurons(count=16, score="taylor", compensate=False),
  "groups": lambda: prune_heads(count=1),
  "queries": lambda: prune_heads(count=1, what="queries"),
  "width": lambda: prune_width(0.125),
  "width plain": lambda: prune_width(count=6, compensate=False),
  "layers": lambda: prune_layers(1),
  "layers kl": lambda: prune_layers(1, score="kl", iterative=True),
}


@pytest.fixture(scope="module")
def results(params):
  return functools.cache(lambda method: run(params, METHODS[method]()))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_removes(method, params, results):
  assert sizes(results(method))["parameters"] < sizes(params)["parameters"]
  assert np.isfinite(np.asarray(MODEL.apply(results(method), TOKENS[:1, :8]))).all()


def test_shapes(params, results):
  """Removed from every weight that has the axis, and from no other."""
  assert shapes(results("neurons")) == {
    **shapes(params), "mlp/gate": (48, 48), "mlp/up": (48, 48), "mlp/down": (48, 48)
  }  # fmt: skip
  assert shapes(results("groups")) == {
    **shapes(params), "attn/q": (48, 32), "attn/k": (48, 16), "attn/v": (48, 16), "attn/o": (32, 48)
  }  # fmt: skip
  assert shapes(results("queries")) == {**shapes(params), "attn/q": (48, 24), "attn/o": (24, 48)}
  narrow = results("width")
  assert {s for shape in shapes(narrow).values() for s in shape} == {42, 48, 24, 64}
  assert narrow["embed"]["table"].shape == (64, 42) and "head" not in narrow  # tied stays tied
  assert narrow["final_norm"]["scale"].shape == narrow["layers"]["0"]["mlp_norm"]["scale"].shape == (42,)
  assert set(results("layers")["layers"]) == {"0", "2"}
  widths = {layer["mlp"]["up"]["kernel"].shape[1] for layer in results("neurons global")["layers"].values()}
  assert sum(l["mlp"]["up"]["kernel"].shape[1] for l in results("neurons global")["layers"].values()) == 3 * 48
  assert len(widths) > 1


@pytest.mark.parametrize("method", ["neurons global", "queries", "width", "layers"])
def test_the_result_is_an_ordinary_model(method, results, tmp_path):
  """It runs, generates with its cache, saves and loads to the bit, and trains."""
  done = results(method)
  save(tmp_path / "model", MODEL, done)
  model, again, _ = load(tmp_path / "model")
  assert checkpoint.tree_hash(again) == checkpoint.tree_hash(done)
  whole = np.asarray(model.apply(again, TOKENS[:1, :8]))
  assert np.isfinite(whole).all()
  tokens = [chunk[0] for chunk in Engine(model, again).stream([TOKENS[0, :8].tolist()], 3)]
  assert np.concatenate([np.ravel(t) for t in tokens])[0] == whole[0, -1].argmax()
  gradient = jax.grad(lambda p: jnp.sum(jnp.square(model.apply(p, TOKENS[:1, :8]))))(again)
  assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("method", ["neurons", "groups", "width", "layers"])
def test_the_same_on_a_mesh(method, params, results):
  done = run(shard(MODEL, params, make_mesh(data=1, tensor=2)), METHODS[method]())
  before, after = tree.flatten(results(method)), tree.flatten(done)
  assert {p: x.shape for p, x in before.items()} == {p: x.shape for p, x in after.items()}
  for path, leaf in before.items():
    np.testing.assert_allclose(np.asarray(after[path]), np.asarray(leaf), atol=2e-3)


def test_what_gives_nothing_is_not_missed(params):
  """Neurons, a group and a query head whose output is read with weight 0 go first, and the logits stay."""
  for layer in ("0", "1", "2"):
    down, o = (params["layers"][layer][a][b]["kernel"] for a, b in (("mlp", "down"), ("attn", "o")))
    params = tree.put(params, f"layers/{layer}/mlp/down/kernel", down.at[jnp.array([3, 17, 40])].set(0))
    params = tree.put(params, f"layers/{layer}/attn/o/kernel", o.at[16:32].set(0))
  want = MODEL.apply(params, TOKENS)
  for transform in (
    prune_neurons(3 / 64, scope="global"), prune_heads(count=1, compensate=False),
    chain(prune_neurons(count=3), prune_heads(1 / 3)),
  ):  # fmt: skip
    done = run(params, transform)
    np.testing.assert_allclose(MODEL.apply(done, TOKENS), want, atol=2e-5)


def test_a_channel_without_content_is_not_missed(params):
  """Channels that nothing writes and the norms' mean square with them."""
  dead = jnp.array([5, 30])
  for path, leaf in tree.flatten(params).items():
    if path.endswith(("o/kernel", "down/kernel", "embed/table")):
      params = tree.put(params, path, leaf.at[:, dead].set(0))
  done = run(params, prune_width(count=2))
  np.testing.assert_allclose(MODEL.apply(done, TOKENS), MODEL.apply(params, TOKENS), atol=3e-4)
  assert run(params, prune_width(count=9, multiple=8))["embed"]["table"].shape == (64, 40)


@pytest.mark.parametrize("kind", ["GPT2", "Bert"])
def test_norms_that_subtract_a_mean_follow(kind):
  """Their scale and bias make up for the mean and the deviation of what went, where they feed linears alone."""
  sizes = {"vocab": 64, "embed": 48, "mlp": 32, "layers": 2, "heads": 2}
  if kind == "GPT2":
    model = GPT2(GPT2Config(head_dim=8, max_length=32), GPT2Sizes(**sizes))
  else:
    model = Bert(BertConfig(head_dim=8, max_length=32), BertSizes(**sizes))
  params = model.init(jax.random.key(2))
  small = jnp.arange(6)  # channels of the stream with an offset and little else, which readers hardly read
  for path, leaf in tree.flatten(params).items():
    if path.endswith(("o/kernel", "down/kernel", "embed/table", "positions/table")):
      params = tree.put(params, path, leaf.at[:, small].set(0.0))
    if path.endswith(("q/kernel", "k/kernel", "v/kernel", "up/kernel")):
      params = tree.put(params, path, leaf.at[small].multiply(1e-3))
  table = params["embed"]["table"]
  params = tree.put(params, "embed/table", table.at[:, small].set(4 * jnp.std(table)))
  narrow = run(params, prune_width(count=6, compensate=False), model)
  assert narrow["embed"]["table"].shape == (64, 42)
  kept = remaining(model, params, "embed", np.arange(6, 48))
  assert {p: x.shape for p, x in tree.flatten(kept).items()} == {p: x.shape for p, x in tree.flatten(narrow).items()}
  output = lambda tree_: np.asarray(model.apply(tree_, TOKENS).hidden if kind == "Bert" else model.apply(tree_, TOKENS))  # noqa: E731
  if kind == "Bert":  # no stage names its norms: they stay
    np.testing.assert_array_equal(output(narrow), output(kept))
  else:
    lost = [np.abs(output(p) - output(params)).mean() for p in (narrow, kept)]
    assert lost[0] < 0.5 * lost[1], lost


def test_scales_of_zero_under_norms_that_subtract_a_mean():
  """Nothing is seen of such a channel; what it is on average follows from those that are seen."""
  model = GPT2(GPT2Config(head_dim=8, max_length=32), GPT2Sizes(vocab=64, embed=48, mlp=32, layers=1, heads=2))
  params = model.init(jax.random.key(2))
  for path, leaf in tree.flatten(params).items():
    if path.endswith("norm/scale"):
      params = tree.put(params, path, leaf.at[3].set(0.0))
  params = tree.put(params, "embed/table", params["embed"]["table"].at[:, 3].set(1.0))
  same = run(params, prune_width(count=0), model)
  np.testing.assert_allclose(model.apply(same, TOKENS), model.apply(params, TOKENS), atol=1e-6)
  seen = np.array([1.0, 0.2, 9.0, 0.8])
  np.testing.assert_allclose(_completed(seen, np.array([True, True, False, True]), 4.0), [1.0, 0.2, 2.0, 0.8])


def test_a_head_of_masked_tokens_gets_its_own_table():
  model = Bert(BertConfig(head_dim=8, max_length=32),
               BertSizes(vocab=64, embed=48, mlp=32, layers=1, heads=2, masked=True))  # fmt: skip
  narrow = run(model.init(jax.random.key(0)), prune_width(count=6), model)
  assert narrow["embed"]["table"].shape == (64, 42) and narrow["head"]["table"].shape == (64, 48)
  assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(model.apply(narrow, TOKENS)))


def test_compensation_is_the_least_squares_solution():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
  w, stays = rng.normal(size=(12, 5)), np.arange(12) % 3 != 0
  found = np.asarray(compensated(jnp.asarray(w), jnp.asarray(x.T @ x), jnp.asarray(stays), 0.0), np.float64)
  best = np.linalg.lstsq(x[:, stays], x @ w, rcond=None)[0]
  np.testing.assert_allclose(found[stays], best, rtol=2e-3, atol=2e-3)
  assert not found[~stays].any()


def test_compensation_helps(params):
  want = MODEL.apply(params, TOKENS)
  error = lambda t: float(jnp.linalg.norm(MODEL.apply(run(params, t), TOKENS) - want))  # noqa: E731
  assert error(prune_neurons(0.5)) < error(prune_neurons(0.5, compensate=False))
  assert error(prune_heads(count=1)) < error(prune_heads(count=1, compensate=False))


def test_global_counts_leave_one_everywhere():
  shares = {"a": np.array([0.0, 0.0, 0.0]), "b": np.array([0.5, 0.2, 0.3])}
  assert global_counts(shares, 0.5) == {"a": 2, "b": 1}


def test_the_layer_that_does_nothing_goes(params):
  """A layer that adds nothing to the stream has no influence; the first and the last stay unless asked."""
  for part in ("attn/o", "mlp/down"):
    params = tree.put(params, f"layers/1/{part}/kernel", jnp.zeros_like(tree.get(params, f"layers/1/{part}/kernel")))
  for score in ("influence", "kl"):
    done = run(params, prune_layers(1, score=score))
    assert set(done["layers"]) == {"0", "2"}
    np.testing.assert_allclose(MODEL.apply(done, TOKENS), MODEL.apply(params, TOKENS), atol=1e-5)
  assert len(run(params, prune_layers(2, ends=True))["layers"]) == 1


def test_the_articles_rule(params):
  """Layers of which less is left than a threshold go, after weights have been pruned."""
  done = run(params, chain(at("layers/1", magnitude(0.9)), prune_layers(threshold=0.5)))
  assert set(done["layers"]) == {"0", "2"}
  size = sum(w.size for p, w in tree.weights(params).items() if p.startswith("layers/1/"))
  assert set(run(params, prune_layers(threshold=float(size + 1)))["layers"]) == {"0", "2"}
  assert set(run(params, prune_layers(threshold=float(size)))["layers"]) == {"0", "1", "2"}


def test_patterns(params):
  done = run(params, at("layers/1/mlp", prune_neurons(0.5)))
  assert [done["layers"][i]["mlp"]["up"]["kernel"].shape[1] for i in "012"] == [64, 32, 64]
  with pytest.raises(WeightError, match="has the same neurons and is not selected"):
    run(params, at("layers/1/mlp/up", prune_neurons(0.5)))
  with pytest.raises(WeightError, match="leave the pattern out"):
    run(params, at("layers/1", prune_width(0.5)))


BAD = {
  "all neurons": (lambda: prune_neurons(count=64), "64 of 64 neurons would go"),
  "all heads": (lambda: prune_heads(count=3), "3 of 3 groups would go"),
  "all queries": (lambda: prune_heads(count=2, what="queries"), "2 of 2 queries would go"),
  "all layers": (lambda: prune_layers(3, ends=True), "leave at least one"),
  "ends": (lambda: prune_layers(2), "only with ends: true"),
  "all channels": (lambda: prune_width(count=48), "at least one stays"),
  "no neuron": (lambda: prune_neurons(0.005), r"of 64 neurons that is less than half of one.*a fraction above 0.00781"),
  "no head": (lambda: prune_heads(0.1), "of 3 groups that is less than half of one"),
  "no query": (lambda: prune_heads(0.1, what="queries"), "of 2 queries that is less than half of one"),
  "no channel": (lambda: prune_width(0.01), "of 48 channels none would go"),
  "none of all": (lambda: prune_neurons(0.002, scope="global", score="magnitude"), "of 192 neurons none would go"),
  "no multiple": (lambda: prune_width(count=6, multiple=16), "none would go, by rounding; ask for 16 or more"),
  "no such axis": (lambda: prune_neurons(0.5, axis="embed"), r"its own axes are \['group', 'kv', 'mlp'\]"),
}


@pytest.mark.parametrize("score", ["influence", "kl"])
def test_scores_that_are_no_number_are_named(params, score):
  broken = tree.put(params, "layers/1/mlp_norm/scale", params["layers"]["1"]["mlp_norm"]["scale"] * jnp.nan)
  with pytest.raises(WeightError, match=r"prune_layers at layers/\d: its score is no number"):
    run(broken, prune_layers(1, score=score))


@pytest.mark.parametrize("name", BAD)
def test_removing_too_much(params, name):
  make, message = BAD[name]
  with pytest.raises(WeightError, match=message):
    run(params, make())


@pytest.mark.parametrize("make", [
  lambda: prune_neurons(), lambda: prune_neurons(0.5, 3), lambda: prune_neurons(1.0), lambda: prune_neurons(-0.1),
  lambda: prune_neurons(count=-1), lambda: prune_neurons(0.5, score="none"), lambda: prune_heads(0.5, what="x"),
  lambda: prune_heads(0.5, what="queries", scope="global"), lambda: prune_width(), lambda: prune_width(1.0),
  lambda: prune_width(count=-1), lambda: prune_layers(), lambda: prune_layers(1, threshold=0.5),
  lambda: prune_layers(-1), lambda: prune_layers(threshold=float("nan")), lambda: prune_layers(1, score="none"),
  lambda: prune_neurons(float("nan")), lambda: prune_width(float("nan")),
])  # fmt: skip
def test_arguments_out_of_range(make):
  with pytest.raises(ValueError, match="prune_"):
    make()


def test_compressed_weights_are_refused_and_masks_follow(params):
  cheap = {"score": "magnitude", "compensate": False}
  for make in (lambda: prune_neurons(0.25, **cheap), lambda: prune_heads(count=1, **cheap), lambda: prune_width(0.125)):
    with pytest.raises(WeightError, match="already stored as int4"):
      run(params, chain(round_to_nearest(4, 16), make()))
    done = run(params, chain(magnitude(0.5), make(), round_to_nearest(4, 16)))
    assert np.isfinite(np.asarray(MODEL.apply(done, TOKENS))).all()


class Unseen:
  """An architecture of its own: no attention, other names, a block that mixes channels by two matrices and a scale."""

  axes = types.MappingProxyType({
    "embed/table": ("word", "stream"),
    "steps/*/norm/scale": ("stream",),
    "steps/*/widen/kernel": ("stream", ("bank", "cell")),
    "steps/*/widen/bias": (("bank", "cell"),),
    "steps/*/narrow/kernel": (("bank", "cell"), "stream"),
  })

  def init(self, key):
    keys = jax.random.split(key, 5)
    step = lambda a, b: {  # noqa: E731
      "norm": {"scale": jnp.ones(16)},
      "widen": {"kernel": jax.random.normal(a, (16, 24)) / 4, "bias": jnp.linspace(-1, 1, 24)},
      "narrow": {"kernel": jax.random.normal(b, (24, 16)) / 5},
    }
    return {"embed": {"table": jax.random.normal(keys[0], (32, 16))},
            "steps": {"0": step(keys[1], keys[2]), "1": step(keys[3], keys[4])}}  # fmt: skip

  def extents(self, params):
    return {"cell": 4}

  def start(self, params, inputs):
    return {"x": params["embed"]["table"][jnp.asarray(inputs["tokens"])]}

  def blocks(self, params):
    stages = (Stage("widen", ("widen",), "norm"), Stage("narrow", ("narrow",), "widen"))
    return tuple(Block(f"steps/{i}", "step", stages) for i in sorted(params.get("steps", {})))

  def run(self, block, params, carry, taps=()):
    p, x = tree.get(params, block.path), carry["x"]
    y = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
    z = jax.nn.relu(y @ p["widen"]["kernel"] + p["widen"]["bias"])
    return {"x": x + z @ p["narrow"]["kernel"]}, {"widen": y, "narrow": z}

  def finish(self, params, carry, last=False):
    return carry["x"] @ params["embed"]["table"].T

  def apply(self, params, tokens, **_):
    carry = self.start(params, {"tokens": tokens})
    for block in self.blocks(params):
      carry, _ = self.run(block, params, carry)
    return self.finish(params, carry)


def test_an_architecture_never_seen():
  """The axes say what to remove: banks of cells, a bias with them, the stream, and steps."""
  model, tokens = Unseen(), TOKENS % 32
  params = model.init(jax.random.key(1))
  dead = tree.put(params, "steps/1/narrow/kernel", params["steps"]["1"]["narrow"]["kernel"].at[8:12].set(0))
  banks = run(dead, prune_heads(count=1), model, tokens)
  assert banks["steps"]["1"]["widen"]["bias"].shape == (20,)
  np.testing.assert_allclose(banks["steps"]["1"]["widen"]["bias"], jnp.linspace(-1, 1, 24)[jnp.r_[0:8, 12:24]])
  narrow = run(params, prune_width(0.25), model, tokens)
  assert narrow["embed"]["table"].shape == (32, 12) and narrow["steps"]["0"]["norm"]["scale"].shape == (12,)
  assert narrow["steps"]["0"]["widen"]["kernel"].shape == (12, 24)
  shorter = run(params, prune_layers(1, ends=True), model, tokens)
  assert len(shorter["steps"]) == 1
  for done in (banks, narrow, shorter):
    assert np.isfinite(np.asarray(model.apply(done, tokens))).all()
