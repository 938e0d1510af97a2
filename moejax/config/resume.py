"""Which fields may change when a run resumes, as marked in their metadata.

A comparison allows fewer changes than a run, because step times and scores are among its results.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from moejax.config.kinds import OfSeveralKinds, kinds

Of = Literal["run", "comparison"]

RUN_MAY_CHANGE: dict[str, tuple[Of, ...]] = {"may_change": ("run",)}
"""Metadata of a field that affects the speed or the evaluation of a run, but not the trained parameters."""
MAY_CHANGE: dict[str, tuple[Of, ...]] = {"may_change": ("run", "comparison")}
"""Metadata of a field that does not affect the trained parameters, step times or scores."""


def changeable(kind: type, of: Of) -> tuple[str, ...]:
  """Dotted paths of the fields of configuration class `kind` that may change. * stands for the index of a list.

  Includes the fields of all kinds that have been imported, built-in or custom.
  """
  return tuple(dict.fromkeys(_marked(kind, of, "")))


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
  """The possible types of a field of type `kind`, each with the corresponding part of the path."""
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    return [(part, "") for part in typing.get_args(kind)]
  if typing.get_origin(kind) is tuple:
    return [(typing.get_args(kind)[0], "*.")]
  if isinstance(kind, type) and issubclass(kind, OfSeveralKinds):
    return [(kind, ""), *((one, "") for one in kinds(kind).values())]
  return [(kind, "")]
