"""compress hands a method the statistics it asks for, block by block, and reports what was done."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmcompress import tree
from lmcompress.arrays import MaskedArray, QuantizedArray
from lmcompress.calibration import compress, weigh_first
from lmcompress.calibration.statistics import STATISTICS
from lmcompress.io.checkpoint import tree_hash
from lmcompress.models import T5, T5Config
from lmcompress.models.t5 import T5Sizes
from lmcompress.ops.observers import edges
from lmcompress.transforms import at, chain, freeze, leafwise, magnitude, mixed_precision, named_chain, round_to_nearest
from lmcompress.types import Evidence, WeightError


@pytest.fixture(scope="module")
def calibration():
  return np.random.default_rng(0).integers(0, 64, (3, 10)).astype(np.int32)


def spy(seen, factor=0.5):
  """Keeps the statistics it is given, and changes the weight so that the next block sees it."""

  def method(
    w, *, path, hessian, reference_hessian, mean, second_moment, absmax, mean_abs, minimum, maximum, histogram
  ):
    seen[path] = {
      "hessian": hessian, "reference_hessian": reference_hessian, "second_moment": second_moment, "absmax": absmax,
      "mean": mean, "mean_abs": mean_abs, "minimum": minimum, "maximum": maximum, "histogram": histogram,
    }
    return w * factor

  return leafwise(method, name="spy")


def tapped(model, original, compressed, block, stage, calibration):
  """Inputs of a stage `[tokens, in]` in float64: blocks and stages before this one compressed."""
  blocks = model.blocks(original)
  for earlier in block.stages[: block.stages.index(stage)]:
    for linear in earlier.linears:
      path = f"{block.path}/{linear}/kernel"
      original = tree.put(original, path, tree.get(compressed, path))
  rows = []
  for row in calibration:
    carry = model.start(original, row[None])
    for done in blocks[: blocks.index(block)]:
      carry, _ = model.run(done, compressed, carry)
    _, inputs = model.run(block, original, carry, (stage.name,))
    rows.append(np.asarray(inputs[stage.name], np.float64)[0])
  return np.concatenate(rows)


def test_statistics_are_those_of_the_tapped_inputs(tiny, calibration):
  """Against NumPy in float64; float32 sums of 30 tokens are good to about 1e-6 of the largest."""
  model, params = tiny
  seen = {}
  done, _ = compress(model, params, spy(seen), calibration)
  assert set(seen) == set(tree.default_selection(params))
  for block in model.blocks(params):
    for stage in block.stages:
      x, r = (tapped(model, params, after, block, stage, calibration) for after in (done, params))
      want = {
        "hessian": 2 / len(x) * x.T @ x, "reference_hessian": 2 / len(x) * x.T @ r,
        "mean": x.mean(0), "second_moment": (x * x).mean(0), "absmax": np.abs(x).max(0),
        "mean_abs": np.abs(x).mean(0), "minimum": np.minimum(x.min(0), 0), "maximum": np.maximum(x.max(0), 0),
        "histogram": np.histogram(np.abs(x), edges())[0],
      }
      for linear in stage.linears:
        got = seen[f"{block.path}/{linear}/kernel"]
        assert set(got) == set(want) == set(STATISTICS)
        for name, value in want.items():
          assert got[name].dtype == jnp.float32
          tolerance = 2 if name == "histogram" else 1e-5 * np.abs(value).max()  # a value at the edge of a bin
          np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=tolerance)


def test_a_block_sees_its_compressed_predecessors(tiny, calibration):
  """Unless block 0 was changed, block 1 would see something else."""
  model, params = tiny
  halved, kept = {}, {}
  compress(model, params, spy(halved, 0.5), calibration)
  compress(model, params, spy(kept, 1.0), calibration)
  first, second = "layers/0/attn/q/kernel", "layers/1/attn/q/kernel"
  np.testing.assert_array_equal(halved[first]["hessian"], kept[first]["hessian"])
  assert float(jnp.max(jnp.abs(halved[second]["hessian"] - kept[second]["hessian"]))) > 1e-3


def test_linears_of_a_stage_share_one_array(tiny, calibration):
  seen = {}
  compress(tiny[0], tiny[1], spy(seen), calibration)
  q, k = (seen[f"layers/0/attn/{name}/kernel"]["hessian"] for name in "qk")
  assert q is k


def test_no_link_sees_stale_statistics(tiny, calibration):
  """The second link of a chain gets the statistics of the tree as the first one left it."""
  model, params = tiny
  first, second = {}, {}
  once, _ = compress(model, params, spy(first), calibration)
  compress(model, params, chain(spy({}), spy(second)), calibration)
  alone = {}
  compress(model, once, spy(alone), calibration)
  for path, found in second.items():
    np.testing.assert_array_equal(found["hessian"], alone[path]["hessian"])
  path = "layers/1/attn/q/kernel"
  assert not np.array_equal(first[path]["hessian"], alone[path]["hessian"])


def test_statistics_for_some_weights(tiny, calibration):
  model, params = tiny
  seen = {}
  done, report = compress(model, params, at("layers/1/mlp", spy(seen)), calibration)
  assert set(seen) == {f"layers/1/mlp/{name}/kernel" for name in ("gate", "up", "down")} == set(report.last())
  assert done["layers"]["0"] == params["layers"]["0"]


def test_report_rows(tiny):
  model, params = tiny
  recipe = named_chain(
    ("prune", at("layers/*/mlp", magnitude(0.5))), ("round", at("layers/*", round_to_nearest(group_size=16))),
    ("deploy", freeze()),
  )
  steps, trees = [], []
  progress, on_link = lambda *args: steps.append(args), lambda *args: trees.append(args)
  done, report = compress(model, params, recipe, progress=progress, on_link=on_link)
  kernels = set(tree.default_selection(params))
  by_link = {link: [row for row in report.rows if row["link"] == link] for link in ("prune", "round")}
  assert len(by_link["prune"]) == 6 and {row["path"] for row in by_link["round"]} == kernels
  assert set(report.last()) == kernels
  for row in report.rows:
    assert set(row) >= {"link", "path", "kind", "shape", "bits", "sparsity", "weight_error", "seconds"}
    assert row["shape"] == list(tree.get(params, row["path"]).shape) and row["seconds"] >= 0

  pruned = next(row for row in by_link["prune"] if row["path"] == "layers/0/mlp/up/kernel")
  assert pruned["bits"] == 33 and pruned["sparsity"] == 0.5 and pruned["kind"] == "masked float32"
  w = np.asarray(params["layers"]["0"]["mlp"]["up"]["kernel"], np.float64)
  zeroed = np.where(np.abs(w) < np.median(np.abs(w)), 0, w)
  assert pruned["weight_error"] == pytest.approx(np.linalg.norm(zeroed - w) / np.linalg.norm(w), rel=1e-5)

  leaf = done["layers"]["0"]["mlp"]["up"]["kernel"]
  rounded = report.last()["layers/0/mlp/up/kernel"]
  dense = np.asarray(leaf.materialize(), np.float64)
  assert rounded["bits"] == leaf.nbits / leaf.size
  assert rounded["sparsity"] == pytest.approx(np.mean(dense == 0))
  # relative to the weight the run started from, not to the pruned one
  assert rounded["weight_error"] == pytest.approx(np.linalg.norm(dense - w) / np.linalg.norm(w), rel=1e-4)

  assert [link["name"] for link in report.links] == ["prune", "round", "deploy"]
  assert [name for name, _ in trees] == ["prune", "round", "deploy"]
  assert isinstance(trees[0][1]["layers"]["0"]["mlp"]["up"]["kernel"], MaskedArray)
  assert tree_hash(trees[-1][1]) == tree_hash(done)
  assert {name for name, *_ in steps} == {"prune", "round", "deploy"}
  last = {name: (n, of) for name, n, of in steps}
  assert all(n == of for n, of in last.values())
  text = str(report)
  assert "layers/0/mlp/up/kernel" in text and "int4 g16" in text
  assert len(text.splitlines()) == len(kernels) + 1


def test_weight_by_weight_is_all_at_once(tiny):
  """The driver's way through the tree changes nothing of the result."""
  model, params = tiny
  recipe = chain(magnitude(0.3, scope="global"), round_to_nearest(group_size=16))
  done, _ = compress(model, params, recipe)
  whole, _ = recipe.apply(params, recipe.init(params), Evidence())
  assert tree_hash(done) == tree_hash(whole)


