"""Generation: prompts prefilled in buckets, then one compiled step a token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmcompress.generation.cache import KVCache, init_cache
from lmcompress.generation.sampling import Sampler
from lmcompress.types import Params

_SMALLEST_BUCKET = 16
_SLOTS = 128
"""Cache sizes are multiples of this."""


def bucket(length: int) -> int:
  """The power of two, at least 16, that a length is padded to: few shapes, few compilations."""
  return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def generate(
  model: Any,
  params: Params,
  tokenizer: Any,
  prompt: str | Sequence[str],
  max_new_tokens: int = 128,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  stop: Sequence[str] = (),
  chat: bool = False,
  cache_dtype: Any = jnp.float32,
  on_text: Callable[[str], None] | None = None,
) -> Any:
  """Continues a prompt, or a batch of prompts of different lengths.

  Args:
    prompt: a text, or a sequence of texts.
    max_new_tokens: at most this many tokens are added to each.
    temperature: 0 is greedy; else divides the logits.
    top_k: draws among the k likeliest; 0 is all.
    top_p: draws among the fewest tokens whose probability reaches p.
    key: decides the draw; needed when the temperature is positive.
    stop: texts at which a continuation ends (and which it leaves out), beside the tokenizer's stop tokens.
    chat: wraps each prompt in the tokenizer's chat template as a user's message.
    cache_dtype: float32 or bfloat16.
    on_text: called with each piece of text as it comes; for a single prompt.

  Returns:
    The continuation (without the prompt), or a list of them for a sequence of prompts.

  Raises:
    ValueError: nothing to continue, a setting out of range, or more tokens than the model's context.
  """
  single = isinstance(prompt, str)
  prompts = [prompt] if single else list(prompt)
  if not prompts:
    raise ValueError("generate: no prompt; pass a text or a sequence of texts")
  if on_text is not None and not single:
    raise ValueError("generate(on_text=...) streams one prompt; found a sequence")
  if chat:
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in prompts]
  ids = [tokenizer.encode(text, parse_special=chat) for text in prompts]
  bos = getattr(tokenizer, "bos_id", None)
  ids = [row or ([bos] if bos is not None else []) for row in ids]
  if not all(ids):
    raise ValueError("generate: a prompt has no tokens; give it some text")
  streams = [tokenizer.stream() for _ in prompts]
  texts, done = ["" for _ in prompts], [False] * len(prompts)
  sent = 0
  steps = decode(
    model,
    params,
    ids,
    max_new_tokens,
    Sampler(temperature, top_k, top_p),
    key,
    cache_dtype,
  )
  for tokens in steps:
    for i, token in enumerate(tokens):
      if done[i]:
        continue
      if token in tokenizer.stop_ids:
        done[i] = True
        continue
      texts[i] += streams[i].push(token)
      found = [texts[i].find(s) for s in stop if s in texts[i]]
      if found:
        texts[i], done[i] = texts[i][: min(found)], True
    if on_text is not None:
      held = 0 if done[0] else max((len(s) - 1 for s in stop), default=0)
      ready = max(sent, len(texts[0]) - held)
      if ready > sent:
        on_text(texts[0][sent:ready])
        sent = ready
    if all(done):
      break
  for i, stream in enumerate(streams):
    if not done[i]:
      texts[i] += stream.flush()
  if on_text is not None and len(texts[0]) > sent:
    on_text(texts[0][sent:])
  return texts[0] if single else texts


def decode(
  model: Any,
  params: Params,
  ids: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampler: Sampler,
  key: jax.Array | None = None,
  cache_dtype: Any = jnp.float32,
) -> Iterator[list[int]]:
  """Yields the next token of every sequence, step by step, until `max_new_tokens`.

  The next step runs on the device while the caller looks at the last one's tokens.

  Raises:
    ValueError: see `generate`.
  """
  sampler.check()
  if max_new_tokens < 1:
    raise ValueError(f"max_new_tokens={max_new_tokens}: at least 1")
  if sampler.temperature > 0 and key is None:
    raise ValueError("a temperature above 0 draws at random: pass key=jax.random.key(seed)")
  longest = max(len(row) for row in ids)
  limit = model.config.max_length
  if longest + max_new_tokens > limit:
    raise ValueError(
      f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's context of {limit}"
    )
  width = bucket(longest)
  slots = _SLOTS * -(-(width + max_new_tokens) // _SLOTS)
  tokens = np.zeros((len(ids), width), np.int32)
  mask = np.zeros((len(ids), width), bool)
  for row, (t, m) in zip(ids, zip(tokens, mask, strict=True), strict=True):
    t[width - len(row) :], m[width - len(row) :] = row, True
  key = jax.random.key(0) if key is None else key
  cache = init_cache(model, params, len(ids), slots, cache_dtype)
  current, cache, key = prefill(model, sampler, params, tokens, mask, cache, key)
  for n in range(max_new_tokens):
    last = n == max_new_tokens - 1
    following = None if last else step(model, sampler, params, current, cache, key)
    yield [int(t) for t in np.asarray(current)]
    if following is not None:
      current, cache, key = following


def prefill(
  model: Any, sampler: Sampler, params: Params, tokens: Any, mask: Any, cache: KVCache, key: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Reads the prompts, layer by compiled layer, and draws the first token of each."""
  carry = model.start(params, {"tokens": tokens, "attention_mask": mask, "cache": cache})
  for block in model.blocks(params):
    carry, _ = model.run(block, params, carry)
  logits, cache = model.finish(params, carry, last=True)
  key, draw = jax.random.split(key)
  return sampler(logits[:, -1], draw), cache, key


@functools.partial(jax.jit, static_argnames=("model", "sampler"), donate_argnames=("cache",))
def step(
  model: Any, sampler: Sampler, params: Params, tokens: jax.Array, cache: KVCache, key: jax.Array
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Reads one token of each sequence and draws the next."""
  logits, cache = model.apply(params, tokens[:, None], cache=cache)
  key, draw = jax.random.split(key)
  return sampler(logits[:, -1], draw), cache, key
