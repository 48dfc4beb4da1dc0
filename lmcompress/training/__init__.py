"""Training: losses and distillation, the step, the loop, and states to resume from."""

from lmcompress.calibration.token_loss import mean_loss
from lmcompress.training.loop import batches, fit
from lmcompress.training.losses import DIVERGENCES, Distill, Labels, divergence
from lmcompress.training.privacy import epsilon
from lmcompress.training.step import Privacy, Training, TrainState, result, start, train_step

__all__ = [
  "DIVERGENCES",
  "Distill",
  "Labels",
  "Privacy",
  "TrainState",
  "Training",
  "batches",
  "divergence",
  "epsilon",
  "fit",
  "mean_loss",
  "result",
  "start",
  "train_step",
]
