"""Groups, mesh axes, and times of collectives, worked out by hand for a v5p torus."""

import itertools

import pytest
from planning_programs import network_of, program

from moejax.config.chips import CHIPS
from moejax.planning.collectives import HOP_S, Network, Place, _groups, collective, transfer
from moejax.planning.program import parse

V5P = CHIPS["v5p"]
LINK = V5P.link_bandwidth
MIB = 2**20


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={{0,2},{1,3}}, x=1", [0, 2]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}, use", list(range(8))),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, use", [0, 2, 4, 6]),
    ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, x", [0, 1, 2, 3]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", list(range(8))),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", [0, 2]),
    ("replica_groups={}", list(range(8))),
  ],
)
def test_a_group_is_read_from_every_form_that_the_compiler_prints(text, group):
  (found,) = _groups(text, 8)
  assert sorted(found) == group


def torus(lengths: tuple[int, ...], mesh: dict[str, int]) -> Network:
  """Devices in the order of their coordinates, last dimension fastest."""
  places = tuple(Place(at, 0) for at in itertools.product(*(range(length) for length in lengths)))
  return Network(V5P, lengths, places, mesh)


def test_the_axes_of_a_group_are_those_along_which_it_differs():
  network = torus((4, 8, 8), {"replica": 4, "data": 8, "expert": 8, "model": 1})
  assert network.axis(range(8)) == "expert"
  assert network.axis(range(0, 64, 8)) == "data"
  assert network.axis(range(64)) == "data+expert"
  assert network.axis([0, 64]) == "replica"


def test_a_closed_ring_gathers_both_ways_and_a_line_has_half_of_it():
  size = 64 * MIB
  ring = torus((8, 4, 4), {"data": 128})
  seconds, rate = transfer(ring, "all-gather", range(0, 128, 16), size)
  assert rate == 2 * LINK
  assert seconds == pytest.approx(size * 7 / 8 / (2 * LINK) + 4 * HOP_S)
  line = torus((2, 2, 1), {"data": 4})
  seconds, rate = transfer(line, "all-gather", [0, 2], size)
  assert rate == LINK
  assert seconds == pytest.approx(size / 2 / LINK + HOP_S)


def test_the_rings_of_two_dimensions_work_at_once_and_a_reduction_passes_twice():
  network = torus((4, 8, 8), {"data": 256})
  size = 64 * MIB
  once, rate = transfer(network, "all-gather", range(64), size)
  twice, _ = transfer(network, "all-reduce", range(64), size)
  assert rate == 4 * LINK
  assert once == pytest.approx(size * 63 / 64 / (4 * LINK) + 8 * HOP_S)
  assert twice - 8 * HOP_S == pytest.approx(2 * (once - 8 * HOP_S))


def test_an_exchange_is_bound_by_the_longest_ring():
  network = torus((4, 8, 8), {"data": 256})
  size = 64 * MIB
  seconds, _ = transfer(network, "all-to-all", range(8), size)
  assert seconds == pytest.approx(8 * size / (8 * LINK) + 4 * HOP_S)
  both, _ = transfer(network, "all-to-all", range(64), size)
  assert both - 8 * HOP_S == pytest.approx(seconds - 4 * HOP_S)
  unlike = [64 * x + y for x in range(4) for y in range(8)]  # rings of four and of eight
  longest, _ = transfer(network, "all-to-all", unlike, size)
  assert longest - 6 * HOP_S == pytest.approx(seconds - 4 * HOP_S)


def test_groups_that_lie_between_each_other_share_their_links():
  network = torus((8, 4, 4), {"data": 128})
  every_second = range(0, 128, 32)
  seconds, rate = transfer(network, "all-gather", every_second, 64 * MIB)
  assert rate == LINK  # half of a closed ring's
  assert seconds == pytest.approx(64 * MIB * 3 / 4 / LINK + 2 * HOP_S)


