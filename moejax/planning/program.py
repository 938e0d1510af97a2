"""Parses the text of a compiled program (HLO): computations, instructions, shapes and trip counts of loops."""

import dataclasses
import functools
import math
import re

BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
  "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes per element. Types that are not listed have one byte, such as f8e4m3, s4 and u4."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of one array."""

  dtype: str
  dims: tuple[int, ...]
  space: int
  """Memory space: 0 is HBM. On TPU, 1 is VMEM."""

  @property
  def elements(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    return self.elements * BYTES.get(self.dtype, 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  """The shape of the result, or the shapes of the elements of a tuple."""
  operands: tuple[str, ...]
  """Names of instructions. A constant has its value, and a parameter its number."""
  attributes: str
  """The attributes, which are the text after the operands."""
  is_root: bool

  @property
  def bytes(self) -> int:
    return sum(shape.bytes for shape in self.shapes)

  @functools.cached_property
  def op_name(self) -> str:
    """The path of scopes in the source. Empty for an instruction that the compiler added."""
    return _first(r'op_name="([^"]*)"', self.attributes) or ""

  @functools.cached_property
  def frame(self) -> int:
    """The number of the stack frame of the source. 0 for an instruction that the compiler added."""
    return int(_first(r"stack_frame_id=(\d+)", self.attributes) or 0)

  @functools.cached_property
  def cycles(self) -> int | None:
    """The compiler's estimate in cycles, or None."""
    found = _first(r'"estimated_cycles":"(\d+)"', self.attributes)
    return int(found) if found else None

  @functools.cached_property
  def estimated_s(self) -> float | None:
    """The GPU compiler's estimate in seconds, or None.

    The lower of its two estimates is used, because one of them is orders of magnitude too high for softmax fusions by
    Triton, which it treats as scattered accesses. The speed of light (`sol`) is a bound and not used.
    """
    found = re.findall(r'"exec_time_us":([\d.e+\-]+),[^{}]*"name":"(?:|indexing-cost-model)"', self.attributes)
    return min(map(float, found)) * 1e-6 if found else None

  @functools.cached_property
  def target(self) -> str:
    """The target of a custom call, else empty."""
    return _first(r'custom_call_target="([^"]*)"', self.attributes) or ""

  @functools.cached_property
  def channel(self) -> str | None:
    """The channel number, which all instructions of a collective have in common."""
    return _first(r"channel_id=(\d+)", self.attributes)

  def called(self, *kinds: str) -> tuple[str, ...]:
    """The computations that it calls, by the kind of call, such as `body`."""
    names: list[str] = []
    for kind in kinds:
      found = re.search(rf"\b{kind}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
      if found:
        names += [name.strip().lstrip("%") for name in (found[1] or found[2]).split(",")]
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions in the order in which they run."""

  name: str
  instructions: tuple[Instruction, ...]

  @functools.cached_property
  def by_name(self) -> dict[str, Instruction]:
    return {instruction.name: instruction for instruction in self.instructions}

  @functools.cached_property
  def users(self) -> dict[str, tuple[Instruction, ...]]:
    """The instructions that use the result of an instruction, by its name."""
    found: dict[str, tuple[Instruction, ...]] = {}
    for instruction in self.instructions:
      for name in dict.fromkeys(instruction.operands):
        found[name] = (*found.get(name, ()), instruction)
    return found

  @property
  def root(self) -> Instruction:
    return next(instruction for instruction in reversed(self.instructions) if instruction.is_root)

  def parameter(self, number: int) -> Instruction:
    return next(i for i in self.instructions if i.opcode == "parameter" and i.operands == (str(number),))


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled module: the program of one device."""

  computations: dict[str, Computation]
  entry: str
  sources: dict[int, str] = dataclasses.field(default_factory=dict)
  """Source lines by the number of a stack frame, as in `models/moe/router.py:120`."""

  @functools.cached_property
  def located(self) -> dict[str, tuple[Computation, Instruction]]:
    """Each instruction of the module by its name, which is unique, and its computation."""
    return {
      instruction.name: (computation, instruction)
      for computation in self.computations.values()
      for instruction in computation.instructions
    }

  def source(self, instruction: Instruction) -> str:
    """The source line of an instruction or, of a fusion without one, of its last instruction that has one. Empty if
    the program has none."""
    inner = self.inner(instruction)
    frames = (part.frame for part in (instruction, *reversed(inner.instructions if inner else ())))
    return next((self.sources[frame] for frame in frames if frame in self.sources), "")

  def inner(self, instruction: Instruction) -> Computation | None:
    """The computation of a fusion or a call."""
    calls = instruction.opcode in ("fusion", "call", "async-start", "call-start")
    names = instruction.called("calls", "to_apply") if calls else ()
    return self.computations.get(names[0]) if names else None


def parse(text: str) -> Program:
  """Parses the text of `compiled.as_text()`."""
  computations: dict[str, Computation] = {}
  entry, name = "", ""
  instructions: list[Instruction] = []
  # Kernels carry metadata that the printer breaks into lines of their own.
  for line in text.replace('\n"', ' "').replace("\n}}", " }}").splitlines():
    if line.startswith("}"):
      computations[name] = Computation(name, tuple(instructions))
    elif line.endswith("{") and not line.startswith((" ", "HloModule")):
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
      entry = name if line.startswith("ENTRY") else entry
      instructions = []
    elif " = " in line and not line.startswith("HloModule"):
      instructions.append(_instruction(line.strip()))
  return Program(computations, entry, _sources(text))


def _sources(text: str) -> dict[int, str]:
  """The source line of each stack frame, from the tables at the head of a program. Files of moejax have their path in
  the package, others their name."""
  tables: dict[str, dict[int, str]] = {}
  for title in ("FileNames", "FileLocations", "StackFrames"):
    rows = _first(rf"(?ms)^{title}\n(.*?)(?=^\D|\n\n)", text) or ""
    tables[title] = {int(number): value for number, value in re.findall(r"(?m)^(\d+) (.*)$", rows)}
  lines = {}
  for number, value in tables["FileLocations"].items():
    name = tables["FileNames"].get(_number("file_name_id", value), "").strip('"')
    name = name.rpartition("/moejax/")[2] if "/moejax/" in name else name.rpartition("/")[2]
    lines[number] = f"{name}:{_number('line', value)}"
  frames = {number: _number("file_location_id", value) for number, value in tables["StackFrames"].items()}
  return {number: lines[location] for number, location in frames.items() if location in lines}


def _number(name: str, text: str) -> int:
  return int(_first(rf"\b{name}=(\d+)", text) or 0)


class DataDependentLoopError(ValueError):
  """The end of a loop is not a constant of the program."""


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int:
  """The trip count of a `while`, from its annotation, or from its condition, initial value and step.

  Raises:
    DataDependentLoopError: If its end is not a constant, as in dropless layers on CPU.
  """
  annotated = _first(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if annotated:
    return int(annotated)
  condition = program.computations[loop.called("condition")[0]]
  body = program.computations[loop.called("body")[0]]
  index, limit, direction = _comparison(program, condition, condition.root)
  start = _constant(computation, _element(computation, loop.operands[0], index)) or 0
  step = _step(body, index)
  count = math.ceil((limit - start) / step)
  return max(0, count + (direction == "LE" and (limit - start) % step == 0))


def _comparison(program: Program, computation: Computation, root: Instruction) -> tuple[int, int, str]:
  """Tuple index of the counter, its limit, and LT or LE."""
  inner = program.inner(root)
  outer_operands: tuple[str, ...] = ()
  where = computation
  if inner is not None:
    outer_operands, where, root = root.operands, inner, inner.root
  if root.opcode != "compare":
    raise DataDependentLoopError(f"loop condition {root.name} is a {root.opcode}, not a comparison")
  direction = _first(r"direction=(\w+)", root.attributes) or "LT"

  def outside(name: str) -> Instruction:
    """The instruction of the condition that defines an operand of the comparison."""
    found = _through(where, name)
    if found.opcode == "parameter" and outer_operands:
      return _through(computation, outer_operands[int(found.operands[0])])
    return found

  sides = [outside(name) for name in root.operands]
  limits = [side for side in sides if side.opcode == "constant"]
  counters = [side for side in sides if side.opcode == "get-tuple-element"]
  if not limits or not counters:
    raise DataDependentLoopError(f"loop condition {computation.name} compares {[side.opcode for side in sides]}")
  if sides.index(limits[0]) == 0:
    direction = {"GT": "LT", "GE": "LE"}.get(direction, direction)
  return _tuple_index(counters[0]), int(limits[0].operands[0]), direction


def _element(computation: Computation, name: str, index: int) -> str:
  """The operand at `index` of a tuple."""
  made = _through(computation, name)
  return made.operands[index] if made.opcode == "tuple" else name


def _constant(computation: Computation, name: str) -> int | None:
  found = _through(computation, name)
  return int(found.operands[0]) if found.opcode == "constant" and found.operands[0].lstrip("-").isdigit() else None


def _step(body: Computation, index: int) -> int:
  """The increment of the counter. 1 if it is not a constant, as in every scan."""
  root = body.root
  added = _through(body, root.operands[index]) if root.opcode == "tuple" else root
  if added.opcode != "add":
    return 1
  return next((value for name in added.operands if (value := _constant(body, name))), 1)


def _through(computation: Computation, name: str) -> Instruction:
  """The instruction with this name, or the original of a copy."""
  found = computation.by_name[name]
  while found.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start") and found.operands[0] in (
    computation.by_name
  ):
    found = computation.by_name[found.operands[0]]
  return found


def _tuple_index(instruction: Instruction) -> int:
  return int(_first(r"index=(\d+)", instruction.attributes) or 0)


def _instruction(line: str) -> Instruction:
  head, _, rest = line.partition(" = ")
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  return Instruction(
    name=head.removeprefix("ROOT ").lstrip("%"),
    opcode=rest[:opening],
    shapes=shapes,
    operands=_operands(rest[opening + 1 : closing]),
    attributes=rest[closing + 1 :],
    is_root=head.startswith("ROOT "),
  )


def _operands(text: str) -> tuple[str, ...]:
  """Names of operands, without the shapes that some printers put before them."""
  text = re.sub(r"/\*.*?\*/", "", text)
  named = re.findall(r"%([\w.\-]+)", text)
  return tuple(named) if named else tuple(part.strip().split(" ")[-1] for part in text.split(",") if part.strip())


def _shapes(text: str) -> tuple[Shape, ...]:
  found = re.finditer(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text)
  return tuple(
    Shape(
      match[1],
      tuple(int(size) for size in match[2].split(",") if size),
      int(_first(r"S\((\d+)\)", match[3] or "") or 0),
    )
    for match in found
  )


def _closing(text: str, opening: int) -> int:
  """Position of the parenthesis that closes the one at `opening`."""
  depth = 0
  for match in re.finditer(r"[()]", text[opening:]):
    depth += 1 if match[0] == "(" else -1
    if depth == 0:
      return opening + match.start()
  raise ValueError(f"no closing parenthesis in {text[:80]}")


def _first(pattern: str, text: str) -> str | None:
  found = re.search(pattern, text)
  return found[1] if found else None
