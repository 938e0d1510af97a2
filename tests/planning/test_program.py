"""The reader of compiled programs, on small ones that libtpu compiled (write_programs.py) and on single lines."""

import pytest
from planning_programs import PRODUCT_FLOPS, program

from moejax.planning.flops import matrix_flops
from moejax.planning.program import Program, Shape, parse, trip_count


def flops(found: Program, name: str | None = None) -> int:
  """FLOPs of a computation, loops by their trip counts."""
  computation = found.computations[name or found.entry]
  total = 0
  for instruction in computation.instructions:
    if instruction.opcode == "while":
      body = instruction.called("body")[0]
      total += trip_count(found, computation, instruction) * flops(found, body)
    else:
      total += matrix_flops(found, computation, instruction)
  return total


@pytest.mark.parametrize(("name", "products"), [("product", 1), ("scan", 8), ("nested_scan", 3 * 5)])
def test_loops_count_by_the_trip_counts_of_their_conditions_nested_ones_too(name, products):
  assert flops(program(name)) == products * PRODUCT_FLOPS


def test_a_shard_of_a_product_counts_its_own_rows():
  assert flops(program("gathered")) == PRODUCT_FLOPS // 4


def one(line: str) -> Program:
  return parse("HloModule m\n\nENTRY %main (p: f32[2]) -> f32[2] {\n" + line + "\n}\n")


def test_a_line_is_taken_apart_with_layouts_memory_spaces_and_tuples():
  text = (
    "  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)\n"
    "  ROOT %copy-start.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]) "
    'copy-start(%p), metadata={op_name="jit(f)/mul" stack_frame_id=1}'
  )
  found = one(text).computations["main"]
  root = found.root
  assert (root.name, root.opcode, root.operands, root.op_name) == ("copy-start.1", "copy-start", ("p",), "jit(f)/mul")
  assert root.shapes == (Shape("bf16", (8, 128), 1), Shape("bf16", (8, 128), 0), Shape("u32", (), 0))
  assert found.by_name["p"].bytes == 2 * 8 * 128
  assert found.parameter(0).name == "p"


def test_an_instruction_that_is_printed_on_several_lines_is_read_whole():
  text = (
    "  %p = f32[2]{0} parameter(0)\n"
    '  ROOT %k = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes='
    '{kernel_metadata={\n"xprof":"{}"\n}}, metadata={op_name="jit(f)/attention/k"}'
  )
  assert one(text).computations["main"].root.op_name == "jit(f)/attention/k"


WHILE = """HloModule m

%body (s: (s32[], f32[2])) -> (s32[], f32[2]) {{
  %s = (s32[], f32[2]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[2]{{0}} get-tuple-element(%s), index=1
  %by = s32[] constant({step})
  %next = s32[] add(%i, %by)
  ROOT %out = (s32[], f32[2]{{0}}) tuple(%next, %x)
}}

%condition (t: (s32[], f32[2])) -> pred[] {{
  %t = (s32[], f32[2]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %end = s32[] constant({end})
  ROOT %more = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (p: f32[2]) -> (s32[], f32[2]) {{
  %p = f32[2]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %begin = s32[] copy(%zero)
  %both = (s32[], f32[2]{{0}}) tuple(%begin, %p)
  ROOT %loop = (s32[], f32[2]{{0}}) while(%both), condition=%condition, body=%body{annotation}
}}
"""

PLAIN = {"start": 0, "end": 10, "step": 1, "sides": "%j, %end", "direction": "LT", "annotation": ""}


@pytest.mark.parametrize(
  ("change", "trips"),
  [
    ({}, 10),
    ({"start": 4}, 6),
    ({"step": 3}, 4),
    ({"direction": "LE"}, 11),
    ({"direction": "LE", "step": 3}, 4),
    ({"sides": "%end, %j", "direction": "GT"}, 10),
    ({"end": 0}, 0),
    ({"annotation": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
  ],
)
def test_a_trip_count_comes_from_first_value_limit_step_and_comparison(change, trips):
  found = parse(WHILE.format(**PLAIN | change))
  main = found.computations["main"]
  assert trip_count(found, main, main.root) == trips


def test_a_loop_without_a_constant_end_is_an_error():
  text = WHILE.format(**PLAIN).replace("%end = s32[] constant(10)", "%end = s32[] get-tuple-element(%t), index=0")
  found = parse(text)
  main = found.computations["main"]
  with pytest.raises(ValueError, match="condition"):
    trip_count(found, main, main.root)


def test_a_gpu_programs_estimate_is_the_lower_of_its_two_models_and_never_the_bound():
  cost = '"reification_cost":[{{"exec_time_us":{},"compute_time_us":1,"memory_access_time_us":1,"name":"{}"}}{}]'
  other = ',{"exec_time_us":0.5,"compute_time_us":1,"memory_access_time_us":1,"name":"indexing-cost-model"}'
  bound = ',{"exec_time_us":0.01,"compute_time_us":0,"memory_access_time_us":0,"name":"sol"}'
  line = "%f = f32[2]{{0}} fusion(%a), kind=kLoop, calls=%c, backend_config={{{}}}"

  def estimated(text: str) -> float | None:
    program = parse("ENTRY %main () -> f32[2] {\n  ROOT " + line.format(text) + "\n}\n")
    return program.computations["main"].root.estimated_s

  assert estimated(cost.format(244442.1, "", other + bound)) == pytest.approx(0.5e-6)
  assert estimated(cost.format(3.0, "", bound)) == pytest.approx(3e-6)
  assert estimated(cost.format(3.0, "sol", "")) is None
