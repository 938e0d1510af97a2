"""One program at a time in a run's or a comparison's directory."""

import contextlib
import pathlib
from collections.abc import Callable

import jax

from moejax.lock import locked


def exclusive(
  directory: pathlib.Path, what: str, note: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
  """`locked` by the first process of a program; its other processes work in the same directory with it."""
  return locked(directory, what, note) if jax.process_index() == 0 else contextlib.nullcontext()
