"""FLOPs of products in the forms that compilers give them, and bytes that operations move."""

import numpy as np
import pytest

from moejax.planning.flops import _pairs, cublas_flops, matrix_flops, memory_bytes
from moejax.planning.program import parse

HEAD = "HloModule m\n\n"


def entry(body: str, before: str = ""):
  found = parse(HEAD + before + "ENTRY %main (p: f32[2]) -> f32[2] {\n" + body + "\n}\n")
  main = found.computations["main"]
  return found, main, main.root


def test_a_dot_counts_its_contracted_dimensions_and_batches():
  found = entry(
    "  %a = f32[4,8,16]{2,1,0} parameter(0)\n  %b = f32[4,16,32]{2,1,0} parameter(1)\n"
    "  ROOT %d = f32[4,8,32]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, rhs_batch_dims={0}, "
    "rhs_contracting_dims={1}"
  )
  assert matrix_flops(*found) == 2 * 4 * 8 * 16 * 32


def test_a_product_written_as_a_convolution_counts_its_features():
  found = entry(
    "  %a = bf16[8,16]{1,0} parameter(0)\n  %b = bf16[16,32]{1,0} parameter(1)\n"
    "  ROOT %c = bf16[8,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"
  )
  assert matrix_flops(*found) == 2 * 8 * 16 * 32


def test_a_batch_written_as_a_window_counts_each_position_once():
  # TPU's form of a batched product: the batch is a spatial dimension of which each output meets one kernel position.
  found = entry(
    "  %a = bf16[4,8,16]{2,1,0} parameter(0)\n  %b = bf16[4,32,16]{2,1,0} parameter(1)\n"
    "  ROOT %c = bf16[4,8,32]{2,1,0} convolution(%a, %b), "
    "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf"
  )
  assert matrix_flops(*found) == 2 * 4 * 8 * 16 * 32


@pytest.mark.parametrize("output, source, size, stride, before, spread, step", [
  (5, 5, 3, 1, 1, 1, 1), (4, 4, 4, 3, 0, 4, 1), (3, 7, 3, 2, 0, 1, 1), (6, 3, 2, 1, 2, 2, 2), (1, 9, 9, 1, 0, 1, 1),
])  # fmt: skip
def test_pairs_equal_those_of_a_convolution_of_ones(output, source, size, stride, before, spread, step):
  spread_out = np.zeros((source - 1) * spread + 1)
  spread_out[::spread] = 1
  counted = 0
  for o in range(output):
    for k in range(size):
      at = o * stride + k * step - before
      counted += int(0 <= at < len(spread_out) and spread_out[at])
  assert _pairs(output, source, size, stride, before, spread, step) == counted


FUSION = """%inside (a: f32[8,1024], i: s32[]) -> f32[1,1024] {
  %a = f32[8,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = f32[1,1024]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,1024}
}

"""


def test_of_an_operand_that_is_only_sliced_the_slice_is_read():
  found = entry(
    "  %x = f32[8,1024]{1,0} parameter(0)\n  %n = s32[]{:S(2)} parameter(1)\n"
    "  ROOT %f = f32[1,1024]{1,0} fusion(%x, %n), kind=kLoop, calls=%inside",
    FUSION,
  )
  assert memory_bytes(*found) == 2 * 4 * 1024


def test_an_update_in_place_moves_what_it_updates():
  found = entry(
    "  %x = f32[8,1024]{1,0} parameter(0)\n  %u = f32[1,1024]{1,0} parameter(1)\n  %n = s32[]{:S(2)} parameter(2)\n"
    "  ROOT %f = f32[8,1024]{1,0} dynamic-update-slice(%x, %u, %n, %n)"
  )
  assert memory_bytes(*found) == 2 * 4 * 1024


def test_what_lies_in_vmem_is_not_read_from_memory():
  found = entry("  %x = f32[8,1024]{1,0:S(1)} parameter(0)\n  ROOT %f = f32[8,1024]{1,0} negate(%x)")
  assert memory_bytes(*found) == 4 * 8 * 1024


def test_a_call_of_cublas_is_its_product_by_the_type_of_its_operands():
  dims = '"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"]'
  text = f"""ENTRY %main (a: bf16[6,64,32], b: bf16[6,32,48]) -> (bf16[6,64,48], s8[4194304]) {{
  %a = bf16[6,64,32] parameter(0)
  %b = bf16[6,32,48] parameter(1)
  ROOT %c = (bf16[6,64,48], s8[4194304]) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", dot={{{dims}}}
}}
"""
  computation = parse(text).computations["main"]
  assert cublas_flops(computation, computation.root) == (2 * 6 * 64 * 32 * 48, "bf16")