def test_input_is_left_alone_and_the_rest_shared(tiny):
  model, params = tiny
  before = tree_hash(params)
  done, _ = compress(model, params, at("layers/0/mlp/up", round_to_nearest(group_size=16)))
  assert tree_hash(params) == before
  assert done["embed"]["table"] is params["embed"]["table"]
  assert isinstance(done["layers"]["0"]["mlp"]["up"]["kernel"], QuantizedArray)


def test_a_list_is_a_chain(tiny):
  links = [magnitude(0.5), round_to_nearest(group_size=16)]
  a, b = (compress(*tiny, recipe)[0] for recipe in (links, chain(*links)))
  assert tree_hash(a) == tree_hash(b)


def noise():
  def add(w, *, key):
    return w + jax.random.normal(key, w.shape)

  return leafwise(add, name="noise")


def test_the_key_decides_everything_random(tiny):
  model, params = tiny
  one, again, other = (compress(model, params, noise(), key=jax.random.key(n))[0] for n in (1, 1, 2))
  assert tree_hash(one) == tree_hash(again) != tree_hash(other)
  twice, _ = compress(model, params, chain(noise(), noise()), key=jax.random.key(1))
  w = lambda p: np.asarray(p["layers"]["0"]["mlp"]["up"]["kernel"])  # noqa: E731
  first, second = w(one) - w(params), w(twice) - w(one)
  assert not np.allclose(first, second)  # each link draws anew


