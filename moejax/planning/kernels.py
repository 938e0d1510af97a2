"""Prices of kernels and library calls that the compiler has no estimate for, from the FLOPs and bytes that their
operands imply.

B batch  N query heads  T query position  S key position  H head dim
R routed rows  E experts  D embed  F hidden  I contracted dimension  J other dimension
"""

import dataclasses
import math
import re

from moejax.config.chips import Chip
from moejax.config.precision import Operands
from moejax.errors import UserError
from moejax.kernels.attention import SCORES
from moejax.kernels.attention_gpu import LARGEST_BLOCK, block_width
from moejax.kernels.grouped_eight_bits_tpu import bytes_before_tgmm, gmm_cost, tgmm_cost
from moejax.kernels.grouped_matmul_tpu import gmm_bytes, padding, tgmm_bytes
from moejax.planning.program import BYTES, Instruction

CUBLAS = "__cublas$"
"""Prefix of the custom call targets of cuBLAS and cuBLASLt."""

PRODUCT_SHARE = 0.79
"""Fraction of peak that cuBLAS reaches on large bfloat16 products on H100: 780 TFLOP/s, from XLA's own table."""

RELATIVE_RATE = {"f32": 0.5, "bf16": 1.0, "f16": 1.0, "s8": 2.0}
"""Rate of the tensor cores by type of the operands, to that of bfloat16 (float32 as TF32); 8-bit floats are twice as
fast. NVIDIA's data sheets of A100 and H100."""

GPU_CALLS = ("__", "mosaic_gpu", "triton")
"""Prefixes of the targets of custom calls that run on a GPU: kernels in Triton or Mosaic, and calls of libraries. Other
targets are markers, which take no time."""

TRITON_SHARE = {"gmm": 0.42, "tgmm": 0.60}
"""Fraction of peak that Triton kernels of grouped products reach on H100, by their name in `moejax/kernels`: 414 and
591 of 989 TFLOP/s, the best times that tokamax 0.0.12 has for its kernels of the same names."""

TRITON_ATTENTION = 0.38
"""Fraction of peak that Triton kernels of attention reach on H100, in the forward and in the backward pass, from the
times that tokamax 0.0.12 has for its kernels (causal, 32 x 4096 positions, 32 query and 8 key heads of 128): 11.6 ms
for 2 products are 378 of 989 TFLOP/s. 41.4 ms for the backward pass are 372, with the 7 products that `attention_dq`
and `attention_dkv` compute; with the 5 that are counted usually, they are 265."""

