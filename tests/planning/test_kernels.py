"""What kernels and library calls on a GPU cost, for which the compiler has no estimate."""

import dataclasses
import itertools

import pytest
from planning_programs import network_of

from moejax.config import Mesh
from moejax.config.chips import CHIPS
from moejax.config.fields import with_fields
from moejax.kernels.attention import SCORES
from moejax.kernels.grouped_matmul_tpu import gmm_bytes, gmm_tiles, row_tile
from moejax.planning.cost import cost
from moejax.planning.estimate import estimate
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology

NETWORK = network_of("v5p", (2, 2, 1))

GPU_CALLS = """HloModule m, is_scheduled=true

ENTRY %main (x: bf16[8192,1024], w: bf16[16,1024,512], n: s32[16], y: bf16[8192,512]) -> bf16[8192,512] {{
  %x = bf16[8192,1024]{{1,0}} parameter(0)
  %w = bf16[16,1024,512]{{2,1,0}} parameter(1)
  %n = s32[16]{{0}} parameter(2)
  %y = bf16[8192,512]{{1,0}} parameter(3)
  ROOT %call = {result} custom-call({operands}), custom_call_target="{target}", operand_layout_constraints={{{layouts}}}, metadata={{op_name="jit(f)/experts/cond/branch_0_fun/{name}/pallas_call"}}
}}
"""  # noqa: E501

X, W, N, Y = "bf16[8192,1024]{1,0}", "bf16[16,1024,512]{2,1,0}", "s32[16]{0}", "bf16[8192,512]{1,0}"


@pytest.mark.parametrize(
  ("name", "target", "result", "operands", "layouts"),
  [
    ("gmm", "__gpu$xla.gpu.triton", Y, "%n, %x, %w", [N, X, W]),
    ("gmm", "__gpu$xla.gpu.triton", X, "%n, %y, %w", [N, Y, W]),  # the transposed matrix
    ("tgmm", "__gpu$xla.gpu.triton", W, "%n, %x, %y", [N, X, Y]),
  ],
)
def test_a_grouped_product_on_a_gpu_multiplies_each_row_by_one_matrix(name, target, result, operands, layouts):
  gpu = dataclasses.replace(CHIPS["h100"], efficiency=1.0)
  text = GPU_CALLS.format(name=name, target=target, result=result, operands=operands, layouts=", ".join(layouts))
  found = cost(parse(text), dataclasses.replace(NETWORK, chip=gpu))
  (operation,) = found.operations
  assert (operation.kind, operation.scope, found.flops) == (f"kernel {name}", "experts", 2 * 8192 * 1024 * 512)
  assert 1.5 < found.step_time_s * gpu.bfloat16_flops / found.flops < 3
  assert found.kernel_s == found.breakdown_s["matrix"] == found.step_time_s


def test_a_grouped_product_of_one_8_bit_type_takes_half_as_long_on_a_gpu_and_one_of_two_types_as_long():
  """Pallas multiplies operands of one type, so that the kernel has those of two types in bfloat16."""
  gpu = dataclasses.replace(CHIPS["h100"], efficiency=1.0)
  scales = ["f32[8192]{0}", "f32[16,512]{1,0}"]

  def seconds(x, w, *more):
    layouts = ", ".join([N, X.replace("bf16", x), W.replace("bf16", w), *more])
    text = GPU_CALLS.format(name="gmm", target="__gpu$xla.gpu.triton", result=Y, operands="%n, %x, %w", layouts=layouts)
    found = cost(parse(text), dataclasses.replace(NETWORK, chip=gpu))
    assert found.flops == 2 * 8192 * 1024 * 512
    return found.step_time_s

  plain = seconds("bf16", "bf16")
  for one in ("s8", "f8e4m3fn"):
    assert seconds(one, one, *scales) == pytest.approx(plain / 2)
  assert seconds("f8e5m2", "f8e4m3fn", *scales) == pytest.approx(plain)


def test_a_grouped_product_of_8_bits_takes_half_as_long_on_a_tpu_and_its_rounding_is_added():
  """The kernel declares its FLOPs, vector operations and bytes."""
  chip = dataclasses.replace(CHIPS["tpu7x"], efficiency=1.0)

  def seconds(name, vector=0):
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {{
  %x = bf16[64,64]{{1,0}} parameter(0)
  ROOT %{name}.1 = bf16[64,64]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={{bf16[64,64]{{1,0}}}}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"{10**15}","transcendentals":"{vector}","bytes_accessed":"1"}}}}}}
}}
"""  # noqa: E501
    found = cost(parse(text), dataclasses.replace(NETWORK, chip=chip))
    assert found.flops == 10**15 and found.operations[0].kind == f"kernel {name}"
    return found.step_time_s

  plain = seconds("tgmm")
  assert seconds("gmm_8bit") == seconds("tgmm_8bit") == pytest.approx(plain / 2)
  added = seconds("tgmm_8bit", 10**12) - plain / 2
  assert added == pytest.approx(1e12 / chip.vector_flops)


MEGABLOX = """HloModule m, is_scheduled=true

