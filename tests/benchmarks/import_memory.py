"""Memory that reading a Hugging Face model takes besides its parameters, on Linux.

python tests/benchmarks/import_memory.py HF_DIR [--layers scanned unrolled]
"""

import argparse
import dataclasses
import pathlib

import jax

from moejax.config import DATA_EXPERT_MODEL, Mesh
from moejax.interop.configs import family_of, model_of, read_config
from moejax.interop.safetensors import open_folder
from moejax.interop.weights import read_parameters
from moejax.models.abstract import abstract_model
from moejax.partitioning import make_partitioner


def resident_bytes() -> tuple[int, int]:
  """The resident memory of this process now, and its maximum."""
  fields = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  now, most = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
  return now, most


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--layers", nargs="+", choices=("scanned", "unrolled"), default=["scanned"])
  known = parser.parse_args()
  config, devices = read_config(known.folder), jax.devices()
  partitioner = make_partitioner(Mesh(data=len(devices)), DATA_EXPERT_MODEL)
  for layers in known.layers:
    model = abstract_model(dataclasses.replace(model_of(config), layers=layers), partitioner)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the maximum
    before, _ = resident_bytes()
    parameters = jax.block_until_ready(read_parameters(open_folder(known.folder), model, family_of(config)))
    _, most = resident_bytes()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(parameters)]
    print(
      f"{layers}, {len(devices)} {devices[0].platform} devices: parameters {sum(sizes) / 1e9:.2f} GB, the largest "
      f"{max(sizes) / 1e9:.2f} GB; memory grew by at most {(most - before) / 1e9:.2f} GB"
    )
    del parameters


if __name__ == "__main__":
  main()
