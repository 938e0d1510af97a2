"""Sends the metrics of runs to Weights & Biases.

It reads the files of a run, so it works for a run that trains elsewhere, one that is finished, and every member of a
comparison, and a fault of the network cannot stop training.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax.comparison.curves import read_metrics
from moejax.comparison.page_tables import flat
from moejax.comparison.record import known
from moejax.errors import UserError
from moejax.files import read_json
from moejax.optional import library


def run_directories(directory: Path) -> list[Path]:
  """The directory itself if it is that of a run, or those of the members of a comparison.

  Raises:
    UserError: If it is neither.
  """
  found = [path.parent for path in sorted(directory.glob("runs/*/metrics.jsonl"))]
  if (directory / "metrics.jsonl").is_file():
    found = [directory]
  if not found:
    raise UserError(f"{directory} has no metrics.jsonl; give the --workdir of `moejax train` or `moejax compare`")
  return found


class Log:
  """A run on Weights & Biases."""

  def __init__(self, directory: Path, project: str, offline: bool):
    """Opens the run. The same directory continues the same run.

    Args:
      directory: the directory of the run.
      project: the project on Weights & Biases.
      offline: whether to write to DIRECTORY/wandb/ only, for `wandb sync`.

    Raises:
      UserError: If wandb is not installed.
    """
    wandb = library("wandb", extra="wandb")
    self.directory = directory
    self._step = -1
    self._run = wandb.init(
      project=project,
      name=directory.name,
      id=hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12],
      config=_content(directory / "experiment.json"),
      dir=str(directory),
      resume=None if offline else "allow",
      mode="offline" if offline else "online",
      reinit="create_new",
      settings=wandb.Settings(console="off", silent=True),
    )

  def update(self) -> int:
    """Sends the records that are new. Returns the number of steps."""
    # The last step is sent again, because an evaluation adds to its record.
    records = [record for record in read_metrics(self.directory / "metrics.jsonl") if record["step"] >= self._step]
    for record in records:
      self._run.log({name: value for name, value in record.items() if known(value)}, step=int(record["step"]))
      self._step = record["step"]
    return len(records)

  def close(self) -> None:
    """Sends the summary and ends the run."""
    self._run.summary.update(dict(flat(_content(self.directory / "summary.json"))))
    self._run.finish()


def log(directory: Path, project: str, offline: bool, follow: bool, note: Callable[[str], None]) -> None:
  """Sends the metrics of a run or a comparison, and with `follow` those that come, until it is interrupted.

  Raises:
    UserError: If the directory has no metrics or wandb is not installed.
  """
  logs: dict[Path, Log] = {}
  try:
    while True:
      for path in run_directories(directory):
        if path not in logs:
          logs[path] = Log(path, project, offline)
        sent = logs[path].update()
        if not follow:
          note(f"{path}: {sent} steps")
      if not follow:
        return
      time.sleep(5.0)
  finally:
    for opened in logs.values():
      opened.close()
    if logs:
      library("wandb", extra="wandb").teardown()  # its service writes the rest of the files


def _content(path: Path) -> dict[str, Any]:
  """The object in a file, or an empty dictionary if it is missing or damaged."""
  try:
    content = read_json(path)
  except (OSError, ValueError):
    return {}
  return content if isinstance(content, dict) else {}
