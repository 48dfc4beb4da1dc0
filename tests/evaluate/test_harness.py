"""The evaluation harness on our models beside its own class for transformers: likelihoods, texts and scores alike."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from small_model import byte_level
from typer.testing import CliRunner

import lmcompress as lmc
from lmcompress.cli import app
from lmcompress.errors import ConfigError
from lmcompress.evaluate.harness import Harness, evaluate
from lmcompress.io.huggingface import load_folder

pytestmark = pytest.mark.slow
CONFIG = {
  "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
  "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.3, "eos_token_id": 0,
}  # fmt: skip
CHOICES = {
  "task": "colours", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
  "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "doc_to_choice": "{{choices}}",
  "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip
TEXTS = {
  "task": "tales", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test",
  "doc_to_text": "", "doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}],
}  # fmt: skip
WRITTEN = {
  "task": "written", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
  "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
  "generation_kwargs": {"until": ["zz"], "max_gen_toks": 8, "do_sample": False},
  "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """`(folder of tasks, model, params, tokenizer, net)`."""
  torch.manual_seed(0)
  folder, tokenizer = tmp_path_factory.mktemp("harness"), byte_level()
  net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
  net.save_pretrained(folder / "hf")
  model, params, _ = load_folder(folder / "hf")
  words = ["red", "green like grass", "blue", "a very long answer that goes on"]
  rows = [{"question": f"The {n}th thing is of which colour" + "?" * (n % 3) + " " * (n % 2), "choices": words,
           "answer": n % 4} for n in range(12)]  # fmt: skip
  rows[5]["question"] = "long " * 40  # more than the context
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "tasks").mkdir()
  for task in (CHOICES, TEXTS, WRITTEN):
    body = {**task, "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    (folder / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(body))
  lmc.save(folder / "m", model, params, tokenizer)
  return folder, model, params, tokenizer, net


def test_scores_are_those_of_the_harness_own_class(place):
  from lm_eval.models.huggingface import HFLM

  folder, model, params, tokenizer, net = place
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="<|endoftext|>")
  own = HFLM(pretrained=net, tokenizer=fast, max_length=96, batch_size=3, device="cpu")
  ours = Harness(model, params, tokenizer, batch=3)
  found, want = (evaluate(h, ["colours", "tales", "written"], folder / "tasks") for h in (ours, own))
  assert set(found) == {"colours", "tales", "written"} and found["colours"]["samples"] == 12
  for task, row in want.items():
    for metric, value in row.items():
      assert found[task][metric] == pytest.approx(value, abs=2e-4), (task, metric)


@pytest.mark.parametrize("pair", [("The sky is", " blue"), ("x", "y" * 200), ("", "red"), ("a " * 300, "b")])
def test_likelihoods(place, pair):
  """Short and long, without a context, and longer than the context."""
  from lm_eval.api.instance import Instance
  from lm_eval.models.huggingface import HFLM

  _, model, params, tokenizer, net = place
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, eos_token="<|endoftext|>")
  own = HFLM(pretrained=net, tokenizer=fast, max_length=96, batch_size=1, device="cpu")
  request = [Instance("loglikelihood", {}, pair, 0)]
  ours = Harness(model, params, tokenizer, batch=2)
  if len(pair[1]) > 96:  # the harness's own class does not take it
    assert ours.loglikelihood(request)[0][0] < 0
    return
  (got, greedy), (want, greedily) = (h.loglikelihood(request)[0] for h in (ours, own))
  assert got == pytest.approx(want, abs=2e-4) and greedy == greedily


def test_contexts_that_are_nothing_or_too_much(place):
  """Of spaces alone, as without one; a cut within a character's bytes; none at all."""
  from lm_eval.api.instance import Instance

  _, model, params, tokenizer, _ = place
  harness = Harness(model, params, tokenizer)
  pairs = ((" ", "red"), ("", " red"))
  spaces, none = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
  assert spaces[0] == pytest.approx(none[0], abs=1e-4)
  asked = {"until": [], "max_gen_toks": 9}
  prompts = [*("日本" * 60 + "a" * k for k in range(4)), ""]
  texts = harness.generate_until([Instance("generate_until", {}, (prompt, asked), 0) for prompt in prompts])
  assert len(texts) == 5


def test_what_is_not_there_is_said_in_a_line(place):
  folder, model, params, tokenizer, _ = place
  harness = Harness(model, params, tokenizer)
  with pytest.raises(ConfigError, match=r"no task 'colors': .*tasks has colours, tales, written, or name a YAML file"):
    evaluate(harness, ["colors"], folder / "tasks")
  (folder / "data.jsonl").rename(folder / "elsewhere")
  try:
    with pytest.raises(ConfigError, match="colours: "):
      evaluate(harness, ["colours"], folder / "tasks")
  finally:
    (folder / "elsewhere").rename(folder / "data.jsonl")
  with pytest.raises(ConfigError, match="from 1"):
    Harness(model, params, tokenizer, batch=0)


def test_the_command_runs_tasks(place):
  folder = place[0]
  arguments = ["eval", str(folder / "m"), "--task", "colours", "--include", str(folder / "tasks"), "--limit", "6"]
  result = CliRunner().invoke(app, [*arguments, "--out", str(folder / "out.json")])
  assert result.exit_code == 0, result.output
  assert "acc_norm" in result.output
  assert json.loads((folder / "out.json").read_text())["found"]["colours"]["samples"] == 6
  refused = CliRunner().invoke(app, ["eval", str(folder / "m"), "--limit", "6"])
  assert "--include, --shots and --limit go with --task" in str(refused.exception)
