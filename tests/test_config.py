"""Configs: every file in the repository resolves; what a file or an override gets wrong is one clear line."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import jax
import pydantic
import pytest
import yaml

from lmcompress import config as configs
from lmcompress import recipe as recipes
from lmcompress.config import Config, check, dump, load_config, merge, override
from lmcompress.io.yaml_text import parse
from lmcompress.models import (
  LSTM,
  T5,
  Llama,
  LlamaConfig,
  LlamaSizes,
  LSTMSizes,
  Seq2Seq,
  Seq2SeqSizes,
  T5Config,
  T5Sizes,
)
from lmcompress.transforms import METHODS
from lmcompress.types import ConfigError

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL = {"name": "x", "model": "smollm2-135m", "recipe": [{"name": "round_to_nearest", "bits": 4}]}


def refused(message, function, *args):
  with pytest.raises(ConfigError, match=message) as caught:
    function(*args)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
  return str(caught.value)


@pytest.fixture
def put(tmp_path):
  def put(text, name="x.yaml"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path
  return put


# --------------------------------------------------------------------------------- the files there are


@pytest.fixture(scope="module")
def params():
  """Paths like a real model's, and rows long enough for the group sizes in use."""
  sizes = LlamaSizes(vocab=64, embed=256, mlp=512, layers=2, heads=8, kv_heads=4)
  return jax.jit(Llama(LlamaConfig(head_dim=32), sizes).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def others():
  """The same of models of other architectures, by a word in their names."""
  t5 = T5(T5Config(head_dim=32), T5Sizes(vocab=64, embed=64, mlp=64, layers=2, decoder_layers=2, heads=2, tied=False))
  models = {
    "lstm": LSTM(sizes=LSTMSizes(vocab=64, embed=64, units=64)), "t5": t5,
    "g2p": Seq2Seq(sizes=Seq2SeqSizes(embed=256, units=256)),
  }  # fmt: skip
  return {word: jax.jit(model.init)(jax.random.key(0)) for word, model in models.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_config_of_the_repository_resolves(path, params, others):
  config = load_config(path)
  params = next((other for word, other in others.items() if word in config.model), params)
  for variant in (config, *configs.variants_of(config)):
    for link in recipes.build(variant.recipe).links if variant.recipe else ():
      link.init(params, None)
  assert check(yaml.safe_load(dump(config)), "again") == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_config_says_how_to_run_it(path):
  """The header holds the exact command; a base, which others extend, needs none. A study names its script."""
  header, name = re.match(r"(?:#.*\n)*", path.read_text("utf-8"))[0], path.relative_to(ROOT).as_posix()
  assert header
  if path.name == "base.yaml":
    return
  config = load_config(path)
  assert path.stem == config.name
  if config.variants:
    script, = re.findall(rf"^# Run: python (experiments/\w+\.py) --config {re.escape(name)}(?: --out .*)?$", header,
                         re.MULTILINE)
    assert (ROOT / script).is_file()
  else:
    assert f"\n# Run: lmcompress {'search' if config.search else 'run'} {name}\n" in header


def test_there_are_configs():
  assert (ROOT / "configs" / "smollm2" / "quickstart.yaml") in FILES


# --------------------------------------------------------------------------------------------- extends


def test_extends_merges_tables_and_replaces_the_rest(put):
  put("model: m\nseed: 1\nrecipe: [{name: freeze}]\nevaluate: {windows: 4, texts: [a]}\n", "a.yaml")
  put("extends: ../a.yaml\nname: b\nseed: 2\nevaluate: {length: 8}\n", "sub/b.yaml")
  config = load_config(put("extends: sub/b.yaml\nname: c\nevaluate: {texts: [b, c]}\ngenerate: null\n",
                           "c.yaml"))
  assert (config.name, config.model, config.seed) == ("c", "m", 2)
  assert (config.evaluate.windows, config.evaluate.length, config.evaluate.texts) == (4, 8, ("b", "c"))
  assert config.recipe == ({"name": "freeze"},) and config.generate is None


def test_merge_leaves_both_as_they_were():
  base, over = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "d": {"e": 1}}
  assert merge(base, over) == {"a": {"b": 1, "c": [3]}, "d": {"e": 1}}
  assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1} and over == {"a": {"c": [3]}, "d": {"e": 1}}
  assert merge({"a": {"b": 1}}, {"a": None}) == {"a": None}