# ------------------------------------------------------------------------------------- refusals

def test_a_key_is_required(tiny):
  with pytest.raises(WeightError, match=r"noise draws at random: pass key=jax\.random\.key\(seed\)"):
    compress(*tiny, noise())


def test_missing_calibration_is_an_error(tiny):
  with pytest.raises(WeightError, match=r"spy needs .*hessian.*: pass calibration=tokens"):
    compress(*tiny, spy({}))


def test_a_step_link_is_refused(tiny):
  with pytest.raises(WeightError, match="magnitude acts inside a training step"):
    compress(*tiny, magnitude(lambda step: 0.5))
  with pytest.raises(ValueError, match=r"magnitude|phase"):
    compress(*tiny, [magnitude(0.0), magnitude(lambda step: 0.5)])


def test_evidence_that_compress_does_not_collect(tiny):
  def method(w, *, step):
    return w

  with pytest.raises(WeightError, match="method needs step, which compress does not collect"):
    compress(*tiny, leafwise(method))


def test_a_pattern_without_a_match(tiny):
  with pytest.raises(WeightError, match="selects no weight among 16; nearest paths"):
    compress(*tiny, at("layers/*/mlpp", round_to_nearest(group_size=16)))


@pytest.mark.parametrize("tokens", [
  np.zeros((3,), np.int32), np.zeros((0, 8), np.int32), np.zeros((2, 0), np.int32),
  np.zeros((2, 8), np.float32), [], [[]],
], ids=["one axis", "no rows", "no tokens", "floats", "empty list", "empty row"])
def test_calibration_of_another_form(tiny, tokens):
  with pytest.raises(WeightError, match=r"calibration tokens are \[n, length\] integers; found"):
    compress(*tiny, spy({}), tokens)


def test_a_weight_whose_statistics_cannot_come_back(tiny, calibration):
  """The embedding lies in no block: asking for its Hessian must not pass in silence."""
  with pytest.raises(WeightError, match="embed/table"):
    compress(*tiny, at("embed", spy({})), calibration)


def test_activations_that_are_not_finite(tiny, calibration):
  model, params = tiny
  wild = tree.put(params, "layers/0/mlp/up/kernel", jnp.full((32, 64), 1e38))
  with pytest.raises(WeightError, match=r"hessian of layers/0/mlp/down|of layers/0/mlp/down is not finite"):
    compress(model, wild, spy({}), calibration)


@pytest.mark.parametrize("tokens", [
  np.zeros((1, 1), np.int32), np.full((2, 8), 5, np.int32),
], ids=["a single token", "one token repeated"])
def test_little_calibration_is_enough(tiny, tokens):
  """A Hessian of low rank is a Hessian; what to do about its rank is the method's business."""
  seen = {}
  compress(*tiny, spy(seen), tokens)
  h = np.asarray(seen["layers/0/attn/q/kernel"]["hessian"])
  assert np.isfinite(h).all() and np.linalg.matrix_rank(h, tol=1e-5) == 1


def test_a_weight_is_how_often_a_token_counts(tiny, calibration):
  """Sums and counts are those of rows given twice, extremes and histograms those of each row once."""
  once, twice = {}, {}
  compress(*tiny, spy(once), {"tokens": calibration, "weights": np.repeat([[2.0], [1.0], [2.0]], 10, axis=1)})
  compress(*tiny, spy(twice), calibration[[0, 0, 1, 2, 2]])
  for path, want in twice.items():
    for name in ("hessian", "reference_hessian", "mean", "second_moment", "mean_abs", "absmax", "minimum", "maximum"):
      near = 1e-5 * float(np.abs(want[name]).max())
      np.testing.assert_allclose(once[path][name], want[name], rtol=1e-4, atol=near, err_msg=f"{path} {name}")
    assert once[path]["histogram"].sum() == pytest.approx(3 / 5 * float(want["histogram"].sum()), rel=1e-3)


