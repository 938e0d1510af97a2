"""A run's directory: which experiment it holds, and its files, written whole or not at all."""

import dataclasses
import json
import os
import pathlib
from typing import Any

from moejax.config.experiment import Experiment
from moejax.errors import UserError

# What may differ when a run continues: it changes how the result is computed or reported, never the result.
OPERATIONAL = ("mesh", "rules", "data.prefetch", "training.checkpoints", "training.log_every", "evaluation")


def claim(directory: pathlib.Path, experiment: Experiment, steps: int) -> None:
  """Makes `directory` this experiment's, or checks that it is; raises as `claim_json`."""
  claim_json(directory, "experiment.json", {"steps": steps, **dataclasses.asdict(experiment)})


def claim_json(directory: pathlib.Path, file: str, content: dict[str, Any]) -> None:
  """Writes `content`, a configuration, to `file` of a directory, or checks that what is there is the same.

  Raises:
    UserError: another configuration is there, or the directory cannot be written.
  """
  path = directory / file
  prepare_directory(directory)
  if path.exists():
    differences = _differences(json.loads(path.read_text()), json.loads(json.dumps(content)))
    if differences:
      raise UserError(
        f"{directory} holds another configuration: {'; '.join(differences[:3])}"
        f"{f' and {len(differences) - 3} more' if len(differences) > 3 else ''}; choose another --workdir, "
        "or change the configuration back to continue what is there"
      )
  write_json(path, content)


def prepare_directory(directory: pathlib.Path) -> None:
  """Makes a directory and tries to write to it.

  Raises:
    UserError: it is a file, is not permitted, or the disk is full.
  """
  probe = directory / ".probe"
  try:
    directory.mkdir(parents=True, exist_ok=True)
    probe.write_bytes(bytes(4096))
    probe.unlink()
  except OSError as error:
    raise UserError(f"cannot write to {directory}: {error.strerror}; choose another --workdir") from error


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a JSON file so that a reader, or a kill, sees the old one or the new one and nothing between."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  temporary.write_text(json.dumps(content, indent=2) + "\n")
  temporary.replace(path)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
  """Dotted fields in which two configurations differ, with both values."""
  if path.removeprefix("members.").partition(".")[2] in OPERATIONAL or path in OPERATIONAL:
    return []
  if isinstance(old, dict) and isinstance(new, dict):
    names = [*old, *(name for name in new if name not in old)]
    return [
      line for name in names for line in _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    ]
  return [] if old == new else [f"{path} is {old!r} there and {new!r} here"]
