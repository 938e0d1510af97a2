"""The grouped matrix product: the matrix of each expert times its rows, without capacity or padding.

R routed rows  E experts  D embed  F hidden

Rows are sorted by expert. D and F may be either way round.

Groups need no alignment: each starts where the one before ends. Each backend splits the groups into tiles, and in a
tile that crosses a border it leaves the rows of other groups unchanged. The products of one layer therefore share one
sorted array, for which a dispatch gathers its tokens once.

`jax.lax.ragged_dot` has the same interface, but computes a dense product over all experts on CPU and GPU, and for the
weight gradient on TPU. tokamax has kernels for TPU and GPU, but version 0.0.12 pins typeguard to 2.13.3, which
conflicts with tyro, the library of the command line.
"""

import functools
from collections.abc import Callable
from types import ModuleType
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
  """Returns out_RF: the first group_sizes_E[0] rows of x times w[0], the next group_sizes_E[1] rows times w[1], and so
  on.

  Sums are in float32. The result and the gradient of x have the dtype of x, and the gradient of w has that of w. Inside
  `jax.shard_map` R, E and F are those of the device, and `check_vma=False` is needed, as for the TPU kernel of JAX.

  Args:
    x_RD: float32 or bfloat16. Rows beyond the sum of the sizes give zeros and have zero gradients, whatever they
      contain.
    w_EDF: float32 or bfloat16.
    group_sizes_E: int32, at least 0, together at most R; any of them may be 0.
    wide_EDF: w in a wider dtype, which receives the gradient in place of w. Its values are not read.
    backend: "auto" selects the backend of the platform that the program is lowered for. On other platforms, a TPU or
      GPU kernel that is named runs in the interpreter of Pallas, for tests.
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
  return on_platform("gmm", backend, x_RD, w_EDF, group_sizes_E, transpose_w=False)


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
  of_x_RD = on_platform("gmm", backend, of_out_RF, w_EDF, group_sizes_E, transpose_w=True)
  of_w_EDF = on_platform("tgmm", backend, x_RD, of_out_RF, group_sizes_E, dtype=wide or w_EDF.dtype)
  return of_x_RD, *((None, of_w_EDF) if wide else (of_w_EDF, None)), None


_grouped_matmul.defvjp(_forward, _backward)


def on_platform(
  product: Literal["gmm", "tgmm", "largest"],
  backend: Backend,
  *arrays: jax.Array,
  of_tpu: ModuleType = grouped_matmul_tpu,
  **options: Any,
) -> jax.Array:
  """Runs `gmm`, the rows of each group times its matrix, `tgmm`, its rows transposed times other rows, or `largest`,
  the largest absolute values of their columns."""
  cpu, gpu, tpu = (
    functools.partial(getattr(module, product), **options)
    for module in (grouped_matmul_cpu, grouped_matmul_gpu, of_tpu)
  )
  kernels: dict[Backend, Callable[[], jax.Array]] = {
    "auto": lambda: jax.lax.platform_dependent(*arrays, tpu=tpu, cuda=gpu, default=cpu),
    "cpu": lambda: cpu(*arrays),
    "gpu": lambda: jax.lax.platform_dependent(*arrays, cuda=gpu, default=functools.partial(gpu, interpret=True)),
    "tpu": lambda: jax.lax.platform_dependent(*arrays, tpu=tpu, default=functools.partial(tpu, interpret=True)),
  }
  return kernels[backend]()
