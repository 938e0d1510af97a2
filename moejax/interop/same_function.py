"""The fields in which two models compute different functions."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moejax.config.dispatch import GroupedDispatch
from moejax.config.kinds import KIND, OfSeveralKinds
from moejax.config.model import OF_PROGRAM, Model
from moejax.config.router import Router, TopKRouter
from moejax.interop.layer_types import shortest_pattern


def differences(ours: Model, theirs: Model) -> Iterator[tuple[str, Any, Any]]:
  """Yields the path and both values of each field that makes the functions of two models differ, without dropped tokens
  and without noise."""
  yield from _fields(_computed(ours), _computed(theirs))


def _computed(model: Model) -> Model:
  """The model with default values of all fields that do not affect its function."""
  defaults = {field.name: field.default for field in dataclasses.fields(Model)}
  of_program: dict[str, Any] = {name: defaults[name] for name in OF_PROGRAM}
  of_program["attention"] = shortest_pattern(model.attention)
  moe = model.moe
  if moe is None:
    return dataclasses.replace(model, **of_program)
  moe = dataclasses.replace(
    moe,
    dispatch=GroupedDispatch(),
    capacity_factor=1.0,
    group_size=None,
    router=_of_function(moe.router),
  )
  if model.num_sparse_layers == model.num_layers:
    model = dataclasses.replace(model, d_ff=1)  # no layer has it
  return dataclasses.replace(model, moe=moe, **of_program)


def _of_function(router: Router) -> Router:
  """The router without what only training uses."""
  router = router.without_noise()
  return dataclasses.replace(router, bias_rate=0.001) if isinstance(router, TopKRouter) and router.bias_rate else router


def _fields(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
  """Fields in which two configurations differ, with both values."""
  for field in dataclasses.fields(ours):
    here, there = getattr(ours, field.name), getattr(theirs, field.name)
    name = f"{path}{field.name}"
    if here != there and type(here) is type(there) and dataclasses.is_dataclass(here):
      yield from _fields(here, there, f"{name}.")
    elif type(here) is not type(there) and isinstance(here, OfSeveralKinds) and isinstance(there, OfSeveralKinds):
      yield f"{name}.{KIND}", here.kind, there.kind
    elif here != there:
      yield name, here, there
