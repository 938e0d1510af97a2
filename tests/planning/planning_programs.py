"""Small compiled programs (write_programs.py) and networks to cost them on."""

import itertools
import math
import pathlib

from moejax.config.chips import CHIPS
from moejax.planning.collectives import Network, Place
from moejax.planning.program import Program, parse

PROGRAMS = pathlib.Path(__file__).parent / "programs"

PRODUCT_FLOPS = 2 * 4096**3
"""Of the product of two matrices in these programs."""


def program(name: str) -> Program:
  """As libtpu compiled it for four v5p chips."""
  return parse((PROGRAMS / f"{name}.txt").read_text())


def network_of(chip: str, torus: tuple[int, ...]) -> Network:
  """All devices on one data axis."""
  places = tuple(Place(at[::-1], 0) for at in itertools.product(*(range(length) for length in reversed(torus))))
  return Network(CHIPS[chip], torus, places, {"data": math.prod(torus)})
