"""The grouped product, forwards and backwards, against the batched product of the same FLOPs at equal groups.

    python tests/benchmarks/grouped_matmul.py                          # times on this machine
    python tests/benchmarks/grouped_matmul.py --experts 128
    python tests/benchmarks/grouped_matmul.py --stock                  # jax.lax.ragged_dot too: 20 s more on CPU
    python tests/benchmarks/grouped_matmul.py --topology v5p:2x2x1     # FLOPs of the program for a TPU, without one

Times: the products take turns, so that whatever else the machine does hits all alike; what counts is the median over
rounds of the ratio to the batched product of the same round. Groups are equal, or skewed as 1 / rank (Zipf). The case
is by default float32, 4096 tokens, 2 of 16 experts, 512 to 1024 on CPU, and elsewhere bfloat16, 8192 tokens, 8 of 64
experts, 2048 to 1024; there one large product shows what rate the chip reaches.

FLOPs (needs libtpu: `pip install "jax[tpu]"`): XLA counts the rows of a kernel once, as the kernel declares them. The
kernel also works through the tiles across a border between groups once for each group: `with borders` counts row tiles
visited x FLOPs of a tile, for all three products. Both are multiples of 2 x R x D x F x 3.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

from moejax.huge_pages import restart_with_huge_pages

CASES = {"cpu": ("float32", 4096, 2, 16, 512, 1024), "other": ("bfloat16", 8192, 8, 64, 2048, 1024)}
FIELDS = ("dtype", "tokens", "experts_per_token", "experts", "width", "hidden")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=9, help="turns of each product")
  parser.add_argument("--stock", action="store_true", help="measure jax.lax.ragged_dot too")
  parser.add_argument("--topology", help="count FLOPs for this TPU topology instead, such as v5p:2x2x1")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"))
  for name in FIELDS[1:]:
    parser.add_argument(f"--{name.replace('_', '-')}", type=int)
  chosen = parser.parse_args()
  if chosen.topology:
    count_flops(chosen.topology)
  else:
    restart_with_huge_pages()
    measure(chosen)


def measure(chosen: argparse.Namespace) -> None:
  """Lets all products take turns, and prints the table."""
  import jax
  import jax.numpy as jnp

  from moejax.kernels.grouped_matmul import grouped_matmul

  platform = jax.devices()[0].platform
  defaults = dict(zip(FIELDS, CASES["cpu" if platform == "cpu" else "other"], strict=True))
  dtype, tokens, A, E, D, F = (getattr(chosen, name) or default for name, default in defaults.items())
  R = tokens * A
  keys = jax.random.split(jax.random.key(0), 3)
  x_RD, of_out_RF = jax.random.normal(keys[0], (R, D), dtype), jax.random.normal(keys[1], (R, F), dtype)
  w_EDF = jax.random.normal(keys[2], (E, D, F), dtype)

  def batched(x_RD, w_EDF, group_sizes_E):
    return jnp.einsum("ERD,EDF->ERF", x_RD.reshape(E, -1, D), w_EDF).reshape(R, F)

  def start(product: Callable, sizes: list[int]) -> Callable[[], None]:
    @jax.jit
    def both_ways(x_RD, w_EDF, group_sizes_E, of_out_RF):
      out_RF, pull_back = jax.vjp(lambda x, w: product(x, w, group_sizes_E), x_RD, w_EDF)
      return out_RF, *pull_back(of_out_RF)

    sizes_E = jnp.asarray(sizes, jnp.int32)
    return lambda: jax.block_until_ready(both_ways(x_RD, w_EDF, sizes_E, of_out_RF))

  products = {
    "batched": start(batched, equal(R, E)),
    "grouped, equal": start(grouped_matmul, equal(R, E)),
    "grouped, Zipf": start(grouped_matmul, zipf(R, E)),
  }
  if chosen.stock:
    products["ragged_dot, equal"] = start(jax.lax.ragged_dot, equal(R, E))
  flops = dict.fromkeys(products, 6 * R * D * F)
  if platform != "cpu":
    square = jax.random.normal(keys[0], (8192, 8192), dtype)
    large = jax.jit(lambda a, b: a @ b)
    products["one large product"] = lambda: jax.block_until_ready(large(square, square))
    flops["one large product"] = 2 * len(square) ** 3
  print(f"{jax.devices()[0].device_kind}, {dtype}: {R} rows, {E} experts, {D} to {F}, Zipf {zipf(R, E)[:3]}...")
  times_s = take_turns(products, chosen.rounds)
  print(f"\n{'product':<20} {'median ms':>10} {'TFLOP/s':>8} {'x batched':>10}")
  for name, own_s in times_s.items():
    rate = 1e-12 * flops[name] / statistics.median(own_s)
    print(f"{name:<20} {1e3 * statistics.median(own_s):>10.2f} {rate:>8.2f} {ratio(own_s, times_s['batched']):>10.2f}")


def take_turns(products: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each product in each round, the median of three runs on end."""
  for run in products.values():
    run()
  times_s: dict[str, list[float]] = {name: [] for name in products}
  for _ in range(rounds):
    for name, run in products.items():
      samples = []
      for _ in range(3):
        begin = time.perf_counter()
        run()
        samples.append(time.perf_counter() - begin)
      times_s[name].append(statistics.median(samples))
  return times_s


