"""Saving and restoring a run with Orbax: arrays, the input's position, and what the run has cost so far.

A checkpoint holds a checksum of each array and of the plain data. One that does not match them, or cannot be read, is
damaged: it is named in a warning, and the checkpoint before it is used.
"""

import errno
import functools
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp

from moejax import processes
from moejax.config.training import Checkpoints
from moejax.errors import Failure, UserError, reason, users_mistake
from moejax.models.abstract import Parameters
from moejax.training.checksum import checksums
from moejax.training.not_finite import is_finite
from moejax.training.state import State

ITEMS = ("state", "progress")

MARKER, METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
"""Files of Orbax that are written last."""

UNCHECKED = {"data", "train_time_s", "tokens"}
"""What the progress of a checkpoint without checksums holds."""

Warn = Callable[[str], None]


class Damaged(Exception):
  """A checkpoint cannot be read, or holds something else than what was saved."""


def _fail(text: str) -> None:
  raise Failure(text)


class Checkpointer:
  """The checkpoints of one run. Saving is asynchronous and atomic: a killed process leaves the last whole one.

  A checkpoint that cannot be written, as on a full disk, is told to `warn` and leaves nothing behind; those before it
  stay, and the next is tried as if nothing had been.
  """

  def __init__(self, directory: pathlib.Path, policy: Checkpoints, warn: Warn = _fail):
    self.policy = policy
    self._directory = directory
    self._warn = warn
    self._saving: int | None = None
    # It logs, with a traceback, what its threads raise; the next call raises that here, as on a full disk.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      item_names=ITEMS,
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
    return max(_saved_steps(self._directory), default=None)

  def finished(self) -> int | None:
    """As `latest`, once everything that is being saved is on disk."""
    self._attempt(self._manager.wait_until_finished)
    return processes.first(self.latest)

  def steps(self) -> list[int]:
    """Steps of all checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, state: State, step: int, progress: dict[str, Any]) -> None:
    """Begins to save; `progress` is plain data, such as the input's state. A step that is saved is not saved again."""
    if self.finished() == step:
      return
    tree = _tree(state)
    sealed = _seal(progress, checksums(tree))
    items = ocp.args.Composite(state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(sealed))
    self._saving = step
    self._attempt(lambda: self._manager.save(step, args=items, force=True))

  def restore(self, step: int, abstract: State, warn: Warn = lambda text: None) -> tuple[State, dict[str, Any]]:
    """The state, placed as `abstract` says whatever mesh saved it, and the progress.

    Raises:
      Damaged: the checkpoint is not what was saved, or holds values that are NaN or infinite.
    """
    folder, tree = self._directory / str(step), _tree(abstract)
    restored = _read(folder, state=ocp.args.StandardRestore(tree), progress=ocp.args.JsonRestore())
    progress, sums = _unseal(restored["progress"])
    _check_arrays(restored["state"], sums, folder, warn)
    state = State(**restored["state"])
    if not is_finite(state):
      raise Damaged("it holds values that are NaN or infinite")
    return state, progress

  def restore_newest(self, abstract: State, warn: Warn) -> tuple[int, State, dict[str, Any]] | None:
    """Step, state and progress of the newest checkpoint that is not damaged, None if there is no checkpoint.

    A damaged one that is newer is set aside under another name, which `warn` is told: its step will be saved again.

    Raises:
      UserError: all checkpoints are damaged.
    """
    steps = processes.first(lambda: _saved_steps(self._directory))
    if not steps:
      return None
    step, (state, progress), damaged = _newest(self._directory, steps, lambda step: self.restore(step, abstract, warn))
    for other, why in damaged.items():
      folder = self._directory / str(other)
      aside = processes.first(functools.partial(_set_aside, folder))
      warn(f"{_damage(folder, why)}; it is now {aside}, and step {step} is used instead")
    if damaged:
      self._manager.reload()
    return step, state, progress

  def close(self) -> None:
    """Waits for what is being saved."""
    self._attempt(self._manager.wait_until_finished)
    self._manager.close()

  def _attempt(self, function: Callable[[], Any]) -> None:
    """Calls a function that saves, or waits for what is being saved, and warns of what went wrong with that.

    Several processes save together, and would wait for the one that cannot: then it is an error.
    """
    try:
      function()
    except Exception as error:
      if processes.count() > 1:
        raise
      for part in self._directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)  # of a full disk it would keep what the next one needs
      self._manager.reload()
      why, kept = users_mistake(error) or reason(error), self.whole()
      left = "no checkpoint is saved yet" if kept is None else f"the newest is that of step {kept}"
      self._warn(f"the checkpoint of step {self._saving} could not be saved: {why}; {left}")


def restore_parameters(directory: pathlib.Path, abstract: Parameters, warn: Warn) -> tuple[Parameters, int]:
  """Parameters of the newest checkpoint that is not damaged, placed as `abstract` says, and its step; the optimizer's
  state is not read. `warn` is told of damaged ones.

  Raises:
    UserError: the directory has no checkpoint, or only damaged ones.
  """
  steps = processes.first(lambda: _saved_steps(directory) if directory.is_dir() else [])
  if not steps:
    raise UserError(f"{directory.parent} holds no checkpoint; train the run first")
  wanted = {"parameters": abstract}
  arguments = ocp.args.PyTreeRestore(
    item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
  )

  def restore(step: int) -> Parameters:
    folder = directory / str(step)
    restored = _read(folder, state=arguments, progress=ocp.args.JsonRestore())
    _check_arrays(restored["state"], _unseal(restored["progress"])[1], folder, warn)
    return restored["state"]["parameters"]

  step, parameters, damaged = _newest(directory, steps, restore)
  for other, why in damaged.items():
    warn(f"{_damage(directory / str(other), why)}; step {step} is used instead")
  return parameters, step


