"""Plans with 8-bit products: what becomes faster, and what does not."""

import dataclasses

import pytest

from moejax.config import Mesh, Model, MoE, Precision
from moejax.config.chips import CHIPS
from moejax.config.fields import with_fields
from moejax.errors import UserError
from moejax.kernels.grouped_eight_bits_tpu import bytes_before_tgmm, tgmm_cost
from moejax.planning.collectives import Network, Place
from moejax.planning.compile import Compiled
from moejax.planning.estimate import estimate
from moejax.planning.kernels import REACHED, product_speedup
from moejax.planning.plan import OPERANDS
from moejax.planning.precision import LARGE, at_precision, check_precisions, plan_precisions, precision_page
from moejax.planning.topology import parse_topology

TPU7X = parse_topology("tpu7x:2x2x1")
SCOPES = [scope for scope, kind in OPERANDS.items() if kind in LARGE]

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

  def plan(text: str, *precisions: str, experiment=tiny_moe, topology=TPU7X):
    compiled = Compiled(experiment, dataclasses.replace(network, chip=topology.chip), text, {"total": 1}, 1.0, False)
    return plan_precisions(compiled, topology, list(precisions))

  return plan


def test_large_products_are_faster_and_all_else_takes_as_long(planned):
  others = ("logits", "router", "attention", "dispatch", "attention_router")
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


def test_what_the_program_has_in_8_bits_is_not_priced_twice(planned, tiny_moe):
  cycles = dict.fromkeys(SCOPES, 10**8)
  own = with_fields(tiny_moe, {"model.precision.experts": "fp8", "model.precision.attention": "fp8"})
  plain, low = planned(step(cycles), "bfloat16", "fp8", experiment=own)
  wide = ("feed_forward", "shared_experts")
  assert plain.plan.step_time_s / low.plan.step_time_s == low.speedup
  expected = len(SCOPES) - len(wide) + len(wide) / (2 * REACHED)
  assert low.plan.step_time_s == pytest.approx(expected / len(SCOPES) * plain.plan.step_time_s)


def test_products_are_planned_in_8_bits_where_a_model_has_them_in_its_compute_type(tiny_dense, tiny_moe):
  of_moe = with_fields(tiny_moe, {"model.precision.experts": "int8"})
  every = with_fields(tiny_moe, {"model.moe.every": 1})
  assert at_precision(tiny_dense, "fp8").model.precision == Precision(attention="fp8", feed_forward="fp8")
  assert at_precision(of_moe, "fp8").model.precision == Precision(attention="fp8", feed_forward="fp8", experts="int8")
  assert at_precision(every, "fp8").model.precision == Precision(attention="fp8", experts="fp8")
  assert at_precision(of_moe, "bfloat16") == of_moe


R, D, F, E = 65536, 4096, 1536, 16
GROUPED = {
  # Kernel, pass, operands and result of each grouped product: forward, gradient of rows, gradient of matrices.
  "gmm.1": ("jvp()", f"bf16[{R},{D}]{{1,0}}, bf16[{E},{D},{F}]{{2,1,0}}", f"bf16[{R},{F}]{{1,0}}"),
  "gmm.2": ("transpose(jvp())", f"bf16[{R},{F}]{{1,0}}, bf16[{E},{D},{F}]{{2,1,0}}", f"bf16[{R},{D}]{{1,0}}"),
  "tgmm.3": ("transpose(jvp())", f"bf16[{R},{D}]{{1,0}}, bf16[{R},{F}]{{1,0}}", f"f32[{E},{D},{F}]{{2,1,0}}"),
}


def kernels(platform: str, operations: int = 0, moved: int = 1, suffix: str = "") -> str:
  """A program with the grouped products of a layer, as kernels of a TPU or GPU."""
  target = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}[platform]
  declared = f'"flops":"{2 * R * D * F}","transcendentals":"{operations}","bytes_accessed":"{moved}"'
  calls = [
    f'  %{name.replace(".", suffix + ".")} = {result} custom-call(%p), custom_call_target="{target}", '
    f"operand_layout_constraints={{s32[{E}]{{0}}, {operands}}}, "
    f'metadata={{op_name="jit(train_step)/{path}/experts/{name.partition(".")[0]}/pallas_call"}}, '
    f'backend_config={{"custom_call_config":{{"cost_estimate":{{{declared}}}}}}}'
    for name, (path, operands, result) in GROUPED.items()
  ]
  lines = ["ENTRY %main (p: s32[16]) -> s32[16] {", "  %p = s32[16]{0} parameter(0)", *calls, "}\n"]
  return "\n".join(["HloModule m, is_scheduled=true\n", *lines])


