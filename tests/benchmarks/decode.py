"""How long a sparse layer takes for few tokens, as in decoding, and how much of that is reading experts.

Five ways to compute the same, interleaved: `grouped`, which sorts the rows by expert; `visit`, a loop that applies each
chosen expert to all tokens; `separate`, the same with an array for each matrix of an expert in place of stacks, which
inference runs on one CPU device for up to 32 tokens; `gather`, which copies the matrices of each chosen expert beside
each other and multiplies them in one batched product; `all`, every expert on every token.

    python tests/benchmarks/decode.py [--experts 16] [--active 2] [--d-model 512] [--d-ff 1024] [--tokens 1 4 16 64]
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.models.moe.experts import Weights as Experts
from moejax.models.moe.few_tokens import visit_experts
from moejax.models.products import Operand

Weights = tuple[jax.Array, jax.Array, jax.Array]


def grouped(x_MD: jax.Array, experts_MA: jax.Array, weights: Weights) -> jax.Array:
  gate_EDF, up_EDF, down_EFD = weights
  E, A = len(up_EDF), experts_MA.shape[1]
  order_R = jnp.argsort(experts_MA.reshape(-1))
  sizes_E = jnp.bincount(experts_MA.reshape(-1), length=E).astype(jnp.int32)
  rows_RD = x_MD[order_R // A]
  hidden_RF = jax.nn.silu(grouped_matmul(rows_RD, gate_EDF, sizes_E)) * grouped_matmul(rows_RD, up_EDF, sizes_E)
  out_RD = grouped_matmul(hidden_RF, down_EFD, sizes_E)
  return jnp.zeros_like(x_MD).at[order_R // A].add(out_RD)


def visit(x_MD: jax.Array, experts_MA: jax.Array, weights: Weights) -> jax.Array:
  matrices = {name: Operand(w, None) for name, w in zip(("gate", "up", "down"), weights, strict=True)}
  ones_MA = jnp.ones(experts_MA.shape, jnp.float32)
  return visit_experts(x_MD, experts_MA, ones_MA, ones_MA > 0, Experts(matrices, {}, "swiglu")).astype(x_MD.dtype)


def gather(x_MD: jax.Array, experts_MA: jax.Array, weights: Weights) -> jax.Array:
  gate_RDF, up_RDF, down_RFD = (w[experts_MA.reshape(-1)] for w in weights)
  rows_RD = jnp.repeat(x_MD, experts_MA.shape[1], axis=0)
  hidden_RF = jax.nn.silu(jnp.einsum("RD,RDF->RF", rows_RD, gate_RDF)) * jnp.einsum("RD,RDF->RF", rows_RD, up_RDF)
  return jnp.einsum("RF,RFD->RD", hidden_RF, down_RFD).reshape(*experts_MA.shape, -1).sum(1)


def every(x_MD: jax.Array, experts_MA: jax.Array, weights: Weights) -> jax.Array:
  gate_EDF, up_EDF, down_EFD = weights
  chosen_ME = jax.nn.one_hot(experts_MA, len(up_EDF)).sum(1).astype(x_MD.dtype)
  hidden_MEF = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, up_EDF)
  return jnp.einsum("MEF,EFD->MD", hidden_MEF * chosen_ME[..., None], down_EFD)


WAYS = {"grouped": grouped, "visit": visit, "separate": visit, "gather": gather, "all": every}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (("experts", 16), ("active", 2), ("d-model", 512), ("d-ff", 1024), ("rounds", 21)):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
  known = parser.parse_args()
  E, A, D, F = known.experts, known.active, known.d_model, known.d_ff
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((E, D, F), (E, D, F), (E, F, D))
  weights = tuple(
    jax.random.normal(key, shape, dtype) * shape[1] ** -0.5 for key, shape in zip(keys, shapes, strict=True)
  )
  separate = tuple(tuple(w) for w in weights)
  megabytes = sum(w.nbytes for w in weights) / 1e6
  print(f"{jax.devices()[0].device_kind}, {E} experts of {D} x {F}, {A} a token, {dtype.__name__}, {megabytes:.0f} MB")
  print("tokens  " + "  ".join(f"{name:>9}" for name in WAYS) + "   (median ms)")
  random = np.random.default_rng(0)
  for M in known.tokens:
    x_MD = jnp.asarray(random.normal(size=(M, D)), dtype)
    experts_MA = jnp.asarray(np.stack([random.permutation(E)[:A] for _ in range(M)]), jnp.int32)
    given = {name: separate if name == "separate" else weights for name in WAYS}
    programs = {name: jax.jit(way).lower(x_MD, experts_MA, given[name]).compile() for name, way in WAYS.items()}
    expected = np.asarray(programs["all"](x_MD, experts_MA, weights), np.float32)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(known.rounds):
      for name, program in programs.items():
        begin = time.perf_counter()
        out = jax.block_until_ready(program(x_MD, experts_MA, given[name]))
        times[name].append(time.perf_counter() - begin)
        np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=0.1, atol=0.1)
    print(f"{M:6}  " + "  ".join(f"{1e3 * statistics.median(each):9.2f}" for each in times.values()), flush=True)


if __name__ == "__main__":
  main()
