"""`moejax list`: list all experiments and suites."""

import argparse

from moejax import lookup
from moejax.terminal import output
from moejax.verb_arguments import helped, no_overrides


def add_options(parser: argparse.ArgumentParser) -> None:
  """It has none."""


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if not helped(known):
    no_overrides(overrides)
    from moejax import describe

    output().print(describe.list_page(lookup.listed()), soft_wrap=True)
  return 0
