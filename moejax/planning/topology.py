"""Topologies by name: `v5p:4x8x8`, `v6e:16x16`, `gpu:h100:8`, `cpu:8`. Does not import JAX."""

import dataclasses
import math
import os
import re
import sys

from moejax.config.chips import CHIPS, Chip
from moejax.errors import UserError

EXAMPLES = "v4:8x8x8, v5e:16x16, v5p:4x8x8, v6e:16x16, tpu7x:4x4x8, gpu:h100:8, cpu:8"

MOST_CHIPS = 2**20
"""Maximum number of devices."""

ENVIRONMENT = {
  # Compiles for a TPU without looking for one, beside any process that has one open.
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  # libtpu writes pages of warnings where these, which a TPU's host has, are absent.
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_LOG_DIR": "disabled",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """The type and number of chips, and how they are connected."""

  name: str
  chip: Chip
  torus: tuple[int, ...]
  """Chips along each dimension of a slice. Empty if a switch connects them."""
  count: int
  """Chips of a slice."""
  slices: int = 1

  @property
  def devices(self) -> int:
    """Number of JAX devices in all slices."""
    return self.count * self.slices * (2 if self.chip.name == "tpu7x" else 1)


def parse_topology(name: str, slices: int = 1) -> Topology:
  """The topology with this name, without calling the compiler.

  Raises:
    UserError: If the chip, the shape or the number of chips is not valid.
  """
  kind, _, rest = name.partition(":")
  if kind == "gpu":
    kind, _, rest = rest.partition(":")
  chip = CHIPS.get(kind)
  expected = r"\d+(x\d+)+" if chip is not None and chip.torus else r"\d+"
  if chip is None or not re.fullmatch(expected, rest) or (chip.platform == "gpu") != name.startswith("gpu:"):
    raise UserError(f"unknown topology {name!r}; use, for example, {EXAMPLES}")
  lengths = tuple(int(length) for length in rest.split("x"))
  if slices < 1:
    raise UserError(f"--slices={slices} must be at least 1")
  if not 0 < math.prod(lengths) * slices <= MOST_CHIPS:
    chips = f"{name!r} has {math.prod(lengths):,} chips" + (f" in each of {slices:,} slices" if slices > 1 else "")
    raise UserError(f"topology {chips}; the total must be 1 to {MOST_CHIPS:,}")
  if chip.torus:
    if len(lengths) != chip.torus:
      raise UserError(f"topology {name!r} has {len(lengths)} dimensions, but {kind} has {chip.torus}, as in {EXAMPLES}")
    return Topology(name, chip, lengths, math.prod(lengths), slices)
  return Topology(name, chip, (), lengths[0], slices)


def prepare_environment(topology: Topology) -> None:
  """Sets environment variables for JAX and libtpu. It has no effect after JAX has been used."""
  for variable, value in ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  os.environ["JAX_PLATFORMS"] = "cpu"
  if "jax" in sys.modules:  # JAX reads the variable when it is imported, for example by a user's file
    sys.modules["jax"].config.update("jax_platforms", "cpu")
  if topology.chip.platform == "cpu":
    flag = "--xla_force_host_platform_device_count"
    given = [part for part in os.environ.get("XLA_FLAGS", "").split() if not part.startswith(flag)]
    os.environ["XLA_FLAGS"] = " ".join([*given, f"{flag}={topology.devices}"])
