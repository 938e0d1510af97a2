"""Plans with 8-bit products: what becomes faster, and what does not."""

import dataclasses

import pytest

from moejax.config import Mesh, Model, MoE
from moejax.config.chips import CHIPS
from moejax.errors import UserError
from moejax.planning.collectives import Network, Place
from moejax.planning.compile import Compiled
from moejax.planning.estimate import estimate
from moejax.planning.kernels import REACHED, product_speedup
from moejax.planning.precision import SCOPES, check_precisions, plan_precisions, precision_page
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
def planned(tiny_moe):
  """Plans a program that is given as text."""
  places = tuple(Place((i // 2 % 2, i // 4, 0), 0) for i in range(8))
  network = Network(TPU7X.chip, TPU7X.torus, places, {"data": 8})

  def plan(text: str, *precisions: str):
    compiled = Compiled(tiny_moe, network, text, {"total": 1}, 1.0, False)
    return plan_precisions(compiled, TPU7X, list(precisions))

  return plan


def test_large_products_are_faster_and_all_else_takes_as_long(planned):
  others = ("logits", "router", "attention", "dispatch", "attention_router", "experts")
  cycles = dict.fromkeys((*SCOPES, *others), 10**8)
  plain, low = planned(step(cycles), "bfloat16", "fp8")
  assert plain.speedup == 1
  assert plain.plan.step_time_s / low.plan.step_time_s == low.speedup
  expected = (len(SCOPES) / (2 * REACHED) + len(others)) / (len(SCOPES) + len(others))
  assert low.plan.step_time_s == pytest.approx(expected * plain.plan.step_time_s)
  assert low.plan.executed_flops_per_device == plain.plan.executed_flops_per_device
  assert low.to_json()["precision"] == "fp8" and precision_page([plain, low])


def test_what_shorter_products_hide_no_longer_is_exposed(planned):
  hidden, shorter = planned(step({"feed_forward": 3 * 10**7}, gathered=10**8), "bfloat16", "fp8")
  exposed = [one.plan.breakdown_s["collective_exposed"] for one in (hidden, shorter)]
  assert exposed[1] > exposed[0]
  assert hidden.plan.step_time_s == pytest.approx(shorter.plan.step_time_s, rel=0.2) and shorter.speedup < 1.3


@pytest.mark.parametrize(("topology", "wrong"), [
  ("v5p:2x2x1", "fp8"), ("gpu:a100:8", "fp8"), ("tpu7x:2x2x1", "int8"), ("cpu:8", "int8"), ("gpu:h100:8", "float16"),
])  # fmt: skip
def test_a_type_that_the_chip_lacks_is_refused_with_those_that_it_has(topology, wrong):
  with pytest.raises(UserError, match=rf"--precision {wrong}: the matrix units of \w+ have bfloat16"):
    check_precisions(["bfloat16", wrong], parse_topology(topology))


def test_a_program_that_does_not_fit_is_priced_by_formula(planned):
  plain, low = planned("", "bfloat16", "fp8")
  assert plain.plan.refused and low.speedup > 1 == plain.speedup and precision_page([plain, low])


SHAPES = {
  "llama 70B": ((80, 8192, 64, 8, 128, 28672, 128256, None), 64, 8192, 256, "attention", 1.53),
  "llama 405B": ((126, 16384, 128, 8, 128, 53248, 128256, None), 256, 8192, 1536, "attention", 1.53),
  "qwen3 235B": ((94, 4096, 64, 4, 128, 1536, 151936, (128, 8)), 256, 4096, 8192, "layer_inputs", 1.12),
}
"""Public shapes, chips, sequence length, batch and remat of runs on tpu7x, and how much faster fp8 made them."""


@pytest.mark.parametrize(("shape", "chips", "length", "batch", "remat", "published"), SHAPES.values(), ids=SHAPES)
def test_the_formula_gains_about_what_public_runs_gain_by_fp8(
  shape, chips, length, batch, remat, published, tiny_dense
):
  layers, width, heads, kv_heads, head_dim, d_ff, vocab, experts = shape
  moe = MoE(num_experts=experts[0], experts_per_token=experts[1], d_ff=d_ff, dispatch="grouped") if experts else None
  model = Model(
    num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff,
    vocab_size=vocab, moe=moe, remat=remat, compute_dtype="bfloat16", gradient_dtype="compute",
  )  # fmt: skip
  experiment = dataclasses.replace(
    tiny_dense, model=model, mesh=Mesh(data=2 * chips),
    data=dataclasses.replace(tiny_dense.data, sequence_length=length),
    training=dataclasses.replace(tiny_dense.training, batch_size=batch),
    evaluation=dataclasses.replace(tiny_dense.evaluation, batch_size=batch),
  )  # fmt: skip
  topology = parse_topology("tpu7x:4x4x4" if chips == 64 else "tpu7x:4x8x8")
  plain, low = (
    estimate(experiment, topology, speedup=product_speedup(topology.chip, precision)).step_time_s
    for precision in ("bfloat16", "fp8")
  )
  assert plain / low == pytest.approx(published, rel=0.12)


def test_no_type_is_listed_for_a_chip_without_matrix_units():
  for chip in CHIPS.values():
    assert product_speedup(chip, "bfloat16") == 1
    assert all(1 < product_speedup(chip, precision) <= 2 for precision in chip.eight_bits)
    assert chip.bfloat16_flops or not chip.eight_bits
