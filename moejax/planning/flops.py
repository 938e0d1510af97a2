"""Computes the FLOPs of matrix products and the bytes that operations read and write in a compiled program."""

import math
import re

from moejax.planning.program import Computation, Instruction, Program, Shape

SLICES = ("dynamic-slice", "gather", "slice")


def matrix_flops(program: Program, computation: Computation, instruction: Instruction) -> int:
  """FLOPs of the matrix products in an instruction, also inside a fusion. A multiply-add counts as 2."""
  if instruction.opcode == "dot":
    contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
    left = computation.by_name[instruction.operands[0]].shapes[0]
    return 2 * instruction.shapes[0].elements * math.prod(left.dims[d] for d in contracted)
  if instruction.opcode == "convolution":
    return _convolution_flops(computation, instruction)
  inner = program.inner(instruction) if instruction.opcode == "fusion" else None
  return sum(matrix_flops(program, inner, part) for part in inner.instructions) if inner else 0


def cublas_flops(computation: Computation, instruction: Instruction) -> tuple[int, str]:
  """FLOPs of a call of cuBLAS, where a multiply-add counts as 2, and the type of its operands."""
  left = computation.by_name[instruction.operands[0]].shapes[0]
  contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
  assert contracted, instruction.name
  depth = math.prod(left.dims[int(number)] for number in re.findall(r"\d+", contracted[1]))
  return 2 * instruction.shapes[0].elements * depth, left.dtype


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
  """FLOPs of a convolution. On TPU a product is one, whose batch dimensions are windows with one valid position."""
  left, right = (computation.by_name[name].shapes[0] for name in instruction.operands[:2])
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels, instruction.name
  lhs, rhs, out = labels[1], labels[2], labels[3]
  window = _window(instruction.attributes)
  pairs = 1
  for position in range(len(window["size"])):
    d = str(position)
    pairs *= _pairs(
      output=instruction.shapes[0].dims[out.index(d)],
      source=left.dims[lhs.index(d)],
      size=window["size"][position],
      stride=window["stride"][position],
      before=window["pad"][position],
      spread=window["lhs_dilate"][position],
      step=window["rhs_dilate"][position],
    )
  batch = instruction.shapes[0].dims[out.index("b")]
  return 2 * batch * right.dims[rhs.index("i")] * right.dims[rhs.index("o")] * pairs


def _window(attributes: str) -> dict[str, list[int]]:
  text = (re.search(r"window=\{([^}]*)\}", attributes) or [None, ""])[1] or ""
  given = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\w\-]+)", text)}
  length = len(given.get("size", []))
  numbers = {
    name: [int(value) for value in given.get(name, ["1"] * length)]
    for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
  }
  return numbers | {"pad": [int(value.split("_")[0]) for value in given.get("pad", ["0_0"] * length)]}


def _pairs(output: int, source: int, size: int, stride: int, before: int, spread: int, step: int) -> int:
  """Pairs of output and kernel position that read an element, and not padding or the gap of a dilation."""
  last = (source - 1) * spread
  count = 0
  for k in range(size):
    offset = k * step - before
    # Outputs o with 0 <= o stride + offset <= last and (o stride + offset) divisible by spread.
    low, high = max(0, -(offset // stride)), min(output - 1, (last - offset) // stride)
    if spread == 1:
      count += max(0, high - low + 1)
    else:
      count += sum((o * stride + offset) % spread == 0 for o in range(low, high + 1))
  return count


def memory_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
  """Bytes that an instruction moves to and from HBM. A slice or update counts its own size, not that of the array."""
  inner = program.inner(instruction) if instruction.opcode == "fusion" else None
  if inner is None:
    reads = [_hbm(computation.by_name[name].shapes) for name in instruction.operands if name in computation.by_name]
    if instruction.opcode in SLICES:
      return 2 * _hbm(instruction.shapes)
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
      return 2 * sum(reads[1:])
    return sum(reads) + _hbm(instruction.shapes)
  return sum(
    _read_bytes(inner, inner.parameter(i).name, computation.by_name[name].shapes)
    for i, name in enumerate(instruction.operands)
    if name in computation.by_name
  ) + _written_bytes(inner, instruction)


def _read_bytes(inner: Computation, parameter: str, shapes: tuple[Shape, ...]) -> int:
  users = [user for user in inner.instructions if parameter in user.operands]
  if users and all(user.opcode in SLICES for user in users):
    return sum(_hbm(shapes) * user.shapes[0].elements // max(1, shapes[0].elements) for user in users)
  if users and all(user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == parameter
                   for user in users):  # fmt: skip
    return 0
  return _hbm(shapes)


def _written_bytes(inner: Computation, instruction: Instruction) -> int:
  roots = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
  written = 0
  for name, shape in zip(roots, instruction.shapes, strict=False):
    root = inner.by_name[name]
    in_place = root.opcode in ("dynamic-update-slice", "scatter")
    part = inner.by_name[root.operands[-1 if root.opcode == "scatter" else 1]].shapes[0] if in_place else shape
    written += part.bytes if shape.space != 1 else 0
  return written


def _hbm(shapes: tuple[Shape, ...]) -> int:
  return sum(shape.bytes for shape in shapes if shape.space == 0)


def _numbers(attributes: str, name: str) -> list[int]:
  found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
  return [int(number) for number in found[1].split(",") if number] if found else []
