"""`moejax match`: find the MoE model with the step time of a dense model on a TPU or GPU topology."""

import argparse
import pathlib

from moejax import api_planning, lookup
from moejax.command_line import NAME, path
from moejax.commands.plan import add_price, add_topology
from moejax.display import Display
from moejax.files import write_whole
from moejax.overrides import override_pair
from moejax.terminal import output
from moejax.verb_arguments import helped, prepare_files, required


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("dense", nargs="?", metavar="DENSE", help=f"the dense experiment: {NAME}")
  parser.add_argument(
    "name", nargs="?", metavar="MOE",
    help="the MoE experiment, whose `matchable` fields are varied; options set its fields, and --dense.PATH sets a "
    "field of DENSE",
  )  # fmt: skip
  add_topology(parser)
  add_price(parser)
  parser.add_argument(
    "--tolerance", type=float, default=0.05, metavar="X",
    help="maximum relative difference of step times that are considered equal (default: 0.05)",
  )  # fmt: skip
  parser.add_argument(
    "--out", type=path, metavar="FILE", help="output file with the matched experiment (default: MOE_matched.py)"
  )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  dense = lookup.find_experiment(required(known, "dense", "DENSE"))
  dense, moe = override_pair(dense, lookup.find_experiment(required(known, "name", "MOE")), overrides)
  topology = required(known, "topology", "--topology NAME")
  prepare_files(known, "out")
  with Display(f"match {dense.name}") as display:
    found = api_planning.match(
      dense, moe, topology, slices=known.slices, tolerance=known.tolerance, calibration=known.calibration,
      progress=display,
    )  # fmt: skip
  from moejax.comparison.pod_match import experiment_file, match_page

  output().print(match_page(found, known.price_per_chip_hour), soft_wrap=True)
  path = known.out or pathlib.Path(f"{moe.name}_matched.py")
  write_whole(path, experiment_file(found.experiment))
  print(f"{path}: moejax train {path}:matched --workdir DIR")
  return 0
