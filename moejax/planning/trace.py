"""Reads when each operation of a program ran from a trace of `jax.profiler`, and divides the time among operations."""

import pathlib
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax

from moejax.errors import UserError

TPU_LINES = ("XLA Ops", "Async XLA Ops")
"""Lines of a TPU whose events are operations. The name of an event is an instruction, without other fields."""

END = "end: "
"""Prefix of the events that mark the end of an operation which threads of a CPU execute in the background."""


class Event(NamedTuple):
  """One execution of an operation on a device."""

  operation: str
  """The name of the instruction in the compiled program."""
  begin_ns: float
  end_ns: float
  background: bool = False
  """Whether other operations may run at the same time, and have precedence."""


def newest_trace(folder: pathlib.Path) -> pathlib.Path:
  """The file of the newest trace that `jax.profiler` wrote to a folder.

  Raises:
    UserError: If there is none.
  """
  files = sorted(folder.glob("plugins/profile/*/*.xplane.pb"))
  if not files:
    raise UserError(f"{folder} has no trace; train with --profile STEPS")
  return files[-1]


def read_events(file: pathlib.Path, module: str) -> dict[str, list[Event]]:
  """The executions of the operations of a module, by device.

  On CPU and GPU, an event has the fields `hlo_op` and `hlo_module`. On CPU, it also names its device, and a second
  event marks the end of an operation that continues in the background after its first event.
  """
  found: dict[str, list[Event]] = {}
  started: list[tuple[str, Event, tuple[str, Any]]] = []
  ends: dict[tuple[str, Any], float] = {}
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    is_device = plane.name.startswith("/device:")
    for line in plane.lines:
      for event in line.events:
        fields = dict(event.stats)
        if event.name.startswith(END):
          ends[event.name.removeprefix(END), fields.get("_c")] = event.end_ns
        operation = fields.get("hlo_op")
        if operation is None and plane.name.startswith("/device:TPU:") and line.name in TPU_LINES:
          operation = event.name.split(" ", 1)[0].lstrip("%")
        if operation is None or fields.get("hlo_module", module) != module:
          continue
        device = plane.name if is_device else f"{plane.name}:{fields.get('device_ordinal', 0)}"
        one = Event(str(operation), event.start_ns, event.end_ns, background=line.name == TPU_LINES[1])
        found.setdefault(device, []).append(one)
        started.append((device, one, (event.name, fields.get("_p"))))
  for device, one, key in started:
    if ends.get(key, 0.0) > one.end_ns:
      found[device].append(Event(one.operation, one.end_ns, ends[key], background=True))
  return found


def divided_ns(events: Iterable[Event], background: Collection[str] = ()) -> dict[str, float]:
  """Divides the time of one device among its operations: each moment belongs in equal parts to the operations that run
  then. Operations in the background, and those named in `background`, only have the moments when no other one runs.

  The sum is the time in which anything runs.
  """
  listed = list(events)
  changes = sorted(
    (at, is_begin, number)
    for number, event in enumerate(listed)
    for at, is_begin in ((event.begin_ns, True), (event.end_ns, False))
    if event.end_ns > event.begin_ns
  )
  running: tuple[set[int], set[int]] = (set(), set())
  found: dict[str, float] = {}
  before = 0.0
  for at, is_begin, number in changes:
    now = running[0] or running[1]
    for one in now:
      name = listed[one].operation
      found[name] = found.get(name, 0.0) + (at - before) / len(now)
    before = at
    event = listed[number]
    of = running[event.background or event.operation in background]
    of.add(number) if is_begin else of.remove(number)
  return found
