"""Tokenizers: GGUF metadata gives the tokenizer it came from or llama.cpp's ids, and streams lose nothing."""

from __future__ import annotations

import heapq
import json
import random
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lmcompress.data import gguf_vocabulary
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.types import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for message in messages %}\n{{ bos_token + message['role'] + '\n' + message['content'] }}"
            "{{ eos_token }}\n  {% endfor %}\n"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}")
CORPUS = [
  "The quick brown fox jumps over the lazy dog, doesn't it? It's 1234 years and 56 days old.",
  "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass  # 42",
  "Größe, naïve café, Ωμέγα, мир, 日本語 中文 한국어, 🙂🙃 and e\u0301 again",
] * 3
PIECES = [
  "The", " the", " fox", "doesn't", "'LL", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "1", "42", "2024",
  "²", "Ⅷ", "٣", "é", "e\u0301", "中文", "日本語", "한국", "🙂", "👩\u200d👧", "🇫🇷", "мир", "_", "x+=1",
  "?!", "...", "--", "\u00a0", "\u3000", "\u200b", "<|im_end|", "$^", "|~",
]


def texts(count, seed=0):
  rng = random.Random(seed)
  return ["", *CORPUS[:3], *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count))]


def byte_level(pre="smollm", **more):
  """Metadata of a GGUF file with a byte-level vocabulary trained on the spot, and the trained tokenizer."""
  trained = tokenizers.Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
  trained.decoder = decoders.ByteLevel()
  trained.train_from_iterator(CORPUS, trainers.BpeTrainer(
    vocab_size=500, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
  vocab = sorted(trained.get_vocab().items(), key=lambda item: item[1])
  tokens = [token for token, _ in vocab]
  merges = [" ".join(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
  metadata = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.merges": merges,
    "tokenizer.ggml.token_type": np.where(np.isin(tokens, SPECIAL), CONTROL, NORMAL).astype(np.int32),
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE, **more,
  }
  return metadata, trained


def sentencepiece(**more):
  """Metadata of a GGUF file with a vocabulary as of Llama 2: the scores fall in the order of training."""
  trained = tokenizers.Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Metaspace()
  trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=200, show_progress=False))
  learned = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
  learned.sort(key=lambda token: len(token) == 1)
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, "<think>"]
  types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(learned), USER_DEFINED]
  scores = [*[0.0] * 259, *(-float(i) for i in range(len(learned))), -1000.0]
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": np.array(types, np.int32),
    "tokenizer.ggml.scores": np.array(scores, np.float32),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    **more,
  }


def llama_cpp(metadata, text, prefix):
  """The ids of llama.cpp's SentencePiece tokenizer: merge the best-scored pair, the leftmost of equals."""
  ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
  scores = metadata["tokenizer.ggml.scores"]
  symbols = list((" " * prefix + text).replace(" ", "▁")) if text else []
  end = len(symbols)
  following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
  queue = []

  def offer(i, j):
    if i >= 0 and j < end and symbols[i] + symbols[j] in ids:
      heapq.heappush(queue, (-scores[ids[symbols[i] + symbols[j]]], i, symbols[i], symbols[j]))

  for i in range(end - 1):
    offer(i, i + 1)
  while queue:
    _, i, left, right = heapq.heappop(queue)
    j = following[i]
    if j == end or (symbols[i], symbols[j]) != (left, right):
      continue
    symbols[i], symbols[j], following[i] = left + right, "", following[j]
    if following[i] < end:
      previous[following[i]] = i
    offer(previous[i], i)
    offer(i, following[i])
  pieces = ([piece] if piece in ids else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in symbols)
  return [ids[token] for piece in pieces for token in piece]


def cut_by(patterns, text):
  """llama.cpp's pre-tokenizer: each pattern cuts the pieces that those before it left."""
  pieces = [text]
  for pattern in patterns:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    pieces = [piece for whole in pieces for piece, _ in split.pre_tokenize_str(whole)]
  return pieces