ATTENTION_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Products of the kernels of `moejax.kernels.attention_gpu`, over the head dim of keys and over that of values: forward
q k, and p v; dq again q k, and dq, and dp; dkv again q k, and dk, and dp, and dv."""

GROUPED_PRODUCTS = ("gmm", "tgmm", "gmm_8bit", "tgmm_8bit", "largest", "rounded_rows")
"""Names of the kernels of grouped products, on TPU and GPU, and of those which find the scales of 8-bit operands and
round them. They take the time of the rows that are there."""

EIGHT_BIT_TYPES = {"fp8": ("f8e4m3fn", "f8e5m2"), "int8": ("s8", "s8")}
"""Types of the operands of 8-bit products: of values, and of the gradient that is an operand of both products of the
backward pass."""

EIGHT_BIT_RATE = 2.0
"""Rate of a matrix unit that has 8-bit operands, to that of bfloat16."""

REACHED = 0.9
"""Part of that rate which products reach beside the casts and scales of their operands, where these have no price of
their own. With it the formula is within 12 % of what fp8 gains in public runs on tpu7x: Llama 70B and 405B 1.53 times,
Qwen3-235B 1.12 times."""

SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}
"""Matrix products over the scores: forward q k and p v; dq again q k, and dp, dq; dkv again q k, and dv, dp, dk."""

VECTOR_OPERATIONS = 12
"""On each score: two comparisons for documents and diagonal, their and, select, maximum, difference, exponential (3),
sum, correction, cast. They run on the vector units while the matrix units wait for them, and are added, not hidden."""


LANES = 128
"""Number of columns of the matrix unit. A narrower head takes as long as a head of this width."""


@dataclasses.dataclass(frozen=True)
class Price:
  """FLOPs, bytes and vector operations of one call of a kernel."""

  flops: float
  occupied_flops: float
  """Those in bfloat16 that take as long: with the head dimension padded to the width of the matrix unit, with all rows
  of the tiles of grouped products, and half of those of 8-bit operands."""
  vector_operations: float
  bytes: int
  bytes_before: int = 0
  """Those of passes over its operands before the kernel, whose time is that of their bytes."""

  def seconds(self, chip: Chip) -> float:
    """Seconds on `chip`: the larger of the matrix plus vector time and the memory time, and the passes before."""
    assert chip.bfloat16_flops
    compute_s = self.occupied_flops / chip.bfloat16_flops + self.vector_operations / chip.vector_flops
    return max(compute_s, self.bytes / chip.hbm_bandwidth) + self.bytes_before / chip.hbm_bandwidth


def product_rate(chip: Chip, dtype: str) -> float:
  """FLOP/s of a large product of cuBLAS with operands of this type."""
  return PRODUCT_SHARE * _relative_rate(dtype) * (chip.bfloat16_flops or chip.vector_flops)


def product_speedup(chip: Chip, precision: str) -> float:
  """How much faster products of this type are than those of bfloat16.

  Raises:
    UserError: the matrix units of the chip do not have the type.
  """
  known = ("bfloat16", *chip.eight_bits)
  if precision not in known:
    raise UserError(f"--precision {precision}: the matrix units of {chip.name} have {', '.join(known)}; use these")
  return 1.0 if precision == "bfloat16" else EIGHT_BIT_RATE * REACHED


def gpu_call(
  call: Instruction, chip: Chip, bits: Operands = "compute", of_pass: str = "forward"
) -> tuple[str, float, float]:
  """Name, FLOPs and seconds of a custom call on GPU other than a product of cuBLAS.

  Grouped products and attention take the longer of their FLOPs and their bytes; grouped products with all rows that
  their buffers hold. For the others the bytes count, a lower bound.

  Args:
    call: the custom call.
    chip: the GPU.
    bits: the type in which a grouped product is priced. "compute" is that of its operands.
    of_pass: the pass of the call, on which the types of 8-bit operands depend.
  """
  operands = _operand_shapes(call.attributes)
  seconds = (call.bytes + sum(_bytes(dtype, dims) for dtype, dims in operands)) / chip.hbm_bandwidth
  # As in `jvp(attention)/attention_fwd/pallas_call` or, where the kernel has no scope, `jvp(gmm)/pallas_call`.
  kernel = re.search(r"(\w+)\)*/pallas_call$", call.op_name)
  name = kernel[1] if kernel else call.target.strip("_$").split("$")[-1]
  assert chip.bfloat16_flops
  if attention := re.fullmatch(r"(attention_(fwd|dq|dkv))(?:_window_(\d+))?", name):
    heads = [operand for operand in operands if len(operand[1]) == 4]
    flops, occupied_flops = _attention_flops(attention[2], [dims for _, dims in heads], int(attention[3] or 0))
    rate = TRITON_ATTENTION * RELATIVE_RATE[heads[0][0]] * chip.bfloat16_flops
    return attention[1], flops, max(occupied_flops / rate, seconds)
  matrices = [(dtype, dims) for dtype, dims in operands if len(dims) >= 2][:2]
  if name not in TRITON_SHARE or not matrices:
    return name, 0.0, seconds
  # gmm: x_RI and w_EDF to out_RJ. tgmm: x_RD and y_RF to out_EDF. Each row meets one matrix.
  rows, columns = matrices[0][1]
  flops = 2.0 * rows * columns * call.shapes[0].dims[-1]
  relative = _grouped_rate({dtype for dtype, _ in matrices})
  if bits != "compute":
    values, gradients = EIGHT_BIT_TYPES[bits]
    types = {values} if name == "gmm" and of_pass != "backward" else {values, gradients}
    relative = product_speedup(chip, bits) if _grouped_rate(types) > 1 else 1.0
    seconds -= sum(_bytes(dtype, dims) - math.prod(dims) for dtype, dims in matrices) / chip.hbm_bandwidth
  return name, flops, max(flops / (TRITON_SHARE[name] * relative * chip.bfloat16_flops), seconds)


def _attention_flops(kernel: str, heads: list[tuple[int, ...]], window: int) -> tuple[float, float]:
  """FLOPs of a kernel of attention whose first operands with four dimensions are q_BTNH, k_BSKH and v_BSKJ, and those
  with the head dims of the blocks.

  Half of the scores are above the diagonal. A window of n positions (0: none) has those of n and one block more, since
  blocks that it contains in part are computed too.
  """
  (B, T, N, H), _, (_, _, _, J) = heads[:3]
  width = min(T, window + LARGEST_BLOCK) if window else T
  scores = B * N * (T * width - width * width / 2)
  of_keys, of_values = ATTENTION_PRODUCTS[kernel]
  flops, occupied_flops = (
    2 * scores * (of_keys * H + of_values * J) for H, J in ((H, J), (block_width(H), block_width(J)))
  )
  return flops, occupied_flops


def _relative_rate(dtype: str) -> float:
  return RELATIVE_RATE.get(dtype, 2.0 if dtype.startswith("f8") else 0.5)


def _grouped_rate(types: set[str]) -> float:
  """Rate of a grouped product on a GPU, to that of bfloat16, by the types of its operands: that of the widest. Two
  types of 8-bit floats are multiplied in bfloat16."""
  return 1.0 if len(types) > 1 and all(dtype.startswith("f8") for dtype in types) else min(map(_relative_rate, types))


def price(kernel: Instruction, bits: Operands = "compute") -> Price:
  """Price of a Mosaic custom call: splash attention from its shapes or, on a part of the sequence, from the scores
  that its scope counts; other kernels from their own cost estimate, which grouped products correct."""
  operands = _operand_shapes(kernel.attributes)
  size = kernel.bytes + sum(_bytes(dtype, dims) for dtype, dims in operands)
  splash = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", kernel.name)
  if splash:
    queries = next(dims for dtype, dims in operands if dtype in ("bf16", "f32") and len(dims) >= 3)
    *batch, N, T, H = queries
    if counted := re.search(rf"\b{SCORES}(\d+)", kernel.op_name):
      of_head = float(counted[1])
    else:
      # Of the blocks of a row, the mask keeps at most `seen`: those up to the diagonal, and within a window.
      seen, blocks = next(sorted(dims[-2:]) for dtype, dims in operands if dtype.startswith("s") and len(dims) == 3)
      of_head = T * T * seen * (2 * blocks - seen + 1) / (2 * blocks**2)
    scores = (batch[0] if batch else 1) * N * of_head
    per_width = 2 * SPLASH_PRODUCTS[splash[1]] * scores
    return Price(per_width * H, per_width * math.ceil(H / LANES) * LANES, VECTOR_OPERATIONS * scores, size)
  declared = {
    name: float(value)
    for name, value in re.findall(r'"(flops|transcendentals|bytes_accessed)":\s*"?(\d+)', kernel.attributes)
  }
  found = Price(
    flops := declared.get("flops", 0.0),
    flops / EIGHT_BIT_RATE if "_8bit" in kernel.name else flops,
    declared.get("transcendentals", 0.0),
    int(declared.get("bytes_accessed", size)),
  )
  matrices = [operand for operand in operands if len(operand[1]) >= 2][:2]
  product = re.match(r"(t?gmm)(_8bit)?\b", kernel.name)
  return _grouped(kernel, product[1], matrices, found, bits) if product and len(matrices) == 2 else found


def _grouped(
  kernel: Instruction, product: str, matrices: list[tuple[str, tuple[int, ...]]], declared: Price, bits: Operands
) -> Price:
  """Price of a grouped product, with the rows that its tiles compute twice.

  Megablox declares more bytes than it moves. With `bits`, its products are priced as if those of
  `moejax.kernels.grouped_eight_bits_tpu` took their place: `gmm` at the rate of all 8-bit products that are not in the
  program, which leaves time for the casts before it, and `tgmm` with the passes of the kernels that find the scales of
  its operands and round them."""
  (dtype, of_x), (_, of_other) = matrices
  out = kernel.shapes[0]
  # gmm: x_RI and w_EDF to out_RJ. tgmm: x_RD, which may be transposed, and y_RF to out_EDF.
  R, E, D, F = (*of_x[:1], *of_other[:1], *of_x[1:], *out.dims[1:]) if product == "gmm" else (*of_other[:1], *out.dims)
  sizes = R, E, D, F, BYTES.get(dtype, 1), BYTES[out.dtype]
  found = declared
  if "_8bit" not in kernel.name and bits == "compute":
    found = dataclasses.replace(declared, bytes=(gmm_bytes if product == "gmm" else tgmm_bytes)(*sizes))
  elif "_8bit" not in kernel.name and product == "gmm":
    work = gmm_cost(R, E, D, F, BYTES[out.dtype])
    found = Price(work.flops, work.flops / (EIGHT_BIT_RATE * REACHED), 0.0, work.bytes_accessed)
  elif "_8bit" not in kernel.name:
    work, before = tgmm_cost(*sizes), bytes_before_tgmm(*sizes)
    found = Price(work.flops, work.flops / EIGHT_BIT_RATE, work.transcendentals, work.bytes_accessed, before)
  return dataclasses.replace(found, occupied_flops=found.occupied_flops * padding(R, E))


def _operand_shapes(attributes: str) -> list[tuple[str, tuple[int, ...]]]:
  found = re.search(r"operand_layout_constraints=\{(.*?\})\}", attributes)
  shapes = re.findall(r"(\w+)\[([\d,]*)\]", found[1]) if found else []
  return [(dtype, tuple(int(size) for size in dims.split(",") if size)) for dtype, dims in shapes]


def _bytes(dtype: str, dims: tuple[int, ...]) -> int:
  size = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}.get(dtype, 1)
  for length in dims:
    size *= length
  return size
