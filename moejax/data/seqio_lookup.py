"""Finds seqio Tasks and Mixtures by their names in data.train and data.tokenizer."""

import importlib
import sys
from typing import Any

from moejax.config.data import SEQIO, seqio_module
from moejax.config.stored import NAMED_BY_FILES
from moejax.errors import UserError
from moejax.optional import library


def find(name: str) -> tuple[Any, str]:
  """The Task or Mixture, and the split, of `seqio:MODULE/TASK@SPLIT`.

  Importing MODULE must register the task. It is searched for like a module of `python -m`, first in the current folder.
  Without MODULE/, the task must already be registered, for example by the user's file of experiments. The default split
  is train. For security, a module is not imported if only an experiment.json or a suite.json names it; its task must
  already be registered.

  Raises:
    UserError: If seqio is not installed, or the module, the task or the split does not exist.
  """
  seqio = library("seqio")
  task, _, split = name.removeprefix(SEQIO).partition("@")
  module, task = seqio_module(name), task.rpartition("/")[2]
  if module and (named_by := NAMED_BY_FILES.get(module)) and module not in sys.modules:
    if task not in _registered(seqio):
      raise UserError(
        f"{name!r} is named by {named_by}, and importing {module} would execute its code; if you trust it, add "
        f"--import {module.replace('.', '/')}.py to the command, or import it before the call"
      )
  elif module:
    _import(module, name)
  registered = _registered(seqio)
  if task not in registered:
    raise UserError(
      f"{name!r}: no seqio task or mixture {task!r} is registered (registered: {', '.join(registered[:8]) or 'none'}); "
      f"add the module that registers it, as in {SEQIO}MODULE/{task}"
    )
  found, split = seqio.get_mixture_or_task(task), split or "train"
  if split not in found.splits:
    raise UserError(f"{name!r} has no split {split!r} (its splits: {', '.join(sorted(found.splits))}); use one of them")
  if "targets" not in found.output_features:
    features = ", ".join(found.output_features)
    raise UserError(f"{name!r} has the features {features} but no targets; use a task with targets")
  return found, split


def _registered(seqio: Any) -> list[str]:
  return sorted([*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()])


def _import(module: str, name: str) -> None:
  if "" not in sys.path:  # installed commands do not have the current folder in sys.path
    sys.path.insert(0, "")
  try:
    importlib.import_module(module)
  except ModuleNotFoundError as error:
    if error.name != module.partition(".")[0] and error.name != module:
      raise
    raise UserError(f"{name!r}: there is no module {module!r}; set PYTHONPATH to the folder that contains it") from None