def test_a_byte_level_vocabulary_encodes_as_the_tokenizer_it_came_from():
  metadata, trained = byte_level()
  tokenizer = Tokenizer.from_gguf(metadata)
  trained.encode_special_tokens = True
  for text in texts(300):
    ids = tokenizer.encode(text)
    assert ids == trained.encode(text).ids
    assert tokenizer.decode(ids) == text
  assert tokenizer.vocab_size == trained.get_vocab_size() == len(metadata["tokenizer.ggml.tokens"])


@pytest.mark.parametrize("pre", sorted(gguf_vocabulary._PATTERNS))
def test_a_pre_tokenizer_cuts_as_its_patterns_say(pre):
  tokenizer = Tokenizer.from_gguf(byte_level(pre)[0])
  splitter, decoder = tokenizer.backend.pre_tokenizer, decoders.ByteLevel()
  for text in texts(60):
    cuts = [decoder.decode([piece]) for piece, _ in splitter.pre_tokenize_str(text)]
    assert "".join(cuts) == text
    assert cuts == cut_by(gguf_vocabulary._PATTERNS[pre], text)


CUTS = {
  "smollm": [("in 1234's", ["in", " ", "1", "2", "3", "4", "'s"]), ("a   b", ["a", "  ", " b"])],
  "gpt-2": [("in 1234's", ["in", " 1234", "'s"]), ("I'LL go\n\n", ["I", "'", "LL", " go", "\n\n"])],
  "llama-bpe": [("in 1234's", ["in", " ", "123", "4", "'s"]), ("I'LL go\n\n", ["I", "'LL", " go", "\n\n"])],
  "qwen2": [("in 1234's", ["in", " ", "1", "2", "3", "4", "'s"]), ("(x) =>\n", ["(x", ")", " =>\n"])],
  "default": [("in 1234's", ["in", " ", "123", "4", "'", "s"])],
  "falcon": [("in 1234", ["in", " ", "123", "4"]), ("a`b", ["a", "`", "b"])],
  "tekken": [("camelCase 12", ["camel", "Case", " ", "1", "2"])],
}


@pytest.mark.parametrize("pre", CUTS)
def test_known_cuts(pre):
  splitter, decoder = Tokenizer.from_gguf(byte_level(pre)[0]).backend.pre_tokenizer, decoders.ByteLevel()
  for text, expected in CUTS[pre]:
    cuts = [decoder.decode([piece]) for piece, _ in splitter.pre_tokenize_str(text)]
    assert cuts == expected


def test_special_tokens_in_a_text_are_text_unless_asked():
  tokenizer = Tokenizer.from_gguf(byte_level()[0])
  text = "a<|im_end|>b"
  plain = tokenizer.encode(text)
  assert 2 not in plain and tokenizer.decode(plain) == text
  parsed = tokenizer.encode(text, parse_special=True)
  assert parsed == [*tokenizer.encode("a"), 2, *tokenizer.encode("b")]
  assert tokenizer.decode(parsed) == "ab" and tokenizer.decode(parsed, skip_special=False) == text
  assert tokenizer.encode(text) == plain


def test_a_user_defined_token_is_always_one_token():
  metadata, _ = byte_level()
  metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
  metadata["tokenizer.ggml.token_type"] = np.append(metadata["tokenizer.ggml.token_type"], USER_DEFINED)
  tokenizer = Tokenizer.from_gguf(metadata)
  ids = tokenizer.encode("a <think> b")
  assert tokenizer.vocab_size - 1 in ids and tokenizer.decode(ids) == "a <think> b"


def test_the_ends_of_sequences_and_turns():
  metadata, _ = byte_level()
  tokenizer = Tokenizer.from_gguf(metadata)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.wants_bos) == (1, 2, False)
  assert tokenizer.stop_ids == {0, 2}
  assert Tokenizer.from_gguf({**metadata, "tokenizer.ggml.eot_token_id": 7}).stop_ids == {0, 2, 7}
  metadata["tokenizer.ggml.token_type"] = np.full(len(metadata["tokenizer.ggml.tokens"]), NORMAL, np.int32)
  del metadata["tokenizer.ggml.eos_token_id"], metadata["tokenizer.ggml.bos_token_id"]
  plain = Tokenizer.from_gguf(metadata)
  assert (plain.bos_id, plain.eos_id, plain.stop_ids) == (None, None, frozenset())
  with pytest.raises(ValueError, match="no token that begins"):
    plain.encode("a", add_bos=True)


