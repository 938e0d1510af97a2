"""The first checkpoint of an upcycled candidate, from the last checkpoint of its parent."""

import dataclasses
import pathlib
from collections.abc import Callable

from moejax import processes
from moejax.comparison.runs import Parent
from moejax.config.upcycled import granularity
from moejax.files import write_json
from moejax.inference.load import load_run
from moejax.interop.first_checkpoint import save_start
from moejax.interop.upcycle import Upcycling, converted
from moejax.training.prepare import Prepared
from moejax.training.run_directory import ORIGIN, read_experiment, saved_steps


def start_from_parent(
  prepared: Prepared, directory: pathlib.Path, parent: Parent, runs: pathlib.Path, warn: Callable[[str], None]
) -> None:
  """Saves the checkpoint of step 0 of a candidate, unless its run has a checkpoint.

  Args:
    prepared: the candidate.
    directory: of its run.
    parent: its trained parent.
    runs: the directory with the run of the parent.
    warn: called with each warning.

  Raises:
    UserError: If the last checkpoint of the parent is missing or damaged.
  """
  if processes.first(lambda: bool(saved_steps(directory))):
    return
  spec, there = prepared.spec, runs / parent.experiment.name
  experiment = dataclasses.replace(read_experiment(there), mesh=spec.experiment.mesh, rules=spec.experiment.rules)
  dense = load_run(there, experiment, warn, checkpoint=str(parent.steps))
  moe, slices = spec.experiment.model.moe, granularity(experiment.model, spec.experiment.model)
  assert moe
  how = Upcycling(
    experts=moe.num_experts // slices,
    active=moe.experts_per_token // slices,
    granularity=slices,
    every=moe.every,
    noise=parent.start.noise,
    seed=spec.experiment.training.seed,
  )
  batches = parent.batches(spec.experiment.training.batch_size)
  origin = {"parent": parent.experiment.name, "parent_steps": parent.steps, "first_batch": batches}
  processes.first_writes(lambda: write_json(directory / ORIGIN, origin | dataclasses.asdict(how)))
  save_start(spec, converted(dense, spec, how), directory, batches)
