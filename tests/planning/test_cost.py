"""What a program costs: cycles, loops, what overlaps and what waits, kernels, scopes."""

import dataclasses

import pytest
from planning_programs import PRODUCT_FLOPS, network_of, program

from moejax.config.chips import CHIPS
from moejax.planning.collectives import Place, transfer
from moejax.planning.cost import cost
from moejax.planning.program import parse

PLAIN = dataclasses.replace(CHIPS["v5p"], efficiency=1.0)
"""v5p as its data sheet has it."""

NETWORK = dataclasses.replace(network_of("v5p", (2, 2, 1)), chip=PLAIN)


def cycles(name: str) -> int:
  """All cycles that are written in a program, each once."""
  computations = program(name).computations.values()
  return sum(instruction.cycles or 0 for computation in computations for instruction in computation.instructions)


def test_a_product_takes_the_cycles_that_the_compiler_estimates():
  found = cost(program("product"), NETWORK)
  assert found.flops == PRODUCT_FLOPS
  assert found.breakdown_s["matrix"] == pytest.approx(cycles("product") / PLAIN.clock_hz, rel=1e-3)
  # The compiler's estimate lies between the chip's peak and half of it.
  assert 1.0 < found.breakdown_s["matrix"] * PLAIN.bfloat16_flops / PRODUCT_FLOPS < 2.0


@pytest.mark.parametrize(("name", "products"), [("scan", 8), ("nested_scan", 15)])
def test_a_loop_costs_its_body_as_often_as_it_runs(name, products):
  found = cost(program(name), NETWORK)
  assert found.flops == products * PRODUCT_FLOPS
  single = cost(program("product"), NETWORK).breakdown_s["matrix"]
  assert found.breakdown_s["matrix"] == pytest.approx(products * single, rel=0.25)  # other tiles, other cycles
  assert sum(operation.count for operation in found.operations if operation.kind == "matrix") == products


@pytest.mark.parametrize(("name", "size"), [("gathered", 2 * 4096 * 4096), ("exchanged", 2 * 1024 * 4096)])
def test_a_collective_without_work_beside_it_is_exposed(name, size):
  found = cost(program(name), NETWORK)
  (exchange,) = found.collectives
  seconds, _ = transfer(NETWORK, exchange.collective.kind, range(4), size)
  assert exchange.exposed_s == pytest.approx(seconds)
  assert found.breakdown_s["collective_exposed"] == pytest.approx(seconds)


def test_the_parts_add_up_to_the_step():
  for name in ("product", "scan", "nested_scan", "gathered", "exchanged"):
    found = cost(program(name), NETWORK)
    assert sum(found.breakdown_s.values()) == pytest.approx(found.step_time_s)


def test_a_chip_s_efficiency_slows_what_it_computes_and_not_its_links():
  slow = dataclasses.replace(NETWORK, chip=dataclasses.replace(PLAIN, efficiency=0.5))
  found, slowed = cost(program("gathered"), NETWORK), cost(program("gathered"), slow)
  assert slowed.breakdown_s["matrix"] == pytest.approx(2 * found.breakdown_s["matrix"])
  assert slowed.breakdown_s["collective_exposed"] == pytest.approx(found.breakdown_s["collective_exposed"])
  assert sum(slowed.breakdown_s.values()) == pytest.approx(slowed.step_time_s)


ASYNC = """HloModule m, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}}

ENTRY %main (p: f32[1048576], q: f32[128]) -> f32[1048576] {{
  %p = f32[1048576]{{0}} parameter(0)
  %q = f32[128]{{0}} parameter(1)
  %start = f32[1048576]{{0}} all-reduce-start(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %work = f32[128]{{0}} negate(%q), backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}
  ROOT %done = f32[1048576]{{0}} all-reduce-done(%start)
}}
"""


def test_a_collective_with_work_beside_it_is_exposed_only_for_what_the_work_leaves():
  whole, _ = transfer(NETWORK, "all-reduce", range(4), 4 * 2**20)
  beside_s = whole / 4
  found = cost(parse(ASYNC.format(cycles=round(beside_s * PLAIN.clock_hz))), NETWORK)
  assert found.breakdown_s["collective_exposed"] == pytest.approx(whole - beside_s, rel=1e-4)
  assert found.step_time_s == pytest.approx(whole, rel=1e-4)
  longer = cost(parse(ASYNC.format(cycles=round(2 * whole * PLAIN.clock_hz))), NETWORK)
  assert longer.breakdown_s["collective_exposed"] == 0
  assert longer.collectives[0].time_s == pytest.approx(whole)
  assert longer.step_time_s == pytest.approx(2 * whole, rel=1e-4)


