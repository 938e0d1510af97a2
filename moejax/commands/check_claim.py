"""`moejax check-claim`: restate a published dense-against-MoE claim at equal step time."""

import argparse

from rich.text import Text

from moejax import api_planning
from moejax.command_line import path
from moejax.display import Display
from moejax.files import write_json
from moejax.terminal import output
from moejax.verb_arguments import helped, no_overrides, prepare_files, required

CHECK_CLAIM = """\
FILE has the keys claim, source, dense and moe. The last two are runs or lists of runs, each with

  tokens                              training tokens (required)
  experiment, fields                  an experiment, and its fields to replace, by dotted paths; or
  active_parameters, total_parameters and optionally expansion, granularity, flops_per_token
  seconds, or mfu and peak_flops      its training time, or what it follows from, for use without --topology
  name, loss                          optional; the loss in nats per token

examples:
  moejax check-claim docs/claims/marin.json
  moejax check-claim docs/claims/olmoe.json --topology v5e:8x16"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = CHECK_CLAIM
  parser.add_argument("file", nargs="?", type=path, metavar="FILE", help="JSON file with the claim")
  parser.add_argument(
    "--topology", metavar="NAME", help="topology, such as v5p:4x8x8 (default: the hardware of the claim)"
  )
  parser.add_argument("--slices", type=int, default=1, metavar="N", help="number of slices (default: 1)")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the simulation (default: 0)")
  parser.add_argument("--json", type=path, metavar="FILE", help="also write all numbers to FILE")


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  file = required(known, "file", "FILE")
  prepare_files(known, "json")
  with Display("check-claim"):
    checked = api_planning.check_claim(file, known.topology, slices=known.slices, seed=known.seed)
  output().print(Text(f"{checked.claim} ({checked.source})", style="bold"), soft_wrap=True)
  for sentence in checked.sentences:
    output().print(Text(f"- {sentence}"), soft_wrap=True)
  if known.json:
    write_json(known.json, checked.to_json())
  return 0
