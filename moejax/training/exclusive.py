"""Allows one program at a time in the directory of a run or a comparison."""

import contextlib
import pathlib
from collections.abc import Callable

import jax

from moejax.lock import locked


def exclusive(
  directory: pathlib.Path, what: str, note: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
  """`locked` for programs of several processes: the first process holds the lock for all of them."""
  return locked(directory, what, note) if jax.process_index() == 0 else contextlib.nullcontext()