def test_a_loop_of_extends_is_refused(put):
  put("extends: b.yaml\n", "a.yaml")
  put("extends: c.yaml\n", "b.yaml")
  refused(r"c\.yaml.*|a\.yaml: extends itself through a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml",
          load_config, put("extends: a.yaml\n", "c.yaml"))
  refused(r"d\.yaml: extends itself through d\.yaml -> d\.yaml", load_config,
          put("extends: d.yaml\n", "d.yaml"))


@pytest.mark.parametrize("base", ["[a.yaml, b.yaml]", "1", "{a: b}"])
def test_extends_is_one_path(put, base):
  refused("extends is the path of one file", load_config, put(f"extends: {base}\n"))


def test_a_base_that_is_not_there(put, tmp_path):
  refused(r"no\.yaml: no such config file; `lmcompress ls` lists", load_config, put("extends: no.yaml\n"))
  refused("no such config file", load_config, tmp_path / "no.yaml")
  refused("no such config file", load_config, tmp_path)


def test_a_long_chain_of_extends_is_read_or_refused(put):
  for i in range(1200):
    put(f"extends: c{i + 1}.yaml\n", f"c{i}.yaml")
  path = put(yaml.safe_dump(SMALL), "c1200.yaml").with_name("c0.yaml")
  with contextlib.suppress(ConfigError):
    assert load_config(path).name == "x"


# ------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_tables_lists_and_new_keys():
  table = {**SMALL, "evaluate": {"windows": 2}}
  found = override(table, ["evaluate.windows=4", "evaluate.texts=[a, b]", "recipe.0.bits=3", "bench.rounds=0",
                           "seed=7",
                           "generate=null", "recipe.0.clip=mse", "description=a=b"])
  assert found["evaluate"] == {"windows": 4, "texts": ["a", "b"]} and found["bench"] == {"rounds": 0}
  assert found["recipe"] == [{"name": "round_to_nearest", "bits": 3, "clip": "mse"}]
  assert (found["seed"], found["generate"], found["description"]) == (7, None, "a=b")
  assert table == {**SMALL, "evaluate": {"windows": 2}} and SMALL["recipe"][0]["bits"] == 4


def test_an_override_may_replace_a_whole_table(put):
  config = load_config(put(yaml.safe_dump(SMALL)),
                       ["recipe=[{name: freeze}]", "evaluate={windows: 3, length: 9}"])
  assert config.recipe == ({"name": "freeze"},) and config.evaluate.length == 9


@pytest.mark.parametrize(("text", "message"), [
  ("seed", r"override 'seed': write key\.path=value"),
  ("=1", "write key"),
  ("recipe.1.bits=3", "'1' is no index of a list of 1"),
  ("recipe.-1.bits=3", "'-1' is no index"),
  ("recipe.first.bits=3", "'first' is no index of a list of 1"),
  ("recipe.²=3", "'²' is no index"),
  ("seed.x=1", "'x' is below 0, which is no table"),
  ("name.0=1", "'0' is below 'x'"),
  ("seed=[", "override 'seed=.*not valid YAML"),
  ("seed=&a 1", "anchors"),
  ("seed=" + "[" * 100, "nested deeper than 50"),
])
def test_an_override_that_reaches_nothing_is_refused(text, message):
  refused(message, override, {**SMALL, "seed": 0}, [text])


@pytest.mark.parametrize("text", ["evaluate..windows=4", ".evaluate=4", "evaluate.windows.=4",
                                  "evaluate.window=4"])
def test_an_override_of_an_unknown_key_is_refused(put, text):
  refused("window|key", load_config, put(yaml.safe_dump({**SMALL, "evaluate": {"length": 4}})), [text])


# ------------------------------------------------------------------------------------------------ YAML


@pytest.mark.parametrize(("text", "value"), [
  ("1e-4", 1e-4), ("1E5", 1e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("1.", 1.0), ("0.25", 0.25),
  ("-.inf", float("-inf")),
  ("12", 12), ("-3", -3), ("0x1f", 31), ("017", 17), ("0o17", 15), ("~", None), ("null", None), ("", None),
  ("true", True),
  ("False", False),
  ("2026-01-02", "2026-01-02"), ("1.2.3", "1.2.3"), ("=", "="), ("1e", "1e"), ("e5", "e5"),
  ("'1e-4'", "1e-4"), ("a: <<", {"a": "<<"}),
  ("layers/*", "layers/*"), ("n:m", "n:m"), ("${HOME}", "${HOME}"), ("{{ x }}", None),
])
def test_scalars(text, value):
  """Numbers as in YAML 1.2 (`1e-4` is one), dates as texts; nothing is interpolated."""
  if text == "{{ x }}":
    refused("not valid YAML|not a text", parse, text, "x")
    return
  found = parse(text, "x")
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["yes", "No", "on", "OFF", "y", "n", "1:30", "1_000", "0b1"])
def test_what_only_yaml_1_1_reads_as_a_boolean_or_a_number_is_a_text(text):
  assert parse(text, "x") == text


