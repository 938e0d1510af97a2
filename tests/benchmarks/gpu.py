"""Everything that is measured on one GPU, in less than 8 minutes: correctness and speed of kernels, layers and a step.

    python tests/benchmarks/gpu.py --out gpu.json              # one H100 or larger
    python tests/benchmarks/gpu.py --smoke --out smoke.json    # tiny shapes, on any device

Parts: the grouped product against `jax.lax.ragged_dot` and the dense product; attention forward and backward, by
moejax's kernels, plain and by cuDNN; a layer of the shape of Llama 7B and one of Mixtral 8x7B, forward and backward;
whole steps of a dense and a sparse model of 1B active parameters. Kernels are compared with float32.
`fraction_of_product` is the rate of a case over that of a large bfloat16 product on the same device. The file is
written after each part. A part that fails has an `error`; parts that would begin after --minutes are skipped.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import utilization

from moejax.config import DATA_EXPERT_MODEL, Mesh, Model, MoE
from moejax.config.parameters import flops_per_token
from moejax.kernels.attention import attention, fused_attention_gpu
from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.models.abstract import abstract_model
from moejax.partitioning import make_partitioner

Case = dict[str, Any]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that everything runs")
  parser.add_argument("--out", type=pathlib.Path, help="JSON file of the results")
  parser.add_argument("--minutes", type=float, default=7.0, help="no part begins later than this")
  chosen = parser.parse_args()
  begin = time.perf_counter()
  rate = utilization.product_rate()
  found: Case = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "product_flops_per_s": rate}
  for name, part in PARTS.items():
    started = time.perf_counter()
    if started - begin > 60 * chosen.minutes:
      found[name] = {"skipped": f"after {chosen.minutes:g} minutes"}
    else:
      try:
        found[name] = part(chosen.smoke, rate)
      except Exception as error:  # the other parts are worth their time without it
        found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    print(name, json.dumps(found[name]), f"{time.perf_counter() - started:.0f} s", flush=True)
    if chosen.out:
      chosen.out.write_text(json.dumps(found, indent=1))


def timed(function: Callable, *arguments: Any, repeats: int = 5) -> float:
  """Median seconds of a compiled function."""
  compiled = jax.jit(function)
  jax.block_until_ready(compiled(*arguments))
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    times.append(time.perf_counter() - begin)
  return statistics.median(times)


def rated(seconds: float, flops: float, rate: float) -> Case:
  return {"seconds": seconds, "flops_per_s": flops / seconds, "fraction_of_product": flops / seconds / rate}


def both_passes(function: Callable, flops: float, rate: float, *arguments: jax.Array) -> Case:
  """Forward, and forward and backward with twice the FLOPs more."""
  loss = lambda *inputs: jnp.sum(jnp.square(function(*inputs).astype(jnp.float32)))  # noqa: E731
  gradient = jax.grad(loss, tuple(range(len(arguments))))
  return {
    "forward": rated(timed(function, *arguments), flops, rate),
    "forward_and_backward": rated(timed(gradient, *arguments), 3 * flops, rate),
  }


def error_of(function: Callable, exact: Callable, *arguments: jax.Array) -> float:
  """Norm of the difference to the float32 result and gradients, relative to theirs; the largest of them."""

  def all_of(function: Callable, arguments: tuple[jax.Array, ...]) -> list[jax.Array]:
    loss = lambda *inputs: jnp.sum(jnp.sin(function(*inputs).astype(jnp.float32)))  # noqa: E731
    return [function(*arguments), *jax.grad(loss, tuple(range(len(arguments))))(*arguments)]

  with jax.default_matmul_precision("highest"):
    wanted = jax.jit(lambda *inputs: all_of(exact, inputs))(*(x.astype(jnp.float32) for x in arguments))
  got = jax.jit(lambda *inputs: all_of(function, inputs))(*arguments)
  pairs = zip(got, wanted, strict=True)
  return max(float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs)


def grouped_products(smoke: bool, rate: float) -> Case:
  R, E, D, F = (64, 4, 16, 32) if smoke else (65_536, 64, 2048, 1024)
  random = np.random.default_rng(0)
  sizes = {
    "equal": np.full(E, R // E),
    "skewed": random.multinomial(R, (1 / np.arange(1, E + 1)) / sum(1 / np.arange(1, E + 1))),
  }
  keys = jax.random.split(jax.random.key(0), 2)
  x_RD, w_EDF = (
    jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, ((R, D), (E, D, F)), strict=True)
  )
  found: Case = {"shape": {"rows": R, "experts": E, "d_model": D, "d_ff": F}}
  for name, of_experts in sizes.items():
    sizes_E = jnp.asarray(of_experts, jnp.int32)
    ways: dict[str, Callable] = {
      "moejax": lambda x, w, s=sizes_E: grouped_matmul(x, w, s, backend="gpu" if smoke else "auto"),
      "ragged_dot": lambda x, w, s=sizes_E: jax.lax.ragged_dot(x, w, s),
    }

    def exact(x_RD: jax.Array, w_EDF: jax.Array, of_experts: np.ndarray = of_experts) -> jax.Array:
      rows = jnp.split(x_RD, np.cumsum(of_experts)[:-1])
      return jnp.concatenate([part @ w_EDF[e] for e, part in enumerate(rows)])

    for way, function in ways.items():
      case = both_passes(function, 2 * R * D * F, rate, x_RD, w_EDF)
      case["error_to_float32"] = error_of(function, exact, x_RD[:R], w_EDF)
      found[f"{way}, {name}"] = case
  dense = lambda x, w: jnp.einsum("ERD,EDF->ERF", x.reshape(E, R // E, D), w)  # noqa: E731
  found["dense product, equal"] = both_passes(dense, 2 * R * D * F, rate, x_RD, w_EDF)
  return found


def attentions(smoke: bool, rate: float) -> Case:
  B, T, N, K, H = (2, 64, 4, 2, 16) if smoke else (4, 4096, 32, 8, 128)
  keys = jax.random.split(jax.random.key(1), 3)
  shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
  arrays = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
  window = T // 4
  implementation = "xla" if smoke else "cudnn"
  ones = lambda q: jnp.ones(q.shape[:2], jnp.int32)  # noqa: E731
  # Documents that end inside a block and at its border. The time is that of one document, whose FLOPs count.
  documents = lambda q: 1 + (jnp.arange(q.shape[1]) * 8 // q.shape[1] + ones(q)) // 3  # noqa: E731
  ours = functools.partial(fused_attention_gpu, interpret=jax.default_backend() == "cpu")
  ways: dict[str, tuple[Callable, int | None]] = {
    "moejax": (lambda q, k, v: ours(q, k, v, ones(q)), None),
    "moejax, window": (lambda q, k, v: ours(q, k, v, ones(q), window), window),
    "moejax, documents": (lambda q, k, v: ours(q, k, v, documents(q)), None),
    "plain": (lambda q, k, v: attention(q, k, v, ones(q)), None),
    "plain, window": (lambda q, k, v: attention(q, k, v, ones(q), window), window),
    implementation: (
      lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation), None
    ),
    f"{implementation}, window": (
      lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=(window - 1, 0), implementation=implementation
      ),
      window,
    ),
  }  # fmt: skip
  found: Case = {"shape": {"batch": B, "length": T, "query_heads": N, "key_heads": K, "head_dim": H}}
  small = tuple(x[:1, : min(T, 512)] for x in arrays)
  for name, (function, of_window) in ways.items():
    try:
      seen = T * (T + 1) / 2 if of_window is None else T * of_window - of_window * (of_window - 1) / 2
      case = both_passes(function, 4 * B * N * H * seen, rate, *arrays)
      of = documents if name.endswith("documents") else ones
      exact = lambda q, k, v, w=of_window, of=of: attention(q, k, v, of(q), w)  # noqa: E731
      case["error_to_float32"] = error_of(function, exact, *small)
      found[name] = case
    except Exception as error:  # cuDNN may refuse a shape
      found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
  return found


def layers(smoke: bool, rate: float) -> Case:
  base = Model(
    num_layers=1, d_model=32 if smoke else 4096, num_heads=4 if smoke else 32, num_kv_heads=4 if smoke else 32,
    head_dim=8 if smoke else 128, d_ff=64 if smoke else 11_008, vocab_size=256, compute_dtype="bfloat16",
  )  # fmt: skip
  width = 48 if smoke else 14_336
  moe = MoE(num_experts=8, experts_per_token=2, d_ff=width, dispatch="grouped")
  mixtral = dataclasses.replace(base, num_kv_heads=2 if smoke else 8, moe=moe)
  tokens = (2, 32) if smoke else (4, 4096)
  return {"dense 7B": _layer(base, tokens, rate), "Mixtral 8x7B": _layer(mixtral, tokens, rate)}


def _layer(model: Model, tokens: tuple[int, int], rate: float) -> Case:
  partitioner = make_partitioner(Mesh(data=1), DATA_EXPERT_MODEL, jax.devices()[:1])
  abstract = abstract_model(model, partitioner)
  parameters = jax.jit(abstract.init)(jax.random.key(0))
  tokens_BT = jax.random.randint(jax.random.key(1), tokens, 0, model.vocab_size)
  positions_BT = jnp.broadcast_to(jnp.arange(tokens[1]), tokens)

  def loss(parameters: Any) -> jax.Array:
    x_BTD, _ = abstract.module(parameters)(tokens_BT, jnp.ones(tokens, jnp.int32), positions_BT)
    return jnp.sum(jnp.square(x_BTD.astype(jnp.float32)))

  of_logits = 6 * model.vocab_size * model.d_model
  flops = (flops_per_token(model, tokens[1]) - of_logits) * tokens[0] * tokens[1]
  return rated(timed(jax.grad(loss), parameters), flops, rate)


def steps(smoke: bool, rate: float) -> Case:
  """Whole steps with their optimizer. Goals on an H100: dense 0.55, sparse 0.45."""
  sizes = (
    {"layers": 2, "width": 128, "sequence": 32, "batch": 2, "accumulation": 1, "steps": 2}
    if smoke
    else {"layers": 16, "width": 2048, "sequence": 4096, "batch": 32, "accumulation": 8, "steps": 6}
  )
  chosen = argparse.Namespace(**sizes, remat="attention", dispatch="grouped", trace=None)
  return {name: utilization.measure(name, chosen) for name in ("dense", "moe")}


PARTS: dict[str, Callable[[bool, float], Case]] = {
  "grouped_products": grouped_products,
  "attention": attentions,
  "layers": layers,
  "steps": steps,
}

if __name__ == "__main__":
  main()
