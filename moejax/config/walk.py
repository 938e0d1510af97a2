"""The way through a configuration: its parts by their dotted paths, as the command line names them."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.config.kinds import KIND, OfSeveralKinds


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the dotted path and the value of a configuration and of all its parts, each before what is inside it.

  The kind of what comes in several kinds is its part `kind`. The configurations of a tuple are named by their index,
  and sharding rules by their logical axis. A field that has no value yet is None.

  Args:
    value: the configuration.
    path: where it is itself.
  """
  yield path, value
  for name, part in _parts(value, path):
    yield from walk(part, join(path, name))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the parts of a configuration that can be set, as `walk`: those that have no parts themselves."""
  return ((inner, part) for inner, part in walk(value, path) if not _parts(part, inner))


def holds_configurations(value: Any) -> bool:
  """Whether a field is a tuple of configurations, such as the pairs of a suite."""
  return isinstance(value, tuple) and bool(value) and dataclasses.is_dataclass(value[0])


def join(path: str, name: str) -> str:
  """The dotted path of what is named `name` at `path`."""
  return f"{path}.{name}" if path else name


def _parts(value: Any, path: str) -> list[tuple[str, Any]]:
  if dataclasses.is_dataclass(value):
    kind: list[tuple[str, Any]] = [(KIND, value.kind)] if isinstance(value, OfSeveralKinds) else []
    return [*kind, *((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))]
  if path.rpartition(".")[2] == "rules":
    return list(dict(value).items())
  return [(str(i), item) for i, item in enumerate(value)] if holds_configurations(value) else []
