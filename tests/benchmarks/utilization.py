"""Model FLOPs utilization of whole train steps on one accelerator: dense and MoE of about 1B active parameters.

    python tests/benchmarks/utilization.py                       # both, at 32 x 4096 tokens in parts of 4 x 4096
    python tests/benchmarks/utilization.py --dispatch einsum     # the MoE by capacity masks
    python tests/benchmarks/utilization.py --layers 2 --width 256 --batch 2 --accumulation 1   # a small one, anywhere

bfloat16, all steps with their optimizer. The MoE has 32 experts, of which each token takes 8, whose widths add up to
the dense layer's: equal active parameters, 2.7B in all, whose state takes 44 GB. What counts is the median step, as
model FLOPs (no recomputation, PaLM's convention, no choice of experts that was dropped) over the rate of a large matrix
product measured on the same device between the steps. Goals on a GPU: dense 55 %, MoE 45 %. `--trace DIR` leaves a
profile for TensorBoard or Perfetto.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import AdamW, Data, Experiment, Losses, Mesh, Model, MoE, Training
from moejax.config.parameters import parameter_counts
from moejax.partitioning import make_partitioner
from moejax.training.clock import fetch_work
from moejax.training.compiler import compiler_options
from moejax.training.memory import argument_bytes
from moejax.training.state import make_train_spec
from moejax.training.step import abstract_inputs, make_train_step


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
  parser.add_argument("--dispatch", choices=("grouped", "einsum"), default="grouped")
  parser.add_argument("--layers", type=int, default=16)
  parser.add_argument("--width", type=int, default=2048, help="heads are 128 wide, the feed-forward 3 times this")
  parser.add_argument("--sequence", type=int, default=4096)
  parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
  parser.add_argument("--accumulation", type=int, default=8, help="parts in which a step is computed")
  parser.add_argument("--remat", default="attention")
  parser.add_argument("--steps", type=int, default=8, help="timed steps")
  parser.add_argument("--trace", help="folder for a profile of two steps of each model")
  chosen = parser.parse_args()
  for name in chosen.models:
    print(json.dumps(measure(name, chosen)), flush=True)


def experiment(name: str, chosen: argparse.Namespace) -> Experiment:
  D, F = chosen.width, 3 * chosen.width
  moe = MoE(num_experts=32, experts_per_token=8, d_ff=F // 8, dispatch=chosen.dispatch) if name == "moe" else None
  heads = max(1, D // 128)
  return Experiment(
    name=name,
    model=Model(
      num_layers=chosen.layers, d_model=D, num_heads=heads, num_kv_heads=heads, head_dim=128, d_ff=F, vocab_size=32_768,
      moe=moe, compute_dtype="bfloat16", remat=chosen.remat,
    ),
    data=Data(sequence_length=chosen.sequence),
    training=Training(
      batch_size=chosen.batch, gradient_accumulation=chosen.accumulation,
      losses=Losses(load_balance=0.01 if moe else 0.0),
    ),
    optimizer=AdamW(learning_rate=1e-4),
    mesh=Mesh(data=1),
  )  # fmt: skip


def measure(name: str, chosen: argparse.Namespace) -> dict:
  """Step time and utilization of one model, and the rate of the product that it is held against."""
  made = experiment(name, chosen)
  spec = make_train_spec(made, make_partitioner(made.mesh, made.rules))
  inputs = abstract_inputs(spec)
  options = compiler_options(spec.partitioner.device, spec.experiment.model, argument_bytes(inputs))
  step = make_train_step(spec).lower(*inputs).compile(compiler_options=options)
  state, batch = spec.init_state(0), random_batch(made)
  times_s, rates = [], []
  for i in range(chosen.steps + 2):
    tracing = jax.profiler.trace(f"{chosen.trace}/{name}") if chosen.trace and i >= chosen.steps else None
    with tracing or contextlib.nullcontext():
      begin = time.perf_counter()
      state, metrics = step(state, batch, np.float32(1e-4))
      jax.block_until_ready((state, metrics))
    times_s.append(time.perf_counter() - begin)
    rates.append(product_rate())
  step_time_s, rate = statistics.median(times_s[1 : chosen.steps]), statistics.median(rates)
  work = fetch_work(metrics)
  flops = work.flops(made.model, made.data.sequence_length)
  return {
    "model": name, "device": jax.devices()[0].device_kind, **dataclasses.asdict(parameter_counts(made.model)),
    "tokens_per_step": work.tokens, "step_time_s": step_time_s, "model_flops_per_step": flops,
    "product_flops_per_s": rate, "utilization": flops / step_time_s / rate,
    "dropped_fraction": work.dropped_fraction, "loss": float(metrics["loss"]),
  }  # fmt: skip


def random_batch(made: Experiment) -> dict[str, jax.Array]:
  random, rows = np.random.default_rng(0), (made.training.batch_size, made.data.sequence_length)
  return {
    "tokens": jnp.asarray(random.integers(0, made.model.vocab_size, rows, np.int32)),
    "targets": jnp.asarray(random.integers(0, made.model.vocab_size, rows, np.int32)),
    "segments": jnp.ones(rows, jnp.int32),
    "positions": jnp.broadcast_to(jnp.arange(rows[1], dtype=jnp.int32), rows),
    "weights": jnp.ones(rows, jnp.float32),
  }  # fmt: skip


def product_rate() -> float:
  """FLOP/s of a square bfloat16 product that is large for the device."""
  size = 8192 if jax.default_backend() != "cpu" else 1024
  a = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  begin = time.perf_counter()
  for _ in range(4):
    last = product(a)
  last.block_until_ready()
  return 4 * 2 * size**3 / (time.perf_counter() - begin)


if __name__ == "__main__":
  main()
