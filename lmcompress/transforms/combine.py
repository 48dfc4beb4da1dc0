"""Combinators: transforms made of transforms, as in optax."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from lmcompress import tree
from lmcompress.arrays import InputArray, LearnedInputArray, MaskedArray, StoredArray, fetch
from lmcompress.types import CompressedArray, Evidence, Params, State, Transform, WeightError

STATISTICS = (
  "hessian", "reference_hessian", "mean", "second_moment", "absmax", "mean_abs", "minimum", "maximum", "histogram"
)  # fmt: skip
"""Evidence that is kept per weight; a matrix function asks for it by a keyword-only argument of that name."""


def chain(*transforms: Transform) -> Transform:
  """Applies transforms in order, each planned on the tree that the one before it left.

  `compress` drives the links one by one. Applied by hand, a chain with `"once"` links takes the whole tree.

  Raises:
    ValueError: the chain is empty, or mixes `"once"` and `"step"` links.
  """
  return named_chain(*((t.name or f"link{i}", t) for i, t in enumerate(transforms)))


def named_chain(*links: tuple[str, Transform]) -> Transform:
  """`chain` with a name for each link, shown in tables."""
  flat = tuple(part for name, t in links for part in (t.links or (t._replace(name=name),)))
  if not flat:
    raise ValueError("chain() needs at least one transform")
  if len(phases := {link.phase for link in flat}) > 1:
    raise ValueError(
      f"chain() mixes phases: {', '.join(f'{link.name} ({link.phase})' for link in flat)}; 'once' links go to compress "
      "and 'step' links into the training step"
    )
  once = phases == {"once"}
  driven = tuple(beneath_inputs(link) for link in flat) if once else flat

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    """Plans what sees this very tree; None marks a link that is planned at its turn."""
    return tuple(None if once and i else link.init(params, selected) for i, link in enumerate(driven))

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    states = []
    for link, planned in zip(driven, state, strict=True):
      planned = link.init(params, evidence.selected) if planned is None else planned
      params, planned = link.apply(params, planned, evidence)
      states.append(planned)
    return params, tuple(states)

  return Transform(
    init,
    apply,
    needs=frozenset().union(*(link.needs for link in flat)),
    phase=flat[0].phase,
    scope=max((link.scope for link in flat), key=("weight", "block", "model").index),
    name="chain",
    links=flat,
  )


Choose = Callable[[Params, frozenset[str] | None], frozenset[str]]
"""`(params, selected so far) -> selected`."""


def _restricted(choose: Choose, transform: Transform, where: str) -> Transform:
  """A transform that acts on what `choose` selects; a chain's links are restricted one by one."""

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = choose(params, selected)
    return _Plan(chosen, transform.init(params, chosen) if chosen else ())

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    if not state.chosen:
      return params, state
    params, inner = transform.apply(params, state.inner, dataclasses.replace(evidence, selected=state.chosen))
    return params, _Plan(state.chosen, inner)

  links = tuple(_restricted(choose, link, where) for link in transform.links)
  plan, made = None, transform.plan
  if made is not None:
    nothing = leafwise(lambda w: w, name=transform.name)
    plan = lambda state: _restricted(choose, made(state.inner) if state.chosen else nothing, where)  # noqa: E731
  return transform._replace(init=init, apply=apply, links=links, name=f"{transform.name} {where}", plan=plan)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("inner",), meta_fields=("chosen",))
@dataclasses.dataclass(frozen=True)
class _Plan:
  """The state of a restricted transform: the weights it acts on, and its own state."""

  chosen: frozenset[str]
  inner: Any


def at(pattern: str, transform: Transform) -> Transform:
  """Restricts a transform to the weights that `pattern` selects; the method still sees the whole tree.

  `*` stays within a path segment, `**` crosses them, and a pattern that matches an ancestor selects what is
  below. Norms and biases are never selected, embedding and head only when named.

  Raises (when planned):
    WeightError: nothing matches; shows the nearest paths.
  """

  def choose(params: Params, selected: frozenset[str] | None) -> frozenset[str]:
    found = tree.select(params, pattern)
    if selected is not None and not found & selected:
      raise WeightError(f"pattern {pattern!r} selects nothing of what the pattern around it selects")
    return found if selected is None else found & selected

  return _restricted(choose, transform, f"at {pattern}")


