"""Combinators: what a pattern selects, what a chain plans on, and what each refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import MaskedArray, QuantizedArray
from lmcompress.calibration import compress
from lmcompress.transforms import (
  at,
  chain,
  freeze,
  leafwise,
  magnitude,
  named_chain,
  partition,
  round_to_nearest,
  scheduled,
)
from lmcompress.transforms.combine import path_key
from lmcompress.transforms.schedules import every
from lmcompress.types import Evidence, Transform, WeightError


@pytest.fixture(scope="module")
def params(tiny):
  return tiny[1]


def mark():
  """Adds one: what changed is what was selected."""

  def plus_one(w):
    return w + 1

  return leafwise(plus_one, name="mark")


def apply(transform, params, **evidence):
  return transform.apply(params, transform.init(params), Evidence(**evidence))[0]


def changed(before, after):
  old = tree.flatten(before)
  return {path for path, leaf in tree.flatten(after).items() if leaf is not old[path]}


LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
ALL = {f"layers/{i}/{name}/kernel" for i in (0, 1) for name in LINEARS}
MLP = {path for path in ALL if "/mlp/" in path}


# ------------------------------------------------------------------------------------- patterns

@pytest.mark.parametrize("pattern, selected", [
  ("layers/*", ALL),
  ("layers", ALL),
  ("**", ALL),
  ("layers/*/mlp", MLP),
  ("layers/*/mlp/", MLP),
  ("**/mlp", MLP),
  ("**/mlp/**", MLP),
  ("layers/0", {path for path in ALL if path.startswith("layers/0/")}),
  ("layers/1/attn/q/kernel", {"layers/1/attn/q/kernel"}),
  ("**/q", {"layers/0/attn/q/kernel", "layers/1/attn/q/kernel"}),
  ("layers/*/*/*/kernel", ALL),
  ("layers/*/attn/[qk]", None),  # no brackets in a pattern
  ("embed", {"embed/table"}),
  ("embed/table", {"embed/table"}),
  ("head", {"head/table"}),
  ("**/table", {"embed/table", "head/table"}),
  ("*/table", {"embed/table", "head/table"}),
  ("*", ALL),  # tables are there too, but not named
  ("layer", None),
  ("layers/7", None),
  ("layers/*/attn_norm", None),  # norms are never selected
  ("final_norm/scale", None),
])
def test_what_a_pattern_selects(params, pattern, selected):
  if selected is None:
    with pytest.raises(WeightError, match="selects no weight"):
      at(pattern, mark()).init(params)
    return
  assert tree.select(params, pattern) == selected
  assert changed(params, apply(at(pattern, mark()), params)) == selected


def test_without_a_pattern_kernels_only(params):
  assert changed(params, apply(mark(), params)) == ALL


def test_no_match_shows_the_nearest_paths(params):
  with pytest.raises(WeightError, match=r"'layers/\*/mlp/upp' selects no weight among 16; .*mlp/up/kernel"):
    at("layers/*/mlp/upp", mark()).init(params)


def test_at_within_at_is_the_intersection(params):
  done = apply(at("layers/0", at("**/mlp", mark())), params)
  assert changed(params, done) == {path for path in MLP if path.startswith("layers/0/")}


def test_at_hides_nothing_from_the_method(params):
  """The method sees the whole tree and is told what is selected."""
  seen = {}

  def see(params, state, evidence):
    seen["paths"], seen["selected"] = set(tree.flatten(params)), evidence.selected
    return params, state

  method = Transform(lambda params, selected=None: (), see, name="see")
  apply(at("layers/0/mlp/up", method), params)
  assert seen["paths"] == set(tree.flatten(params))
  assert seen["selected"] == {"layers/0/mlp/up/kernel"}


# ------------------------------------------------------------------------------------- chain

def test_a_chain_plans_each_link_on_the_tree_before_it(params):
  seen = []

  def link(name, make):
    def init(params, selected=None):
      seen.append((name, type(tree.get(params, "layers/0/mlp/up/kernel")).__name__))
      return make.init(params, selected)

    return make._replace(init=init)

  both = chain(link("prune", magnitude(0.5)), link("round", round_to_nearest(group_size=16)))
  apply(both, params)
  assert seen[-1] == ("round", "MaskedArray")


def test_a_link_that_the_tree_before_it_does_not_admit_raises(params):
  twice = chain(round_to_nearest(group_size=16), round_to_nearest(group_size=16))
  with pytest.raises(WeightError, match="already stored as int4"):
    apply(twice, params)


def test_chain_in_order(params):
  def times(factor):
    def scale(w):
      return w * factor

    return leafwise(scale, name=f"times{factor}")

  done = apply(chain(mark(), times(2), at("layers/0/mlp/up", mark())), params)
  up = params["layers"]["0"]["mlp"]["up"]["kernel"]
  np.testing.assert_allclose(done["layers"]["0"]["mlp"]["up"]["kernel"], (up + 1) * 2 + 1, rtol=1e-6)
  q = params["layers"]["0"]["attn"]["q"]["kernel"]
  np.testing.assert_allclose(done["layers"]["0"]["attn"]["q"]["kernel"], (q + 1) * 2, rtol=1e-6)


def test_at_inside_and_around_a_chain(params):
  inside = apply(chain(at("layers/0", magnitude(0.5)), at("**/mlp", round_to_nearest(group_size=16))), params)
  assert isinstance(inside["layers"]["0"]["attn"]["q"]["kernel"], MaskedArray)
  assert isinstance(inside["layers"]["1"]["mlp"]["up"]["kernel"], QuantizedArray)
  assert isinstance(inside["layers"]["1"]["attn"]["q"]["kernel"], jax.Array)
  around = at("layers/0/mlp", chain(magnitude(0.5), round_to_nearest(group_size=16)))
  done = apply(around, params)
  assert changed(params, done) == {path for path in MLP if path.startswith("layers/0")}
  assert [link.name for link in around.links] == [
    "magnitude at layers/0/mlp", "round_to_nearest at layers/0/mlp"]


def test_chains_flatten_and_names_show(params):
  links = chain(chain(magnitude(0.5), freeze()), mark()).links
  assert [link.name for link in links] == ["magnitude", "freeze", "mark"]
  named = named_chain(("prune", magnitude(0.5)), ("deploy", freeze()))
  assert [link.name for link in named.links] == ["prune", "deploy"]


def test_a_chain_unites_what_its_links_need():
  def curved(w, *, hessian, axis):
    return w

  def drawn(w, *, key, path):
    return w

  both = chain(leafwise(curved), leafwise(drawn), magnitude(0.5, scope="global"))
  assert both.needs == {"hessian", "key"} and both.scope == "model" and both.phase == "once"
  assert chain(magnitude(lambda step: 0.5)).phase == "step"


def test_an_empty_chain_raises():
  with pytest.raises(ValueError, match="at least one transform"):
    chain()


def test_a_chain_does_not_mix_phases():
  with pytest.raises(ValueError, match="phase"):
    chain(magnitude(0.0), magnitude(lambda step: 0.5))


# ------------------------------------------------------------------------------------- partition

def test_partition_by_the_first_pattern_that_matches(params):
  split = partition(
    {"layers/0/mlp/down": "prune", "layers/*/mlp": "round"},
    {"prune": magnitude(0.5), "round": round_to_nearest(group_size=16)},
  )
  done = apply(split, params)
  assert isinstance(done["layers"]["0"]["mlp"]["down"]["kernel"], MaskedArray)
  assert isinstance(done["layers"]["1"]["mlp"]["down"]["kernel"], QuantizedArray)
  assert changed(params, done) == MLP


def test_partition_by_a_function(params):
  label = lambda path: "mark" if path.endswith("q/kernel") else None  # noqa: E731
  split = partition(label, {"mark": mark(), "other": mark()})
  assert changed(params, apply(split, params)) == {path for path in ALL if "/q/" in path}


def test_partition_within_a_selection(params):
  split = at("layers/0", partition({"**/mlp": "mark"}, {"mark": mark()}))
  assert changed(params, apply(split, params)) == {path for path in MLP if path.startswith("layers/0")}


def test_partition_refuses_unknown_labels(params):
  with pytest.raises(ValueError, match=r"no transform for label 'corse'; labels are \['coarse'\]"):
    partition({"layers/*": "corse"}, {"coarse": mark()})
  with pytest.raises(ValueError, match="no transform for label 'x'"):
    partition(lambda path: "x", {"coarse": mark()}).init(params)


def test_partition_takes_tables_only_when_named(params):
  """The rule of patterns: embedding and head belong to a label only where its pattern names them."""
  everything = partition({"**": "mark"}, {"mark": mark()})
  assert changed(params, apply(everything, params)) == ALL
  named = partition({"embed": "mark"}, {"mark": mark()})
  assert changed(params, apply(named, params)) == {"embed/table"}


def test_partition_with_chains_runs_weight_by_weight(tiny):
  """`apply` gets any subtree: a chain inside a partition must not plan patterns anew on it."""
  model, params = tiny
  split = partition(
    {"layers/*/mlp": "both"}, {"both": chain(magnitude(0.5), at("**/down", round_to_nearest(group_size=16)))}
  )
  whole = apply(split, params)
  done, _ = compress(model, params, split)
  assert isinstance(done["layers"]["0"]["mlp"]["down"]["kernel"], QuantizedArray)
  assert isinstance(done["layers"]["0"]["mlp"]["up"]["kernel"], MaskedArray)
  assert jax.tree.structure(done) == jax.tree.structure(whole)


# ------------------------------------------------------------------------------------- scheduled

def test_scheduled_refuses_what_may_change_the_tree():
  with pytest.raises(ValueError, match=r"scheduled\(round_to_nearest\): a 'once' transform may change"):
    scheduled(round_to_nearest(), every(2))


def test_scheduled_acts_when_it_is_time(params):
  start = apply(magnitude(0.0), params)
  transform = scheduled(magnitude(lambda step: 0.5), every(3, start=3, end=6))
  assert transform.needs == {"step"}
  state = transform.init(start)
  update = jax.jit(lambda params, step: transform.apply(params, state, Evidence(step=step))[0])
  dropped = lambda p: float(jnp.mean(1 - p["layers"]["0"]["mlp"]["up"]["kernel"].mask.unpack()))  # noqa: E731
  for step, fraction in ((0, 0.0), (2, 0.0), (3, 0.5), (4, 0.0), (6, 0.5), (9, 0.0)):
    assert dropped(update(start, step)) == fraction
  assert update._cache_size() == 1


def test_scheduled_at_a_pattern(params):
  """What is selected is no array, yet part of a state that a training step carries."""
  start = apply(magnitude(0.0), params)
  transform = scheduled(at("layers/*/mlp", magnitude(lambda step: 0.5)), every(1))
  done = apply(transform, start, step=1)
  dropped = {path: float(jnp.mean(leaf.mask.unpack() == 0)) for path, leaf in tree.weights(done).items()
             if isinstance(leaf, MaskedArray)}
  assert {path for path, fraction in dropped.items() if fraction} == MLP


def test_every():
  due = [step for step in range(12) if bool(every(4, start=2, end=9)(jnp.asarray(step)))]
  assert due == [2, 6]
  with pytest.raises(ValueError, match="at least 1 step"):
    every(0)


# ------------------------------------------------------------------------------------- leafwise

def test_needs_come_from_keyword_only_arguments():
  def method(w, strength=2, *, axis, path, hessian, key, second_moment, damping=0.1):
    return w

  lifted = leafwise(method)
  assert lifted.needs == {"hessian", "key", "second_moment"}
  assert lifted.name == "method" and lifted.phase == "once" and lifted.scope == "weight"


def test_a_method_gets_what_it_asks_for(params):
  path = "layers/0/mlp/up/kernel"
  got = {}

  def method(w, *, axis, path, key, step, grads, hessian):
    got.update(axis=axis, path=path, key=key, step=step, grads=grads, hessian=hessian)
    return w

  transform = at("layers/0/mlp/up", leafwise(method))
  key, h = jax.random.key(3), jnp.eye(32)
  apply(transform, params, key=key, step=7, grads=params, statistics={path: {"hessian": h}})
  assert got["axis"] == -2 and got["path"] == path and got["step"] == 7
  assert got["hessian"] is h and got["grads"] is tree.get(params, path)
  assert jnp.array_equal(jax.random.key_data(got["key"]), jax.random.key_data(path_key(key, path)))


def test_a_table_is_contracted_along_its_features(params):
  axes = {}

  def method(w, *, axis, path):
    axes[path] = axis
    return w

  apply(at("**/table", leafwise(method)), params)
  assert axes == {"embed/table": -1, "head/table": -1}


@pytest.mark.parametrize("need, method", [
  ("hessian", lambda w, *, hessian: w), ("absmax", lambda w, *, absmax: w), ("key", lambda w, *, key: w),
  ("step", lambda w, *, step: w), ("grads", lambda w, *, grads: w),
])
def test_evidence_that_is_missing_raises(params, need, method):
  with pytest.raises(WeightError, match=f"method at layers/0/attn/k/kernel needs '{need}'"):
    apply(leafwise(method, name="method"), params)


def test_an_unnamed_method_goes_by_its_function(params):
  def curved(w, *, hessian):
    return w

  with pytest.raises(WeightError, match=r"^curved at layers/0/attn/k/kernel needs 'hessian'"):
    apply(leafwise(curved), params)


def test_grads_without_the_weight_raise(params):
  """A gradient tree that misses the weight is missing evidence, not None."""

  def method(w, *, grads):
    return w

  with pytest.raises(WeightError, match="needs 'grads'"):
    apply(at("layers/0/mlp/up", leafwise(method)), params, grads={"layers": {}})


def test_a_path_key_does_not_depend_on_order(params):
  """The same key for a weight alone, in another order, and in the whole tree; another for each path."""
  drawn = {}

  def draw(w, *, key, path):
    drawn.setdefault(path, []).append(int(jax.random.bits(key)))
    return w

  transform, key = leafwise(draw), jax.random.key(0)
  apply(transform, params, key=key)
  for path in reversed(sorted(ALL)):
    apply(transform, tree.unflatten({path: tree.get(params, path)}), key=key)
  assert set(drawn) == ALL
  assert all(first == second for first, second in drawn.values())
  assert len({first for first, _ in drawn.values()}) == len(ALL)


def test_check_runs_when_planned(params):
  def refuse(path, leaf):
    raise WeightError(f"refused {path}")

  with pytest.raises(WeightError, match="refused layers/0/mlp/up/kernel"):
    at("layers/0/mlp/up", leafwise(lambda w: w, name="n", check=refuse)).init(params)