def test_a_word_is_refused_where_a_truth_is_meant(put):
  refused("generate.chat: .*boolean", load_config,
          put(yaml.safe_dump({**SMALL, "generate": {"chat": "yes"}})))


@pytest.mark.parametrize(("text", "message"), [
  ("a: &x 1", "line 1: anchors and aliases are not allowed; write it out"),
  ("a: 1\nb: *x", "line 2: anchors and aliases"),
  ("&x [1]", "anchors and aliases"),
  ("a: {<<: {b: 1}, b: &y 2}", "anchors and aliases"),
  ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"),
  ("x: {b: 1, b: 1}", "the key 'b' stands twice"),
  ("- {b: 1, 'b': 1}", "the key 'b' stands twice"),
  ("1: a", "line 1: the key 1 is not a text"),
  ("null: a", "the key None is not a text"),
  ("true: a", "the key True is not a text"),
  ("[a]: b", "is not a text"),
  ("? {a: b}\n: c", "is not a text"),
  ("a: [", "not valid YAML"),
  ("a: b: c", r"x: line 1: not valid YAML \(mapping values are not allowed here\)"),
  ("a: 1\n--- \nb: 2", "not valid YAML"),
  ("a: \x07", "not valid YAML"),
  ("%YAML 9.9\n---\na", "not valid YAML"),
  ("a: !!python/object/apply:os.system ['true']", "tags such as .* not allowed"),
  ("a: !!python/name:os.system", "tags such as .* not allowed"),
  ("a: !!str 1", "tags such as 'tag:yaml.org,2002:str' are not allowed"),
  ("!!map {a: 1}", "tags such as .* not allowed"),
  ("- !!seq [a]", "tags such as .* not allowed"),
  ("a: !x 1", "tags such as .* not allowed"),
  ("a: !!int x", "tags such as .* not allowed"),
  ("a: !!int ''", "tags such as .* not allowed"),
  ("a: !!float ''", "tags such as .* not allowed"),
  ("a: !!bool maybe", "tags such as .* not allowed"),
  ("a: !!timestamp x", "tags such as .* not allowed"),
  ("a: !!binary é", "tags such as .* not allowed"),
  ("a: !!omap [1]", "tags such as .* not allowed"),
  ("a: !!set [1]", "tags such as .* not allowed"),
  ("a: 1" + "0" * 10_000, "not valid YAML"),
  ("[" * 51, "nested deeper than 50"),
  ("[" * 20_000, "nested deeper than 50"),
  ("{a: " * 20_000, "nested deeper than 50"),
  ("- " * 20_000 + "a", "nested deeper than 50"),
  ("a: " + "x" * (1 << 20), "over 1048576 bytes"),
], ids=range(37))
def test_yaml_that_no_config_needs_is_refused(text, message):
  refused(message, parse, text, "x")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
  f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(("text", "limit_s"), [
  (BOMB, 0.1), ("[" * 500_000, 1), ("- " * 250_000, 1), ("{a: " * 200_000, 1), ("a" * ((1 << 20) + 1), 1),
], ids=["aliases", "brackets", "dashes", "braces", "length"])
def test_a_bomb_goes_out_at_once(text, limit_s):
  """A bound on the work, far above what it takes: an alias bomb that is followed takes minutes."""
  times = []
  for _ in range(3):
    begun = time.perf_counter()
    refused(".", parse, text, "x")
    times.append(time.perf_counter() - begun)
  assert min(times) < limit_s


@pytest.mark.parametrize("text", ["", "- a", "text", "1"])
def test_a_config_is_a_table(put, text):
  refused("x.yaml: a config is a table of keys; found", load_config, put(text))


def test_a_config_is_utf8(put):
  refused("x.yaml: not UTF-8 text", load_config, put(b"name: \xff"))


# ------------------------------------------------------------------------------------- keys and values