QUEUED = """HloModule m, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

ENTRY %main (p: f32[1048576], q: f32[1024]) -> f32[1048576] {
  %p = f32[1048576]{0} parameter(0)
  %q = f32[1024]{0} parameter(1)
  %start = f32[1048576]{0} all-reduce-start(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %small = f32[1024]{0} all-reduce(%q), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %done = f32[1048576]{0} all-reduce-done(%start)
}
"""


def test_a_collective_that_all_wait_for_shares_the_links_with_one_under_way_and_does_not_queue_behind_it():
  large, _ = transfer(NETWORK, "all-reduce", range(4), 4 * 2**20)
  small, _ = transfer(NETWORK, "all-reduce", range(4), 4 * 2**10)
  found = cost(parse(QUEUED), NETWORK)
  exposed = {exchange.collective.bytes: exchange.exposed_s for exchange in found.collectives}
  assert exposed[4 * 2**10] == pytest.approx(2 * small)
  assert exposed[4 * 2**20] == pytest.approx(large - small)
  assert found.step_time_s == pytest.approx(large + small)


FUSED = """HloModule m, is_scheduled=true

%begin (p: bf16[1024]) -> (bf16[1024], bf16[4096], u32[]) {
  %p = bf16[1024]{0} parameter(0)
  %g = bf16[4096]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = (bf16[1024]{0}, bf16[4096]{0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (p: bf16[1024], q: f32[128]) -> f32[128] {
  %p = bf16[1024]{0} parameter(0)
  %q = f32[128]{0} parameter(1)
  %g = bf16[4096]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %n = f32[128]{0} negate(%q)
}

%end (p: bf16[1024]) -> bf16[4096] {
  %p = bf16[1024]{0} parameter(0)
  %g = bf16[4096]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = bf16[4096]{0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[1024], q: f32[128]) -> bf16[4096] {
  %p = bf16[1024]{0} parameter(0)
  %q = f32[128]{0} parameter(1)
  %s = (bf16[1024]{0}, bf16[4096]{0}, u32[]) fusion(%p), kind=kCustom, calls=%begin
  %w = f32[128]{0} fusion(%p, %q), kind=kLoop, calls=%async_collective_fusion.1, backend_config={"estimated_cycles":"1750000"}
  ROOT %d = bf16[4096]{0} fusion(%p), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_the_fusions_of_an_asynchronous_collective_count_it_once_and_hide_it():
  found = cost(parse(FUSED), NETWORK)
  (exchange,) = found.collectives
  assert (exchange.collective.kind, exchange.count, exchange.exposed_s) == ("all-gather", 1, 0.0)
  assert found.step_time_s == pytest.approx(1750000 / PLAIN.clock_hz)


OFFLOADED = """HloModule m, is_scheduled=true

%called (p: bf16[4194304], t: token[]) -> bf16[1048576] {{
  %p = bf16[4194304]{{0}} parameter(0)
  %t = token[] parameter(1)
  ROOT %s = bf16[1048576]{{0}} reduce-scatter(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}, {rings}
}}, execution_thread="sparsecore"

