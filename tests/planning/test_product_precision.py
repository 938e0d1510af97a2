"""Plans with 8-bit products: what becomes faster, and what does not."""

import math

import pytest

from moejax.config.chips import CHIPS
from moejax.errors import UserError
from moejax.planning import precision
from moejax.planning.collectives import Network, Place
from moejax.planning.compile import Compiled
from moejax.planning.precision import SCOPES, SPEEDUP, plan_precisions, precision_page
from moejax.planning.topology import parse_topology

TPU7X = parse_topology("tpu7x:2x2x1")

PRODUCT = """  %{name} = bf16[64,64]{{1,0}} dot(%q, %q), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, metadata={{op_name="jit(train_step)/jvp()/{scope}/dot_general"}}, backend_config={{"estimated_cycles":"{cycles}"}}"""  # noqa: E501


def step(cycles: dict[str, int], gathered: int = 0) -> str:
  """A program with one product in each scope, which hide a collective of so many elements."""
  products = [PRODUCT.format(name=f"p{n}", scope=scope, cycles=c) for n, (scope, c) in enumerate(cycles.items())]
  begin = f"  %begin = (bf16[{gathered}]{{0}}, bf16[{8 * gathered}]{{0}}) all-gather-start(%p), replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}}, channel_id=1, use_global_device_ids=true"  # noqa: E501
  end = f"  ROOT %end = bf16[{8 * gathered}]{{0}} all-gather-done(%begin)"
  lines = [begin, *products, end] if gathered else products
  return "\n".join([
    "HloModule m, is_scheduled=true\n", "ENTRY %main (p: bf16[64], q: bf16[64,64]) -> bf16[64,64] {",
    f"  %p = bf16[{max(1, gathered)}]{{0}} parameter(0)", "  %q = bf16[64,64]{1,0} parameter(1)", *lines, "}\n",
  ])  # fmt: skip


@pytest.fixture
def planned(tiny_moe, monkeypatch):
  """Plans a program that is given as text."""
  places = tuple(Place((i // 2 % 2, i // 4, 0), 0) for i in range(8))
  network = Network(TPU7X.chip, TPU7X.torus, places, {"data": 8})

  def plan(text: str, *precisions: str):
    compiled = Compiled(tiny_moe, network, text, {"total": 1}, 1.0, False)
    monkeypatch.setattr(precision, "compile_step", lambda *_: compiled)
    return plan_precisions(tiny_moe, TPU7X, list(precisions))

  return plan


def test_large_products_take_half_the_time_and_all_else_takes_as_long(planned):
  others = ("logits", "router", "attention", "dispatch", "attention_router")
  cycles = dict.fromkeys((*SCOPES, *others), 10**8)
  plain, low = planned(step(cycles), "bfloat16", "fp8")
  assert plain.speedup == 1
  assert plain.plan.step_time_s / low.plan.step_time_s == low.speedup
  expected = (len(SCOPES) / 2 + len(others)) / (len(SCOPES) + len(others))
  assert low.plan.step_time_s == pytest.approx(expected * plain.plan.step_time_s)
  assert low.plan.executed_flops_per_device == plain.plan.executed_flops_per_device
  assert low.to_json()["precision"] == "fp8" and precision_page([plain, low])


def test_what_shorter_products_hide_no_longer_is_exposed(planned):
  hidden, shorter = planned(step({"experts": 3 * 10**7}, gathered=10**8), "bfloat16", "fp8")
  exposed = [one.plan.breakdown_s["collective_exposed"] for one in (hidden, shorter)]
  assert exposed[1] > exposed[0]
  assert hidden.plan.step_time_s == pytest.approx(shorter.plan.step_time_s, rel=0.2) and shorter.speedup < 1.3


@pytest.mark.parametrize(("topology", "wrong"), [
  ("v5p:2x2x1", "fp8"), ("gpu:a100:8", "fp8"), ("tpu7x:2x2x1", "int8"), ("cpu:8", "int8"), ("gpu:h100:8", "float16"),
])  # fmt: skip
def test_a_type_that_the_chip_lacks_is_refused_with_those_that_it_has(topology, wrong, tiny_dense):
  with pytest.raises(UserError, match=rf"--precision {wrong}: the matrix units of \w+ have bfloat16"):
    plan_precisions(tiny_dense, parse_topology(topology), ["bfloat16", wrong])


def test_a_program_that_does_not_fit_has_no_products_to_price(planned):
  with pytest.raises(UserError, match="does not fit"):
    planned("", "fp8")


def test_every_chip_with_matrix_units_has_its_rates():
  assert SPEEDUP.keys() == {name for name, chip in CHIPS.items() if chip.bfloat16_flops}
  assert all(1 <= factor <= 2 and math.isfinite(factor) for of in SPEEDUP.values() for factor in of.values())
