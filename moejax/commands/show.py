"""`moejax show`: show an experiment or a suite: parameters, FLOPs, budget and all fields."""

import argparse
import json

from moejax import lookup
from moejax.command_line import NAME
from moejax.config.experiment import Experiment
from moejax.files import finite
from moejax.overrides import override
from moejax.terminal import output
from moejax.verb_arguments import helped, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("name", nargs="?", metavar="NAME", help=NAME)
  parser.add_argument("--json", action="store_true", help="print JSON")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  found = override(lookup.find(required(known, "name", "NAME")), overrides)
  from moejax import describe

  if known.json:
    facts = describe.facts(found) if isinstance(found, Experiment) else describe.suite_facts(found)
    print(json.dumps(finite(facts), indent=2, allow_nan=False))
  else:
    page = describe.experiment_page(found) if isinstance(found, Experiment) else describe.suite_page(found)
    output().print(page, soft_wrap=True)
  return 0
