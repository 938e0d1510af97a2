"""Optional libraries, imported when they are needed."""

import importlib
from typing import Any

from moejax.errors import UserError


def library(name: str, extra: str = "data") -> Any:
  """The module of an optional dependency.

  Raises:
    UserError: it is not installed; the message is the command that installs it.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if not error.name or error.name.partition(".")[0] != name.partition(".")[0]:
      raise  # the library is installed, but one of its dependencies is not
    raise UserError(f"{name.partition('.')[0]} is not installed; `pip install moejax[{extra}]`") from None