def partition(
  labels: Mapping[str, str] | Callable[[str], str | None], transforms: Mapping[str, Transform]
) -> Transform:
  """A transform for each label; unlabelled weights stay as they are.

  Args:
    labels: a weight's label by the first pattern that selects it, or a function of its path.
    transforms: the transform of each label.

  Raises:
    ValueError: a label has no transform (at once for a mapping, else when planned).
  """

  def label_of(path: str) -> str | None:
    if callable(labels):
      return labels(path)
    return next((label for pattern, label in labels.items() if tree.selects(pattern, path)), None)

  def check(used: set[str | None]) -> None:
    if unknown := used - {None, *transforms}:
      raise ValueError(
        f"partition: no transform for label {sorted(map(str, unknown))[0]!r}; labels are {sorted(transforms)}"
      )

  if not callable(labels):
    check(set(labels.values()))

  def choose(label: str) -> Choose:
    def of_label(params: Params, selected: frozenset[str] | None) -> frozenset[str]:
      found = {path: label_of(path) for path in tree.weights(params) if selected is None or path in selected}
      check(set(found.values()))
      return frozenset(path for path, name in found.items() if name == label)

    return of_label

  parts = [
    _restricted(choose(label), t if t.links or t.plan or t.phase != "once" else beneath_inputs(t), f"for {label}")
    for label, t in transforms.items()
  ]
  if any(t.links or t.plan or t.phase != "once" or t.scope != "weight" for t in parts):
    return chain(*parts)._replace(name="partition")

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    return tuple(part.init(params, selected) for part in parts)

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    done = []
    for part, planned in zip(parts, state, strict=True):
      params, planned = part.apply(params, planned, evidence)
      done.append(planned)
    return params, tuple(done)

  needs = frozenset().union(*(part.needs for part in parts))
  # one link: one pass over calibration serves all labels, each of which sees of inputs what it must
  return Transform(init, apply, needs=needs, name="partition", inputs=True)


def scheduled(transform: Transform, active: Callable[[jax.Array], Any]) -> Transform:
  """Applies a `"step"` transform only at the steps for which `active(step)` is true, under jit.

  Raises:
    ValueError: the transform may change the structure of the tree (`phase == "once"`).
  """
  if transform.phase != "step":
    raise ValueError(
      f"scheduled({transform.name}): a {transform.phase!r} transform may change the structure of the tree; "
      "schedule a 'step' transform, such as magnitude(sparsity=<a function of the step>)"
    )

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    return jax.lax.cond(
      jnp.asarray(active(jnp.asarray(evidence.step))),
      lambda p, s: transform.apply(p, s, evidence),
      lambda p, s: (p, s),
      params,
      state,
    )

  return transform._replace(apply=apply, needs=transform.needs | {"step"}, name=f"scheduled {transform.name}")


def path_key(key: jax.Array, path: str) -> jax.Array:
  """A key of one weight, the same wherever and in whatever order the weight is visited."""
  digest = 2166136261  # FNV-1a, 32 bits
  for byte in path.encode():
    digest = ((digest ^ byte) * 16777619) & 0xFFFFFFFF
  return jax.random.fold_in(key, digest)


def leafwise(
  fn: Callable[..., Any], *, name: str = "", phase: str = "once", check: Callable[[str, Any], None] | None = None
) -> Transform:
  """Lifts a function of one weight to the tree; its keyword-only arguments without a default are its needs.

  `fn(w, *, axis, hessian, key, ...)` may ask for `axis` (the contraction axis), `path`, `key`, `step`,
  `grads` or a statistic of the weight, and returns the leaf that takes the weight's place.

  Args:
    fn: the method on one matrix.
    name: what tables call it.
    phase: `"step"` if `fn` keeps the leaf's structure and jits.
    check: `(path, leaf)`, called when planned; raises `WeightError` for a weight that `fn` cannot take.
  """
  asked = [
    p.name for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty
  ]
  local = {"axis", "path"}

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    chosen = tree.default_selection(params) if selected is None else selected
    found = {path: leaf for path, leaf in tree.weights(params).items() if path in chosen}
    for path, leaf in found.items():
      if check is not None:
        check(path, fetch(leaf))
    return ()

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected

    def visit(path: str, leaf: Any) -> Any:
      given = {need: evidence_for(need, path, evidence, name or fn.__name__) for need in asked}
      return fn(leaf, **given)

    return tree.map_weights(visit, params, chosen), state

  return Transform(init, apply, needs=frozenset(asked) - local, phase=phase, name=name or fn.__name__)


def stagewise(
  fn: Callable[..., dict[str, Any]],
  *,
  name: str,
  needs: frozenset[str],
  check: Callable[[str, Any], None] | None = None,
) -> Transform:
  """Lifts a function of the linears that read one input, which share their statistics.

  Args:
    fn: `({path: leaf}, **evidence) -> {path: leaf}`, a keyword for each need.
    needs: statistics.
    check: `(path, leaf)`, called when planned.
  """

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    return leafwise(lambda w: w, check=check).init(params, selected)

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    chosen = tree.default_selection(params) if evidence.selected is None else evidence.selected
    for members, given in by_stage(params, chosen, evidence, needs, name):
      for path, leaf in fn(members, **given).items():
        params = tree.put(params, path, leaf)
    return params, state

  return Transform(init, apply, needs=needs, name=name)


