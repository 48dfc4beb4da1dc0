"""Scores of entities, spans, texts and samples, beside the libraries' own calls and what is counted by hand."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf
from seqeval.metrics import f1_score

from lmcompress.data.text import load_text
from lmcompress.evaluate import entities, samples, spans, texts
from lmcompress.evaluate.resampling import resampled

CLASSES = ("O", "B-x", "I-x", "B-y", "I-y")


def test_an_entity_is_right_as_a_whole():
  tags = np.asarray([[-1, 1, 2, 0, 3, -1], [0, 3, 4, 4, 0, -1]])
  said = np.asarray([[2, 1, 2, 0, 1, 3], [0, 3, 4, 0, 0, 1]])  # right, wrong type, too short
  found = entities.scores(tags, said, CLASSES)
  assert (found["entities"], found["precision"], found["recall"]) == (3, 1 / 3, 1 / 3)
  assert found["types"] == {"x": {"f1": 2 / 3, "n": 1}, "y": {"f1": 0.0, "n": 2}} and found["measure"] == "f1"
  draw = np.random.default_rng(0)
  tags, said = draw.integers(0, 5, (2, 40, 12))
  words = [[[CLASSES[c] for c in row] for row in side] for side in (tags, said)]
  found = entities.scores(tags, said, CLASSES)
  assert found["f1"] == pytest.approx(f1_score(words[0], words[1]), abs=1e-12)
  assert found["interval"]["f1"][0] < found["f1"] < found["interval"]["f1"][1]
  with pytest.raises(ValueError, match="do not fit"):
    entities.scores(tags, said[:3], CLASSES)


def test_the_likeliest_span_ends_after_it_begins():
  draw = np.random.default_rng(0)
  p = draw.dirichlet(np.ones(9), (20, 2))
  for row, (first, last) in zip(p, spans.likeliest(p, 4), strict=True):
    every = {(a, b): row[0, a] * row[1, b] for a in range(9) for b in range(a, min(9, a + 4))}
    assert (first, last) == max(every, key=every.__getitem__)


def test_spans_share_tokens():
  found = spans.scores(np.asarray([[1, 4], [2, 2], [0, 1]]), np.asarray([[3, 6], [2, 2], [5, 5]]))
  assert found["exact"] == pytest.approx(1 / 3) and found["f1"] == pytest.approx((2 * 2 / 8 + 1 + 0) / 3)
  with pytest.raises(ValueError, match="no two spans"):
    spans.scores(np.zeros((0, 2)), np.zeros((0, 2)))


def test_translations_are_judged_by_sacrebleu():
  written = ["the wolf ate the king of Rome", "a son came home to us"]
  wanted = ["the wolf ate a king of Rome", "the son came home"]
  found = texts.scores(written, wanted, "bleu")
  assert found["bleu"] == pytest.approx(corpus_bleu(written, [wanted]).score, abs=1e-9)
  assert found["chrf"] == pytest.approx(corpus_chrf(written, [wanted]).score, abs=1e-9)
  assert found["interval"]["bleu"][0] < found["interval"]["bleu"][1] and "tok:13a" in found["signature"]
  one, other = "\u4e00\u5207\u8d5e\u9882\u5f52\u5b89\u62c9", "\u4e00\u5207\u8d5e\u9882\u5168\u5f52\u5b89\u62c9"
  chinese = texts.scores([one], [other], "bleu", "zh")["bleu"]
  assert chinese == pytest.approx(corpus_bleu([one], [[other]], tokenize="zh").score) and 20 < chinese < 90
  assert texts.scores(["", ""], wanted, "bleu")["bleu"] == 0
  with pytest.raises(ValueError, match="1 were written for 2 references"):
    texts.scores(["a"], wanted, "bleu")


def test_summaries_are_judged_by_rouge():
  written, wanted = ["profits rose again", "kings"], ["profit rises again", "queens"]
  found, scorer = texts.scores(written, wanted, "rouge"), RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
  each = [scorer.score(b, a) for a, b in zip(written, wanted, strict=True)]
  assert found["rougeL"] == pytest.approx(np.mean([s["rougeL"].fmeasure for s in each]))
  assert found["measure"] == "rougeL" and found["examples"] == [[written[0], wanted[0]], ["kings", "queens"]]


def test_an_interval_holds_the_mean_of_a_normal():
  x = np.random.default_rng(1).normal(size=4000)
  low, high = resampled(x, lambda sums: sums / 4000, 2000, 0)
  assert low < x.mean() < high and high - low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.1)


def test_digits_are_recognised_if_they_look_like_it():
  held = load_text("digits:fifth").split("\n\n")[:60]
  found = samples.judge_digits(held)
  assert found["recognised"] > 0.9 and found["valid"] == found["new"] == 1 and found["real"] > 0.95
  other = [f"{(int(image[0]) + 1) % 10}{image[1:]}" for image in held]
  bad = samples.judge_digits([*other, "3ABC", "", held[0] + "A", load_text("digits:rest").split("\n\n")[0]])
  assert bad["recognised"] < 0.1 and bad["valid"] == pytest.approx(61 / 64) and bad["new"] == pytest.approx(60 / 61)


TUNE = "M:2/4\nL:1/8\nK:G\nG4 | A2 B2 | c4 | {} | G4"


@pytest.mark.slow
def test_tunes_are_read_and_their_bars_counted():
  good, short, none = TUNE.format("d2 e2"), TUNE.format("d2"), "once upon a time"
  found = samples.judge_tunes([good, short, none, "M:2/4\nL:1/8\nK:G\n"])
  assert found["valid"] == 0.5 and found["bars"] == pytest.approx(5 / 6) and found["new"] == 1
  assert found["real"] > 0.9 and found["n"] == 4
  known = load_text("tunes:rest").split("\n\n")[0]
  assert samples.judge_tunes([known])["new"] == 0
