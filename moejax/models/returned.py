"""Checks what functions return that a user's own file may have defined."""

from typing import Any

import jax

from moejax.config.kinds import OfSeveralKinds, described
from moejax.errors import UserError


def check_returned(config: OfSeveralKinds, name: str, returned: Any, shape: tuple[int, ...], dtype: Any) -> None:
  """Checks an array that the function of a configuration returned as `name`. A dtype of None allows every dtype.

  Raises:
    UserError: If its shape or dtype is another one. The message has both.
  """
  wanted = jax.ShapeDtypeStruct(shape, dtype or getattr(returned, "dtype", "float32"))
  if not is_array(returned) or (returned.shape, returned.dtype) != (wanted.shape, wanted.dtype):
    raise UserError(f"{described(type(config))} returned {name} as {shown(returned)}, not as {shown(wanted)}")


def is_array(value: Any) -> bool:
  return hasattr(value, "shape") and hasattr(value, "dtype")


def shown(value: Any) -> str:
  """An array by its dtype and shape, as in `float32[8, 128]`, and anything else by its class."""
  return f"{value.dtype.name}{list(value.shape)}" if is_array(value) else type(value).__name__
