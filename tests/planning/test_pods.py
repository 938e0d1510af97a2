"""docs/pods.md: one definition of MFU, which follows from the step times that the page has."""

import importlib.util
import pathlib
import statistics
import sys
from typing import Any

import pytest

from moejax.planning.meshes import on_topology
from moejax.planning.plan import model_flops_per_step

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def pods() -> Any:
  spec = importlib.util.spec_from_file_location("pods", DOCS / "pods.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules["pods"] = module  # its dataclasses look themselves up
  spec.loader.exec_module(module)
  return module


def test_the_page_is_what_the_command_makes_of_its_step_times(pods):
  page = (DOCS / "pods.md").read_text()
  assert pods.with_mfu(page) == page
  changed = page.replace("| 2.619 | 0.033 | 64.7% |", "| 5.238 | 0.033 | 64.7% |")
  assert "| 5.238 | 0.033 | 32.3% |" in pods.with_mfu(changed) != changed


def test_no_row_uses_the_matrix_units_less_than_its_mfu_says(pods):
  """MFU counts accepted work alone, all of which is executed; of attention it counts the masked half too, which the
  kernel on GPU skips."""
  for line in (DOCS / "pods.md").read_text().splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 10 and cells[6].endswith("%"):
      most = 1.05 if cells[1].startswith("gpu:") else 1.02
      assert float(cells[6][:-1]) < most * float(cells[7][:-1]), line


def test_a_step_of_dense_experts_counts_every_choice_and_one_with_a_small_capacity_fewer(pods):
  by_name = {row.name: on_topology(pods._experiment(row), row.topology) for row in pods.SCALES if not row.fields}
  dense, sparse = by_name["dense_6b4"], by_name["moe_6b4_64e"]
  # Every second layer accepts 1.25 of two choices, each as wide as the dense layer.
  layer = 6 * 3 * dense.model.d_model * dense.model.d_ff * 1024 * 4096
  difference = model_flops_per_step(sparse) - model_flops_per_step(dense)
  assert difference == pytest.approx(14 * 0.25 * layer, rel=0.01)


def test_the_formula_has_the_memory_of_the_compiled_programs(pods):
  ratios = pods.memory_by_formula((DOCS / "pods.md").read_text())
  errors = [abs(ratio - 1) for row, ratio in ratios.items() if row not in pods.EARLIER]
  assert len(errors) > 14 and statistics.median(errors) < 0.03 and max(errors) < 0.1
