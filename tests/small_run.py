"""What the tests of runs share: a recipe, and a config that trains."""

from __future__ import annotations

import yaml

from lmcompress.config import check

COMMAND = "lmcompress run tiny.yaml"
WINDOWS = 4
RECIPE = [
  {"name": "magnitude", "at": "layers/*/mlp/down", "sparsity": 0.2},
  {"name": "round_to_nearest", "at": "layers/*/mlp/down", "bits": 4, "group_size": 32, "symmetric": False},
]


def training(place, **over):
  """Codes of three bits that learn from the model as it was, on the text of `place`; keys of `train` over that."""
  text = str(place / "text.txt")
  table = yaml.safe_load((place / "tiny.yaml").read_text())
  train = {"text": text, "length": 16, "steps": 4, "batch": 4, "learning_rate": 1e-3, "save_every": 2,
           "loss": {"name": "distill"}, "trainable": ["layers/*/mlp"],
           "held_out": {"text": text, "windows": 4, "length": 16}, **over}
  recipe = [{"name": "fake_quantize", "at": "layers/*/mlp", "bits": 3, "group_size": 32}]
  return check({**table, "name": "trained", "recipe": recipe, "train": train, "finish": [{"name": "freeze"}],
                "bench": {"rounds": 0}, "generate": None}, "trained")
