"""Writes tests/planning/programs/memory.json: what libtpu says of programs that just fit, and that just do not.

`python tests/planning/write_memory.py` needs `pip install moejax[tpu]` and takes some minutes.
"""

import json
import pathlib

from moejax.config.chips import CHIPS
from moejax.planning.topology import parse_topology, prepare_environment

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
prepare_environment(parse_topology(TOPOLOGIES["v5p"]))  # JAX reads it when it is imported

# ruff: noqa: E402
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax.planning.devices import describe_devices

FILE = pathlib.Path(__file__).parent / "programs" / "memory.json"

ROWS = 1024
TILE = 1024
"""Columns are a multiple of this, so that no layout pads them."""
KEPT = ("argument", "temp", "output", "alias", "generated_code", "host_argument", "host_temp")


def step(state, x):
  """A donated state, an input, and temporaries that live at different times."""
  summed = jnp.cumsum(jnp.sin(x), axis=1)
  scanned = jax.lax.scan(lambda carry, row: (carry * row + 1, carry), x[:, 0], summed.swapaxes(0, 1))[1]
  return state * 2 + scanned.swapaxes(0, 1), scanned.sum() + summed.sum()


def said(mesh: Mesh, columns: int) -> dict:
  """The compiler's statistics of the step with arrays of so many columns, or why it refuses it."""
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  array = jax.ShapeDtypeStruct((ROWS * mesh.size, columns), jnp.float32, sharding=sharding)
  try:
    found = jax.jit(step, donate_argnums=0).lower(array, array).compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    return {"refused": str(error).splitlines()[0]}
  names = [*(f"{name}_size_in_bytes" for name in KEPT), "peak_memory_in_bytes"]
  return {name: getattr(found, name) for name in names}


def main() -> None:
  """Halves the interval between a program that fits and one that does not, on every chip that has no facts yet."""
  by_chip = json.loads(FILE.read_text()) if FILE.exists() else {}
  for chip, name in TOPOLOGIES.items():
    if chip in by_chip:
      continue
    mesh = Mesh(np.array(describe_devices(parse_topology(name))), ("data",))
    quarter = CHIPS[chip].hbm_bytes // (4 * 4 * ROWS)
    fits, refused = quarter * 9 // 10, quarter * 11 // 10
    facts = {}
    while refused - fits > quarter // 100:
      columns = (fits + refused) // 2 // TILE * TILE
      facts[columns] = said(mesh, columns)
      print(chip, columns, facts[columns], flush=True)
      fits, refused = (fits, columns) if "refused" in facts[columns] else (columns, refused)
    by_chip[chip] = [facts[columns] for columns in sorted(facts)]
    FILE.write_text(json.dumps(by_chip, indent=1) + "\n")


if __name__ == "__main__":
  main()