def _newest(
  directory: pathlib.Path, steps: list[int], restore: Callable[[int], Any]
) -> tuple[int, Any, dict[int, str]]:
  """Step and content of the newest checkpoint that is not damaged, and what is wrong with those that are newer."""
  damaged: dict[int, str] = {}
  for step in sorted(steps, reverse=True):
    try:
      return step, restore(step), damaged
    except Damaged as error:
      damaged[step] = str(error)
  listed = "; ".join(_damage(directory / str(step), why) for step, why in damaged.items())
  raise UserError(
    f"no checkpoint is left to resume from: {listed}. Nothing has been deleted; put a copy in its place, or choose "
    "another --workdir to train again from step 1"
  )


def _read(folder: pathlib.Path, **items: Any) -> Any:
  """What Orbax reads; damage that one process of the program finds is damage for all."""
  restored, why = None, None
  try:
    restored = _read_here(folder, **items)
  except Damaged as error:
    why = str(error)
  if found := [text for text in processes.gather(why) if text is not None]:
    raise Damaged(found[0])
  return restored


def _read_here(folder: pathlib.Path, **items: Any) -> Any:
  """What Orbax reads, whatever it raises being damage where the machine and the user are not the cause."""
  markers = [path.exists() for path in (folder / MARKER, *(folder / item / MARKER for item in ITEMS))]
  if not (folder / METADATA).is_file() or (any(markers) and not all(markers)):
    raise Damaged("its commit marker is missing")
  _ignore_abandoned_reads()
  try:
    # Each process reads for itself: one that finds damage does not keep the others waiting.
    alone = ocp.options.MultiprocessingOptions(primary_host=processes.index(), active_processes={processes.index()})
    handler = ocp.CompositeCheckpointHandler(
      *ITEMS, composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
      return reader.restore(folder.absolute(), args=ocp.args.Composite(**items))
  except Exception as error:
    if users_mistake(error) and not (isinstance(error, OSError) and error.errno == errno.EIO):
      raise
    raise Damaged(f"it cannot be read: {reason(error)[:200]}") from error


@functools.cache
def _ignore_abandoned_reads() -> None:
  """When one read fails, Orbax abandons the others and closes their event loop; each would print a traceback."""
  logging.getLogger("asyncio").setLevel(logging.CRITICAL)
  before = sys.unraisablehook

  def hook(what: "sys.UnraisableHookArgs") -> None:
    error = what.exc_value
    if not (error and (str(error) == "Event loop is closed" or isinstance(error.__cause__, GeneratorExit))):
      before(what)

  sys.unraisablehook = hook


def _seal(progress: dict[str, Any], arrays: dict[str, str]) -> dict[str, Any]:
  """The progress with the checksums of the arrays, and one of itself."""
  content = json.loads(json.dumps({"progress": progress, "arrays": arrays}))  # a copy, as it is written later
  return {**content, "sha256": _digest(content)}


def _unseal(sealed: Any) -> tuple[dict[str, Any], dict[str, str] | None]:
  """The progress, and the checksums of the arrays; None for those of a version that saved none."""
  if isinstance(sealed, dict) and sealed.keys() == {"progress", "arrays", "sha256"}:
    content = {name: sealed[name] for name in ("progress", "arrays")}
    if _digest(content) == sealed["sha256"]:
      return sealed["progress"], sealed["arrays"]
  elif isinstance(sealed, dict) and sealed.keys() == UNCHECKED:
    return sealed, None
  raise Damaged("the checksum of its progress does not match")


def _digest(content: Any) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_arrays(tree: Any, expected: dict[str, str] | None, folder: pathlib.Path, warn: Warn) -> None:
  """Compares restored arrays with the checksums that were saved with them."""
  if expected is None:
    warn(f"{folder} was saved without checksums, and is used unchecked")
    return
  wrong = [name for name, found in checksums(tree).items() if expected.get(name) != found]
  if wrong:
    others = f" and of {len(wrong) - 1} other arrays" if len(wrong) > 1 else ""
    raise Damaged(f"the checksum of {wrong[0]}{others} does not match")


def _saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the folders that have the name of a whole checkpoint."""
  return [int(path.name) for path in directory.iterdir() if path.name.isdigit()]


def _damage(folder: pathlib.Path, why: str) -> str:
  return f"the checkpoint {folder} is damaged ({why})"


def _set_aside(folder: pathlib.Path) -> str:
  """Renames a damaged checkpoint, so that its step can be saved again; returns its new name."""
  names = (folder.with_name(f"damaged-{folder.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
  aside = next(path for path in names if not path.exists())
  return folder.rename(aside).name


def _tree(state: State) -> dict[str, Any]:
  """The state as nested dictionaries and tuples, which is all that Orbax needs to know of it."""
  return {"step": state.step, "parameters": state.parameters, "optimizer": state.optimizer}
