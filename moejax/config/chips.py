"""Accelerators: peak FLOP/s of each device, and the properties of chips that planning uses.

Sources for TPUs: cloud.google.com/tpu/docs (system architecture pages of v2 to v6e and tpu7x) and, for v4 lite, table 1
of "Ten Lessons From Three Generations Shaped Google's TPUv4i" (ISCA 2021). `hbm_bytes` is the memory that libtpu's
compiler allows a program to use, as reported in its out-of-memory errors. The bandwidths of ICI links (one way) and of
the data-center network (per chip) are from jax-ml.github.io/scaling-book/tpus.

Sources for NVIDIA GPUs: the data sheet of each product, halved where it assumes sparsity; for GeForce cards, the
architecture white paper (float32 accumulation). Device names are those of the driver's list of supported products.
NVLink bandwidth is one way. The network is one 400 Gb/s adapter per GPU (200 Gb/s for A100).
"""

import dataclasses
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]

GIB = 2**30

BFLOAT16_FLOPS = {
  # On TPU v2, v3 and tpu7x, JAX counts each of the two cores of a chip as a device.
  "TPU v2": 22.5e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v4 lite": 138e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA A800-SXM4-80GB": 312e12,
  "NVIDIA A800 80GB PCIe": 312e12,
  "NVIDIA A30": 165e12,
  "NVIDIA A40": 149.7e12,
  "NVIDIA A10": 125e12,
  "NVIDIA A10G": 70e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA H800": 989e12,
  "NVIDIA H800 PCIe": 756e12,
  "NVIDIA H20": 148e12,
  "NVIDIA GH200 120GB": 989e12,
  "NVIDIA GH200 480GB": 989e12,
  "NVIDIA GH200 144G HBM3e": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA B300 SXM6 AC": 2250e12,
  "NVIDIA GB200": 2500e12,
  "NVIDIA GB300": 2500e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "NVIDIA GeForce RTX 5090": 209.5e12,
}
"""Peak FLOP/s of dense bfloat16 matrix products with float32 accumulation, by `jax.Device.device_kind`.

The whole name must match: an H100 PCIe has three quarters of the peak of an H100 SXM, and the name of a MIG slice
starts with the name of its GPU.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One JAX device: a chip or, on tpu7x, one of its two cores."""

  name: str
  platform: Platform
  device_kinds: tuple[str, ...]
  """Values of `jax.Device.device_kind`."""
  vector_flops: float
  """Peak float32 FLOP/s of the vector units."""
  clock_hz: float | None = None
  """Clock rate that converts the compiler's cycle estimates to seconds (TPU only). It is the peak FLOP/s divided by the
  FLOPs per cycle: 2 x (128 x 128 or 256 x 256 multipliers) x number of matrix units."""
  hbm_bytes: int
  """Bytes of memory that a program can use."""
  hbm_bandwidth: float
  """Bytes per second."""
  torus: int
  """Number of dimensions of the torus of chips. 0 if a switch connects the chips of a domain."""
  wrap: int = 1
  """A dimension of the torus wraps around if its length is a multiple of this."""
  link_bandwidth: float
  """Bytes per second in one direction, of one link of a torus or of one chip behind a switch."""
  eight_bits: tuple[str, ...] = ()
  """8-bit types with twice the peak rate of bfloat16: fp8, int8. cloud.google.com/tpu/docs and NVIDIA's data sheets."""
  domain: int | None = None
  """Number of chips that are connected by one switch."""
  dcn_bandwidth: float
  """Bytes per second that one chip can send out of its slice or domain."""
  power_w: float | None = None
  """Maximum power of a chip in watts, without its host: that of the data sheet of a GPU, and of v4 that of
  cloud.google.com/tpu/docs/v4. None if none is published."""
  efficiency: float = 1.0
  """Predicted divided by measured time of a step without exposed collectives, for the published runs in
  `docs/step-time.md` on the chips of `runs_are_of`."""
  runs_are_of: tuple[str, ...] = ()
  """The chips whose published runs give the efficiency: this one and others of its generation or, if it has no
  published runs, similar GPUs. Published products give the efficiency of tpu7x, and runs on these chips its error.
  Empty if there are no such runs."""

  @property
  def bfloat16_flops(self) -> float | None:
    """Peak FLOP/s of the matrix units, or None if unknown."""
    return peak_flops(self.device_kinds[0]) if self.device_kinds else None


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4", platform="tpu", device_kinds=("TPU v4",), vector_flops=8.6e12, clock_hz=1.05e9,
      hbm_bytes=int(30.75 * GIB), hbm_bandwidth=1228e9, torus=3, wrap=4, link_bandwidth=4.5e10, dcn_bandwidth=6.25e9,
      power_w=192, efficiency=0.843, runs_are_of=("v4",),
    ),
    Chip(
      name="v5e", platform="tpu", device_kinds=("TPU v5 lite", "TPU v5e"), vector_flops=6.1e12,
      clock_hz=1.5e9, hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, torus=2, wrap=16, link_bandwidth=4.5e10,
      dcn_bandwidth=3.125e9, eight_bits=("int8",), efficiency=0.901, runs_are_of=("v5e",),
    ),
    Chip(
      name="v5p", platform="tpu", device_kinds=("TPU v5", "TPU v5p"), vector_flops=14.3e12,
      clock_hz=1.75e9, hbm_bytes=int(95.74 * GIB), hbm_bandwidth=2765e9, torus=3, wrap=4, link_bandwidth=9e10,
      dcn_bandwidth=6.25e9, eight_bits=("int8",), efficiency=0.934, runs_are_of=("v5p",),
    ),
    Chip(
      name="v6e", platform="tpu", device_kinds=("TPU v6 lite", "TPU v6e"), vector_flops=7.2e12,
      clock_hz=1.75e9, hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1640e9, torus=2, wrap=16, link_bandwidth=9e10,
      dcn_bandwidth=12.5e9, eight_bits=("int8",), efficiency=0.943, runs_are_of=("v6e",),
    ),
    Chip(  # per core, which is what JAX calls a device
      name="tpu7x", platform="tpu", device_kinds=("TPU7x",), vector_flops=9e12,
      clock_hz=2.2e9, hbm_bytes=int(94.75 * GIB), hbm_bandwidth=3690e9, torus=3, wrap=4, link_bandwidth=4.5e10,
      dcn_bandwidth=6.25e9, eight_bits=("fp8",), efficiency=0.884, runs_are_of=("v4", "v5e", "v5p", "v6e"),
    ),
    Chip(
      name="a100", platform="gpu", device_kinds=("NVIDIA A100-SXM4-80GB",), vector_flops=19.5e12,
      hbm_bytes=int(80e9), hbm_bandwidth=2039e9, torus=0, link_bandwidth=300e9, domain=8, dcn_bandwidth=25e9,
      eight_bits=("int8",), power_w=400, efficiency=0.753, runs_are_of=("h100", "h200"),
    ),
    Chip(
      name="h100", platform="gpu", device_kinds=("NVIDIA H100 80GB HBM3",), vector_flops=67e12,
      hbm_bytes=int(80e9), hbm_bandwidth=3350e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
      eight_bits=("fp8", "int8"), power_w=700, efficiency=0.753, runs_are_of=("h100", "h200"),
    ),
    Chip(
      name="h200", platform="gpu", device_kinds=("NVIDIA H200",), vector_flops=67e12,
      hbm_bytes=int(141e9), hbm_bandwidth=4800e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
      eight_bits=("fp8", "int8"), power_w=700, efficiency=0.753, runs_are_of=("h100", "h200"),
    ),
    Chip(
      name="b200", platform="gpu", device_kinds=("NVIDIA B200",), vector_flops=75e12,
      hbm_bytes=int(180e9), hbm_bandwidth=7700e9, torus=0, link_bandwidth=900e9, domain=8, dcn_bandwidth=50e9,
      eight_bits=("fp8", "int8"), power_w=1000, efficiency=0.753, runs_are_of=("h100", "h200"),
    ),
    Chip(  # of a rack of 72 (NVL72), which one switch connects
      name="gb200", platform="gpu", device_kinds=("NVIDIA GB200",), vector_flops=80e12,
      hbm_bytes=int(186e9), hbm_bandwidth=8000e9, torus=0, link_bandwidth=900e9, domain=72, dcn_bandwidth=50e9,
      eight_bits=("fp8", "int8"), power_w=1200, efficiency=0.753, runs_are_of=("h100", "h200"),
    ),
    Chip(  # one core of a server, by order of magnitude: peaks differ between CPUs, so MFU is not reported
      name="cpu", platform="cpu", device_kinds=(), vector_flops=1e11, hbm_bytes=4 * GIB,
      hbm_bandwidth=1e10, torus=0, link_bandwidth=1e10, dcn_bandwidth=1e9,
    ),
  )
}  # fmt: skip
"""The chips, by the name that `--topology` uses."""


def chip_of(device_kind: str) -> Chip | None:
  """The chip with this `jax.Device.device_kind`, or None if it is not listed."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def peak_flops(device_kind: str) -> float | None:
  """Peak bfloat16 FLOP/s of one device with this `jax.Device.device_kind`, or None if it is not listed."""
  return BFLOAT16_FLOPS.get(device_kind)


def without_mfu(platform: str, device_kind: str) -> str | None:
  """The reason why MFU is not reported on such accelerators, and the remedy. None if it is reported, and on CPUs."""
  if platform == "cpu" or device_kind in BFLOAT16_FLOPS:
    return None
  return (
    f"MFU is not reported because the peak FLOP/s of device_kind={device_kind!r} is not known; "
    "add the device to BFLOAT16_FLOPS in moejax/config/chips.py"
  )
