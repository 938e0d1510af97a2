"""`moejax train`: train an experiment and evaluate it on held-out text."""

import argparse

from moejax import api, lookup, processes
from moejax.command_line import NAME, path
from moejax.display import make_display
from moejax.overrides import override
from moejax.terminal import output
from moejax.verb_arguments import helped, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("name", nargs="?", metavar="NAME", help=NAME)
  parser.add_argument("--workdir", type=path, metavar="DIR", help="directory for checkpoints, metrics and results")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  experiment = override(lookup.find_experiment(required(known, "name", "NAME")), overrides)
  directory = required(known, "workdir", "--workdir DIR")
  api.join()
  with make_display(f"train {experiment.name}") as progress:
    trained = api.train(experiment, directory, progress=progress)
  if processes.is_first():
    output().print(trained, soft_wrap=True)
  return 0
