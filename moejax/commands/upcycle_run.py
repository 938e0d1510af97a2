"""`moejax upcycle`: convert a dense run to a sparse run, which initially computes the same function."""

import argparse

from moejax.command_line import path
from moejax.display import Display
from moejax.overrides import override
from moejax.training.run_directory import (
  read_experiment,
)
from moejax.verb_arguments import helped, required

UPCYCLE = """\
RUN is a dense run. NEW is a run at step 0 whose sparse layers compute the same function as the dense layers of RUN:
each expert is a copy of a dense layer or, with --granularity G, one of G slices of a copy. NEW has the data, training
and optimizer of RUN, unless they are set, as in --training.steps 2000 and --mesh.expert 8.

With --distill-tokens, the experts of a token may be fewer than the slices of one copy, so that NEW has fewer active
parameters. It then computes only approximately the same function.

examples:
  moejax upcycle /tmp/small /tmp/sparse --experts 8 --load-balance 0.01 --training.steps 500
  moejax upcycle /tmp/small /tmp/split --experts 1 --granularity 8 --active 4 --distill-tokens 8192 --load-balance 0.01
  moejax train /tmp/sparse/experiment.json --workdir /tmp/sparse"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = UPCYCLE
  parser.add_argument("run", nargs="?", type=path, metavar="RUN", help="directory of a dense run")
  parser.add_argument("new", nargs="?", type=path, metavar="NEW", help="directory of the new run")
  parser.add_argument("--experts", type=int, metavar="N", help="number of copies of each dense feed-forward layer")
  parser.add_argument("--active", type=int, default=2, metavar="N", help="number of copies per token (default: 2)")
  parser.add_argument(
    "--granularity",
    type=int,
    default=1,
    metavar="G",
    help="number of experts per copy (default: 1)",
  )
  parser.add_argument("--every", type=int, default=1, metavar="N", help="make every n-th layer sparse (default: 1)")
  parser.add_argument(
    "--noise", type=float, default=0.0, metavar="X",
    help="add noise to the experts, with X times the standard deviation of a matrix (default: 0, none)",
  )  # fmt: skip
  parser.add_argument(
    "--distill-tokens", type=int, default=0, metavar="N",
    help="train each sparse layer on N tokens to compute what the dense layer does (LaDiMo, arXiv 2408.04278); "
    "--active is then the number of experts per token, not of copies (default: 0, none)",
  )  # fmt: skip
  parser.add_argument("--load-balance", type=float, metavar="X", help="training.losses.load_balance of the new run")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the router and the noise (default: 0)")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  run, directory = required(known, "run", "RUN"), required(known, "new", "NEW")
  required(known, "experts", "--experts N")
  from moejax.interop.upcycle import Upcycling, upcycle, upcycled_experiment

  fields = ("experts", "active", "granularity", "every", "noise", "seed", "distill_tokens")
  how = Upcycling(**{name: getattr(known, name) for name in fields})
  experiment = override(upcycled_experiment(read_experiment(run), directory, how, known.load_balance), overrides)
  with Display(f"upcycle {run}") as display:
    upcycle(run, directory, experiment, how, display)
  print(f"{directory}: moejax train {directory}/experiment.json --workdir {directory}")
  return 0
