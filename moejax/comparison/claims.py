"""Decides which job trains which member: a job claims a member by holding the lock of the member's directory."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence

from moejax import processes
from moejax.training.exclusive import claimed

POLL_S = 1.0
"""Seconds between two looks at members that other jobs train."""


def train_unclaimed(
  members: Sequence[str],
  runs: pathlib.Path,
  is_done: Callable[[str], bool],
  train: Callable[[str], None],
  note: Callable[[str], None],
) -> bool:
  """Trains each member that no other job has claimed, then waits until the others are done.

  A member whose job was killed is taken over: at once on the same host, else when its lock was not touched for
  `moejax.lock.STALE_S` seconds. The new job resumes from the member's newest checkpoint.

  Args:
    members: names of what is to be trained.
    runs: the directory that has a directory of each member.
    is_done: whether a member is trained to its end.
    train: trains one member, whose directory is held meanwhile.
    note: called with a line on each member that another job trains, or that is taken over.

  Returns:
    Whether other jobs took part.
  """
  told = set[tuple[str, str]]()
  while left := processes.first(lambda: [name for name in members if not is_done(name)]):
    trained = False
    for name in left:
      with claimed(runs / name, f"train {name}", note) as other:
        if other is not None:
          who = name, other.partition(", started")[0]
          if who not in told:
            note(f"{name} is trained by {other}")
          told.add(who)
        elif not processes.first(functools.partial(is_done, name)):  # its job may have finished it in between
          train(name)
          trained = True
    if not trained:
      time.sleep(POLL_S)
  return bool(told)
