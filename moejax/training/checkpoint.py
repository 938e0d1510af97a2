"""Saves and restores checkpoints with Orbax: arrays, the position in the data, and the time spent so far.

A checkpoint contains checksums of all arrays and of the other data. If a checksum does not match or the checkpoint
cannot be read, it is damaged. A warning names it, and the previous checkpoint is used.
"""

import errno
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp

from moejax import processes
from moejax.config.training import Checkpoints
from moejax.errors import Failure, UserError, reason, users_mistake
from moejax.models.abstract import Parameters
from moejax.training.checksum import checksums
from moejax.training.metrics import read_scores
from moejax.training.not_finite import is_finite
from moejax.training.run_directory import STEP
from moejax.training.saver import ITEMS, Saver, ignore_abandoned_files
from moejax.training.state import State

LATEST, BEST = "latest", "best"
"""Which checkpoint of a run to load."""

MARKER, METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
"""Files that Orbax writes last."""

UNCHECKED = {"data", "train_time_s", "tokens"}
"""Keys of the progress in a checkpoint without checksums."""

Warn = Callable[[str], None]


class Damaged(Exception):
  """A checkpoint cannot be read, or its content differs from what was saved."""


def _fail(text: str) -> None:
  raise Failure(text)


class Checkpointer:
  """The checkpoints of one run. Saving is asynchronous and atomic: a killed process leaves the last complete
  checkpoint.

  If a checkpoint cannot be written, for example because the disk is full, `warn` is called and the incomplete files are
  removed. Earlier checkpoints are kept, and later ones are saved as usual.
  """

  def __init__(self, directory: pathlib.Path, policy: Checkpoints, warn: Warn = _fail):
    self.policy = policy
    self._directory = directory
    self._warn = warn
    self._saving: int | None = None
    self._saver = Saver(directory, policy)

  def whole(self) -> int | None:
    """Step of the latest checkpoint that is completely written, or None."""
    return max(_saved_steps(self._directory), default=None)

  def finished(self) -> int | None:
    """Waits until all checkpoints are saved, and returns the step of the latest, or None."""
    self._warn_of(self._saver.wait())
    return processes.first(self._saver.latest)

  def save(self, state: State, step: int, progress: dict[str, Any]) -> None:
    """Starts to save a checkpoint, unless it exists. `progress` is JSON data, such as the position of the input."""
    if self.finished() == step:
      return
    tree = _tree(state)
    self._saving = step
    self._warn_of(self._saver.start(step, tree, _seal(progress, checksums(tree))))

  def compare(self, scores: Mapping[int, float]) -> None:
    """Sets the held-out bits per byte of the evaluated steps, which decide which checkpoints are the best."""
    self._saver.scores = scores

  def restore(self, step: int, abstract: State, warn: Warn = lambda text: None) -> tuple[State, dict[str, Any]]:
    """Restores the state, with the shardings of `abstract` independently of the mesh that saved it, and the progress.

    Raises:
      Damaged: If the content differs from what was saved, or contains values that are NaN or infinite.
    """
    folder, tree = self._directory / str(step), _tree(abstract)
    restored = _read(folder, state=ocp.args.StandardRestore(tree), progress=ocp.args.JsonRestore())
    progress, sums = _unseal(restored["progress"])
    _check_arrays(restored["state"], sums, folder, warn)
    state = State(**restored["state"])
    if not is_finite(state):
      raise Damaged("it contains values that are NaN or infinite")
    return state, progress

  def restore_newest(self, abstract: State, warn: Warn) -> tuple[int, State, dict[str, Any]] | None:
    """Restores step, state and progress from the latest checkpoint that is not damaged. None if there is no checkpoint.

    Later checkpoints, which are damaged, are renamed with a warning, since their steps will be saved again.

    Raises:
      UserError: If all checkpoints are damaged.
    """
    steps = processes.first(lambda: _saved_steps(self._directory))
    if not steps:
      return None
    steps = sorted(steps, reverse=True)
    step, (state, progress), damaged = _first(self._directory, steps, lambda step: self.restore(step, abstract, warn))
    for other, why in damaged.items():
      folder = self._directory / str(other)
      aside = processes.first(functools.partial(_set_aside, folder))
      warn(f"{_damage(folder, why)}; it is renamed to {aside}, and step {step} is used instead")
    if damaged:
      self._saver.reload()
    return step, state, progress

  def close(self) -> None:
    """Waits until all checkpoints are saved."""
    self._warn_of(self._saver.close())

  def _warn_of(self, why: str | None) -> None:
    """Warns on process 0 if `why` says that the last checkpoint could not be saved."""
    if why is not None and processes.is_first():
      kept = self.whole()
      left = "no checkpoint is saved yet" if kept is None else f"the latest checkpoint is that of step {kept}"
      self._warn(f"the checkpoint of step {self._saving} could not be saved: {why}; {left}")


