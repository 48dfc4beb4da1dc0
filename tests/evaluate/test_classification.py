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
  for c, rates in enumerate(found["roc"]):
    false, true, _ = metrics.roc_curve((c == LABELS).astype(int), PROBABILITIES[:, c])
    want = [true[false <= x].max() for x in np.linspace(0, 1, ROC_POINTS)]
    np.testing.assert_allclose(rates, want, atol=1e-4)
  assert found["confusion"][0][1] == np.sum((LABELS == 0) & (said == 1))


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
