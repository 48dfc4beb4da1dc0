"""BERT, RoBERTa and DistilBERT in Hugging Face folders and in GGUF."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmcompress.io.names import Foreign, Name, choice, divided, integer, layer_names, norm_names, number
from lmcompress.io.task_heads import task_of
from lmcompress.models import Bert, BertConfig
from lmcompress.types import FormatError, Params

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
                "silu": "silu"}  # fmt: skip


_GGUF = {
  **{f"layers/{{i}}/attn/{x}": f"blk.{{i}}.attn_{'output' if x == 'o' else x}" for x in "qkvo"},
  **{f"layers/{{i}}/mlp/{x}": f"blk.{{i}}.ffn_{x}" for x in ("up", "down")},
}


def _linears(*pairs: tuple[str, str]) -> tuple[Name, ...]:
  return layer_names(*((path, hf, _GGUF.get(path, "")) for path, hf in pairs), biases=True)


def _layers(root: str, attention: str, ends: Mapping[str, str]) -> tuple[Name, ...]:
  """Names of a layer under `root`: of its linears by `attention` and `ends`, of its norms by `ends`."""
  at = "layers/{i}/"
  q, k, v = attention.split()
  return (
    *_linears((f"{at}attn/q", f"{root}.{q}"), (f"{at}attn/k", f"{root}.{k}"), (f"{at}attn/v", f"{root}.{v}"),
              (f"{at}attn/o", f"{root}.{ends['o']}"), (f"{at}mlp/up", f"{root}.{ends['up']}"),
              (f"{at}mlp/down", f"{root}.{ends['down']}")),
    *norm_names(f"{at}attn_norm", f"{root}.{ends['attn_norm']}", "blk.{i}.attn_output_norm"),
    *norm_names(f"{at}mlp_norm", f"{root}.{ends['mlp_norm']}", "blk.{i}.layer_output_norm"),
  )  # fmt: skip


def _optional(*names: Name, outside: bool = False) -> tuple[Name, ...]:
  return tuple(dataclasses.replace(name, optional=True, outside=outside) for name in names)


_EMBEDDINGS = (
  Name("embed/table", "embeddings.word_embeddings.weight", "token_embd.weight"),
  Name("positions/table", "embeddings.position_embeddings.weight", "position_embd.weight"),
  *norm_names("embed_norm", "embeddings.LayerNorm", "token_embd_norm"),
)
_BERT_LAYERS = _layers(
  "encoder.layer.{i}",
  "attention.self.query attention.self.key attention.self.value",
  {
    "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    "attn_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm",
  },
)  # fmt: skip
_BERT_ENDS = (
  Name("types/table", "embeddings.token_type_embeddings.weight", "token_types.weight"),
  *_BERT_LAYERS,
  *_optional(*_linears(("pooler", "pooler.dense"))),
)
_MASKED = {
  "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
           "cls.predictions.decoder.weight"),
  "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
  "distilbert": ("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight"),
}  # fmt: skip
_DISTILBERT_LAYERS = _layers(
  "transformer.layer.{i}",
  "attention.q_lin attention.k_lin attention.v_lin",
  {"o": "attention.out_lin", "up": "ffn.lin1", "down": "ffn.lin2", "attn_norm": "sa_layer_norm",
   "mlp_norm": "output_layer_norm"},
)  # fmt: skip


def _names(config: Mapping[str, Any]) -> tuple[Name, ...]:
  kind = config["model_type"]
  dense, norm, bias, table = _MASKED[kind]
  if not config.get("tie_word_embeddings", True):  # a table of its own brings its own bias
    bias = table.replace(".weight", ".bias")
  masked = (*_linears(("masked/dense", dense)), *norm_names("masked/norm", norm), Name("masked/bias", bias))
  own = _DISTILBERT_LAYERS if kind == "distilbert" else _BERT_ENDS
  if kind == "bert" and task_of(config) == "labels":  # its head has the pooler
    own = tuple(name for name in own if not name.path.startswith("pooler/"))
  return (*_EMBEDDINGS, *own, *_optional(*masked, Name("head/table", table), outside=True))


def read(config: Mapping[str, Any], where: Any) -> Bert:
  """The model of a `config.json`.

  Raises:
    FormatError: names the setting that is wrong or not known here.
  """
  kind = config["model_type"]
  if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder", False):
    raise FormatError(f"{where}: relative positions and decoders are not known here")
  distil = kind == "distilbert"
  first = integer(config, "pad_token_id", where, 1, least=0) + 1 if kind == "roberta" else 0
  positions = integer(config, "max_position_embeddings", where, 512)
  if positions <= first:
    raise FormatError(f"{where}: max_position_embeddings is {positions}, of which padding takes {first}")
  return Bert(
    BertConfig(
      head_dim=divided(config, *(("dim", "n_heads") if distil else ("hidden_size", "num_attention_heads")), where),
      kind=kind,
      norm_epsilon=1e-12 if distil else number(config, "layer_norm_eps", 1e-12, where),
      activation=choice(config, "activation" if distil else "hidden_act", "gelu", _ACTIVATIONS, where),
      first_position=first,
      max_length=positions - first,
    )
  )


def write(model: Bert, params: Params) -> dict[str, Any]:
  """The `config.json` of a model."""
  c, layer = model.config, next(iter(params["layers"].values()))
  vocab, embed = params["embed"]["table"].shape
  width, hidden = layer["attn"]["q"]["kernel"].shape[-1], layer["mlp"]["up"]["kernel"].shape[-1]
  if width != embed:
    raise FormatError(f"heads of {width} entries in all over a stream of {embed}: config.json has one width for both")
  activation = {ours: word for word, ours in reversed(_ACTIVATIONS.items())}[c.activation]
  name = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[c.kind]
  config = {
    "model_type": c.kind, "architectures": [f"{name}ForMaskedLM" if "masked" in params else f"{name}Model"],
    "vocab_size": vocab, "max_position_embeddings": params["positions"]["table"].shape[0],
    "tie_word_embeddings": "head" not in params,
  }  # fmt: skip
  if c.kind == "distilbert":
    return {
      **config, "dim": embed, "hidden_dim": hidden, "n_heads": width // c.head_dim, "n_layers": len(params["layers"]),
      "activation": activation,
    }  # fmt: skip
  return {
    **config, "hidden_size": embed, "intermediate_size": hidden, "num_hidden_layers": len(params["layers"]),
    "num_attention_heads": width // c.head_dim, "hidden_act": activation, "layer_norm_eps": c.norm_epsilon,
    "type_vocab_size": params["types"]["table"].shape[0], "pad_token_id": max(c.first_position - 1, 0),
  }  # fmt: skip


_BUFFERS = (r".*position_ids", r".*token_type_ids", r"cls\.predictions\.decoder\.bias", r"lm_head\.decoder\.bias",
            r"cls\.predictions\.bias", r"lm_head\.bias", r"cls\.seq_relationship\..*")  # fmt: skip


_DENSE = {"bert": "pooler.dense", "roberta": "classifier.dense", "distilbert": "pre_classifier"}


def _heads(word: str) -> dict[str, tuple[Name, ...]]:
  """Heads of classes of a row or of tokens, and of spans; that of a row has a layer of its own before it."""
  outside = lambda *pairs: tuple(dataclasses.replace(name, outside=True) for name in _linears(*pairs))  # noqa: E731
  dense = ("tasks/labels/dense", _DENSE[word])
  return {
    "labels": (
      *(_linears(dense) if word == "bert" else outside(dense)),
      *outside(("tasks/labels", "classifier.out_proj" if word == "roberta" else "classifier")),
    ),
    "tags": outside(("tasks/tags", "classifier")),
    "spans": outside(("tasks/spans", "qa_outputs")),
  }


def _kind(word: str, depth: str) -> Foreign:
  return Foreign(
    Bert, (word,), _names, read, write, depth=depth, prefixes=(f"{word}.", ""), ignored=_BUFFERS, tied=True,
    headless=True, heads=_heads(word),
  )  # fmt: skip


FOREIGN = (
  _kind("bert", "num_hidden_layers"), _kind("roberta", "num_hidden_layers"), _kind("distilbert", "n_layers"),
)  # fmt: skip
