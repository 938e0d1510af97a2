"""Fields of nested configuration classes by their dotted paths."""

import dataclasses
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moejax.config.experiment import Experiment, Suite
from moejax.config.kinds import KIND, OfSeveralKinds
from moejax.config.moe import LOSSES_OF_SPARSE_LAYERS
from moejax.config.plain import typed
from moejax.config.walk import holds_configurations
from moejax.errors import UserError

Configuration = TypeVar("Configuration")


OF_SPARSE_MEMBERS = ("model.moe.", *(f"training.losses.{name}" for name in LOSSES_OF_SPARSE_LAYERS))
"""Prefixes of the paths of fields that only experiments with sparse layers have."""


def with_members(
  suite: Suite, dense: Callable[[Experiment], Experiment], candidate: Callable[[Experiment], Experiment]
) -> Suite:
  """Replaces each dense member and each candidate of a suite. All are replaced before the suite is checked.

  Raises:
    UserError: If the members cannot be compared.
  """
  pairs = tuple(
    dataclasses.replace(pair, dense=dense(pair.dense), candidates=tuple(map(candidate, pair.candidates)))
    for pair in suite.pairs
  )
  return dataclasses.replace(suite, pairs=pairs)


def get_field(configuration: Any, path: str) -> Any:
  """The value at a path such as `model.moe.d_ff` or `model.attention.0.window`."""
  for name in path.split("."):
    is_index = isinstance(configuration, tuple) and name.isdigit()
    configuration = configuration[int(name)] if is_index else getattr(configuration, name)
  return configuration


def with_fields(configuration: Configuration, values: Mapping[str, Any], path: str = "") -> Configuration:
  """Returns a copy of a configuration with the fields at these dotted paths replaced.

  Each class is constructed, and therefore checked, once. NumPy scalars are converted to Python numbers, and paths
  to text. `path` is the
  path of the configuration itself.

  Raises:
    UserError: If a field does not exist, a value has the wrong type, or the configuration is not valid.
  """
  own: dict[str, Any] = {}
  inside: dict[str, dict[str, Any]] = {}
  known = [field.name for field in dataclasses.fields(configuration)]  # type: ignore[arg-type]
  hints = typing.get_type_hints(type(configuration))
  # Whole parts first, so that a field inside of one can be replaced with it.
  for inner, value in sorted(values.items(), key=lambda item: "." in item[0]):
    name, dot, rest = inner.partition(".")
    if name == KIND and isinstance(configuration, OfSeveralKinds):
      raise UserError(f"{path}{KIND} cannot be replaced alone; give an object of the other class as {path[:-1]}")
    if name not in known:
      raise UserError(f"{type(configuration).__name__} has no field {name!r}; its fields are {', '.join(known)}")
    now = own.get(name, getattr(configuration, name))
    if dot and not (dataclasses.is_dataclass(now) or holds_configurations(now)):
      raise UserError(f"{path}{name} is {now!r}, which has no field {rest!r}")
    if dot:
      inside.setdefault(name, {})[rest] = value
    else:
      own[name] = typed(hints[name], _simple(value), f"{path}{name}")
  for name, below in inside.items():
    now = own.get(name, getattr(configuration, name))
    change = _with_items if isinstance(now, tuple) else with_fields
    own[name] = change(now, below, f"{path}{name}.")
  return dataclasses.replace(configuration, **own)  # type: ignore[type-var]


def _with_items(items: tuple[Any, ...], values: Mapping[str, Any], path: str) -> tuple[Any, ...]:
  """`with_fields` of configurations in a tuple, whose paths begin with their index."""
  changed = list(items)
  for inner, value in values.items():
    index, _, rest = inner.partition(".")
    if not (index.isdigit() and int(index) < len(items)) or not rest:
      raise UserError(f"{path}{inner} does not exist; use {path}0.FIELD to {path}{len(items) - 1}.FIELD")
    changed[int(index)] = with_fields(changed[int(index)], {rest: value}, f"{path}{index}.")
  return tuple(changed)


def _simple(value: Any) -> Any:
  """A scalar of NumPy as a number, and a path as text, also in a list."""
  if isinstance(value, list | tuple):
    return tuple(map(_simple, value))
  if isinstance(value, pathlib.PurePath):
    return str(value)
  return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
