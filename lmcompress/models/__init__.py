"""Pure Flax models, an architecture per file."""

from lmcompress.models.bart import Bart, BartConfig, BartSizes
from lmcompress.models.base import Decoding
from lmcompress.models.bert import Bert, BertConfig, BertSizes, Encoded
from lmcompress.models.gemma import Gemma, GemmaConfig, GemmaSizes
from lmcompress.models.gpt2 import GPT2, GPT2Config, GPT2Sizes
from lmcompress.models.llama import Llama, LlamaConfig, LlamaSizes
from lmcompress.models.lstm import LSTM, LSTM_DEPTH, LSTMConfig, LSTMSizes
from lmcompress.models.phi import Phi, PhiConfig, PhiSizes
from lmcompress.models.rope import Rope
from lmcompress.models.seq2seq import Seq2Seq, Seq2SeqConfig, Seq2SeqSizes
from lmcompress.models.t5 import T5, T5Config, T5Sizes

ARCHITECTURES = {
  "llama": (Llama, LlamaConfig),
  "gpt2": (GPT2, GPT2Config),
  "bert": (Bert, BertConfig),
  "bart": (Bart, BartConfig),
  "lstm": (LSTM, LSTMConfig),
  "t5": (T5, T5Config),
  "gemma": (Gemma, GemmaConfig),
  "seq2seq": (Seq2Seq, Seq2SeqConfig),
  "phi": (Phi, PhiConfig),
}
"""Model class and config class by the architecture's name; a new model adds itself here."""

__all__ = [
  "ARCHITECTURES",
  "GPT2",
  "LSTM",
  "LSTM_DEPTH",
  "T5",
  "Bart",
  "BartConfig",
  "BartSizes",
  "Bert",
  "BertConfig",
  "BertSizes",
  "Decoding",
  "Encoded",
  "GPT2Config",
  "GPT2Sizes",
  "Gemma",
  "GemmaConfig",
  "GemmaSizes",
  "LSTMConfig",
  "LSTMSizes",
  "Llama",
  "LlamaConfig",
  "LlamaSizes",
  "Phi",
  "PhiConfig",
  "PhiSizes",
  "Rope",
  "Seq2Seq",
  "Seq2SeqConfig",
  "Seq2SeqSizes",
  "T5Config",
  "T5Sizes",
]
