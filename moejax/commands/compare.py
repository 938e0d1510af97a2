"""`moejax compare`: compare dense and MoE models at equal step time."""

import argparse

from moejax import api, lookup, processes
from moejax.command_line import path
from moejax.display import make_display
from moejax.overrides import override
from moejax.terminal import output
from moejax.verb_arguments import helped, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "name", nargs="?", metavar="SUITE",
    help="a listed suite, FILE.py:FUNCTION, or DIR/suite.json of an existing comparison",
  )  # fmt: skip
  parser.add_argument("--workdir", type=path, metavar="DIR", help="directory for runs, results and the report")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  suite = override(lookup.find_suite(required(known, "name", "SUITE")), overrides)
  directory = required(known, "workdir", "--workdir DIR")
  api.join()
  with make_display(f"compare {suite.name}") as progress:
    compared = api.compare(suite, directory, progress=progress)
  if not processes.is_first():
    return 0
  from moejax.comparison.table import terminal_table

  console = output()
  console.print(terminal_table(compared.comparison), soft_wrap=True)
  for pair in compared.comparison.pairs:
    console.print(f"{pair.dense}: {pair.verdict}", highlight=False, markup=False)
  console.print(compared.finding, highlight=False, markup=False)
  return 0