def by_stage(
  params: Params, chosen: frozenset[str], evidence: Evidence, needs: frozenset[str], name: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """The chosen weights in groups that share their statistics: `({path: leaf}, {need: value})` for each.

  Raises:
    WeightError: a weight has no such statistics.
  """
  groups: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
  for path, leaf in tree.weights(params).items():
    if path in chosen:
      given = {need: evidence_for(need, path, evidence, name) for need in sorted(needs)}
      groups.setdefault(id((evidence.statistics or {})[path]), ({}, given))[0][path] = leaf
  return list(groups.values())


INPUTS = (InputArray, LearnedInputArray)
"""What stands over a weight and acts on its input."""


def beneath_inputs(transform: Transform) -> Transform:
  """The transform on the weights beneath an `InputArray` or `LearnedInputArray`: what is done to their inputs stays."""
  if transform.inputs:
    return transform

  def init(params: Params, selected: frozenset[str] | None = None) -> State:
    return transform.init(_bare(params)[0], selected)

  def apply(params: Params, state: State, evidence: Evidence) -> tuple[Params, State]:
    inner, over = _bare(params)
    given = {name: getattr(evidence, name) for name in ("grads", "fisher", "reference")}
    evidence = dataclasses.replace(evidence, **{name: x if x is None else _bare(x)[0] for name, x in given.items()})
    done, state = transform.apply(inner, state, evidence)
    for path, (leaf, weight) in over.items():
      made = tree.get(done, path)
      if made is weight:
        done = tree.put(done, path, leaf)
      elif made is not None and isinstance(whole := fetch(leaf), INPUTS):
        done = tree.put(done, path, dataclasses.replace(whole, weight=made))
    return done, state

  return transform._replace(init=init, apply=apply)


def _bare(params: Params) -> tuple[Params, dict[str, tuple[Any, Any]]]:
  """The tree with weights in the place of what stands on their inputs; by path, what stood there and its weight.

  What lies in a file and is no array is opened when it is read.
  """
  over: dict[str, tuple[Any, Any]] = {}
  for path, leaf in tree.weights(params).items():
    if isinstance(leaf, INPUTS):
      over[path] = leaf, leaf.weight
    elif isinstance(leaf, StoredArray) and not leaf.dense:
      over[path] = leaf, dataclasses.replace(leaf, read=functools.partial(beneath, leaf))
  for path, (_, weight) in over.items():
    params = tree.put(params, path, weight)
  return params, over


def beneath(leaf: Any) -> Any:
  """The weight beneath what is done to its input."""
  whole = fetch(leaf)
  return whole.weight if isinstance(whole, INPUTS) else whole


def sequentially(name: str, transform: Transform, sequential: str) -> Transform:
  """The transform with statistics of each `stage` taken after the stages before it, or of a whole `block` at once.

  Raises:
    ValueError: neither is asked.
  """
  if sequential not in ("stage", "block"):
    raise ValueError(f"{name}(sequential={sequential!r}): stage or block")
  return transform._replace(scope="block") if sequential == "block" else transform


def side_by_side(weights: Mapping[str, Any], solved: Any) -> Iterator[tuple[str, Any, Any]]:
  """Takes apart what was solved for weights put side by side: `(path, weight, its columns of every array)`."""
  start = 0
  for path, w in weights.items():
    end = start + w.shape[1]
    yield path, w, jax.tree.map(lambda x, start=start, end=end: x[:, start:end], solved)
    start = end


def evidence_for(need: str, path: str, evidence: Evidence, name: str) -> Any:
  """What a method asks for of one weight, by name; raises where it was not collected."""
  if need == "axis":
    return tree.contraction_axis(path)
  if need == "path":
    return path
  if need == "key" and evidence.key is not None:
    return path_key(evidence.key, path)
  if need == "step" and evidence.step is not None:
    return evidence.step
  if need in ("grads", "fisher", "reference") and (given := getattr(evidence, need)) is not None:
    found = tree.get(given, path)
    if found is None:
      raise WeightError(f"{name} at {path} needs {need!r}, and what was given has no such weight")
    return found
  found = (evidence.statistics or {}).get(path, {}).get(need)
  if found is None:
    raise WeightError(
      f"{name} at {path} needs {need!r}, which compress collects for the linears of blocks, from calibration tokens"
    )
  return found


def require_dense(name: str, path: str, leaf: Any) -> None:
  """Raises unless the weight is dense or a masked dense one, with finite floating values."""
  values = leaf.values if isinstance(leaf, MaskedArray) else leaf
  if isinstance(values, CompressedArray):
    raise WeightError(f"{name} at {path}: the weight is already stored as {values.kind}; start from dense weights")
  if not jnp.issubdtype(values.dtype, jnp.floating):
    raise WeightError(f"{name} at {path}: dtype is {values.dtype}, a floating dtype is needed")
  if not isinstance(values, jax.core.Tracer) and not bool(_finite(values)):
    raise WeightError(f"{name} at {path}: the weight holds NaN or infinity; repair or exclude it with at(pattern, ...)")


@functools.partial(jax.jit)
def _finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))
