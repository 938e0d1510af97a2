"""`moejax tokenizer train`: train a byte-level BPE tokenizer on text."""

import argparse

from moejax.command_line import path
from moejax.commands.data import add_text, stage
from moejax.display import Display
from moejax.verb_arguments import helped, no_overrides, prepare_files, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("action", nargs="?", choices=("train",), help="train: write a tokenizer.json")
  add_text(parser)
  parser.add_argument(
    "--vocab-size", type=int, default=32_768, metavar="N",
    help="vocabulary size, including special tokens (default: 32768)",
  )  # fmt: skip
  parser.add_argument("--out", type=path, metavar="FILE", help="output .json file")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  required(known, "action", "train")
  sources, out = required(known, "source", "--source SOURCE"), required(known, "out", "--out FILE")
  prepare_files(known, "out")
  from moejax.data.tokenizer_training import train_tokenizer
  from moejax.data.tokenizers import padded_vocab_size

  with Display(f"tokenizer {out}") as display:
    size = train_tokenizer(
      sources,
      known.vocab_size,
      out,
      text_field=known.text_field,
      on_error=known.on_error,
      progress=stage(display, "text: reading"),
      warn=lambda text: display.note(f"warning: {text}"),
    )
  print(f"{out}: {size:,} tokens; use --data.tokenizer {out} --model.vocab-size {padded_vocab_size(size)}")
  return 0
