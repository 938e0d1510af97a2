"""The runs that a comparison trains: one for each seed of each member that is trained."""

import dataclasses
from collections.abc import Callable, Sequence

from moejax.comparison.branches import Branch, branch
from moejax.comparison.budget import Allotment
from moejax.config.experiment import Experiment, Pair, Suite
from moejax.config.upcycled import Upcycled


@dataclasses.dataclass(frozen=True)
class Parent:
  """The run of a dense model whose last checkpoint an upcycled candidate starts from."""

  experiment: Experiment
  """Its name is that of the run."""
  steps: int
  start: Upcycled

  def batches(self, batch_size: int) -> int:
    """Number of batches of this size that have the text on which the parent was trained."""
    return -(-self.steps * self.experiment.training.batch_size // batch_size)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a member with one seed."""

  experiment: Experiment
  allotment: Allotment
  """Budget of the member."""
  pair: Pair
  parent: Parent | None = None
  """The run that it starts from. None: it starts from random parameters."""

  @property
  def name(self) -> str:
    return self.experiment.name

  def branches(self, suite: Suite) -> list[Branch]:
    """Its runs with shorter budgets. An upcycled candidate, which starts late, has none."""
    if self.parent:
      return []
    return [branch(self.experiment, self.allotment.steps, fraction) for fraction in suite.shorter_budgets]


def make_runs(suite: Suite, allotments: Sequence[Allotment], placed: Callable[[str], Experiment]) -> dict[str, Run]:
  """The runs to train by name, in order. A parent comes before the runs that start from it.

  Args:
    suite: the suite.
    allotments: budgets of its members.
    placed: returns a member on the available devices, with its learning rate.
  """
  trained = {allotment.name: allotment for allotment in allotments if allotment.trained}
  runs = []
  for pair in suite.pairs:
    dense, of_dense = pair.runs(placed(pair.dense.name)), trained[pair.dense.name]
    for member in (member for member in pair.members if member.name in trained):
      start = pair.start(member.name)
      for seed, experiment in enumerate(pair.runs(placed(member.name))):
        parent = _parent(dense[seed], of_dense.steps, start) if start else None
        runs.append(Run(experiment, trained[member.name], pair, parent))
  return {run.name: run for run in runs}


def _parent(dense: Experiment, steps: int, start: Upcycled) -> Parent:
  if start.parent_fraction == 1.0:
    return Parent(dense, steps, start)
  short = branch(dense, steps, start.parent_fraction)
  return Parent(short.experiment, short.steps, start)
