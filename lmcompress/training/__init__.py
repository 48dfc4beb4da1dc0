"""Training: losses and distillation, the step, the loop, and states to resume from."""

from lmcompress.calibration.token_loss import mean_loss
from lmcompress.training.asynchronous import Asynchronous, Local, fit_async, fit_local
from lmcompress.training.generated import Generated, write_rows
from lmcompress.training.heads import Task
from lmcompress.training.loop import batches, fit
from lmcompress.training.losses import DIVERGENCES, Distill, Labels, divergence
from lmcompress.training.match import Match
from lmcompress.training.pipeline import Pipeline, merge_stages, split_stages
from lmcompress.training.privacy import epsilon
from lmcompress.training.step import Privacy, Training, TrainState, compiled_step, result, start, train_step
from lmcompress.training.stored import StoredTeacher, store_predictions
from lmcompress.training.tasks import Weighting, fit_tasks, probabilities

__all__ = [
  "DIVERGENCES",
  "Asynchronous",
  "Distill",
  "Generated",
  "Labels",
  "Local",
  "Match",
  "Pipeline",
  "Privacy",
  "StoredTeacher",
  "Task",
  "TrainState",
  "Training",
  "Weighting",
  "batches",
  "compiled_step",
  "divergence",
  "epsilon",
  "fit",
  "fit_async",
  "fit_local",
  "fit_tasks",
  "mean_loss",
  "merge_stages",
  "probabilities",
  "result",
  "split_stages",
  "start",
  "store_predictions",
  "train_step",
  "write_rows",
]