def test_the_beginning_is_added_once():
  metadata, _ = byte_level(**{"tokenizer.ggml.add_bos_token": True})
  tokenizer = Tokenizer.from_gguf(metadata)
  ids = tokenizer.encode("a")
  assert tokenizer.wants_bos and 1 not in ids
  assert tokenizer.encode("a", add_bos=True) == tokenizer.encode("a", add_special=True) == [1, *ids]
  assert tokenizer.encode("<|im_start|>a", add_bos=True, parse_special=True) == [1, *ids]
  assert Tokenizer.from_gguf(sentencepiece()).wants_bos
  del metadata["tokenizer.ggml.add_bos_token"]
  assert not Tokenizer.from_gguf(metadata).wants_bos
  assert Tokenizer.from_gguf({**metadata, "tokenizer.ggml.pre": "llama-bpe"}).wants_bos


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_encodes_as_llama_cpp(prefix):
  metadata = sentencepiece(**{"tokenizer.ggml.add_space_prefix": prefix})
  tokenizer = Tokenizer.from_gguf(metadata)
  for text in texts(300):
    ids = tokenizer.encode(text)
    assert ids == llama_cpp(metadata, text, prefix), text
    assert tokenizer.decode(ids) == text
  assert tokenizer.encode("</s>") != [2] and tokenizer.encode("</s>", parse_special=True) == [2]


@pytest.mark.parametrize("metadata", [byte_level()[0], sentencepiece()], ids=["gpt2", "llama"])
def test_a_stream_gives_whole_characters_and_all_of_the_text(metadata):
  tokenizer = Tokenizer.from_gguf(metadata)
  for text in texts(60):
    ids = [1, *tokenizer.encode(text), 2]
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.flush() == text == tokenizer.decode(ids)


def test_a_stream_keeps_an_unfinished_character_until_the_flush():
  tokenizer = Tokenizer.from_gguf(byte_level()[0])
  ids = [tokenizer.backend.token_to_id(token) for token in pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False).pre_tokenize_str("a🙂")[0][0]]
  stream = tokenizer.stream()
  assert [stream.push(i) for i in ids] == ["a", "", "", "", "🙂"]
  assert [stream.push(i) for i in ids[:3]] == ["a", "", ""]
  assert stream.flush() == "\ufffd" and stream.flush() == "" and stream.push(ids[0]) == "a"


def test_random_ids_stream_to_what_they_decode_to():
  tokenizer, rng = Tokenizer.from_gguf(byte_level()[0]), random.Random(0)
  for _ in range(100):
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_chat_follows_the_template():
  tokenizer = Tokenizer.from_gguf(byte_level()[0])
  messages = [{"role": "user", "content": "Hi"}]
  assert tokenizer.chat(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
  assert tokenizer.chat(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"


def test_a_template_that_fails_or_reaches_out_is_refused():
  messages = [{"role": "user", "content": "Hi"}]
  for template, message in {
    "{{ raise_exception('roles must alternate') }}": "fails: roles must alternate",
    "{% for %}": "fails",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages.append(1) }}": "fails",
    "{{ messages.__class__.__base__.__subclasses__() }}": "unsafe|fails",
    "{% for i in range(999999) %}{% endfor %}": "Range too big",
    "a" * ((1 << 20) + 1): "1048577 characters",
  }.items():
    tokenizer = Tokenizer.from_gguf(byte_level(**{"tokenizer.chat_template": template})[0])
    with pytest.raises(FormatError, match=message):
      tokenizer.chat(messages)
  metadata, _ = byte_level()
  del metadata["tokenizer.chat_template"]
  with pytest.raises(FormatError, match="no chat template"):
    Tokenizer.from_gguf(metadata).chat(messages)


def test_templates_have_what_transformers_gives_them():
  template = "{% for m in messages %}{% break %}{% endfor %}{{ messages | tojson }}{{ strftime_now('%%') }}"
  tokenizer = Tokenizer.from_gguf(byte_level(**{"tokenizer.chat_template": template})[0])
  assert tokenizer.chat([{"role": "user", "content": "é<"}]) == '[{"role": "user", "content": "é<"}]%'


