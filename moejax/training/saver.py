"""Writes checkpoints with Orbax, by one process or by several together.

With several processes, each writes the shards of its own devices and reports the result to process 0, which completes
the checkpoint when all have succeeded. If a process fails to write, there is no checkpoint of this step, and training
continues: no process waits for a write that has failed.
"""

import asyncio
import dataclasses
import functools
import itertools
import logging
import pathlib
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moejax import processes
from moejax.config.training import Checkpoints
from moejax.errors import reason, users_mistake

ITEMS = ("state", "progress")

_TEMPORARY = ".orbax-checkpoint-tmp"
"""Suffix of a directory that is being written."""
_OF_ARRAYS = "array_metadatas"
"""Directory of Orbax in which every process writes. Orbax would wait ten minutes for process 0 to create it."""
_SAVES = itertools.count(1)
"""Numbers the checkpoints of a program, which are those of several runs in a comparison."""


class Saver:
  """Writes the checkpoints of a run, one at a time, and deletes old ones. All processes must make the same calls."""

  def __init__(self, directory: pathlib.Path, policy: Checkpoints):
    self._directory = directory.absolute()
    # Orbax logs exceptions of its threads with a traceback. The next call raises them here, where they are handled.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    ignore_abandoned_files()
    self.scores: Mapping[int, float] = {}
    """Held-out bits per byte of the evaluated steps, which decide which checkpoints are the best."""
    self._save = 0
    """Number of the current checkpoint among all that this program writes."""
    self._part: threading.Thread | None = None
    self._manager = self._make_manager(policy) if processes.is_first() else None

  def latest(self) -> int | None:
    """Step of the latest checkpoint, including one that is being written, or None. Only process 0 knows it."""
    return self._manager.latest_step() if self._manager else None

  def reload(self) -> None:
    """Must be called after checkpoints were renamed."""
    if self._manager:
      self._manager.reload()

  def start(self, step: int, tree: Any, progress: dict[str, Any]) -> str | None:
    """Starts to write a checkpoint. Returns why it cannot be written, or None, on all processes."""
    self._save = next(_SAVES)
    if not processes.is_first():  # copies while process 0 copies
      jax.tree.map(lambda leaf: leaf.copy_to_host_async(), tree)
    why = processes.first(lambda: self._start(step, tree, progress))
    if why is None and not processes.is_first():
      self._write_part(step, tree)
    return why

  def wait(self) -> str | None:
    """Waits until the checkpoint is written. Returns why it could not be written, or None, on all processes."""
    self._finish_part()
    return processes.first(self._finish)

  def close(self) -> str | None:
    """Waits until this process has written its part. Returns, on process 0, why the checkpoint could not be written.

    Unlike `wait`, it can be called by a single process after an error.
    """
    self._finish_part()
    why = self._finish() if self._manager else None
    if self._manager:
      self._manager.close()
    return why

  def _make_manager(self, policy: Checkpoints) -> ocp.CheckpointManager:
    """The manager of Orbax on process 0, which must not wait for other processes in barriers of its own."""
    self._directory.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(
      self._directory,
      item_names=ITEMS,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=_Kept(policy, self),
        create=False,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        async_options=ocp.options.AsyncOptions(
          barrier_sync_fn=self._barrier, create_directories_asynchronously=processes.count() == 1
        ),
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={processes.index()}),
      ),
    )

  def _start(self, step: int, tree: Any, progress: dict[str, Any]) -> str | None:
    assert self._manager
    items = ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(progress))
    try:
      self._manager.save(step, args=items, force=True)
    except Exception as error:
      self._give_up()
      return _why(error)
    return None

  def _finish(self) -> str | None:
    assert self._manager
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._await_reports()  # the others must not write into a directory that is being deleted
      self._give_up()
      return _why(error)
    return None

  def _give_up(self) -> None:
    """Deletes an incomplete checkpoint, which on a full disk would take the space of the next one."""
    assert self._manager
    for part in self._directory.glob(f"*{_TEMPORARY}*"):
      shutil.rmtree(part, ignore_errors=True)
    self._manager.reload()

  def _barrier(self, *, key: str, timeout_ms: int) -> None:
    """Replaces the barriers of Orbax: only the one before a checkpoint is completed must wait for other processes."""
    if "async_write_complete" in key and (failed := [why for why in self._await_reports() if why is not None]):
      raise _PartFailed(failed[0])

  def _await_reports(self) -> list[str | None]:
    """Waits for the other processes. Returns for each why it could not write its part, or None."""
    return processes.await_reports(self._key)

  def _write_part(self, step: int, tree: Any) -> None:
    """Copies the shards of this process to the host, starts to write them, and reports the result to process 0."""
    key, why, writing = self._key, None, list[Any]()
    try:
      (folder,) = self._directory.glob(f"{step}{_TEMPORARY}/{ITEMS[0]}*")
      (folder / _OF_ARRAYS).mkdir(exist_ok=True)
      saving = ocp.StandardCheckpointHandler().async_save(epath.Path(folder), args=ocp.args.StandardSave(tree))
      writing = asyncio.run(saving) or []
    except Exception as error:
      why = _why(error)

    def await_and_tell() -> None:
      failed = [] if why is None else [why]
      for future in writing:
        try:
          future.result()
        except Exception as error:
          failed.append(_why(error))
      processes.report(key, failed[0] if failed else None)

    self._part = threading.Thread(target=await_and_tell, name="save")
    self._part.start()

  def _finish_part(self) -> None:
    if self._part:
      self._part.join()
      self._part = None

  @property
  def _key(self) -> str:
    """The key of the reports about the current checkpoint."""
    return f"save {self._save}"


@dataclasses.dataclass(frozen=True)
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """Which checkpoints are kept when a new one is saved."""

  policy: Checkpoints
  saver: Saver

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """One value per checkpoint, in ascending order of steps."""
    steps, scores, policy = [checkpoint.step for checkpoint in checkpoints], self.saver.scores, self.policy
    best = sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step))
    kept = {*steps[-policy.keep_last :], *best[: policy.keep_best]}
    return [step in kept or (policy.keep_every is not None and step % policy.keep_every == 0) for step in steps]


class _PartFailed(Exception):
  """Another process could not write its part."""


def _why(error: Exception) -> str:
  """Why something could not be written. With several processes, the text names this process."""
  if isinstance(error, _PartFailed):
    return str(error)
  why = users_mistake(error) or reason(error)
  return f"{processes.name(processes.index())}: {why}" if processes.count() > 1 else why


@functools.cache
def ignore_abandoned_files() -> None:
  """If a file cannot be read or written, Orbax abandons the others and closes their event loop. Without this function,
  each of them would print a traceback."""
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  before = sys.unraisablehook

  def hook(what: "sys.UnraisableHookArgs") -> None:
    error = what.exc_value
    if not (error and (str(error) == "Event loop is closed" or isinstance(error.__cause__, GeneratorExit))):
      before(what)

  sys.unraisablehook = hook