ENTRY %main (p: bf16[4194304], q: f32[128]) -> f32[128] {{
  %p = bf16[4194304]{{0}} parameter(0)
  %q = f32[128]{{0}} parameter(1)
  %t = token[] after-all()
  %start = ((bf16[4194304]{{0}}, token[]), bf16[1048576]{{0}}) call-start(%p, %t), to_apply=%called
  %w = f32[128]{{0}} negate(%q), backend_config={{"estimated_cycles":"{cycles}"}}
  %done = bf16[1048576]{{0}} call-done(%start)
  ROOT %r = f32[128]{{0}} copy(%w)
}}
"""


def test_what_sparse_cores_sum_goes_on_beside_the_work_over_the_rings_that_the_compiler_names():
  size = 2 * 4194304
  one_way = 'backend_config={"color_strategies":[{"phase_rings":[]}]}'
  whole, rate = transfer(NETWORK, "reduce-scatter", range(4), size)
  whole *= rate / PLAIN.link_bandwidth
  waits = cost(parse(OFFLOADED.format(rings=one_way, cycles=0)), NETWORK)
  (exchange,) = waits.collectives
  assert (exchange.collective.kind, exchange.collective.bytes) == ("reduce-scatter", size)
  assert exchange.collective.bandwidth == PLAIN.link_bandwidth
  assert exchange.exposed_s == pytest.approx(whole)
  beside = cost(parse(OFFLOADED.format(rings=one_way, cycles=round(2 * whole * PLAIN.clock_hz))), NETWORK)
  assert beside.breakdown_s["collective_exposed"] == 0
  assert beside.collectives[0].time_s == pytest.approx(whole)


def test_a_collective_without_a_scope_has_that_of_what_uses_its_result():
  """As the compiler leaves those of the SparseCores; through operations without a scope of their own."""
  scoped = 'metadata={{op_name="jit(train_step)/transpose(jvp())/while/body/{}/dot_general"}}'
  text = OFFLOADED.format(rings="backend_config={}", cycles=0).replace(
    "  ROOT %r = f32[128]{0} copy(%w)\n",
    f"  %c = bf16[1048576]{{0}} copy(%done)\n  %u = bf16[1048576]{{0}} negate(%c), {scoped.format('qkv')}\n".replace(
      "{{", "{"
    ).replace("}}", "}")
    + "  ROOT %r = (f32[128]{0}, bf16[1048576]{0}) tuple(%w, %u)\n",
  )
  (exchange,) = cost(parse(text), NETWORK).collectives
  assert exchange.scope == "qkv"


SLICES = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[1048576], q: f32[128]) -> f32[1048576] {{
  %p = f32[1048576]{{0}} parameter(0)
  %q = f32[128]{{0}} parameter(1)
  %t = token[] after-all()
  %send = (f32[1048576]{{0}}, u32[], token[]) send(%p, %t), channel_id=4, is_host_transfer=true, {names}
  %recv = (f32[1048576]{{0}}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true, {names}
  %work = f32[128]{{0}} negate(%q), backend_config={{"estimated_cycles":"1750"}}
  %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true, {names}
  ROOT %done = (f32[1048576]{{0}}, token[]) recv-done(%recv), channel_id=3, is_host_transfer=true, {names}
}}
"""
NAMES = '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"'


