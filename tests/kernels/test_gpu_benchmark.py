"""The prepared measurements of a GPU run to their end, with tiny shapes on CPU."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.nightly
def test_every_part_of_the_measurements_of_a_gpu_runs_and_kernels_are_correct(tmp_path):
  out = tmp_path / "gpu.json"
  subprocess.run([sys.executable, SCRIPT, "--smoke", "--out", out], check=True, capture_output=True, timeout=600)
  found = json.loads(out.read_text())
  assert "error" not in json.dumps({name: list(part) for name, part in found.items() if isinstance(part, dict)})
  for name in ("moejax, equal", "moejax, skewed", "ragged_dot, equal", "ragged_dot, skewed"):
    assert found["grouped_products"][name]["error_to_float32"] < 0.02
  for name in ("moejax", "moejax, window", "moejax, documents", "plain", "plain, window", "xla", "xla, window"):
    assert found["attention"][name]["error_to_float32"] < 0.02
    assert found["attention"][name]["forward_and_backward"]["flops_per_s"] > 0
  assert all(case["fraction_of_product"] > 0 for case in found["layers"].values())
  assert all(math.isfinite(case["loss"]) and case["utilization"] > 0 for case in found["steps"].values())
