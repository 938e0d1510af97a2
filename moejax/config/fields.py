"""Fields of nested configuration classes by their dotted paths."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from moejax.errors import UserError

Configuration = TypeVar("Configuration")


def get_field(configuration: Any, path: str) -> Any:
  """The value at a path such as `model.moe.d_ff`."""
  for name in path.split("."):
    configuration = getattr(configuration, name)
  return configuration


def with_fields(configuration: Configuration, values: Mapping[str, Any]) -> Configuration:
  """The configuration with the fields at these paths replaced. Each class is made, and so checked, once.

  Raises:
    UserError: a path without a field, or a configuration that is not valid.
  """
  own: dict[str, Any] = {}
  inside: dict[str, dict[str, Any]] = {}
  known = [field.name for field in dataclasses.fields(configuration)]  # type: ignore[arg-type]
  for path, value in values.items():
    name, _, rest = path.partition(".")
    if name not in known:
      raise UserError(f"{type(configuration).__name__} has no field {name!r}; its fields are {', '.join(known)}")
    if rest and not dataclasses.is_dataclass(getattr(configuration, name)):
      raise UserError(f"{name} is {getattr(configuration, name)!r}, which has no field {rest!r}")
    if rest:
      inside.setdefault(name, {})[rest] = value
    else:
      own[name] = value
  changed = {name: with_fields(getattr(configuration, name), below) for name, below in inside.items()}
  return dataclasses.replace(configuration, **own, **changed)  # type: ignore[type-var]