def test_what_crosses_slices_goes_by_the_data_centre_network_beside_the_work():
  places = tuple(Place((i, 0, 0), i // 2) for i in range(4))
  two = dataclasses.replace(NETWORK, places=places, mesh={"replica": 2, "data": 2})
  found = cost(parse(SLICES.format(names=f"frontend_attributes={{{NAMES}}}")), two)
  (exchange,) = found.collectives
  assert (exchange.collective.kind, exchange.collective.axis, exchange.collective.devices) == (
    "all-reduce",
    "replica",
    2,
  )
  whole = 4 * 2**20 / PLAIN.dcn_bandwidth
  assert exchange.time_s == pytest.approx(whole)
  assert found.breakdown_s["collective_exposed"] == pytest.approx(whole - 1e-6)


SCATTER = """HloModule m, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

%all-reduce-scatter (p: bf16[4096]) -> bf16[1024] {
  %p = bf16[4096]{0} parameter(0)
  %r = bf16[4096]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  %z = s32[] constant(0)
  ROOT %d = bf16[1024]{0} dynamic-slice(%r, %z), dynamic_slice_sizes={1024}
}

ENTRY %main (p: bf16[4096]) -> bf16[1024] {
  %p = bf16[4096]{0} parameter(0)
  ROOT %f = bf16[1024]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_reduction_of_which_a_slice_is_kept_is_a_reduce_scatter():
  (exchange,) = cost(parse(SCATTER), NETWORK).collectives
  assert (exchange.collective.kind, exchange.collective.bytes) == ("reduce-scatter", 8192)


KERNEL = """HloModule m, is_scheduled=true

ENTRY %main (q: bf16[2,4,2048,128]) -> bf16[2,4,2048,128] {
  %q = bf16[2,4,2048,128]{3,2,1,0} parameter(0)
  %m = s8[1,2,2]{2,1,0} parameter(1)
  ROOT %splash_mha_fwd_segmented.1 = bf16[2,4,2048,128]{3,2,1,0} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[2,4,2048,128]{3,2,1,0}, bf16[2,4,2048,128]{3,2,1,0}, bf16[2,4,2048,128]{3,2,1,0}}, metadata={op_name="jit(f)/jvp()/attention/vmap(x)/pallas_call"}
}
"""  # noqa: E501


def test_a_kernel_is_priced_by_its_blocks_below_the_diagonal_and_marked():
  found = cost(parse(KERNEL), NETWORK)
  blocks = 3  # of four, of 1024 x 1024 scores each
  assert found.flops == 2 * 2 * (2 * 4) * blocks * 1024 * 1024 * 128
  (operation,) = found.operations
  assert (operation.scope, operation.of_pass, operation.kind) == ("attention", "forward", "kernel splash_mha_fwd")
  assert found.kernel_s == found.step_time_s > found.flops / PLAIN.bfloat16_flops


SUMMED_IN_A_LOOP = """HloModule m, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (t: (s32[], f32[1048576])) -> (s32[], f32[1048576]) {
  %t = (s32[], f32[1048576]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %p = f32[1048576]{0} get-tuple-element(%t), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one), backend_config={"estimated_cycles":"0"}
  %sum = f32[1048576]{0} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %out = (s32[], f32[1048576]) tuple(%next, %sum)
}

%condition (t: (s32[], f32[1048576])) -> pred[] {
  %t = (s32[], f32[1048576]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[1048576]) -> f32[1048576] {
  %p = f32[1048576]{0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[1048576]) tuple(%zero, %p)
  %loop = (s32[], f32[1048576]) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %result = f32[1048576]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_collective_in_a_loop_is_waited_for_in_every_trip():
  once, _ = transfer(NETWORK, "all-reduce", range(4), 4 * 2**20)
  found = cost(parse(SUMMED_IN_A_LOOP), NETWORK)
  (exchange,) = found.collectives
  assert (exchange.count, exchange.time_s) == (5, pytest.approx(5 * once))
  assert exchange.exposed_s == pytest.approx(5 * once)
  assert found.breakdown_s["collective_exposed"] == pytest.approx(5 * once)
  assert found.step_time_s == pytest.approx(5 * once)


KERNEL_IN_A_LOOP = """HloModule m, is_scheduled=true

%body (t: (s32[], bf16[2,4,2048,128])) -> (s32[], bf16[2,4,2048,128]) {
  %t = (s32[], bf16[2,4,2048,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %q = bf16[2,4,2048,128]{3,2,1,0} get-tuple-element(%t), index=1
  %m = s8[1,2,2]{2,1,0} constant({...})
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
CALL
  ROOT %out = (s32[], bf16[2,4,2048,128]) tuple(%next, %splash_mha_fwd_segmented.1)
}

%condition (t: (s32[], bf16[2,4,2048,128])) -> pred[] {
  %t = (s32[], bf16[2,4,2048,128]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: bf16[2,4,2048,128]) -> bf16[2,4,2048,128] {
  %q = bf16[2,4,2048,128]{3,2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], bf16[2,4,2048,128]) tuple(%zero, %q)
  %loop = (s32[], bf16[2,4,2048,128]) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %result = bf16[2,4,2048,128]{3,2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_kernel_in_a_loop_takes_its_time_in_every_trip():
  once = cost(parse(KERNEL), NETWORK)
  (call,) = [line.replace("ROOT ", "") for line in KERNEL.splitlines() if "custom-call" in line]
  looped = cost(parse(KERNEL_IN_A_LOOP.replace("CALL", call)), NETWORK)
  assert looped.kernel_s == pytest.approx(6 * once.kernel_s)
  assert looped.breakdown_s["matrix"] == pytest.approx(6 * once.breakdown_s["matrix"])
  assert looped.flops == 6 * once.flops


BRANCHES = """HloModule m, is_scheduled=true

%cheap (p: f32[128]) -> f32[128] {
  %p = f32[128]{0} parameter(0)
  %l = f32[128]{0} negate(%p), backend_config={"estimated_cycles":"0"}
  %m = f32[128]{0} negate(%l), backend_config={"estimated_cycles":"0"}
  ROOT %n = f32[128]{0} negate(%m), backend_config={"estimated_cycles":"1750"}
}

%dear (p: f32[128]) -> f32[128] {
  %p = f32[128]{0} parameter(0)
  %n = f32[128]{0} negate(%p), backend_config={"estimated_cycles":"175000"}
  ROOT %a = f32[128]{0} abs(%n), backend_config={"estimated_cycles":"175000"}
}

ENTRY %main (i: pred[], p: f32[128]) -> f32[128] {
  %i = pred[] parameter(0)
  %p = f32[128]{0} parameter(1)
  ROOT %c = f32[128]{0} conditional(%i, %p, %p), BRANCHES
}
"""


@pytest.mark.parametrize(
  "branches",
  [
    "true_computation=%dear, false_computation=%cheap",
    "true_computation=%cheap, false_computation=%dear",
    "branch_computations={%cheap, %dear}",
    "branch_computations={%dear, %cheap}",
  ],
)
def test_a_conditional_takes_the_time_of_its_slowest_branch_however_many_operations_the_others_have(branches):
  found = cost(parse(BRANCHES.replace("BRANCHES", branches)), NETWORK)
  assert found.step_time_s == pytest.approx(350_000 / PLAIN.clock_hz)
  assert sum(operation.count for operation in found.operations) == 2


COPIES = """HloModule m, is_scheduled=true

ENTRY %main (p: f32[1048576], q: f32[1048576], r: f32[128]) -> f32[1048576] {{
  %p = f32[1048576]{{0}} parameter(0)
  %q = f32[1048576]{{0}} parameter(1)
  %r = f32[128]{{0}} parameter(2)
  %one = (f32[1048576]{{0}}, f32[1048576]{{0}}, u32[]) copy-start(%p)
  %other = (f32[1048576]{{0}}, f32[1048576]{{0}}, u32[]) copy-start(%q)
  %work = f32[128]{{0}} negate(%r), backend_config={{"estimated_cycles":"{cycles}"}}
  %first = f32[1048576]{{0}} copy-done(%one)
  ROOT %second = f32[1048576]{{0}} copy-done(%other)
}}
"""


@pytest.mark.parametrize("busy", [0.0, 0.5, 1.5, 3.0])
def test_copies_queue_behind_one_another_and_go_on_beside_the_work(busy):
  """`busy`: the work's time over one copy's."""
  copy_s = 4 * 2**20 / PLAIN.hbm_bandwidth
  found = cost(parse(COPIES.format(cycles=round(busy * copy_s * PLAIN.clock_hz))), NETWORK)
  assert found.step_time_s == pytest.approx(max(2.0, busy) * copy_s, rel=1e-3)
  assert found.breakdown_s["memory"] == pytest.approx(max(2.0 - busy, 0.0) * copy_s, rel=1e-3)


def test_a_narrow_head_takes_the_matrix_units_as_long_as_a_whole_one():
  narrow = cost(parse(KERNEL.replace("2048,128]", "2048,64]")), NETWORK)
  whole = cost(parse(KERNEL), NETWORK)
  assert whole.flops == 2 * narrow.flops
  assert whole.step_time_s == narrow.step_time_s


@pytest.mark.parametrize(
  ("path", "scope", "of_pass"),
  [
    ("jit(train_step)/jvp()/while/body/closed_call/checkpoint/feed_forward/dot_general", "feed_forward", "forward"),
    ("jit(train_step)/transpose(jvp())/while/body/checkpoint/rematted_computation/qkv/dot", "qkv", "recompute"),
    ("jit(train_step)/transpose(jvp())/while/body/checkpoint/experts/dot_general", "experts", "backward"),
    ("jit(train_step)/transpose(jvp(logits))/dot_general", "logits", "backward"),
    ("jit(train_step)/optimizer/mul", "optimizer", "update"),
    ("jit(train_step)/jvp()/feed_forward/experts/dot_general", "experts", "forward"),
    ("jit(train_step)/jvp()/add", "-", "forward"),
  ],
)
def test_an_operation_is_named_by_the_innermost_scope_of_the_model_and_its_pass(path, scope, of_pass):
  text = (
    "HloModule m\n\nENTRY %main (q: f32[2]) -> f32[2] {\n  %q = f32[2]{0} parameter(0)\n"
    f'  ROOT %n = f32[2]{{0}} negate(%q), metadata={{op_name="{path}"}}, backend_config={{"estimated_cycles":"9"}}\n'
    "}\n"
  )
  (operation,) = cost(parse(text), NETWORK).operations
  assert (operation.scope, operation.of_pass) == (scope, of_pass)
