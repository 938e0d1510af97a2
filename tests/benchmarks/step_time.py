"""Train steps against the bare matrix products of the same steps, in one interleaved run.

    python tests/benchmarks/step_time.py                      # moejax against the floor, 7 rounds
    python tests/benchmarks/step_time.py --rounds 11 --peers spec_train.json
    python tests/benchmarks/step_time.py --layers scanned     # the layout that compiles in time flat in the layers
    python tests/benchmarks/step_time.py --worker moe         # one worker, for another program to drive

A peer is any command that speaks the protocol of `workers.py`, given as {"name": {"cmd": [...], "env": {...}, "cwd":
"..."}}. Workers take turns; what counts is the median over rounds of the ratio to the floor of the same round.

The floor runs every matrix product of the step forwards and backwards at its own shape, and nothing else. Shapes come
from the environment, as the peers' workers read them: PB batch 8, PL layers 4, PD width 256, PH heads 4, PF expert
width 512, PE experts 8, PK experts a token 2, PS sequence 256, PV vocabulary 8192; a dense layer is PF x PK wide.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

from workers import ratio, serve, take_turns

DEFAULTS = {"PB": 8, "PL": 4, "PD": 256, "PH": 4, "PF": 512, "PE": 8, "PK": 2, "PS": 256, "PV": 8192}
WORKERS = ("floor-dense", "floor-moe", "dense", "moe", "moe-dropless")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=7, help="turns of each worker")
  parser.add_argument("--steps", type=int, default=5, help="steps in a turn, of which the median counts")
  parser.add_argument("--layers", default="unrolled", choices=("unrolled", "scanned"), help="layout of our layers")
  parser.add_argument("--peers", type=pathlib.Path, help="JSON file of other workers")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file for every sample")
  parser.add_argument("--worker", choices=WORKERS, help="be this worker instead")
  chosen = parser.parse_args()
  if chosen.worker:
    serve(*make_worker(chosen.worker, chosen.layers))
  else:
    compare(chosen)


def compare(chosen: argparse.Namespace) -> None:
  """Lets all workers take turns and prints the table."""
  own = {name: {"cmd": [sys.executable, __file__, "--layers", chosen.layers, "--worker", name]} for name in WORKERS}
  peers = json.loads(chosen.peers.read_text()) if chosen.peers else {}
  rounds = take_turns(own | peers, chosen.rounds, chosen.steps, chosen.peers.parent if chosen.peers else None)
  if chosen.out:
    chosen.out.write_text(json.dumps(rounds, indent=1) + "\n")
  print(f"\n{'worker':<28} {'median ms':>10} {'x floor':>8} {'x our dense':>12}")
  for name, times_s in rounds.items():
    floor = rounds["floor-moe" if "moe" in name else "floor-dense"]
    print(f"{name:<28} {1e3 * statistics.median(times_s):>10.1f} {ratio(times_s, floor):>8.2f} "
          f"{ratio(times_s, rounds['dense']):>12.2f}")  # fmt: skip


def make_worker(name: str, layers: str) -> tuple[Callable[[], None], dict]:
  sizes = {key: int(os.environ.get(key, value)) for key, value in DEFAULTS.items()}
  step, facts = floor("moe" in name, sizes) if name.startswith("floor") else train_step(name, layers, sizes)
  return step, {"name": name, **facts}


def floor(sparse: bool, sizes: dict[str, int]) -> tuple[Callable[[], None], dict]:
  """Every matrix product of one step: forwards, and both gradients."""
  import jax
  import numpy as np

  B, L, D, N, F, E, A, T, V = (sizes[key] for key in ("PB", "PL", "PD", "PH", "PF", "PE", "PK", "PS", "PV"))
  M, H = B * T, D // N
  forward = [(4 * L, 1, M, D, D), (L, B * N, T, H, T), (L, B * N, T, T, H), (1, 1, M, D, V)]
  if sparse:
    rows = M * A // E
    forward += [(2 * L, E, rows, D, F), (L, E, rows, F, D), (L, 1, M, D, E)]
  else:
    forward += [(2 * L, 1, M, D, F * A), (L, 1, M, F * A, D)]
  multiply, random = jax.jit(lambda a, b: a @ b), np.random.default_rng(0)
  products = []
  for times, batch, m, k, n in forward:
    for rows, inner, columns in ((m, k, n), (m, n, k), (k, m, n)):
      lead = (batch,) if batch > 1 else ()
      a, b = (random.normal(size=(*lead, *shape)).astype(np.float32) for shape in ((rows, inner), (inner, columns)))
      products.append((times, jax.device_put(a), jax.device_put(b)))

  def step() -> None:
    for times, a, b in products:
      for _ in range(times):
        multiply(a, b).block_until_ready()

  return step, {"gflop": 6e-9 * sum(times * batch * m * k * n for times, batch, m, k, n in forward)}


def train_step(name: str, layers: str, sizes: dict[str, int]) -> tuple[Callable[[], None], dict]:
  """moejax's own step on one device: dense, with experts at balanced capacity, or with experts and no drops."""
  begin = time.perf_counter()
  import jax
  import numpy as np

  from moejax.config import AdamW, Data, Experiment, Losses, Mesh, Model, MoE, Training
  from moejax.partitioning import make_partitioner
  from moejax.training.state import make_train_spec
  from moejax.training.step import abstract_inputs, make_train_step

  B, L, D, N, F, E, A, T, V = (sizes[key] for key in ("PB", "PL", "PD", "PH", "PF", "PE", "PK", "PS", "PV"))
  sparse, dispatch = name != "dense", "grouped" if name == "moe-dropless" else "einsum"
  moe = MoE(num_experts=E, experts_per_token=A, d_ff=F, group_size=64, dispatch=dispatch) if sparse else None
  experiment = Experiment(
    name="benchmark",
    model=Model(
      num_layers=L, d_model=D, num_heads=N, num_kv_heads=N, head_dim=D // N, d_ff=F * A, vocab_size=V,
      tie_embeddings=False, moe=moe, layers=layers,
    ),
    data=Data(sequence_length=T),
    training=Training(batch_size=B, losses=Losses(load_balance=0.01 if sparse else 0.0)),
    optimizer=AdamW(learning_rate=1e-3),
    mesh=Mesh(data=1),
  )  # fmt: skip
  spec = make_train_spec(experiment, make_partitioner(experiment.mesh, experiment.rules))
  state = spec.init_state(0)
  compile_begin = time.perf_counter()
  compiled = make_train_step(spec).lower(*abstract_inputs(spec)).compile()
  compile_s = time.perf_counter() - compile_begin
  random, rows = np.random.default_rng(0), (B, T)
  batch = {
    "tokens": random.integers(0, V, rows, np.int32), "targets": random.integers(0, V, rows, np.int32),
    "segments": np.ones(rows, np.int32), "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    "weights": np.ones(rows, np.float32),
  }  # fmt: skip
  batch = jax.device_put(batch, spec.partitioner.batch)

  def step() -> None:
    nonlocal state
    state, metrics = compiled(state, batch, np.float32(1e-3))
    jax.block_until_ready((state, metrics))

  step()
  first_step_s = time.perf_counter() - begin
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
  return step, {"parameters": parameters, "compile_s": compile_s, "first_step_s": first_step_s}


if __name__ == "__main__":
  main()
