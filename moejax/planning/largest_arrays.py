"""The largest arrays that a compiled program computes, and where in the source they are computed."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.planning.cost import NO_WORK, scope_of
from moejax.planning.program import Computation, Program

SHOWN_ARRAYS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeArray:
  """An array on one device."""

  bytes: int
  shape: str
  """Such as `bf16[48,4096,2048]`."""
  scope: str
  of_pass: str
  """One of forward, recompute, backward and update."""
  source: str
  """Its source line. Empty if the program has none."""

  def to_json(self) -> dict[str, Any]:
    """Plain values with the keys of `moejax plan --json`."""
    values = dataclasses.asdict(self)
    return values | {"pass": values.pop("of_pass")}


def largest_arrays(program: Program, count: int = SHOWN_ARRAYS) -> tuple[LargeArray, ...]:
  """The largest arrays, of each shape and source line one. Arguments of the program are not among them."""
  found: dict[tuple[str, str], LargeArray] = {}
  for computation in _executed(program, program.computations[program.entry], set()):
    for instruction in computation.instructions:
      if instruction.opcode in NO_WORK or instruction.opcode in ("while", "call", "conditional"):
        continue
      largest = max(
        (shape for shape in instruction.shapes if not shape.space), key=lambda shape: shape.bytes, default=None
      )
      if largest is None:  # in memory of a core
        continue
      shape = f"{largest.dtype}[{','.join(map(str, largest.dims))}]"
      scope, of_pass = scope_of(instruction, program)
      array = LargeArray(
        bytes=largest.bytes, shape=shape, scope=scope, of_pass=of_pass, source=program.source(instruction)
      )
      found.setdefault((shape, array.source), array)
  return tuple(sorted(found.values(), key=lambda array: -array.bytes)[:count])


def _executed(program: Program, computation: Computation, seen: set[str]) -> Iterator[Computation]:
  """The computation, and those of its loops, calls and conditionals. Arrays inside a fusion are not in memory."""
  if computation.name in seen:
    return
  seen.add(computation.name)
  yield computation
  for instruction in computation.instructions:
    if instruction.opcode in ("while", "call", "conditional"):
      names = ("body", "to_apply", "branch_computations", "true_computation", "false_computation")
      for name in instruction.called(*names):
        if name in program.computations:
          yield from _executed(program, program.computations[name], seen)
