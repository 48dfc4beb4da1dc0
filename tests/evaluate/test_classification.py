"""Scores of a classifier: against scikit-learn's own, by hand, and intervals against a bootstrap of the rows."""

import numpy as np
import pytest
from sklearn import metrics

from lmcompress.evaluate.classification import ROC_POINTS, scores

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 400)
LOGITS = RNG.normal(size=(400, 3)) + 1.2 * np.eye(3)[LABELS]
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)


def test_scores_are_scikit_learns():
  found = scores(LABELS, PROBABILITIES, ("a", "b", "c"))
  said = PROBABILITIES.argmax(1)
  assert found["accuracy"] == metrics.accuracy_score(LABELS, said)
  assert found["f1"] == pytest.approx(metrics.f1_score(LABELS, said, average="macro"))
  assert found["auc"] == pytest.approx(metrics.roc_auc_score(LABELS, PROBABILITIES, multi_class="ovr"))
  assert np.sum(found["confusion"]) == found["n"] == 400
  areas = [np.trapezoid(rates, dx=1 / (ROC_POINTS - 1)) for rates in found["roc"]]
  np.testing.assert_allclose(np.mean(areas), found["auc"], atol=0.01)  # a curve of 51 points for one of 400
  assert found["confusion"][0][1] == np.sum((LABELS == 0) & (said == 1))


def test_equal_scores_give_the_diagonal():
  labels, said = np.tile([0, 1], 50), np.full((100, 2), 0.5)
  np.testing.assert_allclose(scores(labels, said, ("a", "b"))["roc"], [np.linspace(0, 1, ROC_POINTS)] * 2, atol=1e-4)
  said = np.where(np.arange(100)[:, None] % 5 < 2, [0.9, 0.1], [0.2, 0.8])
  found = scores(labels, said, ("a", "b"))
  area = np.mean([np.trapezoid(rates, dx=1 / (ROC_POINTS - 1)) for rates in found["roc"]])
  assert area == pytest.approx(found["auc"], abs=1e-3)


def test_intervals_are_those_of_drawing_rows_anew():
  found = scores(LABELS, PROBABILITIES, ("a", "b", "c"), resamples=4000)
  said = PROBABILITIES.argmax(1)
  rows = RNG.integers(0, 400, (2000, 400))
  for name, measure in (
    ("accuracy", lambda a, b: np.mean(a == b)), ("f1", lambda a, b: metrics.f1_score(a, b, average="macro"))
  ):  # fmt: skip
    drawn = [measure(LABELS[i], said[i]) for i in (rows if name == "accuracy" else rows[:400])]
    np.testing.assert_allclose(found["interval"][name], np.quantile(drawn, [0.025, 0.975]), atol=0.012)


def test_a_class_that_never_occurs_has_no_auc():
  found = scores(np.zeros(5, int), PROBABILITIES[:5], ("a", "b", "c"), resamples=0)
  assert found["auc"] is None and found["roc"] is None
  assert "interval" not in found and found["confusion"][1] == [0, 0, 0]


@pytest.mark.parametrize(
  ("labels", "probabilities"),
  [(LABELS[:3], PROBABILITIES), (LABELS, PROBABILITIES[:, :2]), (LABELS[:0], PROBABILITIES[:0]),
   (LABELS, np.where(np.arange(400)[:, None] == 7, np.nan, PROBABILITIES))],
)  # fmt: skip
def test_what_does_not_fit_is_said(labels, probabilities):
  with pytest.raises(ValueError, match="scores:"):
    scores(labels, probabilities, ("a", "b", "c"))