@pytest.mark.slow
@pytest.mark.parametrize("metadata", [byte_level()[0], sentencepiece()], ids=["gpt2", "llama"])
def test_a_saved_tokenizer_loads_here_and_in_transformers(tmp_path, metadata):
  from transformers import AutoTokenizer

  tokenizer = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.eot_token_id": 5})
  tokenizer.save(tmp_path)
  ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
  for name in ("bos_id", "eos_id", "stop_ids", "chat_template", "wants_bos", "vocab_size"):
    assert getattr(ours, name) == getattr(tokenizer, name), name
  assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, tokenizer.vocab_size)
  for text in [*texts(60), "a<|im_end|>b</s> c"]:
    ids = tokenizer.encode(text, parse_special=True)
    assert ours.encode(text, parse_special=True) == ids
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs(text)["input_ids"] == tokenizer.encode(text, parse_special=True, add_special=True)
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
  if tokenizer.chat_template:
    messages = [{"role": "user", "content": "Hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat(messages) == expected


def folder_with(folder, **files):
  """A model folder; keyword `a__b` is the file `a.b`, a dict is written as JSON."""
  byte_level()[1].save(str(folder / "tokenizer.json"))
  for name, content in files.items():
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
  return folder


def test_a_folder_gives_its_ends_and_template(tmp_path):
  tokenizer = Tokenizer.from_folder(folder_with(
    tmp_path,
    tokenizer_config__json={"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>",
                            "chat_template": [{"name": "tools", "template": "t"},
                                              {"name": "default", "template": "from the config"}]},
    generation_config__json={"eos_token_id": [2, 9]}, config__json={"eos_token_id": 11, "bos_token_id": 0}))
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (1, 2, {0, 2, 9, 11})
  assert tokenizer.chat([]) == "from the config" and not tokenizer.wants_bos
  (tmp_path / "chat_template.jinja").write_text("from the file")
  assert Tokenizer.from_folder(tmp_path).chat([]) == "from the file"


def test_a_folder_with_nothing_but_the_tokenizer_and_a_config(tmp_path):
  folder_with(tmp_path, config__json={"eos_token_id": 2, "bos_token_id": 1})
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (1, 2, None)


def test_truncation_and_padding_are_switched_off(tmp_path):
  _, trained = byte_level()
  trained.enable_truncation(4)
  trained.enable_padding(length=12)
  trained.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_the_template_of_an_encoder_is_added_on_request(tmp_path):
  vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s"])}
  bert = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
  bert.pre_tokenizer = pre_tokenizers.Whitespace()
  bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
  bert.decoder = decoders.WordPiece()
  bert.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
  bert.save(str(tmp_path / "tokenizer.json"))
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert tokenizer.encode("hello worlds") == [4, 5, 6]
  assert tokenizer.encode("hello worlds", add_special=True) == [2, 4, 5, 6, 3]
  assert tokenizer.decode([2, 4, 5, 6, 3]) == "hello worlds" and not tokenizer.wants_bos


@pytest.mark.parametrize(("name", "content", "message"), [
  ("tokenizer.json", "{", "tokenizer.json is no tokenizer"),
  ("tokenizer.json", "[" * 100_000, "tokenizer.json is no tokenizer"),
  ("tokenizer.json", '{"model": {"type": "None"}}', "tokenizer.json is no tokenizer"),
  ("tokenizer_config.json", "{", "tokenizer_config.json is no JSON"),
  ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is no JSON"),
  ("config.json", "[]", "config.json holds a list"),
  ("generation_config.json", "1", "generation_config.json holds a int"),
])
def test_a_damaged_file_is_named(tmp_path, name, content, message):
  (folder_with(tmp_path) / name).write_text(content)
  with pytest.raises(FormatError, match=re.escape(message)):
    Tokenizer.from_folder(tmp_path)


def test_a_missing_an_undecodable_and_a_huge_file_are_named(tmp_path):
  with pytest.raises(FormatError, match=r"has no tokenizer\.json; save one"):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").write_bytes(b"\xff")
  with pytest.raises(FormatError, match=r"tokenizer\.json is not UTF-8"):
    Tokenizer.from_folder(tmp_path)
  with open(tmp_path / "tokenizer.json", "wb") as file:
    file.truncate((64 << 20) + 1)
  with pytest.raises(FormatError, match="67108865 bytes, 67108864 are allowed"):
    Tokenizer.from_folder(tmp_path)


def test_word_pieces_without_ids():
  """What a converter leaves of a folder that names no special tokens: their spelling tells, also of a user's own."""
  tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁play", "ing", "▁,", "▁<e1>"]
  metadata = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.add_bos_token": False,
              "tokenizer.ggml.token_type": np.array([3, 2, 3, 3, 1, 1, 1, 4], np.int32)}  # fmt: skip
  tokenizer = Tokenizer.from_gguf(metadata)
  assert tokenizer.encode("Playing, <e1>", add_special=True) == [2, 4, 5, 6, 7, 3]
  pair = tokenizer.backend.encode("play", "playing")
  assert pair.ids == [2, 4, 3, 4, 5, 3] and pair.type_ids == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(("flags", "ids"), [
  ({}, [3, 4, 1]), ({"add_space_prefix": False}, [5, 4, 1]), ({"add_eos_token": False}, [3, 4]),
])  # fmt: skip
def test_unigrams(flags, ids):
  """The likeliest cut; spaces are one, and none begins or ends a text."""
  metadata = {
    "tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", "▁ab", "▁cd", "ab", "cd", "▁"],
    "tokenizer.ggml.scores": np.array([0, 0, 0, -1, -1, -1.5, -2, -3], np.float32),
    "tokenizer.ggml.token_type": np.array([3, 3, 2, 1, 1, 1, 1, 1], np.int32), "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 2, **{f"tokenizer.ggml.{key}": value for key, value in flags.items()},
  }  # fmt: skip
  tokenizer = Tokenizer.from_gguf(metadata)
  found = tokenizer.encode("  ab   cd ", add_special=True)
  assert found == ids and tokenizer.decode(found) == "ab cd"


