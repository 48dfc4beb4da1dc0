"""Conversations, the passages that answers rest on, and what is typed."""

from __future__ import annotations

import json

import jax
import pytest
from small_model import byte_level, random_params

import lmcompress as lmc
from lmcompress import chat, knowledge
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.knowledge import Knowledge, Passage, passages_of
from lmcompress.models import Bert, BertConfig, BertSizes, Llama, LlamaConfig
from lmcompress.types import ConfigError, SourceError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def tokenizer():
  plain = byte_level()
  return Tokenizer(plain.backend, tokens={"eos_token": "<|endoftext|>"}, chat_template=TEMPLATE)


@pytest.fixture
def talk():
  model = Llama(LlamaConfig(head_dim=16, max_length=128))
  return chat.Conversation(model, random_params(), tokenizer(), chat.Settings(temperature=0.0, max_new_tokens=8))


def test_an_answer_is_that_of_all_that_was_said(talk):
  pieces = []
  first, left_out = talk.ask("Who?", pieces.append)
  assert "".join(pieces) == first and left_out == 0
  second, _ = talk.ask("And?")
  text = f"<user>Who?\n<assistant>{first}\n<user>And?\n<assistant>"
  assert second == lmc.generate(talk.model, talk.params, talk.tokenizer, text, 8)
  assert [m["content"] for m in talk.messages] == ["Who?", first, "And?", second]
  assert talk.command("/undo") == "turns left: 1" and talk.ask("And?")[0] == second


def test_drawn_answers_follow_the_seed():
  model, params = Llama(LlamaConfig(head_dim=16, max_length=128)), random_params()

  def said(seed):
    talk = chat.Conversation(model, params, tokenizer(), chat.Settings(temperature=1.0, max_new_tokens=8), seed=seed)
    return [talk.ask("Who?")[0], talk.ask("Who?")[0]]

  assert said(0) == said(0) != said(1)


def test_what_no_longer_fits_is_left_out_from_the_front(talk):
  for question in ("a" * 30, "b" * 30, "c"):
    _, left_out = talk.ask(question)
  assert left_out == 1 and len(talk.messages) == 6
  messages, _ = talk.prompt("d")
  assert messages[0]["content"] == "b" * 30
  talk.system = "Be brief."
  assert talk.prompt("d")[0][0] == {"role": "system", "content": "Be brief."}
  with pytest.raises(ConfigError, match="do not fit 120 tokens"):
    talk.ask("e" * 200)
  assert len(talk.messages) == 6


def test_an_answer_that_is_stopped_does_not_join(talk):
  def stop(piece):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    talk.ask("Who?", stop)
  assert talk.messages == []


def test_commands(talk, tmp_path):
  assert talk.command("/exit") is None and talk.command("/quit") is None
  assert "/reset" in talk.command("/help")
  assert talk.command("/history") == "nothing was said yet"
  answer, _ = talk.ask("Who?")
  assert talk.command("/history") == f"user: Who?\nassistant: {answer}"
  assert talk.command("/system Be brief.") == "told" and talk.system == "Be brief."
  assert talk.command("/set top_p 0.5") == "temperature 0.0, top_p 0.5, max_new_tokens 8, passages 3"
  assert talk.command("/sources") == "the last answer rests on no passages"
  path = tmp_path / "said.json"
  assert talk.command(f"/save {path}") == f"saved in {path}"
  assert json.loads(path.read_text())["messages"] == talk.messages
  assert talk.command("/reset") == "forgotten" and talk.messages == []


@pytest.mark.parametrize("line, message", [
  ("/sing", "/sing: no such command"), ("/", "no such command"), ("/set colour red", "temperature"),
  ("/set top_p 1.5", r"top_p \(to 1\)"), ("/set max_new_tokens x", "max_new_tokens"), ("/set", "temperature"),
  ("/save", "needs the name of a file"), ("/save /nowhere/at/all.json", "No such file"),
  ("/save a\0b", "null"), ("/save ~nosuchuser/x", "home"),
])  # fmt: skip
def test_commands_that_are_refused(talk, line, message):
  with pytest.raises(ConfigError, match=message):
    talk.command(line)


