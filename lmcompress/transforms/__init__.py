"""A method per file, and the combinators that compose them."""

from lmcompress.transforms.alps import alps
from lmcompress.transforms.any_precision import any_precision, at_precision
from lmcompress.transforms.awq import awq, awq_scale
from lmcompress.transforms.combine import at, chain, leafwise, named_chain, partition, scheduled
from lmcompress.transforms.fake_quantize import fake_quantize
from lmcompress.transforms.fake_quantize_inputs import fake_quantize_inputs
from lmcompress.transforms.freeze import freeze
from lmcompress.transforms.gptq import gptq
from lmcompress.transforms.gradient import gradient
from lmcompress.transforms.hard_concrete import hard_concrete, l0, remove_closed
from lmcompress.transforms.hqq import hqq
from lmcompress.transforms.kmeans import kmeans
from lmcompress.transforms.learned_rounding import learned_rounding
from lmcompress.transforms.llm_int8 import llm_int8
from lmcompress.transforms.lora import adapted, adapters, dora, lora, merge
from lmcompress.transforms.low_rank_residual import low_rank_residual
from lmcompress.transforms.magnitude import magnitude
from lmcompress.transforms.mixed_precision import mixed_precision
from lmcompress.transforms.product_quantize import product_quantize
from lmcompress.transforms.prune_gradually import movement, prune_gradually
from lmcompress.transforms.prune_heads import prune_heads
from lmcompress.transforms.prune_layers import prune_layers
from lmcompress.transforms.prune_neurons import prune_neurons
from lmcompress.transforms.prune_width import prune_width
from lmcompress.transforms.quip_sharp import quip_sharp
from lmcompress.transforms.rigl import rigl
from lmcompress.transforms.rotate import rotate
from lmcompress.transforms.round_to_nearest import round_to_nearest
from lmcompress.transforms.sensitivity import sensitivity
from lmcompress.transforms.share import share
from lmcompress.transforms.shrink import shrink
from lmcompress.transforms.smooth_quant import quantize_activations, quantize_inputs, smooth, smooth_quant
from lmcompress.transforms.sparse_code import sparse_code
from lmcompress.transforms.sparse_gpt import sparse_gpt
from lmcompress.transforms.sparsify_activations import sparsify_activations
from lmcompress.transforms.tie_layers import tie_layers
from lmcompress.transforms.truncated_svd import truncated_svd
from lmcompress.transforms.wanda import wanda

METHODS = {
  f.__name__: f
  for f in (
    round_to_nearest,
    gptq,
    awq,
    awq_scale,
    hqq,
    mixed_precision,
    any_precision,
    learned_rounding,
    llm_int8,
    quip_sharp,
    rotate,
    smooth_quant,
    smooth,
    quantize_inputs,
    quantize_activations,
    sparsify_activations,
    magnitude,
    wanda,
    sparse_gpt,
    alps,
    gradient,
    sensitivity,
    movement,
    prune_gradually,
    rigl,
    hard_concrete,
    l0,
    remove_closed,
    prune_neurons,
    prune_heads,
    prune_width,
    prune_layers,
    kmeans,
    product_quantize,
    sparse_code,
    share,
    shrink,
    tie_layers,
    truncated_svd,
    low_rank_residual,
    dora,
    lora,
    merge,
    fake_quantize,
    fake_quantize_inputs,
    freeze,
  )
}
"""Method factories by the name that a recipe gives them; a new method adds itself here."""

__all__ = [
  "METHODS",
  "adapted",
  "adapters",
  "alps",
  "any_precision",
  "at",
  "at_precision",
  "awq",
  "awq_scale",
  "chain",
  "dora",
  "fake_quantize",
  "fake_quantize_inputs",
  "freeze",
  "gptq",
  "gradient",
  "hard_concrete",
  "hqq",
  "kmeans",
  "l0",
  "leafwise",
  "learned_rounding",
  "llm_int8",
  "lora",
  "low_rank_residual",
  "magnitude",
  "merge",
  "mixed_precision",
  "movement",
  "named_chain",
  "partition",
  "product_quantize",
  "prune_gradually",
  "prune_heads",
  "prune_layers",
  "prune_neurons",
  "prune_width",
  "quantize_activations",
  "quantize_inputs",
  "quip_sharp",
  "remove_closed",
  "rigl",
  "rotate",
  "round_to_nearest",
  "scheduled",
  "sensitivity",
  "share",
  "shrink",
  "smooth",
  "smooth_quant",
  "sparse_code",
  "sparse_gpt",
  "sparsify_activations",
  "tie_layers",
  "truncated_svd",
  "wanda",
]