def gains(found) -> dict[tuple[str, str], float]:
  """How much faster each product of experts is than in bfloat16, by its kernel and pass."""
  plain, low = (
    {(of.kind, of.of_pass): of.time_s for of in one.plan.operations if of.scope == "experts"} for one in found
  )
  return {key: plain[key] / low[key] for key in plain}


@pytest.mark.parametrize(("precision", "backward"), [("fp8", 1.0), ("int8", 2 * REACHED)])
def test_grouped_products_on_a_gpu_gain_where_their_kernels_multiply_8_bits(planned, precision, backward):
  found = planned(kernels("gpu"), "bfloat16", precision, topology=parse_topology("gpu:h100:8"))
  assert gains(found) == {
    ("kernel gmm", "forward"): pytest.approx(2 * REACHED),
    ("kernel gmm", "backward"): pytest.approx(backward),
    ("kernel tgmm", "backward"): pytest.approx(backward),
  }


def test_grouped_products_on_a_tpu_have_the_price_of_the_kernels_for_8_bits(planned, tiny_moe):
  found = planned(kernels("tpu"), "bfloat16", "fp8")
  of_kernel = gains(found)
  assert of_kernel["kernel gmm", "forward"] == of_kernel["kernel gmm", "backward"] == pytest.approx(2 * REACHED)
  assert of_kernel["kernel tgmm", "backward"] < of_kernel["kernel gmm", "backward"]
  # With the passes over its operands, this is the plan of a program that has these kernels.
  own = with_fields(tiny_moe, {"model.precision.experts": "fp8"})
  work = tgmm_cost(R, E, D, F, 2, 4)
  (compiled,) = planned(kernels("tpu", work.transcendentals, work.bytes_accessed, "_8bit"), "fp8", experiment=own)
  seconds, of_compiled = (
    {of.kind.removesuffix("_8bit"): of.time_s for of in one.plan.operations if of.of_pass == "backward"}
    for one in (found[1], compiled)
  )
  passes_s = bytes_before_tgmm(R, E, D, F, 2, 4) / TPU7X.chip.hbm_bandwidth / TPU7X.chip.efficiency
  assert seconds["kernel tgmm"] == pytest.approx(of_compiled["kernel tgmm"] + passes_s)


BATCHED = f"""HloModule m, is_scheduled=true

ENTRY %main (x: bf16[{E},4096,{D}], w: bf16[{E},{D},{F}]) -> bf16[{E},4096,{F}] {{
  %x = bf16[{E},4096,{D}]{{2,1,0}} parameter(0)
  %w = bf16[{E},{D},{F}]{{2,1,0}} parameter(1)
  %call = bf16[{E},4096,{F}]{{2,1,0}} custom-call(%x, %w), custom_call_target="__cublas$gemm", metadata={{op_name="jit(train_step)/jvp()/experts/dot_general"}}, backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}}}}
}}
"""  # noqa: E501


def test_experts_with_a_capacity_gain_on_a_gpu_as_other_products_do(planned):
  found = planned(BATCHED, "bfloat16", "fp8", topology=parse_topology("gpu:h100:8"))
  assert gains(found) == {("matrix", "forward"): pytest.approx(2 * REACHED)}


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
    estimate(at_precision(experiment, precision), topology).step_time_s for precision in ("bfloat16", "fp8")
  )
  assert plain / low == pytest.approx(published, rel=0.12)


def test_no_type_is_listed_for_a_chip_without_matrix_units():
  for chip in CHIPS.values():
    assert product_speedup(chip, "bfloat16") == 1
    assert all(1 < product_speedup(chip, precision) <= 2 for precision in chip.eight_bits)
    assert chip.bfloat16_flops or not chip.eight_bits
