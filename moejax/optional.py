"""Optional libraries, imported when they are needed."""

import importlib
from typing import Any

from moejax.errors import UserError


def library(name: str, extra: str = "data") -> Any:
  """Imports the module of an optional dependency.

  Raises:
    UserError: If it is not installed. The message contains the command that installs it.
  """
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if not error.name or error.name.partition(".")[0] != name.partition(".")[0]:
      raise  # the library is installed, but one of its dependencies is not
    raise UserError(f"{name.partition('.')[0]} is not installed; run `pip install moejax[{extra}]`") from None