@pytest.mark.parametrize(("key", "value", "message"), [
  ("model", "rwkv", "'rwkv'; supported are gpt2, llama, bert, t5"),
  ("model", None, "'None'; supported are gpt2, llama"),
  ("model", [1], "supported are gpt2, llama"),
  ("pre", "no-such", "'no-such'; supported are .*smollm"),
  ("tokens", None, "tokens is missing"),
  ("tokens", [1, 2], "no list of strings"),
  ("tokens", ["a", "a"], "2 entries, 1 distinct"),
  ("tokens", ["a" * 1025], "1025 characters, 1024 are allowed"),
  ("token_type", np.zeros(3, np.int32), "token_type is no list"),
  ("merges", None, "merges is missing"),
  ("merges", ["ab"], "'ab' is no pair"),
  ("merges", ["zz qq"], "cannot be built"),
  ("bos_token_id", 10**6, "bos_token_id is 1000000"),
  ("eos_token_id", -1, "eos_token_id is -1"),
  ("eot_token_id", "x", "eot_token_id is x"),
])
def test_metadata_that_does_not_fit_is_named(key, value, message):
  metadata = {**byte_level()[0], f"tokenizer.ggml.{key}": value}
  with pytest.raises(FormatError, match=f"^model.gguf: .*{message}"):
    Tokenizer.from_gguf(metadata, "model.gguf")


def test_mutants_of_a_tokenizer_file_are_read_or_refused(tmp_path):
  folder_with(tmp_path)
  path, rng = tmp_path / "tokenizer.json", random.Random(0)
  content = path.read_text(encoding="utf-8")
  for _ in range(60):
    at = rng.randrange(len(content))
    mutant = rng.choice([content[:at], content[:at] + rng.choice('{}[]",:0a-') + content[at + 1:]])
    path.write_text(mutant, encoding="utf-8")
    try:
      tokenizer = Tokenizer.from_folder(tmp_path)
      tokenizer.decode(tokenizer.encode(CORPUS[0]))
    except FormatError:
      pass


def test_ids_that_do_not_exist_are_no_crash():
  tokenizer = Tokenizer.from_gguf(byte_level()[0])
  assert tokenizer.decode([10**6]) == ""
  with pytest.raises(FormatError, match="cannot decode"):
    tokenizer.decode([-1])
