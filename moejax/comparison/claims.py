"""Distributes members over jobs. A job claims a member by locking its directory."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence

from moejax import processes
from moejax.training.exclusive import claimed

POLL_S = 1.0
"""Seconds between two checks of members that other jobs train."""


def train_unclaimed(
  members: Sequence[str],
  runs: pathlib.Path,
  is_done: Callable[[str], bool],
  train: Callable[[str], None],
  note: Callable[[str], None],
  is_ready: Callable[[str], bool] = lambda name: True,
) -> bool:
  """Trains each member that no other job has claimed, and waits until the others are done.

  If the job of a member was killed, the member is taken over: immediately on the same host, otherwise after its lock
  has not been updated for `moejax.lock.STALE_S` seconds. Training resumes from the latest checkpoint.

  Args:
    members: names of the members to train.
    runs: the directory with the run directories of the members.
    is_done: whether a member is completely trained.
    train: trains a member, whose directory is locked.
    note: called with a message for each member that another job trains or that is taken over.
    is_ready: whether all that a member needs is there. Members that are not ready wait.

  Returns:
    Whether other jobs took part.
  """
  told = set[tuple[str, str]]()
  while left := processes.first(lambda: [name for name in members if not is_done(name)]):
    trained = False
    for name in left:
      if not processes.first(functools.partial(is_ready, name)):
        continue
      with claimed(runs / name, f"train {name}", note) as other:
        if other is not None:
          who = name, other.partition(", started")[0]
          if who not in told:
            note(f"{name} is trained by {other}")
          told.add(who)
        elif not processes.first(functools.partial(is_done, name)):  # its job may have finished it in the meantime
          train(name)
          trained = True
    if not trained:
      time.sleep(POLL_S)
  return bool(told)
