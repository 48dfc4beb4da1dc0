"""Plans against what runs here: bytes on devices, messages of compiled programs, caches; and models too large."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress import planner, tree
from lmcompress.cli import app
from lmcompress.distributed import RULES, make_mesh, sequence_parallel, shard
from lmcompress.distributed.accelerators import ACCELERATORS
from lmcompress.distributed.sharding import over_data
from lmcompress.errors import ConfigError, LmcompressError
from lmcompress.evaluate import profiling
from lmcompress.generation.cache import init_cache
from lmcompress.models import Llama, LlamaConfig, LlamaSizes
from lmcompress.plan_request import PRESETS, Asked, parse_topology
from lmcompress.planner import (
  Plan,
  estimate,
  largest_batch,
  ring,
  serve_plan,
  train_plan,
)
from lmcompress.shapes import shapes_of, stored
from lmcompress.training import Distill, Labels, Match, Pipeline, Training, compiled_step, start, train_step
from lmcompress.transforms import at, chain, lora
from lmcompress.virtual import VirtualStep, temporaries

SIZES = LlamaSizes(vocab=64, embed=32, mlp=64, layers=2, heads=8, kv_heads=8, tied=False)
MODEL = Llama(LlamaConfig(head_dim=8), SIZES)
PARAMS = MODEL.init(jax.random.key(0))
SHAPES = shapes_of(MODEL)
BATCH, LENGTH = 16, 16


BESIDES = "activations, and what else the step makes"


@pytest.fixture
def uncompiled(monkeypatch):
  """Plans without what a compiled step would say."""
  monkeypatch.setattr(planner, "temporaries", lambda steps: [0] * len(steps))


def on(shape, **over):
  """A compiled step over a mesh, and its state."""
  mesh = make_mesh(**shape)
  training = Training(steps=1, batch=BATCH, **over)
  with jax.set_mesh(mesh):
    state = start(shard(MODEL, PARAMS, mesh), training, lambda path: True)
    pieces, rows = training.accumulate, BATCH // training.accumulate
    batch = over_data(mesh, {"tokens": jnp.zeros((pieces, rows, LENGTH), jnp.int32)}, rows, axis=1)
    moving = state._replace(kept=None)
    args = (MODEL, moving, state.kept, batch, training, None, None, None, jax.random.key(0))
    return state, train_step.lower(*args).compile()


@pytest.mark.parametrize("shape", [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_weights_and_moments_are_what_a_device_holds(shape, uncompiled):
  mesh = make_mesh(**shape)
  state = start(shard(MODEL, PARAMS, mesh), Training(steps=1, batch=BATCH), lambda path: True)
  first = lambda x: x.addressable_shards[0].data.nbytes  # noqa: E731
  plan = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH), LENGTH, shape)
  assert plan.nbytes["weights, float32"] == sum(map(first, jax.tree.leaves(state.trained)))
  moments = [x for x in jax.tree.leaves(state.moments) if x.ndim]  # not the count of steps
  assert plan.nbytes["moments"] == sum(map(first, moments))


@pytest.mark.parametrize(("shape", "over"), [
  ({"fsdp": 8}, {}), ({"data": 2, "fsdp": 2, "tensor": 2}, {}), ({"fsdp": 4, "tensor": 2}, {"accumulate": 2}),
])  # fmt: skip
def test_a_step_holds_what_is_planned(shape, over):
  """XLA's account of the step that runs here, at once, and of the plan, which is of a process of its own, in order."""
  _, step = on(shape, **over)
  plan = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH, **over), LENGTH, shape)
  memory = step.memory_analysis()
  assert plan.total == pytest.approx(memory.argument_size_in_bytes + memory.temp_size_in_bytes, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "over"), [({"fsdp": 8}, {}), ({"tensor": 2}, {"remat": False})])
