"""What several commands do with their arguments."""

import argparse
from typing import Any

from moejax import lookup
from moejax.errors import UserError
from moejax.overrides import print_field_help
from moejax.training.run_directory import prepare_file


def prepare_files(known: argparse.Namespace, *options: str) -> None:
  """Raises UserError where a file of these options cannot be written, before the work that it is for."""
  for option in options:
    if (path := getattr(known, option)) is not None:
      prepare_file(path, f"--{option}")


def helped(known: argparse.Namespace) -> bool:
  """Prints the help of a command if requested, and all fields if an experiment is named."""
  if not known.help:
    return False
  print(known.parser.format_help())
  name = getattr(known, "name", None)
  if name is not None:
    print_field_help(lookup.find(name), f"{known.parser.prog} {name}")
  elif hasattr(known, "name"):
    print("Add NAME to list all its fields with their meaning; `moejax list` shows the names.")
  return True


def required(known: argparse.Namespace, attribute: str, shown: str) -> Any:
  value = getattr(known, attribute)
  if value is None:
    raise UserError(f"{known.parser.prog.removeprefix('moejax ')} needs {shown}; `{known.parser.prog} --help` explains")
  return value


def no_overrides(overrides: list[str]) -> None:
  if overrides:
    raise UserError(f"unexpected {' '.join(overrides)}; this command takes no fields")
