"""Traverses a configuration and yields its parts with their dotted paths."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.config.kinds import KIND, OfSeveralKinds


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted path and the value of a configuration and of all its parts, in depth-first order.

  A class with several kinds also has the part `kind`. Configurations in a tuple are named by their index, and sharding
  rules by their logical axis. A field without a value is None.

  Args:
    value: the configuration.
    path: its own path.
  """
  yield path, value
  for name, part in _parts(value, path):
    yield from walk(part, join(path, name))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the parts that have no parts themselves, which are those that can be set."""
  return ((inner, part) for inner, part in walk(value, path) if not _parts(part, inner))


def holds_configurations(value: Any) -> bool:
  """Whether a field is a tuple of configurations, such as the pairs of a suite."""
  return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def join(path: str, name: str) -> str:
  """The dotted path of the field `name` of the configuration at `path`."""
  return f"{path}.{name}" if path else name


def _parts(value: Any, path: str) -> list[tuple[str, Any]]:
  if dataclasses.is_dataclass(value):
    kind: list[tuple[str, Any]] = [(KIND, value.kind)] if isinstance(value, OfSeveralKinds) else []
    return [*kind, *((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))]
  if path.rpartition(".")[2] == "rules":
    return list(dict(value).items())
  return [(str(i), item) for i, item in enumerate(value)] if holds_configurations(value) else []
