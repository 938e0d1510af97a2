"""Tokens per second of a DS-MoE with few of its experts, and of a dense model with as many parameters.

Both have random weights and generate greedily; the models take turns. `decode` is the time of one new token after the
prompt, `whole` includes the prompt.

    python tests/benchmarks/ds_moe_decode.py [--top-k 3 4] [--batch 1 16] [--prompt 128] [--new 128] [--rounds 5]
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np

from moejax.config import DATA_EXPERT_MODEL, DenseRouter, Mesh, Model, MoE
from moejax.config.parameters import parameter_counts
from moejax.inference.dropless import inference_model
from moejax.inference.generate import Generator
from moejax.inference.sparse import Sparse, sparse_model
from moejax.partitioning import make_partitioner

DENSE = Model(
  num_layers=28, d_model=1024, num_heads=16, num_kv_heads=2, head_dim=64, d_ff=4096, vocab_size=8192, activation="gelu"
)
"""300M parameters in the proportions of the paper's 6B model: GELU, d_ff = 4 d_model, few key/value heads."""
DS_MOE = dataclasses.replace(
  DENSE,
  attention_experts=8,
  moe=MoE(num_experts=32, experts_per_token=32, d_ff=128, router=DenseRouter(), dispatch="dense"),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (("prompt", 128), ("new", 128), ("rounds", 5), ("layers", DENSE.num_layers)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--top-k", type=int, nargs="+", default=[3])
  parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
  parser.add_argument("--loops", choices=("scanned", "unrolled"), default="unrolled")
  known = parser.parse_args()
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  dense, ds_moe = (dataclasses.replace(model, num_layers=known.layers, layers=known.loops) for model in (DENSE, DS_MOE))
  models = {"dense": inference_model(dense, partitioner)} | {
    f"top_k:{k}": inference_model(ds_moe, partitioner, Sparse("top_k", float(k))) for k in known.top_k
  }
  drawn = {kind: models[kind].init(jax.random.key(0)) for kind in ("dense", f"top_k:{known.top_k[0]}")}
  parameters = {name: drawn.get(name, drawn[f"top_k:{known.top_k[0]}"]) for name in models}
  print(f"{jax.devices()[0].device_kind}, {parameter_counts(dense).total / 1e6:.0f}M parameters, {known.loops}")
  print("batch  model      active      decode ms  relative  new tokens/s, whole  relative")
  prompts = np.random.default_rng(0).integers(0, 8192, (max(known.batch), known.prompt)).tolist()
  for size in known.batch:
    generators = {name: Generator(model, size, 8192) for name, model in models.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(known.rounds + 1):
      for name, generator in generators.items():
        seconds = []
        for new in (1, known.new):
          begin = time.perf_counter()
          list(generator.generate(parameters[name], prompts[:size], [lambda ids: False] * size, new))
          seconds.append(time.perf_counter() - begin)
        if turn:
          times[name].append(((seconds[1] - seconds[0]) / (known.new - 1), seconds[1]))
    base = times["dense"]
    for name, found in times.items():
      model = dense if name == "dense" else sparse_model(ds_moe, Sparse("top_k", float(name[6:])))
      active = parameter_counts(model).active / parameter_counts(model).total
      step, whole = (statistics.median(column) for column in zip(*found, strict=True))
      ratios = [
        statistics.median(there[i] / here[i] for there, here in zip(base, found, strict=True)) for i in range(2)
      ]
      print(
        f"{size:5}  {name:9}  {active:6.0%}  {1e3 * step:13.1f}  {ratios[0]:8.2f}  {size * known.new / whole:19.1f}  "
        f"{ratios[1]:8.2f}",
        flush=True,
      )


if __name__ == "__main__":
  main()