def restore_parameters(
  directory: pathlib.Path, abstract: Parameters, warn: Warn, choice: str = LATEST
) -> tuple[Parameters, int]:
  """Restores parameters, with the shardings of `abstract`, and the step of a checkpoint of a run.

  The optimizer state is not read. Calls `warn` for each damaged checkpoint.

  Args:
    directory: with the checkpoints.
    abstract: the parameters as shapes with shardings.
    warn: called for each damaged checkpoint.
    choice: "latest", "best" (the lowest held-out bits per byte), or a step. Instead of a damaged checkpoint, the next
      latest or best is used.

  Raises:
    UserError: If there is no such checkpoint, or all of them are damaged.
  """
  steps = processes.first(lambda: _chosen(directory, choice))
  wanted = {"parameters": abstract}
  arguments = ocp.args.PyTreeRestore(
    item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
  )

  def restore(step: int) -> Parameters:
    folder = directory / str(step)
    restored = _read(folder, state=arguments, progress=ocp.args.JsonRestore())
    _check_arrays(restored["state"], _unseal(restored["progress"])[1], folder, warn)
    return restored["state"]["parameters"]

  step, parameters, damaged = _first(directory, steps, restore)
  for other, why in damaged.items():
    warn(f"{_damage(directory / str(other), why)}; step {step} is used instead")
  return parameters, step


def _chosen(directory: pathlib.Path, choice: str) -> list[int]:
  """The steps of the checkpoints that a choice allows, the first choice first."""
  steps = sorted(_saved_steps(directory), reverse=True) if directory.is_dir() else []
  listed = ", ".join(map(str, reversed(steps)))
  if not steps:
    raise UserError(f"{directory.parent} holds no checkpoint; train the run first")
  if choice == LATEST:
    return steps
  if choice == BEST:
    scores = read_scores(directory.parent)
    if scored := sorted((step for step in steps if step in scores), key=lambda step: (scores[step], step)):
      return scored
    raise UserError(
      f"no checkpoint of {directory.parent} was evaluated (its checkpoints: {listed}); train with evaluation.every, or "
      f"choose {LATEST} or a step"
    )
  if not STEP.fullmatch(choice):
    raise UserError(f"checkpoint={choice!r} is not {LATEST}, {BEST} or a step; the checkpoints are {listed}")
  if int(choice) not in steps:
    raise UserError(f"{directory.parent} has no checkpoint of step {choice}; its checkpoints are {listed}")
  return [int(choice)]


def _first(directory: pathlib.Path, steps: list[int], restore: Callable[[int], Any]) -> tuple[int, Any, dict[int, str]]:
  """Step and content of the first checkpoint that is not damaged, and the damage of those before it."""
  damaged: dict[int, str] = {}
  for step in steps:
    try:
      return step, restore(step), damaged
    except Damaged as error:
      damaged[step] = str(error)
  listed = "; ".join(_damage(directory / str(step), why) for step, why in damaged.items())
  raise UserError(
    f"all checkpoints are damaged: {listed}. Nothing has been deleted; restore a copy, or choose another --workdir to "
    "train again from step 1"
  )


def _read(folder: pathlib.Path, **items: Any) -> Any:
  """Reads with Orbax. If one process of the program finds damage, all processes raise Damaged."""
  restored, why = None, None
  try:
    restored = _read_here(folder, **items)
  except Damaged as error:
    why = str(error)
  if found := [text for text in processes.gather(why) if text is not None]:
    raise Damaged(found[0])
  return restored


def _read_here(folder: pathlib.Path, **items: Any) -> Any:
  """Reads with Orbax. Exceptions count as damage unless they are errors of the machine or the user."""
  markers = [path.exists() for path in (folder / MARKER, *(folder / item / MARKER for item in ITEMS))]
  if not (folder / METADATA).is_file() or (any(markers) and not all(markers)):
    raise Damaged("its commit marker is missing")
  ignore_abandoned_files()
  try:
    # Each process reads independently, so that the others do not wait for a process that finds damage.
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


def _seal(progress: dict[str, Any], arrays: dict[str, str]) -> dict[str, Any]:
  """Adds the checksums of the arrays, and a checksum of the whole, to the progress."""
  content = json.loads(json.dumps({"progress": progress, "arrays": arrays}))  # a copy, because it is written later
  return {**content, "sha256": _digest(content)}


def _unseal(sealed: Any) -> tuple[dict[str, Any], dict[str, str] | None]:
  """The progress and the checksums of the arrays, or None in a checkpoint of an earlier version without checksums."""
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
    warn(f"{folder} was saved without checksums, so it cannot be verified")
    return
  wrong = [name for name, found in checksums(tree).items() if expected.get(name) != found]
  if wrong:
    others = f" and of {len(wrong) - 1} other arrays" if len(wrong) > 1 else ""
    raise Damaged(f"the checksum of {wrong[0]}{others} does not match")


def _saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the folders whose name is that of a complete checkpoint."""
  return [int(path.name) for path in directory.iterdir() if STEP.fullmatch(path.name)]


def _damage(folder: pathlib.Path, why: str) -> str:
  return f"the checkpoint {folder} is damaged ({why})"


def _set_aside(folder: pathlib.Path) -> str:
  """Renames a damaged checkpoint, so that its step can be saved again; returns its new name."""
  names = (folder.with_name(f"damaged-{folder.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
  aside = next(path for path in names if not path.exists())
  return folder.rename(aside).name


def _tree(state: State) -> dict[str, Any]:
  """Converts the state to nested dictionaries and tuples for Orbax."""
  return {"step": state.step, "parameters": state.parameters, "optimizer": state.optimizer}