def test_an_unknown_key_shows_the_keys():
  message = refused("^x: no key 'modle'; keys are extends, name", check, {**SMALL, "modle": "y"}, "x")
  assert all(key in message for key in Config.model_fields)


@pytest.mark.parametrize(("changes", "message"), [
  ({"evaluate": {"window": 4}}, "evaluate.window"),
  ({"evaluate": {"windows": "4"}}, "evaluate.windows: .*; found '4'"),
  ({"evaluate": {"windows": 4.0}}, "evaluate.windows"),
  ({"evaluate": {"windows": 0}}, "evaluate.windows: .*greater than or equal to 1"),
  ({"evaluate": {"length": 1}}, "evaluate.length"),
  ({"evaluate": {"texts": "pydoc"}}, "evaluate.texts"),
  ({"evaluate": None}, "evaluate"),
  ({"evaluate": []}, "evaluate"),
  ({"seed": -1}, "seed"),
  ({"seed": 2**32}, "seed"),
  ({"seed": True}, "seed"),
  ({"seed": 1.0}, "seed"),
  ({"name": ""}, "name"),
  ({"name": "../x"}, "name"),
  ({"name": "a/b"}, "name"),
  ({"name": ".."}, "name"),
  ({"name": "a\n"}, "name"),
  ({"name": "a" * 81}, "name"),
  ({"model": None}, "model"),
  ({"model": 1}, "model"),
  ({"recipe": {"name": "freeze"}}, "recipe"),
  ({"recipe": "freeze"}, "recipe"),
  ({"recipe": ["freeze"]}, "recipe"),
  ({"calibration": {"windows": 4}}, "calibration.text"),
  ({"mesh": {"data": 2, "model": 4}}, "mesh.model"),
  ({"mesh": {"data": "2"}}, "mesh.data"),
  ({"bench": {"rounds": -1}}, "bench.rounds"),
  ({"generate": {"prompt": 1}}, "generate.prompt"),
])
def test_a_value_that_does_not_fit_is_named(changes, message):
  refused(f"^x: {message}", check, {**SMALL, **changes}, "x")


@pytest.mark.parametrize("key", ["name", "model", "recipe"])
def test_a_key_that_is_needed(key):
  refused(f"^x: {key}: Field required", check, {k: v for k, v in SMALL.items() if k != key}, "x")


def test_a_config_is_frozen():
  config = check(SMALL, "x")
  with pytest.raises(pydantic.ValidationError):
    config.seed = 1


# -------------------------------------------------------------------------------------------- the hash


def test_the_hash_is_eight_digits_that_do_not_depend_on_how_the_file_is_written(put):
  a = load_config(put("name: x\nmodel: m\nrecipe: [{name: magnitude, sparsity: 0.5}]\nseed: 0\n"))
  b = load_config(put("# note\nseed: 0\nrecipe:\n- sparsity: 5e-1\n  name: magnitude\nmodel: 'm'\nname: x\n"))
  assert a.hash == b.hash and re.fullmatch(r"[0-9a-f]{8}", a.hash) and a.folder == f"x-{a.hash}"
  assert check(yaml.safe_load(dump(a)), "again").hash == a.hash


def test_the_hash_changes_with_every_value():
  base = {**SMALL, "mesh": {"data": 1}, "calibration": {"text": "grimm"}}
  hashes = [check(base, "x").hash]
  for text in ("seed=1", "model=m", "recipe.0.bits=3", "recipe.0.at=embed", "evaluate.windows=1",
               "evaluate.length=9",
               "evaluate.texts=[grimm, pydoc]", "bench.rounds=1", "bench.prefill=1", "bench.decode=1",
               "generate=null",
               "generate.prompt=x", "generate.chat=true", "mesh.data=2", "mesh.tensor=2",
               "calibration.windows=1",
               "recipe=[]", "recipe=[{name: freeze}]"):
    hashes.append(check(override(base, [text]), "x").hash)
  assert len(set(hashes)) == len(hashes)