ENTRY %main (n: s32[{E}]) -> bf16[{R},{J}] {{
  %n = s32[{E}]{{0}} parameter(0)
  ROOT %gmm.1 = bf16[{R},{J}]{{1,0}} custom-call(%n, %x, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={{s32[{E}]{{0}}, bf16[{R},{I}]{{1,0}}, bf16[{E},{I},{J}]{{2,1,0}}}}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"{flops}","transcendentals":"0","bytes_accessed":"{moved}"}}}}}}
}}
"""  # noqa: E501


def fetched(R, E, I, J):
  """Bytes that `gmm` reads in bfloat16: Pallas fetches a block when it is not that of the step before."""
  r, i, j = gmm_tiles(R, E, I, J, 2)
  size = R // E - 7  # borders of groups are within tiles
  visits = [(z // r, min(z // size, E - 1)) for z in range(R)]
  blocks, moved = (None, None), 0
  for n, (tile, expert), k in itertools.product(range(-(-J // j)), dict.fromkeys(visits), range(-(-I // i))):
    before, blocks = blocks, ((tile, k), (expert, k, n))
    moved += 2 * (r * i * (blocks[0] != before[0]) + i * j * (blocks[1] != before[1]))
  return moved


@pytest.mark.parametrize(
  ("R", "E", "I", "J"), [(65536, 16, 2048, 768), (65536, 16, 768, 2048), (16384, 8, 4096, 2048), (32768, 1, 2048, 8192)]
)
def test_a_grouped_product_on_a_tpu_moves_the_bytes_of_its_tiles_and_computes_all_their_rows(R, E, I, J):
  """Megablox declares the bytes of a matrix for each row tile of its group."""
  chip = dataclasses.replace(CHIPS["tpu7x"], efficiency=1.0)
  flops = 2 * R * I * J
  assert gmm_bytes(R, E, I, J, 2, 2) - 2 * R * J == pytest.approx(fetched(R, E, I, J), rel=0.15)
  found = cost(
    parse(MEGABLOX.format(R=R, E=E, I=I, J=J, flops=flops, moved=10**12)), dataclasses.replace(NETWORK, chip=chip)
  )
  assert found.flops == flops
  compute_s = flops * (1 + (E - 1) * row_tile(R, E) / R) / chip.bfloat16_flops
  assert found.step_time_s == pytest.approx(max(compute_s, gmm_bytes(R, E, I, J, 2, 2) / chip.hbm_bandwidth))


@pytest.mark.parametrize("name", ["gmm_8bit.2.clone", "tgmm_8bit.1", "tgmm_8bit.3.x"])
def test_grouped_products_on_a_tpu_may_have_operands_of_8_bits_and_two_dimensional_scales(name):
  """An operand that was rounded before, by a kernel that transposes it, is not rounded in the product."""
  x, w, out = {
    "gmm": ("f8e4m3fn[8192,1024]{1,0}", "f8e4m3fn[8,1024,512]{2,1,0}", "bf16[8192,512]{1,0}"),
    "tgmm": ("f8e4m3fn[1024,8192]{1,0}", "bf16[8192,512]{1,0}", "bf16[8,1024,512]{2,1,0}"),
  }[name.partition("_")[0]]
  flops = 2 * 8192 * 1024 * 512
  text = f"""HloModule m, is_scheduled=true

