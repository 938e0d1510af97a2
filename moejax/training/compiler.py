"""XLA options for compiling the training step, in runs and in plans. None of them changes results.

For GPU, XLA hides the latency of collectives by default. In plans for H100, pipelining collectives over the iterations
of a loop made one of five steps faster (by 3 %) and three slower (by up to 10 %), and double buffering of loops made it
slower too, so that neither is an option here.

The environment variable LIBTPU_INIT_ARGS adds further options, such as `--xla_tpu_scoped_vmem_limit_kib=32768`.
"""

import math

import jax

from moejax.config.chips import chip_of
from moejax.config.model import Model
from moejax.gpu_memory import SHARE

Options = dict[str, str | bool]

OVERLAP: Options = {
  # Gather weights during matrix products, which is off by default.
  "xla_tpu_overlap_compute_collective_tc": True,
  "xla_enable_async_all_gather": True,
  # Keep all-gathers over all chips of a slice. By default they become all-reduces, which move twice the bytes and do
  # not overlap with computation.
  "xla_tpu_prefer_async_allgather_to_allreduce": True,
  # Gather the weights of experts whole. Split into one product per shard, each product is too small for the
  # matrix units, and summing the results moves every row through HBM each time.
  "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}

SCATTER: Options = {
  # Reduce-scatter all gradients of experts. By default two of three are all-reduced and then sliced.
  "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
  "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": "1",
}

EXCHANGE: Options = {
  # Overlap the all-to-all of tokens with products. v5e does not support this, and its compiler rejects the program.
  "xla_tpu_enable_async_all_to_all": True,
}

CHUNKS: Options = {
  # The same for rows that are exchanged in chunks. The option above does not apply to ragged all-to-alls.
  "xla_tpu_enable_async_ragged_all_to_all": True,
}

FUSION: Options = {
  # Gather weights between the tiles of a product. For v5e only: libtpu 0.0.46 and later reject the option for other
  # chips, where it can give wrong results.
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
}

SPARSE_CORES: Options = {
  # Use the SparseCores to gather weights and sum gradients during products, as in public runs on v5p and v6e.
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
  "xla_tpu_use_tc_device_shape_on_sc": True,
}

# Allow products to use more VMEM, for larger tiles. The values (KiB) are those of public runs on v6e and, below, tpu7x.
TILES: Options = {"xla_tpu_scoped_vmem_limit_kib": "98304"}

OF_CHIP = {
  "v4": EXCHANGE,
  "v5e": FUSION,
  "v5p": EXCHANGE | SPARSE_CORES,
  "v6e": EXCHANGE | SPARSE_CORES | TILES,
  "tpu7x": EXCHANGE | SPARSE_CORES | {"xla_tpu_scoped_vmem_limit_kib": "65536"},
}
"""Additional options, by name of the chip."""


SCHEDULED, FACTOR = 0.8, 95
"""XLA schedules a program for GPU so that its temporaries take FACTOR per cent of what its arguments leave of this
share of the memory. Of a program that needs more, it computes values again and overlaps no collectives."""


def compiler_options(device: jax.Device, model: Model | None = None, arguments: int = 0) -> Options:
  """The options for devices of this type, for the training step of a model whose arguments have so many bytes on a
  device."""
  chip = chip_of(device.device_kind)
  if device.platform == "gpu" and chip:
    return _whole_memory(chip.hbm_bytes, arguments)
  if device.platform != "tpu":
    return {}
  options = OVERLAP | SCATTER | OF_CHIP.get(chip.name if chip else "", {})
  return options | CHUNKS if model and model.moe and model.moe.dispatch.exchanges_in_chunks else options


def _whole_memory(size: int, arguments: int) -> Options:
  """The option with which XLA for GPU schedules for all memory that a run uses (`moejax.gpu_memory`). Empty if the
  arguments alone take SCHEDULED of the memory, since no factor raises a limit of zero."""
  left = SCHEDULED * size / SHARE - arguments
  factor = math.floor(100 * (size - arguments) / left) if left > 0 else 0
  return {"xla_gpu_memory_limit_slop_factor": str(factor)} if factor > FACTOR else {}