def test_a_saved_file_is_not_overwritten(talk, tmp_path):
  (tmp_path / "said.json").write_text("mine")
  with pytest.raises(ConfigError, match="it is there already"):
    talk.command(f"/save {tmp_path / 'said.json'}")


# passages


def test_passages_are_whole_paragraphs_up_to_their_size(tmp_path):
  short, long = "one two three", " ".join(f"w{i}" for i in range(knowledge.WORDS + 7))
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "b.md").write_text(f"{short}\nfour\n\n{short}\n\n\n{long}\n\nlast")
  (tmp_path / "a.txt").write_text("\ufeffalone", "utf-8")
  (tmp_path / "c.txt").write_bytes(b"caf\xe9")
  (tmp_path / "d.bin").write_bytes(b"\0")
  (tmp_path / "e.rst").write_text("  \n\n")
  notes = []
  found = passages_of(tmp_path, notes.append)
  assert found == [
    Passage("a.txt", 1, "alone"),
    Passage("deep/b.md", 1, "one two three four one two three"),
    Passage("deep/b.md", 7, " ".join(long.split()[: knowledge.WORDS])),
    Passage("deep/b.md", 7, " ".join([*long.split()[knowledge.WORDS :], "last"])),
  ]
  assert notes == ["c.txt is left out: no UTF-8 at byte 3"]


def test_no_passages_are_refused(tmp_path):
  with pytest.raises(SourceError, match="a folder of texts is needed"):
    passages_of(tmp_path / "nowhere")
  with pytest.raises(SourceError, match="no text in files of"):
    passages_of(tmp_path)


def test_the_nearest_passages_go_before_the_question(talk):
  encoder = Bert(BertConfig(head_dim=8, max_length=64), BertSizes(vocab=264, embed=32, mlp=32, layers=1, heads=4))
  params = encoder.init(jax.random.key(0))
  texts = ["the wolf", "a king had three sons", "kings", "of bread"]
  base = Knowledge(encoder, params, byte_level(), [Passage("tales.txt", n, text) for n, text in enumerate(texts)], 32)
  found = base.search("a king had three sons", 2)
  assert found[0][0].text == "a king had three sons" and found[0][1] == pytest.approx(1, abs=1e-5)
  assert len(found) == 2 and found[0][1] >= found[1][1]
  assert base.search("a king", 4, least=1.1) == []
  talk.knowledge, talk.settings.passages = base, 1
  talk.model = Llama(LlamaConfig(head_dim=16, max_length=512))
  talk.ask("a king had three sons")
  assert talk.prompt("x")[0][0]["content"] == f"{chat.GROUNDED}\n\n[1] a king had three sons"
  assert talk.command("/sources") == "[1] tales.txt:1 (1.00)  a king had three sons"
  assert [m["role"] for m in talk.messages] == ["user", "assistant"]
  assert not any(chat.GROUNDED in m["content"] for m in talk.messages)


def test_a_long_file_is_read_at_once(tmp_path):
  """By lines once, not anew for each paragraph."""
  (tmp_path / "long.txt").write_text("word and more\n\n" * 200_000)
  found = passages_of(tmp_path)
  assert len(found) == 5000 and found[-1].line == 2 * 40 * 4999 + 1


def test_a_decoder_gives_no_vectors():
  with pytest.raises(ValueError, match="Llama gives texts no vectors"):
    Knowledge(Llama(LlamaConfig(head_dim=16)), {}, byte_level(), [Passage("a", 1, "b")])
  with pytest.raises(ValueError, match="Bert has no tokenizer"):
    Knowledge(Bert(BertConfig(head_dim=8)), {}, None, [Passage("a", 1, "b")])
