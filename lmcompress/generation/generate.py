"""Generation: a prompt or several in, text out, streamed as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lmcompress.generation.engine import Engine, Stats
from lmcompress.generation.loop import step
from lmcompress.generation.prefill import bucket, prefill
from lmcompress.generation.prefix import PrefixCache
from lmcompress.generation.sampling import Sampler
from lmcompress.types import Params

__all__ = ["bucket", "decode", "generate", "prefill", "step"]


def generate(
  model: Any,
  params: Params,
  tokenizer: Any,
  prompt: str | Sequence[str] | Sequence[Mapping[str, str]],
  max_new_tokens: int = 128,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  key: jax.Array | None = None,
  stop: Sequence[str] = (),
  chat: bool = False,
  cache_dtype: Any = jnp.float32,
  draft: tuple[Any, Params] | None = None,
  draft_tokens: int = 4,
  prefix_cache: PrefixCache | None = None,
  on_text: Callable[[str], None] | None = None,
  on_stats: Callable[[Stats], None] | None = None,
) -> Any:
  """Continues a prompt, or a batch of prompts of different lengths.

  Args:
    prompt: a text, a sequence of texts, or with `chat` one conversation as a sequence of messages (`role`, `content`).
    max_new_tokens: at most this many tokens are added to each.
    temperature: 0 is greedy; else divides the logits.
    top_k: draws among the k likeliest; 0 is all.
    top_p: draws among the fewest tokens whose probability reaches p.
    key: decides the draw; needed when the temperature is positive.
    stop: texts at which a continuation ends (and which it leaves out), beside the tokenizer's stop tokens.
    chat: wraps each prompt in the tokenizer's chat template, a text as a user's message.
    cache_dtype: float32 or bfloat16, or whatever else `init_cache` takes.
    draft: `(model, params)` of a cheaper model with the same tokenizer: it proposes tokens, the model keeps those it
      agrees with. The text is drawn from the same distribution as without it (greedy: is the same text but for ties
      in the last bits, see `speculative.py`). For instance `(model, first_layers(params, 8))`.
    draft_tokens: how many tokens the draft proposes at once.
    prefix_cache: remembers prompts, so that one which begins like an earlier one reads only the rest.
    on_text: called with each piece of text as it comes; for a single prompt.
    on_stats: called once at the end with the `Stats`: times, tokens, how many drafts were kept.

  Returns:
    The continuation (without the prompt), or a list of them for a sequence of prompts.

  Raises:
    ValueError: nothing to continue, a setting out of range, a draft that does not fit, or more tokens than the
      model's context.
  """
  talk = chat and not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
  single = isinstance(prompt, str) or talk
  prompts: list[Any] = [prompt] if single else list(prompt)
  if not prompts:
    raise ValueError("generate: no prompt; pass a text or a sequence of texts")
  if on_text is not None and not single:
    raise ValueError("generate(on_text=...) streams one prompt; found a sequence")
  if chat:
    prompts = [tokenizer.chat(p if talk else [{"role": "user", "content": p}]) for p in prompts]
  ids = [list(tokenizer.encode(text, parse_special=chat)) for text in prompts]
  bos, begins = getattr(tokenizer, "bos_id", None), getattr(tokenizer, "wants_bos", False)
  if bos is not None:  # what is empty begins with it, and all does where the model was trained so
    ids = [[bos, *row] if not row or (begins and row[0] != bos) else row for row in ids]
  if not all(ids):
    raise ValueError("generate: a prompt has no tokens; give it some text")
  engine = Engine(
    model,
    params,
    Sampler(temperature, top_k, top_p),
    cache_dtype=cache_dtype,
    draft=draft,
    draft_tokens=draft_tokens,
    prefix_cache=prefix_cache,
    ahead=not stop,  # a stop text is found here, not on the device
  )
  texts = continued(engine, tokenizer, ids, max_new_tokens, key, stop, on_text)
  if on_stats is not None:
    on_stats(engine.stats)
  return texts[0] if single else texts


def continued(
  engine: Engine,
  tokenizer: Any,
  ids: Sequence[Sequence[int]],
  max_new_tokens: int,
  key: jax.Array | None = None,
  stop: Sequence[str] = (),
  on_text: Callable[[str], None] | None = None,
) -> list[str]:
  """What an engine writes after each prompt of token ids, as `generate` does; `on_text` hears of the first."""
  streams = [tokenizer.stream() for _ in ids]
  texts, done = ["" for _ in ids], [False] * len(ids)
  sent = 0
  for rows in engine.stream(ids, max_new_tokens, key, tokenizer.stop_ids):
    for i, row in enumerate(rows):
      for token in row:
        if done[i]:
          break
        if token in tokenizer.stop_ids:
          done[i] = True
          break
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
  return texts


def decode(
  model: Any,
  params: Params,
  ids: Sequence[Sequence[int]],
  max_new_tokens: int,
  sampler: Sampler,
  key: jax.Array | None = None,
  cache_dtype: Any = jnp.float32,
) -> Iterator[list[int]]:
  """Yields the next token of every sequence, step by step, until `max_new_tokens`; `Engine` has more to set.

  Raises:
    ValueError: see `generate`.
  """
  engine = Engine(model, params, sampler, cache_dtype=cache_dtype)
  for rows in engine.stream(ids, max_new_tokens, key):
    yield from map(list, zip(*rows, strict=True))
