"""`moejax report`: regenerate the report of a comparison."""

import argparse

from moejax.command_line import path
from moejax.verb_arguments import helped, no_overrides, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("workdir", nargs="?", type=path, metavar="DIR", help="the --workdir of a comparison")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory = required(known, "workdir", "DIR")
  from moejax.comparison.report import write_report

  print(write_report(directory))
  return 0
