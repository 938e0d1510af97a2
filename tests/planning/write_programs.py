"""Writes the programs of tests/planning/programs anew: small ones, as libtpu compiles them for four v5p chips.

`python tests/planning/write_programs.py` needs `pip install moejax[tpu]`. What names files of the machine is left out.
"""

import pathlib
import re

from moejax.planning.topology import parse_topology, prepare_environment

TOPOLOGY = parse_topology("v5p:2x2x1")
prepare_environment(TOPOLOGY)  # JAX reads it when it is imported

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.planning.devices import describe_devices

FOLDER = pathlib.Path(__file__).parent / "programs"


def product(x, w):
  return x @ w


def scan(x, weights):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def nested_scan(x, weights):
  return jax.lax.scan(lambda x, _: (scan(x, weights), None), x, None, length=3)[0]


def gathered(x, w):
  return x @ jax.lax.with_sharding_constraint(w, NamedSharding(MESH, PartitionSpec()))


def exchanged(x):
  turned = jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, PartitionSpec(None, "data")))
  return turned + 1


MESH = Mesh(np.array(describe_devices(TOPOLOGY)), ("data",))
ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()

PROGRAMS = {
  "product": (product, [((4096, 4096), WHOLE), ((4096, 4096), WHOLE)]),
  "scan": (scan, [((4096, 4096), WHOLE), ((8, 4096, 4096), WHOLE)]),
  "nested_scan": (nested_scan, [((4096, 4096), WHOLE), ((5, 4096, 4096), WHOLE)]),
  "gathered": (gathered, [((4096, 4096), ROWS), ((4096, 4096), ROWS)]),
  "exchanged": (exchanged, [((4096, 4096), ROWS)]),
}


def main() -> None:
  """Compiles and writes each program."""
  for name, (function, arguments) in PROGRAMS.items():
    shapes = [
      jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(MESH, spec)) for shape, spec in arguments
    ]
    text = jax.jit(function).lower(*shapes).compile().as_text()
    text = re.sub(r"\n(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d+ .*\n)*\n*", "\n", text)
    (FOLDER / f"{name}.txt").write_text(re.sub(r" stack_frame_id=\d+", "", text))


if __name__ == "__main__":
  main()