def ratio(times_s: list[float], base_s: list[float]) -> float:
  """Median over rounds of the ratio within a round."""
  return statistics.median(a / b for a, b in zip(times_s, base_s, strict=True))


def equal(R: int, E: int) -> list[int]:
  return [R // E] * E


def zipf(R: int, E: int) -> list[int]:
  """Shares of all rows as 1 / rank; the first group takes what rounding leaves."""
  total = sum(1 / rank for rank in range(1, E + 1))
  sizes = [int(R / rank / total) for rank in range(1, E + 1)]
  return [sizes[0] + R - sum(sizes), *sizes[1:]]


def count_flops(topology: str) -> None:
  """Compiles the product and its gradients for one chip of a topology, and prints what they compute."""
  os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  from moejax.kernels import grouped_matmul_tpu as tpu
  from moejax.kernels.grouped_matmul import grouped_matmul

  chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(chip)

  def counted(product: Callable, R: int, E: int, D: int, F: int) -> float:
    def both_ways(x_RD, w_EDF, group_sizes_E, of_out_RF):
      out_RF, pull_back = jax.vjp(lambda x, w: product(x, w, group_sizes_E), x_RD, w_EDF)
      return out_RF, *pull_back(of_out_RF)

    shapes = ((R, D), "bfloat16"), ((E, D, F), "bfloat16"), ((E,), "int32"), ((R, F), "bfloat16")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding) for shape, dtype in shapes]
    return jax.jit(both_ways).lower(*arrays).compile().cost_analysis()["flops"] / (6 * R * D * F)

  def with_borders(sizes: list[int], D: int, F: int) -> float:
    R, E = sum(sizes), len(sizes)
    products = ((tpu.gmm_tiles, D, F), (tpu.gmm_tiles, F, D), (tpu.tgmm_tiles, D, F))
    work = 0
    for tiles_of, a, b in products:
      rows, tile_a, tile_b = tiles_of(R, E, a, b, 2)
      work += visited(sizes, rows) * rows * filled(a, tile_a) * filled(b, tile_b)
    return work / (len(products) * R * D * F)

  print(f"{chip.device_kind}, bfloat16, multiples of the ideal FLOPs forwards and backwards\n")
  print(f"{'':<34} {'XLA counts':>21} {'grouped with borders':>27}")
  print(f"{'rows':>8} {'experts':>8} {'D to F':>16} {'ragged_dot':>11} {'grouped':>9} {'equal':>13} {'Zipf':>13}")
  for R, E, D, F in ((8192, 16, 512, 1024), (8192, 128, 512, 1024), (65536, 16, 2048, 1024), (262144, 128, 2048, 768)):
    xla = [counted(product, R, E, D, F) for product in (jax.lax.ragged_dot, grouped_matmul)]
    borders = [with_borders(groups(R, E), D, F) for groups in (equal, zipf)]
    print(f"{R:>8} {E:>8} {f'{D} to {F}':>16} {xla[0]:>11.2f} {xla[1]:>9.3f} {borders[0]:>13.3f} {borders[1]:>13.3f}")


def visited(sizes: list[int], tile: int) -> int:
  """Row tiles in which a group has rows, added over groups."""
  ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
  return sum(-(-end // tile) - (end - size) // tile for end, size in zip(ends, sizes, strict=True) if size)


def filled(size: int, tile: int) -> int:
  """The dimension as whole tiles."""
  return -(-size // tile) * tile


if __name__ == "__main__":
  main()
