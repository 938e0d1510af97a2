"""Saving and restoring a run with Orbax: arrays, the input's position, and what the run has cost so far."""

import logging
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from moejax.config.training import Checkpoints
from moejax.errors import UserError
from moejax.models.abstract import Parameters
from moejax.training.state import State


class Checkpointer:
  """The checkpoints of one run. Saving is asynchronous and atomic: a killed process leaves the last whole one."""

  def __init__(self, directory: pathlib.Path, policy: Checkpoints):
    self.policy = policy
    self._directory = directory
    # It logs, with a traceback, what its threads raise; the next call raises that here, as on a full disk.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      item_names=("state", "progress"),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=policy.keep_last,
        keep_period=policy.keep_every,
        create=True,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
      ),
    )

  def latest(self) -> int | None:
    """Steps done at the newest checkpoint, None where there is none."""
    return self._manager.latest_step()

  def whole(self) -> int | None:
    """Steps done at the newest checkpoint that is written whole: not at one that is being written."""
    steps = [int(path.name) for path in self._directory.iterdir() if path.name.isdigit()]
    return max(steps, default=None)

  def finished(self) -> int | None:
    """As `latest`, once everything that is being saved is on disk."""
    self._manager.wait_until_finished()
    return self.latest()

  def steps(self) -> list[int]:
    """Steps of all checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, state: State, step: int, progress: dict[str, Any]) -> None:
    """Begins to save; `progress` is plain data, such as the input's state. A step that is saved is not saved again."""
    if self.latest() == step:
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), progress=ocp.args.JsonSave(progress)),
      force=True,
    )

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, Any]]:
    """The state, placed as `abstract` says whatever mesh saved it, and the progress."""
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(_tree(abstract)), progress=ocp.args.JsonRestore()),
    )
    return State(**restored["state"]), restored["progress"]

  def close(self) -> None:
    """Waits for what is being saved."""
    self._manager.wait_until_finished()
    self._manager.close()


def restore_parameters(directory: pathlib.Path, abstract: Parameters) -> tuple[Parameters, int]:
  """Parameters of the newest checkpoint, placed as `abstract` says, and its step; the optimizer's state is not read.

  Raises:
    UserError: the directory has no checkpoint.
  """
  options = ocp.CheckpointManagerOptions(create=False)
  with ocp.CheckpointManager(directory.absolute(), item_names=("state", "progress"), options=options) as manager:
    step = manager.latest_step()
    if step is None:
      raise UserError(f"{directory} holds no checkpoint; train the run first")
    wanted = {"parameters": abstract}
    state = ocp.args.PyTreeRestore(
      item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    restored = manager.restore(step, args=ocp.args.Composite(state=state))
  return restored["state"]["parameters"], step


def _tree(state: State) -> dict[str, Any]:
  """The state as nested dictionaries and tuples, which is all that Orbax needs to know of it."""
  return {"step": state.step, "parameters": state.parameters, "optimizer": state.optimizer}
