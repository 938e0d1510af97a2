"""Accelerators: the peak FLOP/s of a device by its exact name, and what planning needs to know of a chip.

Sources: TPU: cloud.google.com/tpu/docs (system architecture pages of v2 to v6e and tpu7x), and for v4 lite table 1 of
"Ten Lessons From Three Generations Shaped Google's TPUv4i" (ISCA 2021). `hbm_bytes` of TPU is what libtpu's compiler
grants a program, which it names when one does not fit. ICI: one-way rate of a link as measured in
jax-ml.github.io/scaling-book/tpus; DCN: egress of one chip, same page. NVIDIA: the data sheet of each product, which
doubles its figures for sparsity, and of GeForce cards the architecture white paper (float32 accumulation); names as the
driver's list of supported products has them. NVLink one way, network of one 400 Gb/s adapter a GPU (A100: 200).
"""

import dataclasses
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]

GIB = 2**30

BFLOAT16_FLOPS = {
  # Of TPU v2, v3 and tpu7x JAX counts each of a chip's two cores as a device.
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

Names are compared whole: an H100 PCIe has three quarters of the peak of an H100 SXM, and the name of a MIG slice begins
with that of its GPU.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device as JAX sees it: a chip, or on tpu7x one of its two cores."""

  name: str
  platform: Platform
  device_kinds: tuple[str, ...]
  """What `jax.Device.device_kind` may be."""
  vector_flops: float
  """Peak float32 FLOP/s of the vector units."""
  clock_hz: float | None = None
  """Cycles a second of the compiler's estimates: TPU only. Peak FLOP/s over the FLOPs of a cycle, which are 2 x 128 x
  128 or 256 x 256 multipliers x matrix units."""
  hbm_bytes: int
  """Memory that a program may use."""
  hbm_bandwidth: float
  """Bytes a second."""
  torus: int
  """Dimensions of the torus that links make; 0 where a switch joins the chips of a domain."""
  wrap: int = 1
  """An axis of the torus closes to a ring where its length is a multiple of this."""
  link_bandwidth: float
  """Bytes a second, one way, of one link; behind a switch, of one chip."""
  domain: int | None = None
  """Chips that one switch joins."""
  dcn_bandwidth: float
  """Bytes a second of one chip out of its slice or domain."""
  efficiency: float = 1.0
  """Predicted divided by measured time of a step without exposed collectives, for the published runs in
  `docs/step-time.md` on the chips of `runs_are_of`."""
  runs_are_of: str | None = None
  """The chip whose published runs give the efficiency: this one, or where it has none, "other TPUs" for their mean, or
  a similar GPU. None: no runs."""

  @property
  def bfloat16_flops(self) -> float | None:
    """Peak FLOP/s of the matrix units; None where unknown."""
    return peak_flops(self.device_kinds[0]) if self.device_kinds else None


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4", platform="tpu", device_kinds=("TPU v4",), vector_flops=8.6e12, clock_hz=1.05e9,
      hbm_bytes=int(30.75 * GIB), hbm_bandwidth=1228e9, torus=3, wrap=4, link_bandwidth=4.5e10, dcn_bandwidth=6.25e9,
      efficiency=0.663, runs_are_of="v4",
    ),
    Chip(
      name="v5e", platform="tpu", device_kinds=("TPU v5 lite", "TPU v5e"), vector_flops=6.1e12,
      clock_hz=1.5e9, hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, torus=2, wrap=16, link_bandwidth=4.5e10,
      dcn_bandwidth=3.125e9, efficiency=0.901, runs_are_of="v5e",
    ),
    Chip(
      name="v5p", platform="tpu", device_kinds=("TPU v5", "TPU v5p"), vector_flops=14.3e12,
      clock_hz=1.75e9, hbm_bytes=int(95.74 * GIB), hbm_bandwidth=2765e9, torus=3, wrap=4, link_bandwidth=9e10,
      dcn_bandwidth=6.25e9, efficiency=0.934, runs_are_of="v5p",
    ),
    Chip(
      name="v6e", platform="tpu", device_kinds=("TPU v6 lite", "TPU v6e"), vector_flops=7.2e12,
      clock_hz=1.75e9, hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1640e9, torus=2, wrap=16, link_bandwidth=9e10,
      dcn_bandwidth=12.5e9, efficiency=0.943, runs_are_of="v6e",
    ),
    Chip(  # per core, which is what JAX calls a device
      name="tpu7x", platform="tpu", device_kinds=("TPU7x",), vector_flops=9e12,
      clock_hz=2.2e9, hbm_bytes=int(94.75 * GIB), hbm_bandwidth=3690e9, torus=3, wrap=4, link_bandwidth=4.5e10,
      dcn_bandwidth=6.25e9, efficiency=0.860, runs_are_of="other TPUs",
    ),
    Chip(
      name="a100", platform="gpu", device_kinds=("NVIDIA A100-SXM4-80GB",), vector_flops=19.5e12,
      hbm_bytes=int(80e9), hbm_bandwidth=2039e9, torus=0, link_bandwidth=300e9, domain=8, dcn_bandwidth=25e9,
      efficiency=0.672, runs_are_of="h100",
    ),
    Chip(
      name="h100", platform="gpu", device_kinds=("NVIDIA H100 80GB HBM3",), vector_flops=67e12,
      hbm_bytes=int(80e9), hbm_bandwidth=3350e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
      efficiency=0.672, runs_are_of="h100",
    ),
    Chip(
      name="h200", platform="gpu", device_kinds=("NVIDIA H200",), vector_flops=67e12,
      hbm_bytes=int(141e9), hbm_bandwidth=4800e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
      efficiency=0.672, runs_are_of="h100",
    ),
    Chip(
      name="b200", platform="gpu", device_kinds=("NVIDIA B200",), vector_flops=75e12,
      hbm_bytes=int(180e9), hbm_bandwidth=7700e9, torus=0, link_bandwidth=900e9, domain=8, dcn_bandwidth=50e9,
      efficiency=0.672, runs_are_of="h100",
    ),
    Chip(  # one core of a server, by order of magnitude: no vendor's figure covers them all, so it has no MFU
      name="cpu", platform="cpu", device_kinds=(), vector_flops=1e11, hbm_bytes=4 * GIB,
      hbm_bandwidth=1e10, torus=0, link_bandwidth=1e10, dcn_bandwidth=1e9,
    ),
  )
}  # fmt: skip
"""By the name that `--topology` uses."""


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`, None where planning knows none of exactly this name."""
  return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of the matrix units of one device, None where no device of exactly this name is listed."""
  return BFLOAT16_FLOPS.get(device_kind)


def without_mfu(device_kind: str) -> str | None:
  """Why a run on such devices has no MFU, and what to do about it; None where it has one."""
  if device_kind in BFLOAT16_FLOPS:
    return None
  return (
    f"MFU is not reported: the peak FLOP/s of device_kind={device_kind!r} is not known; "
    "to have it, add the device to BFLOAT16_FLOPS in moejax/config/chips.py"
  )
