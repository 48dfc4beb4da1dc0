"""Paths and maps over a parameter tree, and its two halves: what trains and what does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lmcompress import ops, tree
from lmcompress.arrays import MaskedArray, QuantizedArray
from lmcompress.transforms import at, chain, magnitude, round_to_nearest
from lmcompress.types import Evidence, WeightError


def apply(transform, params):
  return transform.apply(params, transform.init(params), Evidence())[0]


@pytest.fixture(scope="module")
def compressed(tiny):
  """Codes with a real minimum, masks over dense values, masks over codes, and dense weights."""
  minimum = round_to_nearest(group_size=16, symmetric=False, zero="real", scale_dtype="float32")
  links = {
    "layers/*/mlp/up": minimum, "layers/*/mlp/down": magnitude(0.5),
    "layers/*/attn/q": chain(magnitude(0.5), minimum), "layers/*/attn/k": round_to_nearest(group_size=16),
  }
  return apply(chain(*(at(pattern, link) for pattern, link in links.items())), tiny[1])


def test_flatten_in_natural_order():
  layers = {name: {"up": {"kernel": name}} for name in ("10", "9", "0", "1")}
  params = {"layers": layers, "embed": {"table": "e"}}
  assert list(tree.flatten(params)) == [
    "embed/table", "layers/0/up/kernel", "layers/1/up/kernel", "layers/9/up/kernel", "layers/10/up/kernel"]
  assert tree.unflatten(tree.flatten(params)) == params


def test_flatten_does_not_enter_composites(compressed):
  leaves = tree.flatten(compressed)
  assert isinstance(leaves["layers/0/mlp/up/kernel"], QuantizedArray)
  assert isinstance(leaves["layers/0/attn/q/kernel"], MaskedArray)
  assert set(tree.weights(compressed)) == {path for path in leaves if path.endswith(("kernel", "table"))}


def test_get_and_put():
  params = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert tree.get(params, "a/c/d") == 2 and tree.get(params, "a/c") == {"d": 2}
  assert tree.get(params, "a/x") is None and tree.get(params, "a/b/deeper") is None
  changed = tree.put(params, "a/b", 9)
  assert changed == {"a": {"b": 9, "c": {"d": 2}}, "e": 3} and params["a"]["b"] == 1
  assert changed["a"]["c"] is params["a"]["c"]
  assert tree.put(params, "new/deep/path", 5)["new"] == {"deep": {"path": 5}}


def test_maps(compressed):
  seen = []
  tree.map_weights(lambda path, leaf: seen.append(path) or leaf, compressed)
  assert seen == list(tree.weights(compressed))
  same = tree.map_leaves(lambda path, leaf: leaf, compressed)
  assert jax.tree.structure(same) == jax.tree.structure(compressed)
  one = tree.map_weights(lambda path, leaf: None, compressed, {"embed/table", "final_norm/scale"})
  assert tree.get(one, "embed/table") is None and tree.get(one, "final_norm/scale") is not None


@pytest.mark.parametrize("pattern, path, answer", [
  ("layers/*/mlp", "layers/3/mlp/up/kernel", True),
  ("layers/*/mlp", "layers/3/attn/q/kernel", False),
  ("layers/*", "layers/3", True),
  ("layers/*", "layers", False),
  ("layers/*/up", "layers/3/mlp/up", False),  # a star stays within one segment
  ("layers/**/up", "layers/3/mlp/up/kernel", True),
  ("layers/**/up", "layers/up", True),  # crossing none
  ("**/up", "up/kernel", True),
  ("**/up", "layers/3/mlp/cup/kernel", False),
  ("**", "anything/at/all", True),
  ("layers/1", "layers/10/mlp/up/kernel", False),
  ("layers/1*", "layers/10/mlp/up/kernel", True),
  ("layers/*/*/up", "layers/3/mlp/up/kernel", True),
  ("layers/*/mlp/**", "layers/3/mlp/up/kernel", True),
  ("embed", "embedding/table", False),
  ("a.b", "a.b/kernel", True),
  ("a.b", "axb/kernel", False),  # a dot is a dot
  ("layers/*/mlp/u", "layers/3/mlp/up/kernel", False),
])
def test_matches(pattern, path, answer):
  assert tree.matches(pattern, path) is answer


def test_axis_goes_by_the_name():
  assert tree.contraction_axis("layers/0/mlp/up/kernel") == -2 and tree.contraction_axis("embed/table") == -1
  assert tree.is_weight("head/table")
  assert not tree.is_weight("final_norm/scale") and not tree.is_weight("q/bias")


def test_partition_and_combine_are_inverse(compressed):
  train, rest = tree.partition(compressed)
  back = tree.combine(train, rest)
  assert jax.tree.structure(back) == jax.tree.structure(compressed)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(compressed), strict=True):
    assert a is b
  assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(train))
  up = train["layers"]["0"]["mlp"]["up"]["kernel"]
  assert up.codes.data is None and up.scale is not None and up.minimum is not None
  q = train["layers"]["0"]["attn"]["q"]["kernel"]
  assert q.mask.data is None and q.values.codes.data is None and q.values.scale is not None
  assert train["layers"]["0"]["mlp"]["down"]["kernel"].values is not None


def test_partition_by_path(compressed):
  train, rest = tree.partition(compressed, lambda path: path.startswith("layers/1/mlp/"))
  held = {path for path, leaf in tree.flatten(train).items() if jax.tree.leaves(leaf)}
  assert held == {f"layers/1/mlp/{name}/kernel" for name in ("up", "down", "gate")}
  assert jax.tree.structure(tree.combine(train, rest)) == jax.tree.structure(compressed)


def test_an_adam_step_on_a_compressed_tree(tiny, compressed):
  """Gradients reach scales, minimums, masked values and dense weights; codes and masks stay to the bit."""
  model, _ = tiny
  compressed = {**compressed, "layers": {"0": compressed["layers"]["0"]}}  # one layer has every form
  train, rest = tree.partition(compressed)
  tokens = jnp.arange(12).reshape(2, 6)
  optimizer = optax.adam(1e-2)

  def loss(train):
    logits = model.apply(tree.combine(train, rest), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

  @jax.jit
  def step(train, state):
    value, grads = jax.value_and_grad(loss)(train)
    updates, state = optimizer.update(grads, state, train)
    return optax.apply_updates(train, updates), state, value, grads

  state, values = optimizer.init(train), []
  trained = train
  for _ in range(5):
    trained, state, value, grads = step(trained, state)
    values.append(float(value))
  assert values[-1] < values[0] - 0.1
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
  done = tree.combine(trained, rest)
  for path in ("layers/0/mlp/up/kernel", "layers/0/attn/k/kernel"):
    before, after = tree.get(compressed, path), tree.get(done, path)
    assert after.codes.data is before.codes.data and bool(jnp.any(after.scale != before.scale))
  down = tree.get(done, "layers/0/mlp/down/kernel")
  assert down.mask.data is tree.get(compressed, "layers/0/mlp/down/kernel").mask.data
  assert float(jnp.mean(down.materialize() == 0)) == 0.5  # the mask held


def test_stack_and_unstack(compressed):
  stacked = tree.stack_layers(compressed)
  up = stacked["layers"]["mlp"]["up"]["kernel"]
  assert up.shape == (2, 32, 64) and stacked["embed"] is compressed["embed"]
  back = tree.unstack_layers(stacked)
  assert jax.tree.structure(back) == jax.tree.structure(compressed)
  for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(compressed), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_a_scan_over_stacked_layers_is_a_loop(compressed):
  stacked, x = tree.stack_layers(compressed)["layers"]["mlp"], jnp.ones((3, 32))

  def body(h, mlp):
    return ops.linear(ops.linear(h, mlp["up"]["kernel"]), mlp["down"]["kernel"]), None

  scanned = jax.jit(lambda stacked: jax.lax.scan(body, x, stacked)[0])(stacked)
  h = x
  for i in ("0", "1"):
    h, _ = body(h, compressed["layers"][i]["mlp"])
  np.testing.assert_allclose(scanned, h, rtol=1e-4, atol=1e-5)


def test_stacking_sorts_layers_by_number():
  params = {"layers": {str(i): {"up": {"kernel": jnp.full((1,), i)}} for i in (10, 2, 1)}}
  np.testing.assert_array_equal(tree.stack_layers(params)["layers"]["up"]["kernel"][:, 0], [1, 2, 10])


@pytest.mark.parametrize("change", ["shape", "structure", "form", "dtype"])
def test_unlike_layers_are_not_stacked(tiny, change):
  params = tiny[1]
  kernel = params["layers"]["1"]["mlp"]["up"]["kernel"]
  other = {
    "shape": lambda: kernel[:, :32],
    "structure": lambda: {"deeper": kernel},
    "form": lambda: apply(magnitude(0.5), {"kernel": kernel})["kernel"],
    "dtype": lambda: kernel.astype(jnp.bfloat16),  # stacking would widen it without a word
  }[change]()
  with pytest.raises(WeightError, match="layers/1 differs from layers/0"):
    tree.stack_layers(tree.put(params, "layers/1/mlp/up/kernel", other))


def test_leaf_nbits():
  assert tree.leaf_nbits(jnp.zeros((4, 8), jnp.bfloat16)) == 4 * 8 * 16
  masked = apply(magnitude(0.5), {"kernel": jnp.zeros((32, 8))})["kernel"]
  assert tree.leaf_nbits(masked) == masked.nbits == 32 * 8 * 33
