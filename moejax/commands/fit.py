"""`moejax fit`: fit scaling laws to finished runs."""

import argparse

from moejax import api_planning
from moejax.command_line import path
from moejax.display import Display
from moejax.errors import UserError
from moejax.files import write_json, write_whole
from moejax.terminal import output
from moejax.verb_arguments import helped, no_overrides, prepare_files

FIT = """\
Fits Chinchilla's law (dense runs) and the joint law of dense and MoE models (all runs) to their held-out losses, with
bootstrap intervals and the error of the largest runs, predicted from the others. The weights of the published laws then
follow from these runs.

examples:
  moejax fit /tmp/small /tmp/medium /tmp/large /tmp/moe      runs of `moejax train`
  moejax fit /tmp/quickstart --plot fit.png --json fit.json  all runs of a comparison
  moejax fit ladder.json                                     runs of another framework

A JSON file has a list of objects with active_parameters, total_parameters, tokens and loss, and optionally name,
embedding_parameters, expansion, granularity and flops_per_token."""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = FIT
  parser.add_argument(
    "runs", nargs="*", metavar="DIR",
    help="directory of a finished run or comparison, or a JSON file with a list of runs",
  )  # fmt: skip
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (default: 0)")
  parser.add_argument("--json", type=path, metavar="FILE", help="also write all numbers to FILE")
  parser.add_argument("--plot", type=path, metavar="FILE", help="also plot the joint law and the runs (.png, .svg)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  if not known.runs:
    raise UserError("fit needs DIR; see `moejax fit --help`")
  if known.plot and known.plot.suffix not in (".png", ".svg"):
    raise UserError(f"--plot {known.plot} must end in .png or .svg")
  prepare_files(known, "json", "plot")
  with Display("fit") as display:
    fitted = api_planning.fit(known.runs, seed=known.seed, progress=display)
  from moejax.decision.figures import drawn, fit_figure
  from moejax.decision.fit_page import fit_page

  output().print(fit_page(fitted), soft_wrap=True)
  if known.json:
    write_json(known.json, fitted.to_json())
  if known.plot:
    write_whole(known.plot, drawn(fit_figure(fitted.fits[0]), known.plot.suffix[1:]))
  return 0