def test_a_deep_model_is_drawn_on_from_a_shallow_one(shape, over):
  model = Llama(LlamaConfig(head_dim=8), dataclasses.replace(SIZES, layers=7))
  training, shapes = Training(steps=1, batch=BATCH, **over), shapes_of(model)
  plan = train_plan(model, shapes, training, LENGTH, shape)
  every = frozenset(tree.flatten(shapes))
  held, = temporaries([VirtualStep(model, shapes, training, LENGTH, every, None, shape, RULES)])
  made = plan.nbytes["gradients"] + plan.nbytes[BESIDES]
  assert made == pytest.approx(held, rel=0.05)


def test_a_compiled_step_of_a_mesh_is_that_of_one_device():
  """The same program, made from where arrays lie and from a state that lies there."""
  _, step = on({"data": 2, "fsdp": 4}, average=0.9)
  params = shard(MODEL, PARAMS, make_mesh(data=2, fsdp=4))
  training = Training(steps=1, batch=BATCH, average=0.9)
  made = compiled_step(MODEL, params, training, LENGTH, lambda path: True)
  assert profiling.needs(made) == profiling.needs(step)


@pytest.mark.parametrize(("trains", "teacher"), [("", False), ("norm", False), ("", True)])
def test_gradients_add_up_without_all_blocks_gathered(trains, teacher):
  """Weights do not change between pieces of a batch, and XLA would gather them all before; those of a teacher too."""
  params = shard(MODEL, PARAMS, make_mesh(fsdp=8))
  loss = Distill("forward") if teacher else Labels()
  training = Training(steps=1, batch=BATCH, accumulate=2, loss=loss)
  guide = (MODEL, params) if teacher else None
  text = compiled_step(MODEL, params, training, LENGTH, lambda path: trains in path, None, guide).as_text()
  assert "all-gather(" not in text.split("ENTRY")[1] and "all-gather(" in text


def test_what_no_process_makes():
  """More devices than there can be, and a step that is none."""
  step = VirtualStep(MODEL, SHAPES, Training(steps=1, batch=1), LENGTH, frozenset(["x"]), None, {}, RULES)
  with pytest.raises(ConfigError, match="a plan of 8192 devices"):
    temporaries([step._replace(sizes={"fsdp": 8192})])
  with pytest.raises(LmcompressError, match="does not compile: ValueError: nothing trains"):
    temporaries([step])


@pytest.mark.slow
@pytest.mark.parametrize("ways", [3, 1 << 16])
def test_devices_that_repeat_the_same_hold_the_same(ways):
  few, many = (train_plan(MODEL, SHAPES, Training(steps=1, batch=2 * n), LENGTH, {"data": n}) for n in (2, ways))
  assert few.nbytes == many.nbytes


@pytest.mark.parametrize("shape", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_adapters_over_codes_and_a_teacher(shape):
  """What trains has moments and gradients, what stays has not; the teacher lies beside them and sends for itself."""
  recipe = chain(at("layers/*", lmc.round_to_nearest(4, 16)), at("layers/*", lora(2)))
  small = lmc.compress(MODEL, PARAMS, recipe, key=jax.random.key(0))[0]
  deltas = lambda path: tree.matches("**/delta", path)  # noqa: E731
  training = Training(steps=1, batch=BATCH, loss=Distill("forward"))
  state = start(shard(MODEL, small, make_mesh(**shape)) if shape else small, training, deltas)
  first = lambda arrays: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays) if x.ndim)  # noqa: E731
  shapes = stored(SHAPES, recipe, jnp.float32)
  plan = train_plan(MODEL, shapes, training, LENGTH, shape, trainable=deltas, teacher=(MODEL, SHAPES))
  assert plan.nbytes["weights, float32"] == plan.nbytes["gradients"] == first(state.trained)
  assert plan.nbytes["weights that do not train"] == first(state.kept)
  assert plan.nbytes["moments"] == first(state.moments)
  whole = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH), LENGTH, shape)
  assert plan.nbytes["the teacher"] == whole.nbytes["weights, float32"]
  sent, all_sent = ({m.what: m.nbytes for m in p.messages if m.axis == "data"} for p in (plan, whole))
  assert not shape or sent["gradients"] < all_sent["gradients"] / 4
  assert any(m.what == "weights of the teacher" for m in plan.messages) == bool(shape)
  with pytest.raises(ConfigError, match="nothing trains"):
    train_plan(MODEL, SHAPES, training, LENGTH, shape, trainable=deltas, teacher=(MODEL, SHAPES))