ENTRY %main (n: s32[8]) -> {out} {{
  %n = s32[8]{{0}} parameter(0)
  ROOT %{name} = {out} custom-call(%n, %x, %w, %s), custom_call_target="tpu_custom_call", operand_layout_constraints={{s32[8]{{0}}, {x}, {w}, f32[1,8192]{{1,0}}}}, backend_config={{"custom_call_config":{{"cost_estimate":{{"flops":"{flops}","transcendentals":"0","bytes_accessed":"1"}}}}}}
}}
"""  # noqa: E501
  chip = dataclasses.replace(CHIPS["tpu7x"], efficiency=1.0)
  found = cost(parse(text), dataclasses.replace(NETWORK, chip=chip))
  of_tiles = 1 + 7 * row_tile(8192, 8) / 8192
  assert found.step_time_s == pytest.approx(of_tiles * flops / 2 / chip.bfloat16_flops)


@pytest.mark.parametrize(
  "target", ["__gpu$xla.gpu.triton", "__cub$DeviceRadixSort", "__cudnn$fmhaSoftmax", "mosaic_gpu_v2"]
)
def test_a_call_on_a_gpu_that_nothing_prices_takes_at_least_its_bytes_and_a_marker_nothing(target):
  gpu = dataclasses.replace(CHIPS["h100"], efficiency=1.0)
  on_gpu = dataclasses.replace(NETWORK, chip=gpu)
  text = GPU_CALLS.format(name="other", target=target, result=X, operands="%x", layouts=X)
  assert cost(parse(text), on_gpu).step_time_s == pytest.approx(2 * 8192 * 1024 * 2 / gpu.hbm_bandwidth)
  assert cost(parse(text.replace(target, "AssumeGatherIndicesInBound")), on_gpu).step_time_s == 0


SPLASH = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[1,32,2048,128], k: bf16[1,32,16384,128], n: s8[1,2,16]) -> bf16[1,32,2048,128] {{
  %q = bf16[1,32,2048,128]{{3,2,1,0}} parameter(0)
  %k = bf16[1,32,16384,128]{{3,2,1,0}} parameter(1)
  %n = s8[1,2,16]{{2,1,0}} parameter(2)
  ROOT %splash_mha_{kernel}_segmented.2 = bf16[1,32,2048,128]{{3,2,1,0}} custom-call(%n, %q, %k), custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,2,16]{{2,1,0}}, bf16[1,32,2048,128]{{3,2,1,0}}, bf16[1,32,16384,128]{{3,2,1,0}}}}, metadata={{op_name="jit(f)/attention/{scope}pallas_call"}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_attention_of_a_part_of_the_sequence_has_the_scores_that_its_scope_counts(kernel, products):
  scores = 17 * 1024**2  # of 2 x 16 blocks, an early and a late row
  found = cost(parse(SPLASH.format(kernel=kernel, scope=f"{SCORES}{scores}/splash/")), NETWORK)
  (operation,) = found.operations
  assert (operation.kind, found.flops) == (f"kernel splash_mha_{kernel}", 2 * products * 32 * scores * 128)


Q, K, V = "bf16[2,4096,8,192]{3,2,1,0}", "bf16[2,4096,2,192]{3,2,1,0}", "bf16[2,4096,2,128]{3,2,1,0}"
SEGMENTS, OF_OUT, LSE = "s32[2,4096]{1,0}", "bf16[2,4096,8,128]{3,2,1,0}", "f32[2,8,4096]{2,1,0}"


@pytest.mark.parametrize(
  ("name", "layouts", "widths", "occupied"),
  [
    ("attention_fwd", ["f32[8]{0}", SEGMENTS, Q, K, V], 192 + 128, 256 + 128),
    ("attention_dq", [SEGMENTS, Q, K, V, OF_OUT, LSE, LSE], 2 * 192 + 128, 2 * 256 + 128),
    ("attention_dkv", [SEGMENTS, Q, K, V, OF_OUT, LSE, LSE], 2 * 192 + 2 * 128, 2 * 256 + 2 * 128),
  ],
)
@pytest.mark.parametrize("window", [None, 128, 8192])
@pytest.mark.parametrize("path", ["attention/{}", "attention/transpose(jvp({}))"])
def test_attention_on_a_gpu_multiplies_half_of_the_scores_or_those_of_the_window(
  name, layouts, widths, occupied, window, path
):
  gpu = dataclasses.replace(CHIPS["h100"], efficiency=1.0)
  called = name if window is None else f"{name}_window_{window}"
  called = path.format(called)
  call = GPU_CALLS.format(
    name=called, target="__gpu$xla.gpu.triton", result=OF_OUT, operands="%x", layouts=", ".join(layouts)
  )
  found = cost(parse(call.replace("/experts/cond/branch_0_fun/", "/")), dataclasses.replace(NETWORK, chip=gpu))
  width = 256 if window == 128 else 4096  # with the block that a window contains in part
  scores = 2 * 8 * (4096 * width - width**2 / 2)
  (operation,) = found.operations
  assert (operation.kind, operation.scope) == (f"kernel {name}", "attention")
  assert found.flops == 2 * scores * widths
  assert found.step_time_s == pytest.approx(2 * scores * occupied / (0.38 * gpu.bfloat16_flops))


def test_the_formula_prices_attention_on_a_gpu_as_plans_price_its_kernels(tiny_dense):
  shape = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "remat": "none"}
  fields = {f"model.{name}": value for name, value in shape.items()} | {"data.sequence_length": 4096, "mesh": Mesh()}
  batch = {"training.batch_size": 2, "evaluation.batch_size": 2}
  experiment, topology = with_fields(tiny_dense, fields | batch), parse_topology("gpu:h100:1")
  of_attention, others = (estimate(experiment, topology, gpu_attention=share) for share in (0.38, float("inf")))
  gpu, kernels_s = dataclasses.replace(CHIPS["h100"], efficiency=1.0), 0.0
  for name in ("attention_fwd", "attention_dq", "attention_dkv"):
    layouts = ", ".join(operand.replace("192", "128") for operand in (Q, K, V))
    call = GPU_CALLS.format(name=name, target="__gpu$xla.gpu.triton", result=OF_OUT, operands="%x", layouts=layouts)
    kernels_s += cost(parse(call), dataclasses.replace(NETWORK, chip=gpu)).step_time_s
  attention_s = of_attention.step_time_s - others.step_time_s
  assert attention_s == pytest.approx(experiment.model.num_layers * kernels_s)
  assert estimate(experiment, topology).step_time_s == of_attention.step_time_s
