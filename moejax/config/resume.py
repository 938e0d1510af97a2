"""Which fields may change when a run resumes: a mark on the field, as it never decides the result of training.

A comparison is stricter than a run: its results are step times and scores too.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

Of = Literal["run", "comparison"]

RUN_MAY_CHANGE: dict[str, tuple[Of, ...]] = {"may_change": ("run",)}
"""Metadata of a field that changes how fast a run is, or what of it is scored, but not what is trained."""
MAY_CHANGE: dict[str, tuple[Of, ...]] = {"may_change": ("run", "comparison")}
"""Metadata of a field that changes neither what is trained nor a step time nor a score."""


@functools.cache
def changeable(kind: type, of: Of) -> tuple[str, ...]:
  """Dotted paths of the fields of configuration class `kind` that may change; * stands for a place in a list."""
  return tuple(_marked(kind, of, ""))


def _marked(kind: type, of: Of, path: str) -> Iterator[str]:
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(typing.cast(Any, kind)):
    if of in field.metadata.get("may_change", ()):
      yield path + field.name
      continue
    for part, place in _parts(hints[field.name]):
      if dataclasses.is_dataclass(part):
        yield from _marked(typing.cast(type, part), of, f"{path}{field.name}.{place}")


def _parts(kind: Any) -> list[tuple[Any, str]]:
  """The types that a field of type `kind` may hold, each with what a path to it has in between."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return [(part, "") for part in typing.get_args(kind)]
  if typing.get_origin(kind) is tuple:
    return [(typing.get_args(kind)[0], "*.")]
  return [(kind, "")]