def test_what_a_plan_of_training_takes_as_it_is():
  """Predictions written before, a teacher of another width, and a stage in which nothing trains."""
  written = Training(steps=1, batch=BATCH, loss=Distill("forward"))
  plain = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH), LENGTH, {})
  assert train_plan(MODEL, SHAPES, written, LENGTH, {}).nbytes == plain.nbytes
  wide = Llama(LlamaConfig(head_dim=8), dataclasses.replace(SIZES, embed=64))
  matched = dataclasses.replace(written, match=Match(hidden=1.0))
  beside = train_plan(MODEL, SHAPES, matched, LENGTH, {}, teacher=(wide, shapes_of(wide)))
  assert beside.nbytes["the teacher"] > 2 * plain.nbytes["weights, float32"] * 0.9
  staged = dataclasses.replace(Training(steps=1, batch=BATCH), accumulate=2)
  early = train_plan(MODEL, SHAPES, staged, LENGTH, {"pipe": 2}, trainable=lambda path: path.startswith("layers/0/"))
  assert early.nbytes["weights, float32"] == sum(x.size * 4 for x in tree.weights(SHAPES["layers"]["0"]).values()) + 256


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [{"pipe": 2}, {"pipe": 2, "fsdp": 2, "data": 2}, {"pipe": 2, "tensor": 4}])
def test_a_stage_is_planned_as_it_lies(shape, tied, uncompiled):
  """Weights, moments and a table that two stages have, of the device that holds most."""
  model = Llama(LlamaConfig(head_dim=8), dataclasses.replace(SIZES, tied=tied))
  params = model.init(jax.random.key(0))
  training = Training(steps=1, batch=BATCH, accumulate=2)
  rest = {axis: n for axis, n in shape.items() if axis != "pipe"}
  mesh = make_mesh(**{**rest, "fsdp": 2 * shape.get("fsdp", 1)})
  pipeline = Pipeline(model, shard(model, params, mesh), training, 2)
  state = pipeline.spread(start(shard(model, params, mesh), training, lambda path: True))

  def held(arrays):
    found = collections.Counter()
    for x in arrays:
      for piece in x.addressable_shards:
        found[piece.device] += piece.data.nbytes
    return max(found.values())

  plan = train_plan(model, shapes_of(model), training, LENGTH, shape)
  assert plan.nbytes["weights, float32"] == held(jax.tree.leaves(state.trained))
  assert plan.nbytes["moments"] == held([x for x in jax.tree.leaves(state.moments) if x.ndim])
  sent, = (m for m in plan.messages if m.axis == "pipe")
  ways = shape.get("data", 1) * shape.get("fsdp", 1)
  assert sent.kind == "send" and sent.count == 4 and sent.nbytes == 4 * (BATCH // 2 // ways) * LENGTH * 32 * 4


def test_more_stages_than_blocks_are_refused():
  with pytest.raises(ConfigError, match="mesh pipe=4: 4 stages of 2 blocks"):
    train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH), LENGTH, {"pipe": 4})


@pytest.mark.parametrize("remat", [False, True])
def test_gathers_are_those_of_the_compiled_step(remat, uncompiled):
  """As many, and of as many bytes as the whole arrays have."""
  _, step = on({"fsdp": 8}, remat=remat)
  found = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", step.as_text())
  plan = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH, remat=remat), LENGTH, {"fsdp": 8})
  gather, = (m for m in plan.messages if m.kind == "all-gather")
  assert gather.count == len(found)
  whole = sum(4 * int(np.prod([int(n) for n in dims.split(",")])) for dims in found)
  assert gather.nbytes == pytest.approx(ring("all-gather", whole, 8))


