"""One sparse layer, forwards and backwards: dispatches, many experts, fine-grained experts, and Hugging Face's Mixtral.

    python tests/benchmarks/moe_layer.py                              # all of ours, 7 rounds
    python tests/benchmarks/moe_layer.py --torch-python PATH          # and MixtralSparseMoeBlock of that Python
    python tests/benchmarks/moe_layer.py --cases e128                 # some
    PB=64 python tests/benchmarks/moe_layer.py --cases e128           # a larger batch: more rows for each expert

Every case has the same width and the same active parameters: 2048 tokens (8 x 256) of width 256, top-2 of 8 experts of
512 hidden units unless its name says otherwise. Tokens are random and routed by a fresh router, as at the start of a
training run; `zipf` moves the router's bias so that the busiest of 8 experts gets 37 % of the choices. The gradient is
that of the input and of all weights. Workers take turns (`workers.py`); what counts is the median over rounds of the
ratio to `base` of the same round. On two CPU cores the goals are: e128 at most 1.25 times base, fine at most 1.3 times,
router, sort, gathers and sums (`base` without `experts-base`) at most 0.25 times the products (`floor-base`), and
Hugging Face's layer slower than ours.

The weights of 128 experts are 201 MB, which a step reads twice and whose gradient it writes: with 2048 tokens, 32 rows
an expert, that traffic alone outweighs the products.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable

from workers import ratio, serve, take_turns

B, T, D = int(os.environ.get("PB", "8")), 256, 256
BASE = {"num_experts": 8, "experts_per_token": 2, "d_ff": 512, "dispatch": "grouped"}
CASES: dict[str, dict] = {
  "base": {},
  "zipf": {},
  "e16": {"num_experts": 16},
  "e32": {"num_experts": 32},
  "e64": {"num_experts": 64},
  "e128": {"num_experts": 128},
  "fine": {"num_experts": 64, "experts_per_token": 16, "d_ff": 64},
  "einsum": {"dispatch": "einsum", "group_size": 64},
  "dense": {"dispatch": "dense"},
}
FLOORS = ("base", "e128", "fine")
"""Cases whose products alone are timed too, as batched products of equal groups (`floor-base` and so on), and whose
experts are, on routed rows that lie ready (`experts-base`). The rest of a layer is router, sort, gathers and sums."""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=7, help="turns of each worker")
  parser.add_argument("--steps", type=int, default=5, help="steps in a turn, of which the median counts")
  parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, help="which of ours")
  parser.add_argument("--torch-python", help="a Python with torch and transformers")
  parser.add_argument("--worker", help="be this worker instead: a case, experts-CASE, floor-CASE or huggingface")
  chosen = parser.parse_args()
  if chosen.worker:
    serve(*worker(chosen.worker))
    return
  names = list(dict.fromkeys(["base", *chosen.cases]))
  names += [f"{part}-{name}" for name in names if name in FLOORS for part in ("experts", "floor")]
  specs = {name: {"cmd": [sys.executable, __file__, "--worker", name]} for name in names}
  if chosen.torch_python:
    specs["huggingface"] = {"cmd": [chosen.torch_python, __file__, "--worker", "huggingface"]}
  turns = take_turns(specs, chosen.rounds, chosen.steps)
  print(f"\n{'case':<14} {'median ms':>10} {'x base':>8} {'x floor':>8}")
  for name, times_s in turns.items():
    products_s = turns.get("floor-base" if name == "huggingface" else f"floor-{name.removeprefix('experts-')}")
    of_products = f"{ratio(times_s, products_s):.2f}" if products_s else ""
    of_base = f"{ratio(times_s, turns['base']):.2f}"
    print(f"{name:<14} {1e3 * statistics.median(times_s):>10.1f} {of_base:>8} {of_products:>8}".rstrip())


def worker(name: str) -> tuple[Callable[[], None], dict]:
  if name == "huggingface":
    return huggingface()
  if name.startswith("experts-"):
    return experts(name.removeprefix("experts-"))
  return floor(name.removeprefix("floor-")) if name.startswith("floor-") else ours(name)


def floor(name: str) -> tuple[Callable[[], None], dict]:
  """The products of a case alone, forwards and backwards, at equal groups whose rows lie ready."""
  import jax
  import jax.numpy as jnp

  case = BASE | CASES[name]
  E, F, rows = case["num_experts"], case["d_ff"], B * T * case["experts_per_token"] // case["num_experts"]
  x_ERD, of_out_ERD = (jax.random.normal(jax.random.key(seed), (E, rows, D)) for seed in (1, 2))
  gate_EDF, up_EDF = (jax.random.normal(jax.random.key(seed), (E, D, F)) for seed in (3, 4))
  down_EFD = jax.random.normal(jax.random.key(5), (E, F, D))

  def loss(x_ERD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array) -> jax.Array:
    hidden_ERF = jax.nn.silu(jnp.einsum("ERD,EDF->ERF", x_ERD, gate_EDF)) * jnp.einsum("ERD,EDF->ERF", x_ERD, up_EDF)
    return jnp.sum(jnp.einsum("ERF,EFD->ERD", hidden_ERF, down_EFD) * of_out_ERD)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

  def step() -> None:
    jax.block_until_ready(gradient(x_ERD, gate_EDF, up_EDF, down_EFD))

  return step, {"case": f"floor-{name}"}


def experts(name: str) -> tuple[Callable[[], None], dict]:
  """The experts of a case alone, forwards and backwards, on rows of random choices that lie ready."""
  import jax
  import jax.numpy as jnp

  from moejax.models.moe.experts import Weights
  from moejax.models.moe.experts_on_cpu import feed_forward_on_cpu
  from moejax.models.products import Operand

  case = BASE | CASES[name]
  E, A, F = case["num_experts"], case["experts_per_token"], case["d_ff"]
  _, choices_MA = jax.lax.top_k(jax.random.normal(jax.random.key(0), (B * T, E)), A)
  sizes_E = jnp.bincount(choices_MA.reshape(-1), length=E)
  rows_RD, of_out_RD = (jax.random.normal(jax.random.key(seed), (B * T * A, D)) for seed in (1, 2))
  shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
  matrices = {name: jax.random.normal(jax.random.key(3 + i), shapes[name]) for i, name in enumerate(shapes)}

  def loss(rows_RD: jax.Array, matrices: dict[str, jax.Array]) -> jax.Array:
    weights = Weights({name: Operand(matrix, None) for name, matrix in matrices.items()}, {}, "swiglu")
    return jnp.sum(feed_forward_on_cpu(rows_RD, sizes_E, weights) * of_out_RD)

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))

  def step() -> None:
    jax.block_until_ready(gradient(rows_RD, matrices))

  return step, {"case": f"experts-{name}", "largest": int(sizes_E.max())}


def ours(name: str) -> tuple[Callable[[], None], dict]:
  """moejax's layer on one device."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from moejax.config import DATA_EXPERT_MODEL, Mesh, Model, MoE, Router
  from moejax.models.moe.layer import MoELayer
  from moejax.partitioning import make_partitioner

  router = Router(bias_rate=0.001) if name == "zipf" else Router()
  moe = MoE(**BASE | CASES[name] | {"router": router})
  model = Model(num_layers=4, d_model=D, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=1024, vocab_size=8192, moe=moe)
  layer = MoELayer(model, make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1]), nnx.Rngs(params=0))
  if layer.bias_E is not None:
    layer.bias_E[...] = 0.05 * jnp.log(1.0 / jnp.arange(1, moe.num_experts + 1))
  graph, state = nnx.split(layer)
  parameters = nnx.to_pure_dict(state)
  x_BTD, valid_BT = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.ones((B, T), bool)
  of_out_BTD = jax.random.normal(jax.random.key(2), (B, T, D))

  def loss(parameters: dict, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    out_BTD, counted = nnx.merge(graph, parameters)(x_BTD, valid_BT)
    return jnp.sum(out_BTD * of_out_BTD), jnp.sum(counted["choices"], axis=(0, 1)) / jnp.sum(counted["choices"])

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  load_E = gradient(parameters, x_BTD)[1]

  def step() -> None:
    jax.block_until_ready(gradient(parameters, x_BTD))

  return step, {"case": name, "busiest": round(float(load_E.max()), 3)}


def huggingface() -> tuple[Callable[[], None], dict]:
  """The layer of Hugging Face's Mixtral at the shape of `base`."""
  import torch
  from transformers import MixtralConfig
  from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

  torch.set_num_threads(2)
  torch.manual_seed(0)
  config = MixtralConfig(
    hidden_size=D,
    intermediate_size=BASE["d_ff"],
    num_local_experts=BASE["num_experts"],
    num_experts_per_tok=BASE["experts_per_token"],
  )
  layer = MixtralSparseMoeBlock(config).float().train()
  for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
  x_BTD = torch.randn(B, T, D, requires_grad=True)
  of_out_BTD = torch.randn(B, T, D)

  def step() -> None:
    out_BTD = layer(x_BTD)
    out_BTD = out_BTD[0] if isinstance(out_BTD, tuple) else out_BTD
    out_BTD.backward(of_out_BTD)
    layer.zero_grad(set_to_none=True)
    x_BTD.grad = None

  return step, {"case": "huggingface", "torch": torch.__version__}


if __name__ == "__main__":
  main()
