"""The verbs of models at work: `generate`, `chat` and `classify`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelName = Annotated[str, typer.Argument(help="A known name, a GGUF file, a Hugging Face folder, or a saved folder.")]


def generate(
  model: ModelName,
  prompt: Annotated[str, typer.Argument(help="The text to continue; `-` reads it from standard input.")],
  max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 128,
  temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
  top_k: Annotated[int, typer.Option(help="0 is all tokens.")] = 0,
  top_p: Annotated[float, typer.Option(help="1 is all tokens.")] = 1.0,
  seed: Annotated[int, typer.Option()] = 0,
  stop: Annotated[list[str] | None, typer.Option(help="A text that ends the continuation; repeat for more.")] = None,
  chat: Annotated[bool, typer.Option("--chat", help="Wraps the prompt in the model's chat template.")] = False,
  draft: Annotated[
    str | None, typer.Option(help="A cheaper model, same tokenizer, that proposes tokens; the text stays the same.")
  ] = None,
  draft_layers: Annotated[int | None, typer.Option(help="Drafts with the model's own first layers instead.")] = None,
  draft_tokens: Annotated[int, typer.Option(help="Tokens that the draft proposes at once.")] = 4,
  beams: Annotated[int, typer.Option(help="Of an encoder-decoder: hypotheses that its search keeps.")] = 1,
  stats: Annotated[bool, typer.Option("--stats", help="Tells times and acceptance on standard error.")] = False,
) -> None:
  """Continues a prompt, streaming the text; an encoder-decoder writes what it makes of the prompt.

  Examples:

    lmcompress generate smollm2-135m "The capital of France is" -n 32 --stats

    lmcompress generate results/quickstart-1a2b3c4d/model "Write a haiku about rain." --chat --temperature 0.7

    lmcompress generate smollm2-135m "Once upon a time" --draft results/quickstart-1a2b3c4d/model --stats

    lmcompress generate smollm2-135m "Once upon a time" --draft-layers 20 --draft-tokens 2 --stats

    lmcompress generate flan-t5-folder "translate English to German: How old are you?" --beams 4
  """
  import jax

  import lmcompress as lmc
  from lmcompress.environment import keep_programs
  from lmcompress.generation import first_layers

  keep_programs()
  if draft is not None and draft_layers is not None:
    raise lmc.ConfigError(f"--draft {draft} and --draft-layers {draft_layers}: one draft at a time; leave one out")
  net, params, tokenizer = lmc.load(model)
  if tokenizer is None:
    raise lmc.SourceError(f"{model} has no tokenizer; put a tokenizer.json beside it")
  params = lmc.prepare(params, consume=True)
  text = sys.stdin.read() if prompt == "-" else prompt
  if hasattr(net, "encode"):
    given = {
      "--draft": draft, "--draft-layers": draft_layers, "--temperature": temperature, "--top-k": top_k,
      "--top-p": top_p != 1, "--stop": stop, "--chat": chat, "--stats": stats,
    }  # fmt: skip
    if refused := [option for option, value in given.items() if value]:
      raise lmc.ConfigError(f"{', '.join(refused)}: {model} is an encoder-decoder, which searches by --beams alone")
    from lmcompress.generation.seq2seq import rewrite

    typer.echo(rewrite(net, params, tokenizer, [text], max_new_tokens, beams, batch=1)[0])
    return
  if beams != 1:
    raise lmc.ConfigError(f"--beams {beams}: {model} is no encoder-decoder; it draws by --temperature and --top-p")
  drafter = None
  if draft is not None:
    other, theirs, _ = lmc.load(draft)
    drafter = other, lmc.prepare(theirs, consume=True)
  elif draft_layers is not None:
    drafter = net, first_layers(params, draft_layers)
  found: list[Any] = []
  lmc.generate(
    net,
    params,
    tokenizer,
    text,
    max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    key=jax.random.key(seed),
    stop=stop or (),
    chat=chat,
    draft=drafter,
    draft_tokens=draft_tokens,
    on_text=lambda piece: typer.echo(piece, nl=False),
    on_stats=found.append,
  )
  typer.echo()
  if stats:
    typer.echo(found[0], err=True)


def chat(
  model: ModelName,
  system: Annotated[str, typer.Option(help="What the model is told before everything.")] = "",
  knowledge: Annotated[
    Path | None, typer.Option(help="A folder of .txt, .md, .rst; answers rest on passages from it and cite them.")
  ] = None,
  encoder: Annotated[str, typer.Option(help="The encoder that finds passages.")] = "minilm-l6",
  passages: Annotated[int, typer.Option(help="Passages that the model reads for each question.")] = 3,
  max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n")] = 256,
  temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
  top_p: Annotated[float, typer.Option(help="1 is all tokens.")] = 0.9,
  seed: Annotated[int, typer.Option()] = 0,
) -> None:
  """Talks with a model; /help lists what else can be typed. Questions may come from standard input, a line each.

  Examples:

    lmcompress chat smollm2-135m

    lmcompress chat results/quickstart-1a2b3c4d/model --system "Answer in one sentence." --temperature 0

    lmcompress chat smollm2-135m --knowledge docs
  """
  import lmcompress as lmc
  from lmcompress import chat as talk
  from lmcompress.environment import keep_programs
  from lmcompress.knowledge import Knowledge, passages_of

  keep_programs()
  settings = talk.Settings()
  for name, value in (
    ("temperature", temperature), ("top_p", top_p), ("max_new_tokens", max_new_tokens), ("passages", passages),
  ):  # fmt: skip
    settings.change(name, str(value))
  found = passages_of(knowledge, lambda text: typer.echo(text, err=True)) if knowledge is not None else []
  net, params, tokenizer = lmc.load(model)
  if hasattr(net, "encode") or not getattr(net, "causal", True):
    raise lmc.ConfigError(f"{model} writes no text by itself; chat needs a decoder")
  if tokenizer is None or tokenizer.chat_template is None:
    raise lmc.SourceError(f"{model} has no chat template; use an instruct model, or `lmcompress generate`")
  base = None
  if found:
    reads = lmc.load(encoder)
    typer.echo(f"reading {len(found)} passages", err=True)
    base = Knowledge(reads[0], lmc.prepare(reads[1], consume=True), reads[2], found)
  params = lmc.prepare(params, consume=True)
  conversation = talk.Conversation(net, params, tokenizer, settings, system, base, seed)
  asks = sys.stdin.isatty()
  if asks:
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  (lines are edited, and come back)
    typer.echo("/help lists commands")
  while True:
    try:
      line = input("> " if asks else "").strip()
    except EOFError:
      return
    except KeyboardInterrupt:
      typer.echo()
      continue
    if not line:
      continue
    try:
      if line.startswith("/"):
        answer = conversation.command(line)
        if answer is None:
          return
        typer.echo(answer)
        continue
      _, left_out = conversation.ask(line, lambda piece: typer.echo(piece, nl=False))
      typer.echo()
      if left_out:
        typer.echo(f"({left_out} earlier turns no longer fit)", err=True)
      if base is not None:
        typer.echo(talk.cited(conversation.sources) or "(no passage has to do with it)")
    except KeyboardInterrupt:
      typer.echo("\n(stopped; it is not kept)", err=True)
    except lmc.LmcompressError as error:  # what was said is kept
      if not asks:
        raise
      typer.echo(str(error), err=True)


def classify(
  model: Annotated[str, typer.Argument(help="A saved model or a Hugging Face folder with heads.")],
  file: Annotated[Path, typer.Argument(help="Texts: .csv, .tsv or .jsonl with a column, or .txt with one a line.")],
  task: Annotated[list[str] | None, typer.Option(help="Which head; repeat for more. All where not given.")] = None,
  text: Annotated[str, typer.Option(help="The column of the texts.")] = "text",
  by: Annotated[list[str] | None, typer.Option(help="A column to add up by, as source or date; repeat.")] = None,
  period: Annotated[str, typer.Option(help="Dates are added up by day, month or year.")] = "month",
  out: Annotated[Path | None, typer.Option(help="Writes rows, classes and probabilities as a .csv.")] = None,
  plot: Annotated[Path | None, typer.Option(help="Writes the shares of classes as an .svg.")] = None,
  batch: Annotated[int, typer.Option(help="Texts at once.")] = 32,
) -> None:
  """Tells the classes of texts, such as their sentiment or topic, and adds them up by source and date.

  Examples:

    lmcompress classify results/fixed-6609d938/model reviews.csv --task sentiment

    lmcompress classify results/fixed-6609d938/model news.jsonl --text body --by source --by date --plot news.svg

    lmcompress classify results/fixed-6609d938/model letters.txt --out classes.csv
  """
  from rich.console import Console
  from rich.progress import Progress
  from rich.table import Table

  import lmcompress as lmc
  from lmcompress import classes
  from lmcompress.environment import keep_programs

  keep_programs()
  for path, suffix in ((out, ".csv"), (plot, ".svg")):
    if path is not None and (path.suffix != suffix or not path.parent.is_dir() or path.is_dir()):
      raise lmc.ConfigError(f"{path}: a {suffix} in a folder that is there")
  if period not in classes.PERIODS:
    raise lmc.ConfigError(f"--period {period}: one of {', '.join(classes.PERIODS)}")
  table = classes.read_texts(file, text, by or [])
  net, params, tokenizer = lmc.load(model)
  heads = classes.heads_of(Path(model), params, task)
  if tokenizer is None:
    raise lmc.SourceError(f"{model} has no tokenizer; put a tokenizer.json beside it")
  params = lmc.prepare(params, consume=True)
  console = Console(stderr=True)
  with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
    bar = progress.add_task("classifying", total=len(heads) * len(table.texts))
    found = classes.classified(net, params, tokenizer, table.texts, heads, batch, lambda n: progress.advance(bar, n))
  for name, head in heads.items():
    shown = Table("", *head.classes, "texts", title=name)
    for group, shares, count in classes.shares(found[name], table, period):
      shown.add_row(group, *(f"{share:.1%}" for share in shares), str(count))
    Console().print(shown)
  if out is not None:
    classes.write(out, table, found, heads)
    typer.echo(f"classes: {out}")
  if plot is not None:
    classes.draw(plot, table, found, heads, period)
    typer.echo(f"plot: {plot}")
