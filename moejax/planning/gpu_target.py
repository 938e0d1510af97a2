"""Describes NVIDIA GPUs to XLA's GPU compiler, so that it needs neither a GPU nor a driver.

The description is XLA's `GpuTargetConfigProto` as text. Figures: NVIDIA's architecture white papers (A100, Hopper) and
data sheets; sizes of shared memory and registers: CUDA programming guide, table of technical specifications.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """The properties of a GPU that the compiler needs."""

  name: str
  cores: int
  """Streaming multiprocessors."""
  clock_ghz: float
  memory_bytes: int
  memory_bandwidth: int
  l2_bytes: int
  shared_bytes: int
  """Shared memory of a core; a block may take 1 KiB less."""
  compute_capability: str
  lanes: int
  """Float32 multiply-adds per core and clock cycle."""
  nvlinks: int
  tensor_clock_ghz: float
  tensor_bf16: int
  """bfloat16 multiply-adds per tensor core and clock cycle. Each core has four tensor cores. 8-bit types have twice as
  many."""
  is_priced: bool = True
  """Whether the compiler can estimate the time of operations."""


S32, U32, F16, F32, F64, BF16 = 4, 8, 10, 11, 12, 16
EIGHT_BIT = (2, 6, 19, 20, 23, 24, 25, 28, 29, 33)
"""XLA's numbers of types (`PrimitiveType`): those above, then s8, u8 and the kinds of f8."""

CUDA = "12.8.0"
"""CUDA version."""


_GPUS = {
  "a100": _Gpu("NVIDIA A100-SXM4-80GB", 108, 1.41, 85_045_870_592, 2_039_000_000_000, 41_943_040, 167_936,
               "major: 8", 64, 12, 1.41, 256, is_priced=False),
  "h100": _Gpu("NVIDIA H100 80GB HBM3", 132, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, 233_472,
               "major: 9 feature_extension: ACCELERATED_FEATURES", 128, 18, 1.83, 512),
  "h200": _Gpu("NVIDIA H200", 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, 233_472,
               "major: 9 feature_extension: ACCELERATED_FEATURES", 128, 18, 1.83, 512),
  "b200": _Gpu("NVIDIA B200", 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, 233_472,
               "major: 10 feature_extension: ACCELERATED_FEATURES", 128, 18, 1.835, 1024),
  "gb200": _Gpu("NVIDIA GB200", 152, 2.062, 197_897_748_480, 7_928_064_000_000, 135_528_448, 233_472,
                "major: 10 feature_extension: ACCELERATED_FEATURES", 128, 18, 1.926, 1024),
}  # fmt: skip


def describe(chip: str) -> str:
  """The target description of a GPU in `moejax.config.chips.CHIPS`."""
  gpu = _GPUS[chip]
  return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  scalar_unit_description {{ {_scalar_rates(gpu)} }}
  matrix_unit_description {{ {_tensor_rates(gpu)} }}
  cuda_compute_capability {{ {gpu.compute_capability} }}
  device_vendor: "NVIDIA Corporation"
  name: "{gpu.name}"
  driver_version: "13.0.0"
  runtime_version: "{CUDA}"
  compile_time_toolkit_version: "{CUDA}"
  dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: {gpu.nvlinks} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def is_priced(chip: str) -> bool:
  """Whether XLA can write its own estimate of each operation's time into a program for this GPU."""
  return _GPUS[chip].is_priced


def _scalar_rates(gpu: _Gpu) -> str:
  lanes = {S32: 64, U32: 64, F16: gpu.lanes, F32: gpu.lanes, F64: 64, BF16: gpu.lanes}
  return _rates({kind: (gpu.clock_ghz, units, 2 if kind in (F16, BF16) else 1) for kind, units in lanes.items()})


def _tensor_rates(gpu: _Gpu) -> str:
  per_clock = dict.fromkeys(EIGHT_BIT, 2 * gpu.tensor_bf16) | {
    F16: gpu.tensor_bf16, BF16: gpu.tensor_bf16, F32: gpu.tensor_bf16 // 2, F64: 32,
  }  # fmt: skip
  return _rates({kind: (gpu.tensor_clock_ghz, 4, operations) for kind, operations in per_clock.items()})


def _rates(by_type: dict[int, tuple[float, int, int]]) -> str:
  return " ".join(
    f"rate_infos {{ key: {kind} "
    f"value {{ clock_rate_ghz: {clock} units_per_core: {units} ops_per_clock: {operations} }} }}"
    for kind, (clock, units, operations) in by_type.items()
  )