def test_a_token_of_no_weight_is_in_no_sum(tiny, calibration):
  """It is read all the same, unlike padding: what follows sees it."""
  weights = np.ones(calibration.shape)
  weights[:, 0] = 0
  seen, whole = {}, {}
  compress(*tiny, spy(seen), {"tokens": calibration, "weights": weights})
  compress(*tiny, spy(whole), calibration)
  path = "layers/0/attn/q/kernel"
  model, params = tiny
  block = model.blocks(params)[0]
  x = tapped(model, params, params, block, block.stages[0], calibration).reshape(3, 10, -1)[:, 1:].reshape(27, -1)
  np.testing.assert_allclose(seen[path]["hessian"], 2 / 27 * x.T @ x, rtol=1e-4, atol=1e-5)
  assert not np.allclose(seen[path]["hessian"], whole[path]["hessian"], rtol=1e-2)


def test_the_first_real_token_is_weighed(calibration):
  mask = np.ones(calibration.shape, bool)
  mask[1, :4] = False
  given = weigh_first({"tokens": calibration, "attention_mask": mask, "decoder_input_ids": calibration[:, :3]}, 9.0)
  want = np.ones(calibration.shape)
  want[[0, 1, 2], [0, 4, 0]] = 9
  np.testing.assert_array_equal(given["weights"], want)
  np.testing.assert_array_equal(given["decoder_weights"], np.repeat([[9.0, 1.0, 1.0]], 3, axis=0))
  again = weigh_first(given, 2.0)
  np.testing.assert_array_equal(again["weights"], np.where(want == 9, 18, 1))
  assert weigh_first(calibration, 1.0) is calibration
  with pytest.raises(ValueError, match="a finite number of at least 0"):
    weigh_first(calibration, -1.0)
  with pytest.raises(WeightError, match="calibration tokens are"):
    weigh_first(calibration[0], 2.0)


def test_a_link_that_runs_the_model_takes_weighed_tokens(tiny, calibration):
  """Weights are no argument of a model: by divergence, and by gradients."""
  for sensitivity in ("kl", "fisher"):
    recipe = mixed_precision(6.0, (3, 8), 16, sensitivity=sensitivity, tokens=20)
    plain, weighed = (compress(*tiny, recipe, given)[1] for given in (calibration, weigh_first(calibration, 4.0)))
    bits = [{path: row["bits"] for path, row in report.last().items()} for report in (plain, weighed)]
    assert bits[0] == bits[1]  # what a width costs does not read them; what gptq then does, does


def test_weights_of_a_decoder():
  """Rows given twice, on both sides of an encoder-decoder, padding among them."""
  sizes = T5Sizes(vocab=64, embed=16, mlp=32, layers=1, decoder_layers=1, heads=2)
  model = T5(T5Config(head_dim=8, max_length=32), sizes)
  params = model.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  given = {
    "tokens": rng.integers(0, 64, (3, 9)).astype(np.int32), "decoder_input_ids": rng.integers(0, 64, (3, 5)),
    "attention_mask": np.arange(9) < np.array([[9], [4], [7]]),
    "decoder_attention_mask": np.arange(5) < np.array([[2], [5], [3]]),
  }  # fmt: skip
  given["decoder_input_ids"] = given["decoder_input_ids"].astype(np.int32)
  often = np.array([[1.0], [2.0], [1.0]])
  once, twice = {}, {}
  weights = {"weights": np.repeat(often, 9, axis=1), "decoder_weights": np.repeat(often, 5, axis=1)}
  compress(model, params, spy(once), given | weights)
  compress(model, params, spy(twice), {name: x[[0, 1, 1, 2]] for name, x in given.items()})
  assert any("cross" in path for path in once)
  for path, want in twice.items():
    for name in ("hessian", "reference_hessian", "mean", "absmax"):
      near = 1e-5 * float(np.abs(want[name]).max())
      np.testing.assert_allclose(once[path][name], want[name], rtol=1e-4, atol=near, err_msg=f"{path} {name}")