# --------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(("link", "message"), [
  ({"name": "round_to_neares"},
   r"recipe\[0\]: no method 'round_to_neares'; did you mean 'round_to_nearest'\? Methods are "),
  ({"name": "magnitud", "sparsity": 0.2}, "did you mean 'magnitude'"),
  ({"name": "zzz"}, r"no method 'zzz'[;.:] *[Mm]ethods are round_to_nearest"),
  ({"name": None}, "no method None"),
  ({"name": ["magnitude"]}, "no method"),
  ({}, "no method None"),
  ({"name": "round_to_nearest", "bit": 4},
   "round_to_nearest does not take 'bit'; it takes at, bits, group_size"),
  ({"name": "round_to_nearest", "bits": "4"},
   r"recipe\[0\] \(round_to_nearest\): bits: .*integer; found '4'"),
  ({"name": "round_to_nearest", "bits": 4.5}, "bits: .*integer"),
  ({"name": "round_to_nearest", "bits": True}, "bits: .*integer"),
  ({"name": "round_to_nearest", "bits": None}, "bits: .*integer"),
  ({"name": "round_to_nearest", "bits": 1}, r"round_to_nearest\(bits=1\): bits are 2 to 8"),
  ({"name": "round_to_nearest", "bits": 9}, "bits are 2 to 8"),
  ({"name": "round_to_nearest", "group_size": 0}, "at least 1, or -1 for a whole row"),
  ({"name": "round_to_nearest", "group_size": "row"}, "group_size"),
  ({"name": "round_to_nearest", "grid": "int5"}, "grid: .*'nf4'"),
  ({"name": "round_to_nearest", "symmetric": "no"}, "symmetric: .*boolean"),
  ({"name": "round_to_nearest", "clip": "max"}, "clip: "),
  ({"name": "round_to_nearest", "grid": "nf4", "symmetric": False}, "only integer grids have a zero"),
  ({"name": "magnitude"}, "give exactly one of sparsity, threshold and pattern; found none"),
  ({"name": "magnitude", "sparsity": 0.1, "pattern": "2:4"}, "give exactly one"),
  ({"name": "magnitude", "sparsity": 1.5}, r"magnitude\(sparsity=1.5\): a fraction from 0 to 1"),
  ({"name": "magnitude", "sparsity": float("nan")}, "a fraction from 0 to 1"),
  ({"name": "magnitude", "sparsity": "0.2"}, "sparsity"),
  ({"name": "magnitude", "sparsity": True}, "sparsity"),
  ({"name": "magnitude", "threshold": -1.0}, "not negative"),
  ({"name": "magnitude", "pattern": "4:2"}, "write n:m with 0 < n < m"),
  ({"name": "magnitude", "sparsity": 0.1, "scope": "layer"}, "scope: "),
  ({"name": "freeze", "bits": 4}, "freeze does not take 'bits'; it takes at, sparse$"),
  ({"name": "freeze", "at": 3}, r"at is a pattern such as 'layers/\*/mlp'; found 3"),
  ({"name": "freeze", "at": ["embed"]}, "at is a pattern"),
])
def test_a_link_that_does_not_fit_is_named(link, message):
  refused(message, recipes.build, [link])
  refused(f"^x: .*{message.lstrip('^')}", check, {**SMALL, "recipe": [link]}, "x")


def test_the_link_is_counted():
  refused(r"^recipe\[2\]: no method", recipes.build, [{"name": "freeze"}, {"name": "freeze"}, {"name": "x"}])


@pytest.mark.parametrize("links", [[], ()])
def test_an_empty_recipe_builds_nothing(links):
  refused("recipe: it is empty; add a link such as", recipes.build, links)
  assert check({**SMALL, "recipe": list(links)}, "x").recipe == ()


def test_a_link_that_is_no_table():
  refused("a link is a table such as", recipes.build, ["freeze"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_schema_of_its_signature(name):
  message = refused(f"{name} does not take 'nothing'; it takes at", recipes.build,
                    [{"name": name, "nothing": 1}])
  for field in recipes._schema(METHODS[name]).model_fields:
    assert field in message


def test_whole_numbers_are_floats_too():
  recipes.build([{"name": "magnitude", "sparsity": 0}, {"name": "magnitude", "threshold": 1}])


def test_no_link_can_name_a_python_object():
  """Methods come from a table; a dotted name is just an unknown one."""
  refused("no method 'os.system'", recipes.build, [{"name": "os.system", "command": "true"}])
  refused("no method", recipes.build, [{"name": "__class__"}])
  assert configs.recipes is recipes


def test_configs_name_the_run_that_makes_their_model():
  """A model that another config trains lies in the folder that its config gives today."""
  made = {f"results/{configs.load_config(file).folder}/model" for file in FILES}
  named = {configs.load_config(file).model for file in FILES}
  assert {name for name in named if name.startswith("results/")} <= made
