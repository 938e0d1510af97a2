"""The largest arrays of a program are those in memory, with the lines of the source that compute them."""

import dataclasses

from moejax.planning.collectives import Network
from moejax.planning.cost import cost
from moejax.planning.largest_arrays import largest_arrays
from moejax.planning.program import parse
from moejax.planning.topology import parse_topology

PROGRAM = """HloModule m, is_scheduled=true

FileNames
1 "/usr/lib/moejax/models/norms.py"
2 "/usr/lib/python/jax/_src/other.py"

FunctionNames
1 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=23 end_line=23 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%fused (a: f32[4096,4096]) -> f32[64] {
  %a = f32[4096,4096]{1,0} parameter(0)
  %inside = f32[4096,4096]{1,0} negate(%a), metadata={op_name="jit(f)/norm/neg" stack_frame_id=2}
  ROOT %sum = f32[64]{0} slice(%inside), slice={[0:64]}, metadata={op_name="jit(f)/norm/slice" stack_frame_id=1}
}

ENTRY %main (x: f32[4096,4096]) -> f32[64] {
  %x = f32[4096,4096]{1,0} parameter(0)
  %near = f32[8192,8192]{1,0:S(1)} broadcast(%x), dimensions={0,1}
  %half = bf16[1024,512]{1,0} convert(%x), metadata={op_name="jit(f)/transpose(jvp(norm))/convert" stack_frame_id=2}
  ROOT %out = f32[64]{0} fusion(%x), kind=kLoop, calls=%fused
}
"""


def test_arrays_in_memory_are_sorted_and_have_their_source():
  arrays = largest_arrays(parse(PROGRAM))
  assert [(one.shape, one.bytes, one.scope, one.of_pass, one.source) for one in arrays] == [
    ("bf16[1024,512]", 2**20, "norm", "backward", "other.py:7"),
    ("f32[64]", 256, "norm", "forward", "models/norms.py:23"),
  ]
  assert largest_arrays(parse(PROGRAM), 1) == arrays[:1]


def test_operations_have_the_source_line_of_their_largest_part():
  cpu = parse_topology("cpu:1")
  found = cost(parse(PROGRAM), Network(cpu.chip, (), (), {}))
  sources = {(one.scope, one.of_pass): one.source for one in found.operations}
  assert sources[("norm", "backward")] == "other.py:7" and sources[("norm", "forward")] == "models/norms.py:23"


def test_a_program_without_tables_of_sources_has_none():
  head, _, tail = PROGRAM.partition("FileNames")
  program = parse(head + "%fused" + tail.partition("%fused")[2])
  assert {dataclasses.replace(one, source="") for one in largest_arrays(program)} == set(largest_arrays(program))
