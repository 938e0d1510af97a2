"""Reading traces, and dividing the time of a device among its operations."""

import jax
import numpy as np
import pytest

from moejax.errors import UserError
from moejax.planning.trace import Event, divided_ns, newest_trace, read_events


def test_each_moment_belongs_to_the_operations_that_run_then():
  alone = [Event("a", 0, 10), Event("b", 10, 30), Event("a", 40, 45)]
  assert divided_ns(alone) == {"a": 15, "b": 20}
  assert divided_ns([Event("a", 0, 10), Event("b", 4, 10)]) == {"a": 4 + 3, "b": 3}
  # What runs in the background, or is named so, has the moments in which nothing else runs.
  behind = [Event("a", 2, 6), Event("gather", 0, 10, background=True), Event("reduce", 9, 12)]
  assert divided_ns(behind, {"reduce"}) == {"gather": 2 + 3 + 0.5, "a": 4, "reduce": 0.5 + 2}
  assert divided_ns([Event("a", 3, 3)]) == {} == divided_ns([])


def test_the_parts_are_the_time_in_which_anything_runs():
  drawn = np.random.default_rng(0)
  for _ in range(50):
    begins, lengths = drawn.integers(0, 60, 12).tolist(), drawn.integers(0, 9, 12).tolist()
    events = [
      Event(f"op.{drawn.integers(5)}", begin, begin + length, bool(drawn.integers(2)))
      for begin, length in zip(begins, lengths, strict=True)
    ]
    busy = {at for event in events for at in range(int(event.begin_ns), int(event.end_ns))}
    assert sum(divided_ns(events, {"op.1"}).values()) == pytest.approx(len(busy))


FIELDS = ("hlo_op", "hlo_module", "device_ordinal", "_p", "_c")


def plane(name, lines):
  """A plane of a trace as text: lines of events (name, begin, duration, fields), in nanoseconds."""
  names = sorted({event[0] for events in lines.values() for event in events})
  text = ""
  for line, events in lines.items():
    inside = ""
    for event, begin, duration, fields in events:
      stats = "".join(
        f"stats {{ metadata_id: {FIELDS.index(field) + 1} "
        + (f'str_value: "{value}" }}' if isinstance(value, str) else f"uint64_value: {value} }}")
        for field, value in fields.items()
      )
      times = f"offset_ps: {begin * 1000} duration_ps: {duration * 1000}"
      inside += f"events {{ metadata_id: {names.index(event) + 1} {times} {stats} }}"
    text += f'lines {{ name: "{line}" {inside} }}'
  for tables, known in (("event_metadata", names), ("stat_metadata", FIELDS)):
    text += "".join(f'{tables} {{ key: {n} value {{ id: {n} name: "{of}" }} }}' for n, of in enumerate(known, 1))
  return f'planes {{ name: "{name}" {text} }}'


def test_events_of_every_platform_are_read(tmp_path):
  own = {"hlo_module": "jit_step"}
  text = plane("/host:CPU", {
    "worker": [
      ("dot.1", 10, 5, own | {"hlo_op": "dot.1", "device_ordinal": 1, "_p": 7}),
      ("copy.2", 15, 5, own | {"hlo_op": "copy.2", "device_ordinal": 0, "_p": 8}),
      ("other.3", 0, 99, {"hlo_op": "other.3", "hlo_module": "jit_other"}),
      ("end: copy.2", 19, 1, {"_c": 8}),
    ],
    "pool": [("end: dot.1", 30, 2, {"_c": 7}), ("ThreadpoolListener", 0, 99, {})],
  })  # fmt: skip
  text += plane("/device:GPU:0", {"Stream #7": [("kernel_name", 1, 2, own | {"hlo_op": "fusion.4"})]})
  text += plane("/device:TPU:0", {
    "XLA Modules": [("jit_step(1)", 0, 50, {})],
    "XLA Ops": [("%fusion.5 = bf16[8] fusion(%a)", 3, 4, {})],
    "Async XLA Ops": [("all-gather-start.6", 2, 9, {})],
  })  # fmt: skip
  file = tmp_path / "plugins" / "profile" / "now" / "host.xplane.pb"
  with pytest.raises(UserError, match="no trace; train with --profile STEPS"):
    newest_trace(tmp_path)
  file.parent.mkdir(parents=True)
  file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))
  assert newest_trace(tmp_path) == file
  assert read_events(file, "jit_step") == {
    # A product that threads complete after its event has ended.
    "/host:CPU:1": [Event("dot.1", 10, 15), Event("dot.1", 15, 32, background=True)],
    "/host:CPU:0": [Event("copy.2", 15, 20)],
    "/device:GPU:0": [Event("fusion.4", 1, 3)],
    "/device:TPU:0": [Event("fusion.5", 3, 7), Event("all-gather-start.6", 2, 11, background=True)],
  }
