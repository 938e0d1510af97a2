"""Peak rates by the exact name that a device gives itself."""

import random

import pytest

from moejax.config.chips import BFLOAT16_FLOPS, CHIPS, chip_of, peak_flops, without_mfu


@pytest.mark.parametrize(
  ("device_kind", "peak"),
  [
    ("TPU v3", 61.5e12),  # a device is one of the two cores of a chip
    ("TPU v4", 275e12),
    ("TPU v4 lite", 138e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA L40S", 362e12),
  ],
)
def test_a_device_of_a_listed_name_has_the_peak_of_its_data_sheet(device_kind, peak):
  assert peak_flops(device_kind) == peak
  assert without_mfu("gpu", device_kind) is None


@pytest.mark.parametrize(
  "device_kind", ["cpu", "", "NVIDIA H100", "NVIDIA H100 XYZ", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v9", "TPU7"]
)
def test_another_name_has_no_peak_and_a_line_that_names_it_and_what_to_do(device_kind):
  assert peak_flops(device_kind) is None
  told = without_mfu("gpu", device_kind)
  assert repr(device_kind) in told and "BFLOAT16_FLOPS" in told and "\n" not in told


def test_nothing_is_said_about_mfu_on_cpus():
  assert without_mfu("cpu", "cpu") is None


def test_nothing_is_known_by_the_beginning_or_a_variant_of_a_listed_name():
  draw = random.Random(0)
  for name in BFLOAT16_FLOPS:
    beginnings = {name[:length] for length in range(len(name))}
    variants = {
      name + suffix for suffix in (" ", " XYZ", " NVL", " PCIe", " lite", "-80GB", "".join(draw.choices("ab1 ", k=4)))
    }
    for other in (beginnings | variants | {name.lower(), f"AMD {name}"}) - set(BFLOAT16_FLOPS):
      assert peak_flops(other) is None and chip_of(other) is None, other


def test_planning_takes_the_peak_of_the_device_that_a_run_would_find():
  kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
  assert len(kinds) == len(set(kinds))
  for chip in CHIPS.values():
    assert {peak_flops(kind) for kind in chip.device_kinds} == ({chip.bfloat16_flops} - {None}), chip.name
    assert all(chip_of(kind) is chip for kind in chip.device_kinds)
    assert (chip.bfloat16_flops is None) == (chip.platform == "cpu")
