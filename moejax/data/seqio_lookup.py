"""Registered Tasks and Mixtures of seqio by the names that data.train and data.tokenizer give them."""

import importlib
import sys
from typing import Any

from moejax.config.data import SEQIO
from moejax.errors import UserError
from moejax.optional import library


def find(name: str) -> tuple[Any, str]:
  """The Task or Mixture, and the split, of `seqio:MODULE/TASK@SPLIT`.

  The module, whose import registers the task, is found as `python -m` finds one, the current folder first; without
  MODULE/ the task must be registered already, as by the user's own file of experiments. @SPLIT is train by default.

  Raises:
    UserError: seqio is not installed, there is no such module or task, or the task has no such split.
  """
  seqio = library("seqio")
  task, _, split = name.removeprefix(SEQIO).partition("@")
  module, _, task = task.rpartition("/")
  if module:
    _import(module, name)
  registered = sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])
  if task not in registered:
    raise UserError(
      f"{name!r}: no seqio task or mixture {task!r} is registered (there are: {', '.join(registered[:8]) or 'none'}); "
      f"name the module that registers it, as in {SEQIO}MODULE/{task}"
    )
  found, split = seqio.get_mixture_or_task(task), split or "train"
  if split not in found.splits:
    raise UserError(
      f"{name!r} has no split {split!r} (its splits: {', '.join(sorted(found.splits))}); name one of them"
    )
  if "targets" not in found.output_features:
    features = ", ".join(found.output_features)
    raise UserError(f"{name!r} has the features {features} and no targets; name a task that has targets")
  return found, split


def _import(module: str, name: str) -> None:
  if "" not in sys.path:  # an installed command does not look into the current folder
    sys.path.insert(0, "")
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name != module.partition(".")[0] and error.name != module:
      raise
    raise UserError(f"{name!r}: there is no module {module!r}; set PYTHONPATH to the folder that it lies in") from None
