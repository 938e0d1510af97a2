"""`moejax data pack`: tokenize text once into shards that any number of runs and hosts can read."""

import argparse
from collections.abc import Callable

from moejax.command_line import path
from moejax.display import Display
from moejax.errors import UserError
from moejax.verb_arguments import helped, no_overrides, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("action", nargs="?", choices=("pack",), help="pack: write a folder of shards for data.train")
  add_text(parser)
  parser.add_argument(
    "--tokenizer", default="bytes", metavar="NAME", help="tokenizer, as in data.tokenizer (default: bytes)"
  )
  parser.add_argument("--out", type=path, metavar="DIR", help="output folder")
  parser.add_argument(
    "--keep", choices=("all", "train", "validation"), default="all",
    help="which part of the train/validation split to pack (default: all)",
  )  # fmt: skip
  parser.add_argument(
    "--validation-fraction", type=float, metavar="F",
    help="fraction of the documents in the validation part, as in data.validation_fraction (default: 0.05)",
  )  # fmt: skip
  parser.add_argument(
    "--deduplicate", action="store_true", help="pack only the first of several documents with the same text"
  )
  parser.add_argument(
    "--document-length", type=int, metavar="N",
    help="maximum length of a document in characters, as in data.document_length",
  )  # fmt: skip
  parser.add_argument(
    "--processes", type=int, metavar="N", help="number of tokenizer processes (default: one per CPU core)"
  )
  parser.add_argument(
    "--shard-tokens", type=int, default=2**25, metavar="N", help="number of tokens per shard (default: 2**25)"
  )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  required(known, "action", "pack")
  sources, out = required(known, "source", "--source SOURCE"), required(known, "out", "--out DIR")
  if known.validation_fraction is not None and known.keep == "all":
    raise UserError("--validation-fraction has no effect with --keep all; add --keep train or --keep validation")
  from moejax.config.data import Data
  from moejax.data.documents import Reading
  from moejax.data.pack import pack
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"pack {out}") as display:
    manifest = pack(
      sources,
      known.tokenizer,
      out,
      reading=Reading(known.text_field, known.document_length, known.on_error),
      keep=known.keep,
      validation_fraction=Data.validation_fraction if known.validation_fraction is None else known.validation_fraction,
      deduplicate=known.deduplicate,
      processes=known.processes,
      shard_tokens=known.shard_tokens,
      progress=stage(display, "text: reading and tokenizing"),
      warn=lambda text: display.note(f"warning: {text}"),
    )
  print(
    f"{out}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['text_bytes']:,} bytes of "
    f"text in {len(manifest['shards'])} shards; use --model.vocab-size {padded_vocab_size(manifest['vocab_size'])}"
  )
  return 0


def stage(display: Display, name: str) -> Callable[[str, float], None]:
  """Returns a function that reports progress. Its first call starts the stage."""
  begun = False

  def show(what: str, done: float) -> None:
    nonlocal begun
    if not begun:
      begun = True
      display.stage(name, total=1.0)
    display.advance(done, what)

  return show


def add_text(verb: argparse.ArgumentParser) -> None:
  verb.add_argument("--source", nargs="+", action="extend", metavar="SOURCE", help="text sources, as in data.train")
  verb.add_argument(
    "--text-field", default="text", metavar="NAME",
    help="field or column that holds the text, as in data.text_field (default: text)",
  )  # fmt: skip
  verb.add_argument(
    "--on-error", choices=("stop", "skip"), default="stop",
    help="what to do with records and files that cannot be read, as in data.on_error (default: stop)",
  )  # fmt: skip