def test_tokens_in_parts_send_as_much_and_keep_less():
  """A sum of all is one in parts and a gather; each block's input is kept in parts."""
  training, mesh = Training(steps=1, batch=BATCH), {"tensor": 4}
  plans = [train_plan(MODEL, SHAPES, training, LENGTH, mesh, {**RULES, "length": to}) for to in (None, "tensor")]
  sent = [[m for m in plan.messages if "embedding" not in m.what] for plan in plans]
  assert {m.kind for m in sent[0]} == {"all-reduce"} and {m.kind for m in sent[1]} == {"all-gather", "reduce-scatter"}
  assert sum(m.nbytes for m in sent[1]) == pytest.approx(sum(m.nbytes for m in sent[0]))
  assert plans[1].nbytes[BESIDES] < plans[0].nbytes[BESIDES]
  with pytest.raises(ConfigError, match="tensor=4 does not divide rows of 6 tokens"):
    train_plan(MODEL, SHAPES, training, 6, mesh, {**RULES, "length": "tensor"})


@pytest.mark.parametrize("remat", [False, True])
def test_gathers_of_tokens_are_those_of_the_compiled_step(remat, uncompiled):
  with sequence_parallel(True):
    _, step = on({"tensor": 8}, remat=remat)
  plan = train_plan(
    MODEL, SHAPES, Training(steps=1, batch=BATCH, remat=remat), LENGTH, {"tensor": 8}, {**RULES, "length": "tensor"}
  )
  found = re.findall(r" all-gather(?:-start)?\(", step.as_text())
  assert sum(m.count for m in plan.messages if m.kind == "all-gather") == len(found)


def test_sums_are_those_of_the_compiled_forward_pass():
  plan = serve_plan(MODEL, SHAPES, 8, LENGTH, {"tensor": 8})
  mesh = make_mesh(tensor=8)
  text = jax.jit(MODEL.apply).lower(shard(MODEL, PARAMS, mesh), jnp.zeros((8, 1), jnp.int32)).compile().as_text()
  sums = collections.Counter(re.findall(r" (all-\w+|reduce-scatter)(?:-start)?\(", text))
  assert sum(m.count for m in plan.messages) == sums["all-reduce"] and set(sums) == {"all-reduce"}


@pytest.mark.parametrize("shape", [{"data": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}])
def test_a_cache_is_as_large_as_planned(shape):
  """Of one device's rows and heads, in two bytes an entry."""
  plan = serve_plan(MODEL, SHAPES, 8, 64, shape)
  cache = init_cache(MODEL, PARAMS, 8, 64, jnp.bfloat16)
  held = sum(x.nbytes for layer in cache.layers.values() for x in layer.buffers)
  assert plan.nbytes["keys and values"] == held / (shape.get("data", 1) * shape.get("tensor", 1))


def test_compressed_weights_are_planned_as_they_are_stored():
  recipe = lmc.at("layers/*", lmc.round_to_nearest(bits=4, group_size=16))
  small, _ = lmc.compress(MODEL, PARAMS, recipe)
  shapes = stored(SHAPES, recipe, jnp.float32)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), small)


def test_a_recipe_that_reads_weights_is_refused():
  with pytest.raises(ConfigError, match=r"reads weights.*round_to_nearest"):
    stored(SHAPES, lmc.at("layers/*", lmc.gptq(bits=4, group_size=16)))


@pytest.mark.parametrize(("kind", "want"), [("all-gather", 75.0), ("reduce-scatter", 75.0), ("all-reduce", 150.0)])
def test_a_ring_sends(kind, want):
  assert ring(kind, 100.0, 4) == want


