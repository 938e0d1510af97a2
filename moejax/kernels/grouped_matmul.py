"""The grouped matrix product: every expert's matrix on its own rows, without capacity and without padding.

R routed rows  E experts  D embed  F hidden

Rows are sorted by expert. D and F may be either way round.

Rows need no alignment: a group starts where the one before it ends. Each backend splits the groups into tiles itself
and leaves alone, in a tile across a border, the rows that are not its group's. So the products of one layer share one
sorted array, and a dispatch gathers its tokens into that order once.

`jax.lax.ragged_dot` would be this function, were it not a dense product over all experts on CPU and GPU, and on TPU
in its weight gradient. tokamax has a TPU and a GPU kernel behind one function too; it is no dependency because
tokamax 0.0.12 pins typeguard to 2.13.3, which holds the command line's tyro at 0.9.1.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from moejax.kernels import grouped_matmul_cpu, grouped_matmul_gpu, grouped_matmul_tpu

Backend = Literal["auto", "cpu", "gpu", "tpu"]


def grouped_matmul(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  group_sizes_E: jax.Array,
  *,
  wide_EDF: jax.Array | None = None,
  backend: Backend = "auto",
) -> jax.Array:
  """out_RF: the first group_sizes_E[0] rows of x times w[0], the next group_sizes_E[1] rows times w[1], and so on.

  Sums are float32; the result and the gradient of x have the type of x, the gradient of w that of w. Inside
  `jax.shard_map` R, E and F are the device's own share, and the map needs `check_vma=False`, as the TPU kernel that
  JAX ships does.

  Args:
    x_RD: float32 or bfloat16. Rows beyond the sum of the sizes give zeros and get zero gradients, whatever they hold.
    w_EDF: float32 or bfloat16.
    group_sizes_E: int32, at least 0, together at most R; any of them may be 0.
    wide_EDF: w in a wider type. Nothing reads it; it gets the gradient, in its type, and w gets none.
    backend: "auto" takes that of the platform which the program is lowered for. A TPU or GPU kernel asked for by name
      runs on other platforms in Pallas' interpreter, which is for tests.
  """
  if x_RD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.shape != w_EDF.shape[:1] or x_RD.shape[1] != w_EDF.shape[1]:
    raise ValueError(
      f"grouped_matmul takes x_RD, w_EDF and group_sizes_E; got {x_RD.shape}, {w_EDF.shape}, {group_sizes_E.shape}"
    )
  if not {x_RD.dtype.name, w_EDF.dtype.name} <= {"float32", "bfloat16"}:
    raise TypeError(f"grouped_matmul takes float32 and bfloat16; got {x_RD.dtype} rows and {w_EDF.dtype} weights")
  if x_RD.shape[0] == 0:
    return jnp.zeros((0, w_EDF.shape[2]), x_RD.dtype)
  wide = None if wide_EDF is None else wide_EDF.dtype
  return _grouped_matmul(x_RD, w_EDF, wide_EDF, group_sizes_E.astype(jnp.int32), backend, wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _grouped_matmul(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  wide_EDF: jax.Array | None,
  group_sizes_E: jax.Array,
  backend: Backend,
  wide: jnp.dtype | None,
) -> jax.Array:
  return _run("gmm", backend, x_RD, w_EDF, group_sizes_E, transpose_w=False)


def _forward(
  x_RD: jax.Array,
  w_EDF: jax.Array,
  wide_EDF: jax.Array,
  group_sizes_E: jax.Array,
  backend: Backend,
  wide: jnp.dtype | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return _grouped_matmul(x_RD, w_EDF, wide_EDF, group_sizes_E, backend, wide), (x_RD, w_EDF, group_sizes_E)


def _backward(
  backend: Backend, wide: jnp.dtype | None, saved: tuple[jax.Array, ...], of_out_RF: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None, None]:
  x_RD, w_EDF, group_sizes_E = saved
  of_x_RD = _run("gmm", backend, of_out_RF, w_EDF, group_sizes_E, transpose_w=True)
  of_w_EDF = _run("tgmm", backend, x_RD, of_out_RF, group_sizes_E, dtype=wide or w_EDF.dtype)
  return of_x_RD, *((None, of_w_EDF) if wide else (of_w_EDF, None)), None


_grouped_matmul.defvjp(_forward, _backward)


def _run(product: Literal["gmm", "tgmm"], backend: Backend, *arrays: jax.Array, **options: Any) -> jax.Array:
  """`gmm`, a group's rows times its matrix, or `tgmm`, its rows transposed times other rows, on a backend."""
  cpu, gpu, tpu = (
    functools.partial(getattr(module, product), **options)
    for module in (grouped_matmul_cpu, grouped_matmul_gpu, grouped_matmul_tpu)
  )
  kernels: dict[Backend, Callable[[], jax.Array]] = {
    "auto": lambda: jax.lax.platform_dependent(*arrays, tpu=tpu, cuda=gpu, default=cpu),
    "cpu": lambda: cpu(*arrays),
    "gpu": lambda: jax.lax.platform_dependent(*arrays, cuda=gpu, default=functools.partial(gpu, interpret=True)),
    "tpu": lambda: jax.lax.platform_dependent(*arrays, tpu=tpu, default=functools.partial(tpu, interpret=True)),
  }
  return kernels[backend]()
