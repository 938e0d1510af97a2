"""Functions for the arguments of several commands."""

import argparse
from typing import Any

from moejax import lookup
from moejax.errors import UserError
from moejax.overrides import print_field_help
from moejax.training.run_directory import prepare_file


def prepare_files(known: argparse.Namespace, *options: str) -> None:
  """Raises UserError if the file of one of these options cannot be written, before any work is done."""
  for option in options:
    if (path := getattr(known, option)) is not None:
      prepare_file(path, f"--{option}")


def helped(known: argparse.Namespace) -> bool:
  """Prints the help of a command if it is requested. If an experiment is named, the help lists all fields."""
  if not known.help:
    return False
  print(known.parser.format_help())
  name = getattr(known, "name", None)
  if name is not None:
    print_field_help(lookup.find(name), f"{known.parser.prog} {name}")
  elif hasattr(known, "name"):
    print("To list all fields of an experiment, add its NAME. `moejax list` shows all names.")
  return True


def required(known: argparse.Namespace, attribute: str, shown: str) -> Any:
  value = getattr(known, attribute)
  if value is None:
    raise UserError(f"{known.parser.prog.removeprefix('moejax ')} needs {shown}; see `{known.parser.prog} --help`")
  return value


def no_overrides(overrides: list[str]) -> None:
  if overrides:
    raise UserError(f"unexpected {' '.join(overrides)}; this command has no fields to set")


def add_sparse(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--sparse", metavar="MODE[:X]",
    help="experts that a DS-MoE uses: threshold[:0.48], top_k:K or threshold_top_k[:0.48]; for a top-k router, skip:X "
    "skips experts with a weight below X times the largest (default: as trained)",
  )  # fmt: skip
