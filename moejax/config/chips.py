"""Peak matrix rates of accelerators, for model FLOPs utilisation. Unknown devices, CPUs among them, have none."""

PEAK_BFLOAT16_FLOPS = {
  # Dense bfloat16, from the vendors' specifications: cloud.google.com/tpu/docs/system-architecture-tpu-vm and the
  # NVIDIA data sheets. Keys begin `jax.Device.device_kind`; the longest that fits counts.
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 2307e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
  """FLOP/s in bfloat16 of one device, None where unknown."""
  fits = [kind for kind in PEAK_BFLOAT16_FLOPS if device_kind.startswith(kind)]
  return PEAK_BFLOAT16_FLOPS[max(fits, key=len)] if fits else None
