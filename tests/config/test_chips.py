"""Peak rates by the name that a device gives itself."""

import pytest

from moejax.config.chips import peak_flops


@pytest.mark.parametrize(
  ("device_kind", "peak"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),  # begins as TPU v5 does, which is v5p
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),  # a device is one of the two cores of a chip
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H200", 989e12),
  ],
)
def test_the_longest_name_that_a_device_kind_begins_with_counts(device_kind, peak):
  assert peak_flops(device_kind) == peak


@pytest.mark.parametrize("device_kind", ["cpu", "TPU v3", "NVIDIA GeForce RTX 4090", ""])
def test_what_is_not_known_has_no_peak(device_kind):
  assert peak_flops(device_kind) is None