@pytest.mark.parametrize("weights", [
  np.ones((3, 9)), np.full((3, 10), -1.0), np.full((3, 10), np.nan), np.zeros((3, 10)), np.full((3, 10), "a"),
  np.full((3, 10), 1e300), np.full((3, 10), 1e-60), np.full((3, 10), 1j),
], ids=["another length", "negative", "not a number", "none above 0", "words", "too large", "too small", "complex"])
def test_weights_of_another_form(tiny, calibration, weights):
  with pytest.raises(WeightError, match="calibration's weights are a number of at least 0 for each token"):
    compress(*tiny, spy({}), {"tokens": calibration, "weights": weights})
  with pytest.raises(WeightError, match="decoder_weights and no decoder_input_ids"):
    compress(*tiny, spy({}), {"tokens": calibration, "decoder_weights": np.ones((3, 10))})


def test_rows_are_split_over_a_mesh(tiny, monkeypatch):
  """Each device runs its rows, and a Hessian is one all-reduce: the statistics of one device, to rounding."""
  from lmcompress.calibration import sequential
  from lmcompress.distributed import make_mesh, shard

  model, params = tiny
  tokens = np.random.default_rng(0).integers(0, 64, (8, 10)).astype(np.int32)
  local, apart, specs = {}, {}, []
  compress(model, params, spy(local), tokens)
  run = sequential._tapped

  def tapped_on(model, block, params, carry, taps):
    specs.append(carry["h"].sharding.spec)
    return run(model, block, params, carry, taps)

  monkeypatch.setattr(sequential, "_tapped", tapped_on)
  compress(model, shard(model, params, make_mesh(data=4, tensor=2)), spy(apart), tokens)
  assert specs and all(spec[0] == "data" for spec in specs)
  for path, want in local.items():
    for name, value in want.items():
      near = 2 if name == "histogram" else 1e-4 * float(np.abs(value).max())
      np.testing.assert_allclose(apart[path][name], value, rtol=1e-4, atol=near)


def test_what_calibration_will_take(tiny):
  """By hand, for a Hessian of each of two streams; the same for twice the layers."""
  from lmcompress.calibration.sequential import expected_bytes

  _, params = tiny
  parts = expected_bytes(params, 8, 10, frozenset({"hessian", "reference_hessian"}))
  assert parts["streams"] == 2 * 8 * 10 * 32 * 4 and parts["statistics"] == 2 * 64 * 64 * 4
  deeper = {**params, "layers": params["layers"] | {str(i): params["layers"]["0"] for i in (2, 3)}}
  assert expected_bytes(deeper, 8, 10, frozenset({"hessian", "reference_hessian"})) == parts


def test_gradients_of_an_encoder_decoder():
  """Of what its decoder writes, as differentiated by hand; padding of either side and the last token count nothing."""
  sizes = T5Sizes(vocab=40, embed=16, mlp=24, layers=1, decoder_layers=1, heads=2)
  model = T5(T5Config(head_dim=8), sizes)
  params, rng = model.init(jax.random.key(0)), np.random.default_rng(0)
  given = {"tokens": rng.integers(0, 40, (2, 9)), "decoder_input_ids": rng.integers(0, 40, (2, 6))}
  masks = {"attention_mask": np.arange(9) < [[9], [5]], "decoder_attention_mask": np.arange(6) < [[6], [4]]}
  seen = {}

  def method(w, *, path, grads):
    seen[path] = grads
    return w

  compress(model, params, leafwise(method, name="spy"), {**given, **masks})

  def loss(params, row):
    whole = {name: x[row][None] for name, x in given.items()}
    real = masks["attention_mask"][row][None]
    logits = jax.nn.log_softmax(model.apply(params, whole.pop("tokens"), attention_mask=real, **whole), axis=-1)
    n = int(masks["decoder_attention_mask"][row].sum()) - 1
    return -sum(logits[0, i, given["decoder_input_ids"][row, i + 1]] for i in range(n)) / n

  wanted = jax.grad(lambda params: (loss(params, 0) + loss(params, 1)) / 2)(params)
  for path in ("encoder/layers/0/attn/q/kernel", "decoder/layers/0/cross/k/kernel", "decoder/layers/0/mlp/down/kernel"):
    want = np.asarray(tree.get(wanted, path))
    assert np.abs(want).max() > 1e-4
    np.testing.assert_allclose(seen[path], want, atol=1e-5 * np.abs(want).max(), rtol=1e-4)
  with pytest.raises(WeightError, match="takes decoder_input_ids"):
    compress(model, params, leafwise(method, name="spy"), given["tokens"])
