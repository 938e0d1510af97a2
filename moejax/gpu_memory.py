"""The share of a GPU's memory that a run uses.

JAX reserves three quarters of it by default. The rest is for what is allocated outside, which is the context of CUDA
and the buffers of NCCL, about 3 GB (docs.jax.dev, GPU memory allocation).
"""

import os

SHARE = 0.94
"""Of the memory of a GPU. `hbm_bytes` of a chip (`moejax.config.chips`) are this share, so that a run has the memory
with which it is planned."""

VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""By which JAX takes another share, and the older name of the same."""


def use_gpu_memory() -> None:
  """Sets the share that JAX reserves when it first looks for GPUs, unless the user has set one."""
  if not any(name in os.environ for name in VARIABLES):
    os.environ[VARIABLES[0]] = str(SHARE)