def test_an_estimate_by_hand():
  """100 devices of 989 Tflop/s with 3.35 TB/s and 450 GB/s."""
  from lmcompress.planner import Message

  sent = [Message("x", "all-reduce", "tensor", 1, 90e9), Message("y", "all-reduce", "data", 1, 10e9)]
  plan = Plan([], {"weights": 1.0}, sent, 8 * 16 * 989e12, 6.7e12, 1)
  found = estimate(plan, ACCELERATORS["h100"], {"data": 16, "tensor": 8})
  assert found.arithmetic == pytest.approx(1.0) and found.memory == pytest.approx(2.0)
  assert found.sending == pytest.approx(90 / 450 + 10 / 50)
  assert found.least == pytest.approx(2.0) and found.most == pytest.approx(3.4)
  assert found.joules == pytest.approx(700 * 128 * 2.0)
  assert estimate(plan, ACCELERATORS["tpu-v5p"], {"data": 16}).joules is None


@pytest.mark.parametrize(("room", "want"), [(99, 0), (100, 4), (199, 4), (200, 8), (1000, 40), (1099, 40)])
def test_the_largest_batch(room, want):
  assert largest_batch(lambda n: 25.0 * n, room, 4) == want


def test_operations_of_a_step(uncompiled):
  """Six for each weight and token, and those of attention; eight where blocks are computed again."""
  weights = sum(x.size for path, x in lmc.tree.weights(SHAPES).items() if path != "embed/table")
  attended = 2 * 2 * (2 * 64) * (LENGTH + 1) / 2  # scores and values, of two layers whose queries are 64 wide
  plain = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH, remat=False), LENGTH, {})
  assert plain.operations == pytest.approx(3 * BATCH * LENGTH * (2 * weights + attended))
  again = train_plan(MODEL, SHAPES, Training(steps=1, batch=BATCH), LENGTH, {})
  assert again.operations == pytest.approx(plain.operations * 4 / 3)


def test_a_mixture():
  """A device's experts, two of eight products for a token, and of a token's step the bytes of two experts."""
  model = Llama(LlamaConfig(head_dim=8), dataclasses.replace(SIZES, experts=8))
  shapes = shapes_of(model)
  own = sum(x.size for path, x in lmc.tree.weights(shapes).items() if "/experts/" in path)
  rest = sum(x.size for path, x in lmc.tree.weights(shapes).items() if "/experts/" not in path)
  alone, split = (serve_plan(model, shapes, 1, LENGTH, sizes) for sizes in ({}, {"expert": 4}))
  dense = serve_plan(MODEL, SHAPES, 1, LENGTH, {})
  assert alone.nbytes["weights"] - split.nbytes["weights"] == 4 * own * 3 / 4
  assert alone.operations - dense.operations == pytest.approx(2 * (own / 4 - own / 8 + 2 * 32 * 8))
  assert alone.read == pytest.approx(4 * (rest + own / 4) + 4 * 5 * 32 + alone.nbytes["keys and values"])
  sums, = split.messages
  assert (sums.axis, sums.count) == ("expert", 2)
  plan = train_plan(model, shapes, Training(steps=1, batch=BATCH), LENGTH, {"expert": 4, "data": 2})
  placed = start(shard(model, model.init(jax.random.key(0)), make_mesh(expert=4, data=2)),
                 Training(steps=1, batch=BATCH), lambda path: True)  # fmt: skip
  assert plan.nbytes["weights, float32"] == sum(x.addressable_shards[0].data.nbytes
                                                for x in jax.tree.leaves(placed.trained))  # fmt: skip


def test_a_model_that_fits_nowhere_here():
  """405 billion weights over 128 devices: from shapes alone."""
  model = PRESETS["llama3-405b"]
  shapes = shapes_of(model)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 405_853_388_800
  plan = serve_plan(model, stored(shapes, None), 128, 8192, {"data": 16, "tensor": 8})
  assert plan.nbytes["weights"] == pytest.approx(405_853_388_800 * 2 / 8, rel=1e-3)
  assert plan.nbytes["keys and values"] == 126 * 2 * 128 * 8192 * 8 * 2


