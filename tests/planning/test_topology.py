"""Names of hardware, and what is said of those that are none."""

import os
import re
import subprocess
import sys

import pytest

from moejax.errors import UserError
from moejax.planning.topology import parse_topology


@pytest.mark.parametrize(
  ("name", "slices", "chip", "torus", "devices"),
  [
    ("v5p:4x8x8", 1, "v5p", (4, 8, 8), 256),
    ("v6e:16x16", 4, "v6e", (16, 16), 1024),
    ("tpu7x:4x4x8", 1, "tpu7x", (4, 4, 8), 256),  # two devices a chip
    ("gpu:h100:8", 2, "h100", (), 16),
    ("cpu:8", 1, "cpu", (), 8),
  ],
)
def test_a_topology_is_read_from_its_name(name, slices, chip, torus, devices):
  found = parse_topology(name, slices)
  assert (found.chip.name, found.torus, found.devices) == (chip, torus, devices)


@pytest.mark.parametrize(
  "name", ["v9:4x4", "v5p", "v5p:256", "v5p:4x8", "h100:8", "gpu:v5p:4", "gpu:h100:2x2", "cpu:0x", ""]
)
def test_an_unknown_topology_is_answered_with_the_known(name):
  with pytest.raises(UserError, match=re.escape("v5p:4x8x8")):
    parse_topology(name)


@pytest.mark.parametrize(
  ("name", "slices", "said"),
  [
    ("cpu:0", 1, "topology 'cpu:0' has 0 chips; the total must be 1 to 1,048,576"),
    ("v5p:4x0x8", 1, "topology 'v5p:4x0x8' has 0 chips;"),
    ("v5p:4096x4096x8", 1, "has 134,217,728 chips;"),
    ("v5p:4x8x8", 10_000, "has 256 chips in each of 10,000 slices;"),
    ("cpu:8", 0, "--slices=0 must be at least 1"),
    ("cpu:8", -1, "--slices=-1"),
  ],
)
def test_no_chips_and_more_than_there_can_be_are_refused(name, slices, said):
  with pytest.raises(UserError, match=re.escape(said)):
    parse_topology(name, slices)


def test_jax_that_a_users_file_imported_already_takes_no_accelerator():
  code = (
    "import jax; from moejax.planning.topology import parse_topology, prepare_environment;"
    "prepare_environment(parse_topology('v5p:2x2x1')); print(jax.config.jax_platforms)"
  )
  environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
  assert done.stdout.strip() == "cpu"