GPU_STARTS = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: f32[8,16], b: f32[8,32]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[8,32]{1,0} parameter(1)
  %reduce = ((f32[8,16], f32[8,32]), (f32[2,16], f32[2,32])) reduce-scatter-start(%a, %b), replica_groups={{0,1,2,3}}
  %gather = ((f32[8,16], f32[8,32]), (f32[32,16], f32[32,32])) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}
  ROOT %done = f32[2,16]{1,0} get-tuple-element(%reduce), index=0
}
"""


def test_a_combined_collective_moves_the_bytes_of_all_its_results():
  network = Network(CHIPS["h100"], (), tuple(Place((i,), 0) for i in range(4)), {"data": 4})
  program = parse(GPU_STARTS)
  by_name = program.computations[program.entry].by_name
  summand = 4 * (8 * 16 + 8 * 32)
  assert collective(network, program, by_name["reduce"]).bytes == summand
  assert collective(network, program, by_name["gather"]).bytes == 4 * summand


@pytest.mark.parametrize(("to", "stride"), [(16, 1), (32, 2), (48, 3)])
def test_a_permute_goes_one_way_and_shares_its_links_with_those_between(to, stride):
  network = torus((8, 4, 4), {"data": 128})
  seconds, rate = transfer(network, "collective-permute", [0, to], 64 * MIB)
  assert rate == LINK / stride
  assert seconds == pytest.approx(stride * 64 * MIB / LINK + HOP_S)


def test_a_permute_crosses_a_switch_the_network_or_both_dimensions_of_its_way_with_all_its_bytes():
  network = Network(CHIPS["h100"], (), tuple(Place((i,), i // 8) for i in range(16)), {"data": 16})
  for to, rate in ((1, CHIPS["h100"].link_bandwidth), (8, CHIPS["h100"].dcn_bandwidth)):
    assert transfer(network, "collective-permute", [0, to], 512 * MIB)[0] == pytest.approx(512 * MIB / rate, rel=0.01)
  diagonal = transfer(torus((8, 4, 4), {"data": 128}), "collective-permute", [0, 16 + 8], 64 * MIB)[0]
  assert diagonal == pytest.approx(3 * 64 * MIB / LINK, rel=0.01)  # one step in one dimension and two in another


def test_a_permute_lasts_as_long_as_its_longest_way_and_nothing_if_each_device_keeps_its_own():
  network = torus((8, 4, 4), {"context": 8, "data": 16})

  def priced(pairs):
    text = f"""HloModule m

ENTRY %main (x: f32[1024]) -> f32[1024] {{
  %x = f32[1024]{{0}} parameter(0)
  ROOT %moved = f32[1024]{{0}} collective-permute(%x), source_target_pairs={pairs}
}}
"""
    found = parse(text)
    return collective(network, found, found.computations[found.entry].root)

  moved = priced("{{0,0},{16,32},{32,80}}")  # one device stays, the longest way is three hops
  assert (moved.kind, moved.axis, moved.devices) == ("collective-permute", "context", 2)
  assert moved.time_s == pytest.approx(3 * 4096 / LINK + HOP_S)
  assert priced("{{0,0},{1,1}}").time_s == 0


def test_what_crosses_slices_leaves_from_all_chips_of_a_slice():
  places = tuple(Place((i % 4, 0, 0), i // 4) for i in range(8))
  network = Network(V5P, (4, 1, 1), places, {"replica": 2, "data": 4})
  seconds, rate = transfer(network, "all-reduce", range(8), 64 * MIB)
  inside, _ = transfer(network, "all-reduce", range(4), 64 * MIB)
  assert rate == V5P.dcn_bandwidth
  assert seconds == pytest.approx(inside + 2 * 64 * MIB / 2 / 4 / V5P.dcn_bandwidth)


def test_behind_a_switch_a_chip_has_its_own_rate():
  h100 = CHIPS["h100"]
  network = Network(h100, (), tuple(Place((i,), 0) for i in range(8)), {"data": 8})
  seconds, rate = transfer(network, "all-gather", range(8), 64 * MIB)
  assert rate == h100.link_bandwidth
  assert seconds == pytest.approx(64 * MIB * 7 / 8 / h100.link_bandwidth + HOP_S)


@pytest.mark.parametrize(
  ("name", "kind", "size"), [("gathered", "all-gather", 2 * 4096 * 4096), ("exchanged", "all-to-all", 2 * 1024 * 4096)]
)
def test_the_collective_of_a_compiled_program_is_found_with_kind_axis_and_bytes(name, kind, size):
  found, network = program(name), network_of("v5p", (2, 2, 1))
  moved = [
    item
    for instruction in found.computations[found.entry].instructions
    if (item := collective(network, found, instruction)) is not None
  ]
  assert [(item.kind, item.axis, item.devices, item.bytes) for item in moved] == [(kind, "data", 4, size)]
