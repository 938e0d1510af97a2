"""`moejax wandb`: send the metrics of runs to Weights & Biases."""

import argparse

from moejax.command_line import path
from moejax.verb_arguments import helped, no_overrides, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("workdir", nargs="?", type=path, metavar="DIR", help="the --workdir of `train` or `compare`")
  parser.add_argument("--project", default="moejax", help="project on Weights & Biases (default: moejax)")
  parser.add_argument("--offline", action="store_true", help="write to RUN/wandb/ only; `wandb sync` uploads it later")
  parser.add_argument("--follow", action="store_true", help="send new metrics until Ctrl-C")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  directory = required(known, "workdir", "DIR")
  from moejax.comparison.wandb_log import log

  log(directory, known.project, known.offline, known.follow, print)
  return 0
