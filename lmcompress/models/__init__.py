"""Pure Flax models, an architecture per file."""

from lmcompress.models.bert import Bert, BertConfig, BertSizes, Encoded
from lmcompress.models.gpt2 import GPT2, GPT2Config, GPT2Sizes
from lmcompress.models.llama import Llama, LlamaConfig, LlamaSizes
from lmcompress.models.lstm import LSTM, LSTM_DEPTH, LSTMConfig, LSTMSizes
from lmcompress.models.rope import Rope

ARCHITECTURES = {
  "llama": (Llama, LlamaConfig),
  "gpt2": (GPT2, GPT2Config),
  "bert": (Bert, BertConfig),
  "lstm": (LSTM, LSTMConfig),
}
"""Model class and config class by the architecture's name; a new model adds itself here."""

__all__ = [
  "ARCHITECTURES",
  "GPT2",
  "LSTM",
  "LSTM_DEPTH",
  "Bert",
  "BertConfig",
  "BertSizes",
  "Encoded",
  "GPT2Config",
  "GPT2Sizes",
  "LSTMConfig",
  "LSTMSizes",
  "Llama",
  "LlamaConfig",
  "LlamaSizes",
  "Rope",
]
