"""The one table of accelerators: what a chip computes, holds and moves in a second, each figure with its source.

Sources: TPU: cloud.google.com/tpu/docs (system architecture pages of v4, v5e, v5p, v6e, tpu7x). `hbm_bytes` of TPU is
what libtpu's compiler grants a program, which it names when one does not fit. ICI: one-way rate of a link as measured
in jax-ml.github.io/scaling-book/tpus; DCN: egress of one chip, same page. NVIDIA: data sheets of A100 80GB SXM,
H100 SXM, H200 SXM and HGX B200; dense bfloat16, NVLink one way, network of one 400 Gb/s adapter a GPU (A100: 200).
"""

import dataclasses
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device as JAX sees it: a chip, or on tpu7x one of its two cores."""

  name: str
  platform: Platform
  device_kinds: tuple[str, ...]
  """How `jax.Device.device_kind` begins."""
  bfloat16_flops: float | None
  """Peak FLOP/s of the matrix units; None where unknown."""
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
  """Predicted over measured time of what a step computes, exposed collectives apart, on the published runs that
  `docs/step-time.md` has for this chip; for TPUs without one the mean of those that have one, for others 1."""


CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4", platform="tpu", device_kinds=("TPU v4",), bfloat16_flops=275e12, vector_flops=8.6e12, clock_hz=1.05e9,
      hbm_bytes=int(30.75 * GIB), hbm_bandwidth=1228e9, torus=3, wrap=4, link_bandwidth=4.5e10, dcn_bandwidth=6.25e9,
      efficiency=0.663,
    ),
    Chip(
      name="v5e", platform="tpu", device_kinds=("TPU v5 lite", "TPU v5e"), bfloat16_flops=197e12, vector_flops=6.1e12,
      clock_hz=1.5e9, hbm_bytes=int(15.75 * GIB), hbm_bandwidth=819e9, torus=2, wrap=16, link_bandwidth=4.5e10,
      dcn_bandwidth=3.125e9, efficiency=0.901,
    ),
    Chip(
      name="v5p", platform="tpu", device_kinds=("TPU v5",), bfloat16_flops=459e12, vector_flops=14.3e12,
      clock_hz=1.75e9, hbm_bytes=int(95.74 * GIB), hbm_bandwidth=2765e9, torus=3, wrap=4, link_bandwidth=9e10,
      dcn_bandwidth=6.25e9, efficiency=0.934,
    ),
    Chip(
      name="v6e", platform="tpu", device_kinds=("TPU v6 lite", "TPU v6e"), bfloat16_flops=918e12, vector_flops=7.2e12,
      clock_hz=1.75e9, hbm_bytes=int(31.25 * GIB), hbm_bandwidth=1640e9, torus=2, wrap=16, link_bandwidth=9e10,
      dcn_bandwidth=12.5e9, efficiency=0.943,
    ),
    Chip(  # per core, which is what JAX calls a device
      name="tpu7x", platform="tpu", device_kinds=("TPU7x",), bfloat16_flops=1153.5e12, vector_flops=9e12,
      clock_hz=2.2e9, hbm_bytes=int(94.75 * GIB), hbm_bandwidth=3690e9, torus=3, wrap=4, link_bandwidth=4.5e10,
      dcn_bandwidth=6.25e9, efficiency=0.860,
    ),
    Chip(
      name="a100", platform="gpu", device_kinds=("NVIDIA A100",), bfloat16_flops=312e12, vector_flops=19.5e12,
      hbm_bytes=int(80e9), hbm_bandwidth=2039e9, torus=0, link_bandwidth=300e9, domain=8, dcn_bandwidth=25e9,
    ),
    Chip(
      name="h100", platform="gpu", device_kinds=("NVIDIA H100",), bfloat16_flops=989e12, vector_flops=67e12,
      hbm_bytes=int(80e9), hbm_bandwidth=3350e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
    ),
    Chip(
      name="h200", platform="gpu", device_kinds=("NVIDIA H200",), bfloat16_flops=989e12, vector_flops=67e12,
      hbm_bytes=int(141e9), hbm_bandwidth=4800e9, torus=0, link_bandwidth=450e9, domain=8, dcn_bandwidth=50e9,
    ),
    Chip(
      name="b200", platform="gpu", device_kinds=("NVIDIA B200",), bfloat16_flops=2250e12, vector_flops=75e12,
      hbm_bytes=int(180e9), hbm_bandwidth=7700e9, torus=0, link_bandwidth=900e9, domain=8, dcn_bandwidth=50e9,
    ),
    Chip(  # one core of a server, by order of magnitude: no vendor's figure covers them all, so it has no MFU
      name="cpu", platform="cpu", device_kinds=(), bfloat16_flops=None, vector_flops=1e11, hbm_bytes=4 * GIB,
      hbm_bandwidth=1e10, torus=0, link_bandwidth=1e10, dcn_bandwidth=1e9,
    ),
  )
}  # fmt: skip
"""By the name that `--topology` uses."""


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`, None where unknown; the longest name that fits counts."""
  fits = [(len(kind), chip.name) for chip in CHIPS.values() for kind in chip.device_kinds
          if device_kind.startswith(kind)]  # fmt: skip
  return CHIPS[max(fits)[1]] if fits else None


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of the matrix units of one device, None where unknown."""
  chip = chip_of(device_kind)
  return chip.bfloat16_flops if chip else None
