"""`moejax decide`: decide between dense and MoE models for a pod and a budget."""

import argparse

from moejax import api_planning, lookup
from moejax.command_line import NAME, path
from moejax.commands.plan import add_topology
from moejax.display import Display
from moejax.errors import UserError
from moejax.files import write_json, write_whole
from moejax.overrides import override_pair
from moejax.terminal import output
from moejax.verb_arguments import helped, prepare_files, required

DECIDE = """\
Times dense and MoE models of several widths on the topology, predicts their losses after the budget with an ensemble of
published scaling laws, and prints the probability that an MoE is better, break-even times, and what would change the
answer.

examples:
  moejax decide dense_6b4 moe_6b4_64e --topology v5p:4x8x8 --days 21 --price-per-chip-hour 4.2
  moejax decide dense_6b4 moe_6b4_64e --topology v5p:4x8x8 --money 500000 --price-per-chip-hour 4.2
  moejax decide dense_6b4 moe_6b4_64e --topology v5p:4x8x8 --days 21 --experts 16 64 --every 1 2 --html decision.html
  moejax decide mine.py:dense mine.py:moe --topology gpu:h100:8 --days 3 --runs fit.json --compile"""

SPACE = {
  "width": (float, "factors of all widths (default: 0.35 to 4)"),
  "depth": (float, "factors of the number of layers"),
  "experts": (int, "numbers of experts"),
  "top-k": (int, "numbers of experts per token"),
  "granularity": (int, "divide each expert into N narrower ones, of which a token uses N times as many"),
  "every": (int, "make every N-th layer sparse"),
  "precision": (str, "types of the large products: bfloat16, fp8, int8"),
}
"""Type and help of the options of the search space."""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = DECIDE
  parser.add_argument(
    "names", nargs="*", metavar="NAME",
    help=f"dense and MoE experiments, at least one of each: {NAME}; options set fields of the MoE experiments, and "
    "--dense.PATH sets a field of the dense ones",
  )  # fmt: skip
  add_topology(parser)
  parser.add_argument("--days", type=float, metavar="X", help="days of training")
  parser.add_argument(
    "--money", type=float, metavar="X", help="the price of training instead of its days; needs --price-per-chip-hour"
  )
  parser.add_argument("--price-per-chip-hour", type=float, metavar="X", help="price in any currency")
  for name, (kind, help) in SPACE.items():
    metavar = {float: "X", int: "N", str: "TYPE"}[kind]
    parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=metavar, help=help)
  parser.add_argument(
    "--runs", nargs="+", default=[], metavar="DIR",
    help="finished runs, comparisons, or the JSON file of `moejax fit`, to which laws are fitted",
  )  # fmt: skip
  parser.add_argument(
    "--measure", nargs="+", default=[], metavar="RUN",
    help="trained dense and MoE runs, whose decoding is measured on this machine to correct the cost of serving",
  )  # fmt: skip
  parser.add_argument("--compile", action="store_true", help="compile the best models (default: times by formula)")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the simulation (default: 0)")
  parser.add_argument("--json", type=path, metavar="FILE", help="also write all numbers to FILE")
  parser.add_argument("--html", type=path, metavar="FILE", help="also write the decision as an HTML page to FILE")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  if not known.names:
    raise UserError("decide needs NAME; see `moejax decide --help`")
  topology = required(known, "topology", "--topology NAME")
  found = [lookup.find_experiment(name) for name in known.names]
  dense, sparse = ([one for one in found if (one.model.moe is None) == is_dense] for is_dense in (True, False))
  if overrides and dense and sparse:
    dense = [override_pair(one, sparse[0], overrides)[0] for one in dense]
    sparse = [override_pair(dense[0], one, overrides)[1] for one in sparse]
  prepare_files(known, "json", "html")
  with Display("decide") as display:
    decision = api_planning.decide(
      [*dense, *sparse], topology, days=known.days, money=known.money, price_per_chip_hour=known.price_per_chip_hour,
      space={name.replace("-", "_"): values for name in SPACE if (values := getattr(known, name.replace("-", "_")))},
      runs=known.runs, measure=known.measure, compile=known.compile, seed=known.seed, slices=known.slices,
      calibration=known.calibration, progress=display,
    )  # fmt: skip
  from moejax.decision.answer import as_json
  from moejax.decision.page import as_html, decision_page

  output().print(decision_page(decision), soft_wrap=True)
  if known.json:
    write_json(known.json, as_json(decision))
  if known.html:
    write_whole(known.html, as_html(decision))
  return 0
