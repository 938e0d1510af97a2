"""`moejax calibrate`: measure the speed of an accelerator of this machine, for plans."""

import argparse

from moejax import api_planning
from moejax.command_line import path
from moejax.display import Display
from moejax.terminal import output
from moejax.verb_arguments import helped, no_overrides, prepare_files, required

CALIBRATE = """\
Measures the speed of one accelerator of this machine (matrix products, copies, attention, grouped products, and the
overhead of a step) and, if the machine has several, of collectives between them. This takes a few minutes. Plans for
this type of chip can use the result, and measured steps make them more accurate:

  moejax calibrate --out mine.json
  moejax plan NAME --topology gpu:h100:8 --calibration mine.json
  moejax plan NAME --topology gpu:h100:8 --calibration mine.json --against 1.84"""


def add_options(parser: argparse.ArgumentParser) -> None:
  parser.epilog = CALIBRATE
  parser.add_argument(
    "--out",
    type=path,
    metavar="FILE",
    help="output file; keeps measurements of other chips and measured steps",
  )


def run(known: argparse.Namespace, overrides: list[str]) -> int:
  if helped(known):
    return 0
  no_overrides(overrides)
  file = required(known, "out", "--out FILE")
  prepare_files(known, "out")
  with Display("calibrate") as display:
    found = api_planning.calibrate(file, progress=display)
  from moejax.planning.page import calibration_page

  output().print(calibration_page(found), soft_wrap=True)
  return 0
