"""`moejax export`: convert a run to a model in Hugging Face format."""

import argparse

from moejax import api
from moejax.command_line import path
from moejax.display import Display
from moejax.verb_arguments import helped, no_overrides, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = """\
Writes config.json, safetensors files and the tokenizer to HF_DIR, for transformers, vLLM and SGLang. If no Hugging Face
architecture supports the model, an error names the field.

example:
  moejax export /tmp/small /tmp/small-hf --dtype bfloat16"""
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a trained run")
  parser.add_argument("folder", nargs="?", type=path, metavar="HF_DIR", help="new folder for the model")
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
    help="dtype of the weights (default: float32)",
  )  # fmt: skip


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory, folder = required(known, "run", "RUN"), required(known, "folder", "HF_DIR")
  with Display(f"export {directory}") as display:
    config = api.export_model(directory, folder, dtype=known.dtype, progress=display)
  print(f"{folder}: {config['architectures'][0]}")
  return 0