@pytest.mark.parametrize(("name", "count"), [
  ("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("gemma2-9b", 9_241_705_984),
  ("mixtral-8x7b", 46_702_792_704),
])  # fmt: skip
def test_presets_have_the_published_sizes(name, count):
  assert sum(x.size for x in jax.tree.leaves(shapes_of(PRESETS[name]))) == count


# ---------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(("arguments", "message"), [
  (["--topology", "data"], "no axis and size"),
  (["--topology", "data=2,data=2"], "no axis and size"),
  (["--topology", "model=2"], "'model=2' is no axis"),
  (["--topology", "tensor=3"], "tensor=3 does not divide the axis 'vocab'|tensor=3 does not divide"),
  (["--accelerator", "abacus"], "those are h100"),
  (["--compute", "int8"], "bfloat16 or float32"),
  (["--length", "999999"], "longer than the model's context"),
  (["--topology", "data=4", "--batch", "6"], "take a multiple of 4"),
])
def test_what_does_not_fit_is_said_in_a_line(arguments, message):
  result = CliRunner().invoke(app, ["plan", "llama3-8b", "--serve", *arguments])
  assert result.exit_code and re.search(message, str(result.exception))


def test_the_command_tells_and_writes(tmp_path):
  """And leaves the environment as it was: what another process computes afterwards hangs on XLA's flags."""
  out, environment = tmp_path / "plan.json", dict(os.environ)
  arguments = ["plan", "llama3-8b", "--serve", "--topology", "tensor=2", "--length", "4096", "--price", "2", "--out"]
  result = CliRunner().invoke(app, [*arguments, str(out)])
  assert result.exit_code == 0, result.output
  assert dict(os.environ) == environment
  body = json.loads(out.read_text())
  assert body["devices_of"]["h100"]["fits"] and not body["devices_of"]["h100"]["form"].startswith("int")
  assert "layers/*/mlp/up/kernel" in result.output and "largest batch" in result.output
  assert body["total"] == pytest.approx(sum(body["nbytes"].values()))


def test_a_config_says_the_rest(tmp_path):
  lmc.save(tmp_path / "m", MODEL, PARAMS)
  table = {
    "name": "x", "model": str(tmp_path / "m"), "recipe": [], "mesh": {"data": 2, "tensor": 2},
    "train": {"text": "grimm", "length": 16, "batch": 4, "compute": "bfloat16"},
  }  # fmt: skip
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  asked = Asked.of(str(tmp_path / "c.yaml"), None, False, None, None, "float32")
  assert {axis: n for axis, n in asked.sizes.items() if n > 1} == {"data": 2, "tensor": 2}
  assert asked.batch == 4 and asked.length == 16
  assert asked.training is not None and asked.training.compute == "bfloat16" and asked.devices == 4
  assert parse_topology("data=2, tensor=2") == {"data": 2, "tensor": 2}
  table["recipe"] = [{"name": "round_to_nearest", "at": "layers/*", "bits": 4, "group_size": 16},
                     {"name": "lora", "at": "layers/*", "rank": 2}]  # fmt: skip
  table["train"] |= {"trainable": ["**/delta"], "loss": {"name": "distill", "kind": "reverse"}}
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  asked = Asked.of(str(tmp_path / "c.yaml"), None, False, None, None, "float32")
  made = asked.plan(4)
  assert made.nbytes["moments"] < made.nbytes["weights that do not train"] < made.nbytes["the teacher"]
  table["recipe"] = [{"name": "prune_neurons", "fraction": 0.5}]
  table["calibration"] = {"text": "grimm", "windows": 1, "length": 8}
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  with pytest.raises(ConfigError, match="the recipe reads weights"):
    Asked.of(str(tmp_path / "c.yaml"), None, False, None, None, "float32")
  table["train"]["trainable"] = ["layers/**"]
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  assert "planned as if" in Asked.of(str(tmp_path / "c.yaml"), None, False, None, None, "float32").note
  table["recipe"] = [{"name": "gptq", "at": "layers/*", "group_size": 16}]
  (tmp_path / "c.yaml").write_text(yaml.safe_dump(table))
  served = Asked.of(str(tmp_path / "c.yaml"), None, True, None, None, "float32")
  assert tree.get(served.params, "layers/0/mlp/up/kernel").codes.bits == 4
